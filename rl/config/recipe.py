"""Recipes: files laid over each other, command-line overrides, and errors that name the key. Knows no schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from imagerl.rl.errors import ImageRLError, nearest, one_line
from imagerl.rl.files.mistakes import explain, shown
from imagerl.rl.files.reading import MAX_DEPTH, read_text
from imagerl.rl.files.yaml_text import MAX_RECIPE_BYTES, Dumper, parse_yaml, unshared

Loc = tuple[str | int, ...]
Override = str | tuple[str, object]  # "run.steps=5", its value in YAML, or ("run.steps", 5)
SHIPPED = Path(__file__).parents[2] / "recipes"  # of the installed package, by a link of the checkout


class RecipeModel(BaseModel):
    """The base of every section of a recipe: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @classmethod
    def prepare(cls, data: dict[str, object]) -> dict[str, object]:
        """Write short spellings in raw data out, before overrides reach into it."""
        return data

    @classmethod
    def redirect(cls, loc: Loc, value: object) -> Loc:
        """Return the key that an override of `loc` really sets. For schemas that accept a short spelling."""
        return loc

    def to_yaml(self) -> str:
        """Write out the whole recipe, defaults included. It reads back equal through `load_yaml_recipe`."""
        data = self.model_dump(mode="json")
        return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


RecipeT = TypeVar("RecipeT", bound=RecipeModel)


# ---- files and overrides ------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """List the recipes that come with the package, by the name that a command takes, such as `compare/grpo`."""
    files = sorted((*SHIPPED.glob("*.yaml"), *SHIPPED.glob("*/*.yaml")))
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in files}


def find_recipe(path: str | Path) -> Path:
    """Find a recipe's file: the one at `path`, or where there is none the shipped one of that name.

    Raises ImageRLError for a name, without a suffix, that is neither."""
    if Path(path).exists() or Path(path).suffix:
        return Path(path)
    shipped = shipped_recipes()
    if str(path) not in shipped:
        near = nearest(str(path), shipped)
        hint = f'did you mean "{near}"?' if near else "imagerl recipes lists those that ship"
        raise ImageRLError(f'"{path}" is no recipe file, and no recipe of that name ships; {hint}')
    return shipped[str(path)]


def read_recipe(path: str | Path) -> dict[str, object]:
    """Read the mapping in a recipe file, or in the shipped one of that name, laid over that of the file it `extends`,
    unvalidated. Its key `kind` ("train" when absent) names the schema."""
    path = find_recipe(path)
    data = _read_mapping(path)
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise ImageRLError(f'{path}: "extends" should be the path of another recipe, not {shown(base)}')
    below = _read_mapping(Path(path).parent / base)
    if "extends" in below:
        raise ImageRLError(
            f"{path} extends {base}, which extends another; a recipe has one file below it at most"
        )
    return lay_over(below, data)


