"""Rewards by name or import path.

A reward is a function, or a class with `__call__`, called by keyword with one list entry per sample:
`prompts`, `completions` (image-token ids; `completion_ids` is the same list under TRL's name), `images`
(PIL, RGB) and every column of the prompt set. Names it does not accept are left out, so a function may ask
for `images` only.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.mixing import Gate, Weight
from rl.types import ImageRLError, RewardFn, RewardOutput

REWARDS: dict[str, str] = {
    "clip": "rewards.clip:ClipReward",
    "clip_direction": "rewards.clip:ClipDirectionReward",
    "colours": "rewards.colours:ColoursReward",
    "composition": "rewards.composition:CompositionReward",
    "edit": "rewards.edit:EditReward",
    "edit_consistency": "rewards.edit_consistency:EditConsistencyReward",
    "ocr": "rewards.ocr:OCRReward",
}
SAMPLE_NAMES = ("prompts", "completions", "completion_ids", "images")


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One entry of a recipe's reward list. `target` is a name in REWARDS, "file.py:function" or
    "package.module:function"; `settings` go to a class's constructor, or to a function at every call."""

    target: str
    weight: Weight = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> RewardSpec:
        """From `{name | import_path, weight, gate, **settings}`; a None stands for an absent key."""
        settings = dict(entry)
        weight, gate = settings.pop("weight", None), settings.pop("gate", None)
        targets = [
            t for t in (settings.pop("name", None), settings.pop("import_path", None)) if t is not None
        ]
        if len(targets) != 1:
            raise ImageRLError(f"a reward needs either name or import_path, got {dict(entry)}")
        return cls(
            targets[0],
            1.0 if weight is None else weight,
            settings,
            None if gate is None else Gate.from_mapping(gate),
        )

    def absolute(self) -> RewardSpec:
        """The same spec with a file's path made absolute, so that another process finds the same file."""
        path, colon, attribute = self.target.rpartition(":")
        if not path.endswith(".py"):
            return self
        return replace(self, target=f"{Path(path).resolve()}{colon}{attribute}")


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward ready to be called."""

    label: str
    fn: RewardFn
    weight: Weight = 1.0
    gate: Gate | None = None


class _KeywordReward:
    """Calls a user's function with the keywords it accepts, and with the recipe's settings."""

    def __init__(self, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        parameters = inspect.signature(function).parameters.values()
        self._function = function
        self._settings = dict(settings)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if _is_keyword(p)}

    def __call__(self, **columns: Any) -> Any:
        keywords = {**columns, **self._settings}
        if not self._takes_all:
            keywords = {name: value for name, value in keywords.items() if name in self._names}
        return self._function(**keywords)


def one_line(error: BaseException) -> str:
    """ "ValueError: too red (my_reward.py:7)": the error, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())[:200]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _is_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _needed(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Names that the caller must give by keyword."""
    return [p.name for p in parameters if _is_keyword(p) and p.default is p.empty]


def _call_parameters(found: Any) -> list[inspect.Parameter]:
    """Parameters of the call that scores samples, without `self`."""
    if inspect.isclass(found):
        return list(inspect.signature(_instance_call(found)).parameters.values())[1:]
    return list(inspect.signature(found).parameters.values())


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ImageRLError(f"reward file {path} does not exist; correct its import_path")
    name = f"reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImageRLError(f"reward file {path} is not a Python file; correct its import_path")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:  # so that it may import its neighbours; last, to shadow nothing
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_target(target: str) -> Any:
    """The function or class behind an import path; an ImageRLError says what is wrong with it."""
    place, _, attribute = target.rpartition(":")
    if not (place and attribute):
        raise ImageRLError(f"reward {target!r} must read file.py:function or package.module:function")
    try:
        if place.endswith(".py"):
            module = _import_file(Path(place))
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(place)
    except ImageRLError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ImageRLError(f"reward {target!r}: syntax error in {where}: {error.msg}") from error
    except Exception as error:
        raise ImageRLError(f"reward {target!r}: importing {place} failed: {one_line(error)}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'no function'}"
        raise ImageRLError(f"reward {target!r}: {place} has no {attribute}; {hint}")
    found = getattr(module, attribute)
    if not callable(found) or (inspect.isclass(found) and _instance_call(found) is None):
        raise ImageRLError(f"reward {target!r}: {attribute} is not a function or a class with __call__")
    return found


def _instance_call(cls: type) -> Any:
    """`__call__` as instances of a class see it, or None; `cls.__call__` may be the metaclass's."""
    return next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)


