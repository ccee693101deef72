"""Load rewards by name or import path.

A reward is a function, or a class with `__call__`, called by keyword with one list entry per sample:
`prompts`, `completions` (image-token ids; `completion_ids` is the same list under TRL's name), `images`
(PIL, RGB) and every column of the prompt set. Names it does not accept are left out, so a function may ask
for `images` only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from imagerl.rewards.boundary.targets import (
    before_scoring,
    call_parameters,
    check_columns,
    check_settings,
    construct,
    import_target,
    is_keyword,
    needed_columns,
    setting_parameters,
)
from imagerl.rewards.mixing import Gate, Half, Weight
from imagerl.rewards.preference.presets import PRESETS
from imagerl.rl.errors import ImageRLError, hint
from imagerl.rl.files.importing import split_target
from imagerl.rl.files.mistakes import explain
from imagerl.rl.types import RewardFn, RewardOutput

REWARDS: dict[str, str] = {
    "clip": "imagerl.rewards.clip.reward:ClipReward",
    "clip_direction": "imagerl.rewards.clip.reward:ClipDirectionReward",
    "colours": "imagerl.rewards.colours:ColoursReward",
    "composition": "imagerl.rewards.composition.reward:CompositionReward",
    "edit": "imagerl.rewards.edit.success:EditReward",
    "edit_consistency": "imagerl.rewards.edit.consistency:EditConsistencyReward",
    "image_reward": "imagerl.rewards.preference.image_reward:ImageRewardReward",
    "judge": "imagerl.rewards.judge.reward:JudgeReward",
    "ocr": "imagerl.rewards.ocr.reward:OCRReward",
    "pairwise": "imagerl.rewards.preference.pairwise:PairwiseReward",
    "vlm": "imagerl.rewards.preference.vlm:VLMReward",
}
NAMES = tuple(dict.fromkeys([*REWARDS, *PRESETS]))
REMOTE = "imagerl.rewards.boundary.remote:RemoteReward"  # behind an address


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One entry of a recipe's reward list. `target` is a name in REWARDS, "file.py:function",
    "package.module:function" or the address of a served reward, "http://host:port/name"; `settings` go to a class's
    constructor, or to a function at every call. `python` is the interpreter that runs the reward in a process of
    its own, `runtime_env` Ray's description of the environment of its actor, which reserves `num_gpus`."""

    target: str
    weight: Weight = 1.0
    settings: Mapping[str, object] = field(default_factory=dict)
    gate: Gate | None = None
    python: str | None = None
    runtime_env: Mapping[str, object] | None = None
    half: Half = "both"
    function: RewardFn | None = None  # given in Python; `target` is then only its name
    num_gpus: float = 0.0  # that each of its actors reserves

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> RewardSpec:
        """Read `{name | import_path | url, weight, gate, function, python, runtime_env, num_gpus, half, **settings}`;
        a None stands for an absent key."""
        settings = dict(entry)
        weight, gate = settings.pop("weight", None), settings.pop("gate", None)
        python, runtime_env = settings.pop("python", None), settings.pop("runtime_env", None)
        function = settings.pop("function", None)
        half: Half = settings.pop("half", None) or "both"
        num_gpus = settings.pop("num_gpus", None) or 0.0
        sources = [settings.pop(key, None) for key in ("name", "import_path", "url")]
        targets = [target for target in sources if target is not None]
        if len(targets) != 1:
            raise ImageRLError(f"a reward needs exactly one of name, import_path and url, got {dict(entry)}")
        if isinstance(function, str):
            raise ImageRLError(
                f"reward {targets[0]!r} was a function given in Python, of which only the source is kept: give it "
                "again, as in imagerl.train(recipe, rewards=..., resume=True), or save it in a file and name it by "
                f"import_path: file.py:{targets[0]}"
            )
        return cls(
            targets[0],
            1.0 if weight is None else weight,
            settings,
            None if gate is None else Gate.from_mapping(gate),
            python,
            runtime_env,
            half,
            function,
            num_gpus,
        )

    @property
    def is_remote(self) -> bool:
        return self.target.startswith(("http://", "https://"))

    @property
    def ships(self) -> bool:
        """Tell whether it is one of NAMES."""
        return self.function is None and self.target in NAMES

    @property
    def asks_server(self) -> bool:
        """Tell whether a server must answer."""
        return self.is_remote or (self.ships and _shipped(self.target)[0] in ("judge", "pairwise"))

    @property
    def is_isolated(self) -> bool:
        """Tell whether it may need what this process cannot import."""
        return self.python is not None or self.runtime_env is not None

    def absolute(self) -> RewardSpec:
        """Return the spec with absolute paths, so that another process finds the same files. The interpreter's is
        not resolved: a virtual environment is known by its link."""
        spec, (path, colon, attribute) = self, self.target.rpartition(":")
        if path.endswith(".py"):
            spec = replace(spec, target=f"{Path(path).resolve()}{colon}{attribute}")
        if self.python is not None:
            spec = replace(spec, python=os.path.abspath(shutil.which(self.python) or self.python))
        return spec


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward ready to be called."""

    label: str
    fn: RewardFn
    weight: Weight = 1.0
    gate: Gate | None = None
    half: Half = "both"


def _resolve(spec: RewardSpec) -> tuple[str, Any]:
    """Return the label and the function or class of a spec, signature and settings checked, nothing constructed."""
    found: Any
    if spec.function is not None:
        label, found = spec.target, spec.function
    elif spec.is_remote:
        label, found = _label_of_address(spec.target), import_target(REMOTE)
    elif ":" in spec.target or spec.target.endswith(".py"):
        label, found = spec.target.rpartition(":")[2], import_target(spec.target)
    elif spec.ships:
        label, found = spec.target, import_target(REWARDS[_shipped(spec.target)[0]])
    else:
        meant = hint(spec.target, NAMES, "use one of")
        raise ImageRLError(
            f"no reward is named {spec.target!r}; {meant} (your own: import_path: file.py:name)"
        )
    check_settings(label, found, _all_settings(spec))
    if spec.is_remote or spec.ships:
        _check_types(label, found, _all_settings(spec))
    return label, found


def _check_types(label: str, found: type, settings: Mapping[str, object]) -> None:
    """Raise ImageRLError when a setting of a reward of ours is no value of the type that its constructor names. What
    users' annotations mean is theirs to say."""
    hints = get_type_hints(found.__init__, include_extras=True)  # type: ignore[misc]
    fields: dict[str, Any] = {name: (hints[name], ...) for name in settings}
    schema = create_model(label, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
    try:
        schema.model_validate(dict(settings))
    except ValidationError as error:
        raise ImageRLError(f"reward {label!r}: {explain(error, schema)}") from None


def _label_of_address(url: str) -> str:
    """Return the last part of an address. Raises ImageRLError for one that is not http(s)://host[:port]/…/name;
    a user name or query would carry secrets into recipes and logs."""
    found = re.fullmatch(r"https?://[\w.\-\[\]:]+(?:/[\w.\-~]+)*/([A-Za-z_]\w*)", url)
    if found is None:
        raise ImageRLError(
            "the url of a reward must be http(s)://host:port/name, without user, password and query: the token "
            "comes from an environment variable"
        )
    return found[1]


def _all_settings(spec: RewardSpec) -> dict[str, object]:
    return {**_shipped(spec.target)[1], **spec.settings, **({"url": spec.target} if spec.is_remote else {})}


def _shipped(target: str) -> tuple[str, dict[str, object]]:
    """Return the reward that a preset stands for and its settings; another name stands for itself."""
    return PRESETS.get(target, (target, {}))


def _check_isolated(spec: RewardSpec) -> str:
    """Return the label of a reward that this process must not import."""
    place, label = split_target(spec.target, "reward")
    if place.endswith(".py") and not Path(place).is_file():
        raise ImageRLError(f"reward file {place} does not exist; correct its import_path")
    if spec.python is not None and not os.access(shutil.which(spec.python) or spec.python, os.X_OK):
        raise ImageRLError(
            f"reward {label!r}: {spec.python} is no program; give the path of a Python interpreter, such as "
            "/envs/paddle/bin/python"
        )
    return label


def check_reward(spec: RewardSpec, columns: Iterable[str] | None = None) -> str:
    """Return the label of a reward that can be imported and takes its settings; nothing heavy is constructed.

    With `columns` (names in the prompt set) every argument without a default must be among them. A reward with an
    environment of its own is checked there, when it is loaded. Raises ImageRLError in one line otherwise."""
    if spec.is_isolated:
        return _check_isolated(spec)
    label, found = _resolve(spec)
    if columns is not None:
        check_columns(label, needed_columns(found, spec.settings), columns)
    return label


def check_entries(entries: Iterable[Mapping[str, object]], columns: Iterable[str] | None = None) -> list[str]:
    """Return labels of a recipe's rewards. Raises ImageRLError like `check_reward`, for the first unusable one."""
    names = None if columns is None else list(columns)
    return [check_reward(RewardSpec.from_mapping(entry), names) for entry in entries]


def takes(spec: RewardSpec) -> list[str]:
    """Return the names of a reward's arguments; `**columns` names none. Raises ImageRLError like `check_reward`."""
    return [parameter.name for parameter in call_parameters(_resolve(spec)[1]) if is_keyword(parameter)]


def columns_needed(spec: RewardSpec) -> list[str]:
    """Return the columns that calling a reward needs; empty where it checks them itself, in another process."""
    if spec.is_isolated or spec.is_remote:
        return []
    return needed_columns(_resolve(spec)[1], spec.settings)


def secrets_of(spec: RewardSpec) -> list[str]:
    """Return the environment variables that a reward's settings ending in `_env` name, defaults included."""
    named = {name: value for name, value in spec.settings.items() if name.endswith("_env")}
    if not spec.is_isolated:
        label, found = _resolve(spec)
        for parameter in setting_parameters(label, found):
            if parameter.name.endswith("_env"):
                named.setdefault(parameter.name, parameter.default)
    return [value for value in named.values() if isinstance(value, str)]


def load_reward(target: str, /, **settings: object) -> tuple[str, RewardFn]:
    """Return label and callable of a reward by name, import path or address (see RewardSpec).

    Raises ImageRLError: unknown name, missing file or function, an error while importing or constructing."""
    return load_spec(RewardSpec(target, settings=settings))


def load_spec(
    spec: RewardSpec,
    patience_s: float | None = None,
    columns: Sequence[str] | None = None,
    policy: object = None,
) -> tuple[str, RewardFn]:
    """Return label and callable of a reward. `patience_s` is the time that one call has, for rewards that wait for
    others; it goes to a setting of that name. `columns` are checked where only loading can. `policy` is what a reward
    gets that names it.

    Raises ImageRLError like `load_reward`."""
    if spec.python is not None:
        from imagerl.rewards.boundary.interpreter import InterpreterReward

        label = _check_isolated(spec)
        return label, InterpreterReward(spec.python, spec.target, spec.settings, patience_s, columns)
    label, found = _resolve(spec)
    settings = _all_settings(spec)
    if patience_s is not None and any(p.name == "patience_s" for p in setting_parameters(label, found)):
        settings.setdefault("patience_s", patience_s)
    if columns is not None and spec.is_isolated:
        check_columns(label, needed_columns(found, settings), columns)
    try:
        if spec.is_remote or spec.ships:
            with before_scoring(f"reward {label!r} could not be constructed"):
                return label, found(**settings)
        return label, construct(label, found, settings, policy)
    except ImageRLError as error:
        if spec.target not in PRESETS:
            raise
        # known to its user by its own name, not by that of what it is made of
        shipped = _shipped(spec.target)[0]
        raise ImageRLError(str(error).replace(f"reward {shipped!r}", f"reward {label!r}", 1)) from error


def unique_labels(labels: Sequence[str]) -> list[str]:
    """Return labels with a number added to repeated ones: ocr, ocr_2, ..."""
    counts = [labels[: index + 1].count(label) for index, label in enumerate(labels)]
    return [label if n == 1 else f"{label}_{n}" for label, n in zip(labels, counts, strict=True)]


def load_rewards(
    specs: Sequence[RewardSpec],
    patience_s: float | None = None,
    columns: Sequence[str] | None = None,
    policy: object = None,
) -> list[LoadedReward]:
    """Load all rewards of a recipe, under distinct labels. Arguments and errors are those of `load_spec`."""
    loaded = [load_spec(spec, patience_s, columns, policy) for spec in specs]
    labels = unique_labels([label for label, _ in loaded])
    return [
        LoadedReward(label, fn, spec.weight, spec.gate, spec.half)
        for label, (_, fn), spec in zip(labels, loaded, specs, strict=True)
    ]


def _prompt_text(prompt: Any) -> str:
    """Return the text of a plain or a chat prompt; TRL splits the content into blocks where there are pictures."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content if block.get("type") == "text")


def as_trl_reward(reward: Callable[..., Any], label: str | None = None) -> Callable[..., list[float | None]]:
    """Wrap a reward of ours as a function for TRL's `GRPOTrainer(reward_funcs=[...])`, which wants a
    `__name__` and a plain list. Pictures come from the dataset column `images` (or `image`); a list of one
    picture is unwrapped, and a chat prompt stands for the text of its last message."""

    def trl_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        images = columns.pop("images", None) or columns.pop("image", None) or []
        output = reward(
            prompts=[_prompt_text(prompt) for prompt in prompts],
            completions=completions,
            images=[image[0] if isinstance(image, (list, tuple)) else image for image in images],
            **columns,
        )
        return list(output.rewards if isinstance(output, RewardOutput) else output)

    trl_reward.__name__ = label or str(getattr(reward, "__name__", type(reward).__name__))
    return trl_reward
