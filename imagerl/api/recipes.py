"""Recipes from Python: by name or file, changed by values instead of words, with functions as rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagerl.rl.config.recipe import Override, changed_recipe, load_yaml_recipe, read_recipe, shipped_recipes
from imagerl.rl.config.rewards import RewardSpec
from imagerl.rl.config.sft import AnyRecipe, SFTRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import RewardFn

Reward = (
    RewardFn | Callable[..., object] | str | Mapping[str, object]
)  # a function, a name or import path, a recipe's entry
Rewards = Mapping[str, Reward] | Sequence[Reward] | Reward
Overrides = Sequence[str] | Mapping[str, object]
REWARD_LISTS = ("rewards", "rewards.functions", "gold")  # keys whose values may hold functions


def load_recipe(
    source: str | Path | AnyRecipe, overrides: Overrides = (), /, **sections: object
) -> AnyRecipe:
    """Load a recipe by its file or the name of one that ships, or take one, and change it.

    Overrides are words of a command, `["run.steps=5"]`, or dotted keys with values, `{"run.steps": 5}`; sections too
    may be given by keyword: `load_recipe("tiny_ocr_grpo", run={"steps": 5}, rewards=[my_function])`. Lists of rewards
    may hold functions; see `reward_entries`.

    Raises ImageRLError with one line on a mistake."""
    if isinstance(overrides, str):
        raise ImageRLError(f'overrides should be a list, as in ["{overrides}"]')
    given: list[Override] = []
    for key, value in (*_pairs(overrides), *sections.items()):
        given += [key] if value is None and "=" in key else _leaves(key, value)
    if isinstance(source, Recipe | SFTRecipe):
        return changed_recipe(source, given)
    kind = read_recipe(source).get("kind", "train")
    if kind == "sft":
        return load_yaml_recipe(SFTRecipe, source, given)
    return load_yaml_recipe(Recipe, source, given)


def list_recipes() -> list[str]:
    """Name the recipes that come with the package, as `load_recipe` and `train` take them."""
    return list(shipped_recipes())


def reward_entries(rewards: Rewards) -> list[dict[str, object]]:
    """Write rewards out as a recipe's list: functions by their names, or under those of a mapping; names of ours and
    import paths as they are; mappings as entries, in which `function` may hold one, `{"function": f, "weight": 0.3}`.

    Raises ImageRLError for anything else."""
    if isinstance(rewards, Mapping) and not {"name", "import_path", "url", "function"} & rewards.keys():
        return [_entry(reward, name) for name, reward in rewards.items()]
    listed = rewards if isinstance(rewards, list | tuple) else [rewards]
    return [_entry(reward) for reward in listed]


def reward_specs(rewards: Rewards) -> list[RewardSpec]:
    """Check rewards as a recipe's. Raises ImageRLError."""
    from imagerl.rl.config.recipe import validate_recipe

    return [validate_recipe(RewardSpec, entry, "rewards") for entry in reward_entries(rewards)]


def _entry(reward: object, name: str | None = None) -> dict[str, object]:
    if isinstance(reward, str):
        key = "url" if "://" in reward else "import_path" if ":" in reward else "name"
        return {key: reward}
    if not isinstance(reward, Mapping):
        reward = {"function": reward}
    entry = {key: _plain(value) for key, value in reward.items()}
    if entry.get("function") is not None:
        name = name or entry.get("name") or _name_of(entry["function"])
    return entry if name is None or "import_path" in entry or "url" in entry else {**entry, "name": name}


def _name_of(function: object) -> str:
    if not callable(function):
        raise ImageRLError(f"{function!r} is no reward; give a function, a name such as 'ocr', or a mapping")
    name = str(getattr(function, "__name__", type(function).__name__))
    if not name.isidentifier():
        raise ImageRLError("a lambda has no name; give rewards as a mapping, {'mine': lambda ...}")
    return name


def _pairs(overrides: Overrides) -> Iterator[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for word in overrides:
        if not isinstance(word, str):
            raise ImageRLError(f'an override should read "run.steps=5", not {word!r}')
        yield (word, None)


def _leaves(key: str, value: object) -> list[Override]:
    """Return overrides of what a mapping says of a section, and leave alone what it does not mention."""
    if key in REWARD_LISTS and not (key == "rewards" and isinstance(value, Mapping) and _is_section(value)):
        return [(key, reward_entries(value))]  # type: ignore[arg-type]
    if isinstance(value, Mapping) and key.count(".") < 2 and value:
        return [leaf for name, entry in value.items() for leaf in _leaves(f"{key}.{name}", entry)]
    return [(key, _plain(value))]


def _is_section(value: Mapping[str, object]) -> bool:
    from imagerl.rl.config.rewards import RewardsConfig

    return bool(value.keys() & RewardsConfig.model_fields.keys())


def _plain(value: object) -> Any:
    """Return a value as YAML would have it."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