def _resolve(spec: RewardSpec) -> tuple[str, Any]:
    """The label and the function or class of a spec, signature and settings checked, nothing constructed."""
    if ":" in spec.target or spec.target.endswith(".py"):
        label, found = spec.target.rpartition(":")[2], import_target(spec.target)
    elif spec.target in REWARDS:
        label, found = spec.target, import_target(REWARDS[spec.target])
    else:
        close = difflib.get_close_matches(spec.target, REWARDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of: {', '.join(REWARDS)}"
        raise ImageRLError(
            f"no reward is named {spec.target!r}; {hint} (your own: import_path: file.py:name)"
        )
    is_class = inspect.isclass(found)
    if inspect.iscoroutinefunction(_instance_call(found) if is_class else found):
        raise ImageRLError(f"reward {label!r} is async; make it an ordinary function")
    try:
        parameters = _call_parameters(found)
        takers = list(inspect.signature(found).parameters.values()) if is_class else parameters
    except ValueError as error:
        raise ImageRLError(f"reward {label!r} has no readable signature; wrap it in a def") from error
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise ImageRLError(f"reward {label!r} must take keywords; write def {label}(images, **kwargs)")
    names = [p.name for p in takers if _is_keyword(p) and (is_class or p.name not in SAMPLE_NAMES)]
    for name in spec.settings if not any(p.kind is p.VAR_KEYWORD for p in takers) else ():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'none'}"
            raise ImageRLError(f"reward {label!r} has no setting {name!r}; {hint}")
    missing = [name for name in _needed(takers) if is_class and name not in spec.settings]
    if missing:
        raise ImageRLError(f"reward {label!r} needs the setting {missing[0]!r}; add it to its entry")
    return label, found


def check_reward(spec: RewardSpec, columns: Iterable[str] | None = None) -> str:
    """The label of a reward that can be imported and takes its settings; nothing heavy is constructed.

    With `columns` (names in the prompt set) every argument without a default must be among them.
    Raises ImageRLError in one line otherwise."""
    label, found = _resolve(spec)
    if columns is not None:
        given = [*SAMPLE_NAMES, *columns]
        for name in _needed(_call_parameters(found)):
            if name not in given and (inspect.isclass(found) or name not in spec.settings):
                raise ImageRLError(
                    f"reward {label!r} asks for {name!r}, which is no column of the prompt set; "
                    f"it gets: {', '.join(given)}"
                )
    return label


def asks_for(spec: RewardSpec, name: str) -> bool:
    """Whether a reward names a column among its arguments. Raises ImageRLError like `check_reward`."""
    return any(parameter.name == name for parameter in _call_parameters(_resolve(spec)[1]))


def load_reward(target: str, /, **settings: Any) -> tuple[str, RewardFn]:
    """Label and callable of a reward by name or import path (see RewardSpec).

    Raises ImageRLError: unknown name, missing file or function, an error while importing or constructing."""
    label, found = _resolve(RewardSpec(target, settings=settings))
    if target in REWARDS:
        return label, found(**settings)
    if not inspect.isclass(found):
        return label, _KeywordReward(found, settings)
    try:
        instance: Any = found(**settings)
    except ImageRLError:
        raise
    except Exception as error:
        raise ImageRLError(f"reward {label!r} could not be constructed: {one_line(error)}") from error
    return label, _KeywordReward(instance, {})


def unique_labels(labels: Sequence[str]) -> list[str]:
    """Labels with a number added to repeated ones: ocr, ocr_2, ..."""
    counts = [labels[: index + 1].count(label) for index, label in enumerate(labels)]
    return [label if n == 1 else f"{label}_{n}" for label, n in zip(labels, counts, strict=True)]


def load_rewards(specs: Sequence[RewardSpec]) -> list[LoadedReward]:
    """All rewards of a recipe, under distinct labels. Raises ImageRLError like `load_reward`."""
    loaded = [load_reward(spec.target, **spec.settings) for spec in specs]
    labels = unique_labels([label for label, _ in loaded])
    return [
        LoadedReward(label, fn, spec.weight, spec.gate)
        for label, (_, fn), spec in zip(labels, loaded, specs, strict=True)
    ]


def _prompt_text(prompt: Any) -> str:
    """The text of a plain or a chat prompt; TRL splits the content into blocks where there are pictures."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content if block.get("type") == "text")


def as_trl_reward(reward: Callable[..., Any], label: str | None = None) -> Callable[..., list[float | None]]:
    """A reward of ours as a function for TRL's `GRPOTrainer(reward_funcs=[...])`, which wants a `__name__`
    and a plain list. Pictures come from the dataset column `images` (or `image`); a list of one picture is
    unwrapped, and a chat prompt stands for the text of its last message."""

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
