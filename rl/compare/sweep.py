"""A grid of settings as recipes of their own, which a comparison then holds against each other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path

import yaml

from imagerl.rl.config.recipe import Override, apply_override, find_recipe, read_recipe, validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.mistakes import holds_list, iter_fields
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.files.yaml_text import Dumper, parse_yaml

MOST_POINTS = 256  # of a grid


def split_axes(words: Sequence[str]) -> tuple[dict[str, list[object]], list[str]]:
    """Split `key=[a, b]`, the values that a key takes in turn, from overrides of all runs. A key whose value is a
    list takes a list of lists. Raises ImageRLError for no axis, one twice, or one of a single value."""
    lists = {key.removesuffix(".functions") for key, i in iter_fields(Recipe) if holds_list(i.annotation)}
    axes: dict[str, list[object]] = {}
    others = []
    for word in words:
        key, _, text = word.partition("=")
        values = parse_yaml(text, f'"{word}"') if text.startswith("[") else None
        plain = key in lists and not (values and all(isinstance(value, list) for value in values))
        if not isinstance(values, list) or plain:
            others.append(word)
        elif key in axes or len(values) < 2:
            raise ImageRLError(
                f'"{word}": give each key once, with two values or more, as in optim.lr=[1e-4, 2e-4]'
            )
        else:
            axes[key] = values
    if not axes:
        raise ImageRLError("nothing to sweep: give a key with its values, as in optim.lr=[1e-4, 2e-4]")
    return axes, others


def grid_names(axes: dict[str, list[object]]) -> dict[str, dict[str, object]]:
    """Name every point of the grid after its settings, such as `lr=0.0001,group_size=8`; maps to value by key."""
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    points = {}
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = ",".join(f"{short[key]}={_word(value)}" for key, value in point.items())
        points[name] = point
    if not 1 < len(points) <= MOST_POINTS:
        raise ImageRLError(f"the grid has {len(points)} points; give 2 to {MOST_POINTS}, no value twice")
    return points


def write_grid(
    recipe: str, axes: dict[str, list[object]], folder: Path, overrides: Sequence[Override] = ()
) -> list[str]:
    """Write the recipe of every point into `folder`; returns their paths, in order.

    Raises ImageRLError for a recipe that no point may be made of, or a point that is none under the `overrides` of all
    runs."""
    base = read_recipe(recipe)
    if "env_vars" in yaml.dump(base, Dumper=Dumper):
        raise ImageRLError(
            f"{recipe} has env_vars, which may hold secrets and are written down nowhere; take them out"
        )
    paths = []
    for name, point in grid_names(axes).items():
        data = Recipe.prepare(deepcopy(base))
        for key, value in point.items():
            apply_override(Recipe, data, f"{key}={yaml.dump(value, Dumper=Dumper, default_flow_style=True)}")
        whole = deepcopy(data)
        for override in overrides:
            apply_override(Recipe, whole, override)
        validate_recipe(Recipe, whole, f"{find_recipe(recipe)} with {name}")
        path = folder / f"{name}.yaml"
        write_atomic(path, yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))
        paths.append(str(path))
    return paths


def _word(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "+-._" else "_" for c in text)[:40]