def lay_over(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    """Lay one mapping over another, key by key within sections. null takes a key away, so that its default holds."""
    merged = dict(below)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            old = merged.get(key)
            merged[key] = lay_over(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _read_mapping(path: str | Path) -> dict[str, object]:
    data = parse_yaml(read_text(path, MAX_RECIPE_BYTES), str(path))
    if data is None:
        raise ImageRLError(f"{path} is empty; a recipe is a mapping of sections, see recipes/")
    if not isinstance(data, dict):
        raise ImageRLError(
            f"{path} holds {_type_name(data)}; a recipe is a mapping of sections, see recipes/"
        )
    return data


def apply_override(cls: type[RecipeModel], data: dict[str, object], override: Override) -> None:
    """Set one dotted key in `data`. Missing sections on the way are created, list entries are counted from 0.

    Raises:
        ImageRLError: the override has no `=`, or leads below a plain value or past the end of a list.
    """
    place = f'override "{_named(override)}"'
    key, equals, text = override.partition("=") if isinstance(override, str) else (override[0], True, "")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH or not key.isprintable():
        raise ImageRLError(f"cannot read the {place}; write dotted.key=value, as in run.steps=50")
    value = parse_yaml(text, place) if isinstance(override, str) else override[1]
    loc = cls.redirect(tuple(int(p) if re.fullmatch("[0-9]{1,9}", p) else p for p in parts), value)
    here: Any = data
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        above = ".".join(map(str, loc[:depth])) or "the recipe"
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                entries = f"0 to {len(here) - 1}" if here else "none, it is empty"
                raise ImageRLError(f"{place}: {above} is a list with entries {entries}")
            if not last and here[part] is None:
                here[part] = {}
        elif isinstance(here, dict):
            part = str(part)
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            raise ImageRLError(f"{place}: {above} is {_type_name(here)}, there is nothing below it")
        if last:
            here[part] = value
        else:
            here = here[part]


def _named(override: Override) -> str:
    """Name an override in a message."""
    return one_line(override if isinstance(override, str) else f"{override[0]}={override[1]}", 80)


# ---- validation --------------------------------------------------------------------------------------------


def load_yaml_recipe(cls: type[RecipeT], path: str | Path, overrides: Sequence[Override] = ()) -> RecipeT:
    """Read, override and validate a recipe.

    Raises:
        ImageRLError: one line with the file or the override to blame, the dotted key, and what it should be.
    """
    data = cls.prepare(read_recipe(path))
    if "kind" in cls.model_fields:
        ours = cast(str, get_args(cls.model_fields["kind"].annotation)[0])
        theirs = data.get("kind", "train")
        if theirs != ours:
            raise ImageRLError(
                f'{path} is a recipe of kind {shown(theirs)}; this command takes kind "{ours}"'
            )
    return _validated(cls, data, overrides, str(path))


def changed_recipe(recipe: RecipeT, overrides: Sequence[Override]) -> RecipeT:
    """Return a recipe with overrides. Raises ImageRLError like `load_yaml_recipe`."""
    return _validated(type(recipe), recipe.model_dump(), overrides, "the recipe")


def _validated(
    cls: type[RecipeT], data: dict[str, object], overrides: Sequence[Override], source: str
) -> RecipeT:
    try:
        return cls.model_validate(_overridden(cls, data, overrides))
    except ValidationError as error:
        mistake = explain(error, cls)
    raise ImageRLError(f"{_blamed(cls, data, overrides, mistake) or source}: {mistake}")


def validate_recipe(cls: type[RecipeT], data: dict[str, object], source: str) -> RecipeT:
    """Build a recipe from plain data; `source` begins the message of the ImageRLError that it may raise."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ImageRLError(f"{source}: {explain(error, cls)}") from None


def _overridden(
    cls: type[RecipeModel], data: dict[str, object], overrides: Sequence[Override]
) -> dict[str, object]:
    changed = {key: unshared(value) for key, value in data.items()}
    for override in overrides:
        apply_override(cls, changed, override)
    return changed


def _blamed(
    cls: type[RecipeModel], data: dict[str, object], overrides: Sequence[Override], mistake: str
) -> str:
    """Find the overrides without which a mistake is not made; none when the file makes it alone."""

    def makes(chosen: Sequence[Override]) -> bool:
        try:
            cls.model_validate(_overridden(cls, data, chosen))
        except ValidationError as error:
            return explain(error, cls) == mistake
        except ImageRLError:  # another one may need what this one sets
            pass
        return False

    rest = ([*overrides[:index], *overrides[index + 1 :]] for index in range(len(overrides)))
    guilty = [
        f'"{_named(override)}"' for override, others in zip(overrides, rest, strict=True) if not makes(others)
    ]
    return f"override{'s' * (len(guilty) > 1)} {' and '.join(guilty)}" if guilty else ""


def _type_name(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
    return "nothing" if value is None else names.get(type(value), "a number")
