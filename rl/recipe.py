"""Recipes: files laid over each other, command-line overrides, and errors that name the key. Knows no schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rl.errors import ImageRLError, one_line
from rl.reading import MAX_DEPTH, read_text
from rl.yaml_text import MAX_RECIPE_BYTES, Dumper, parse_yaml

Loc = tuple[str | int, ...]


class RecipeModel(BaseModel):
    """Base of every section of a recipe: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Raw data with short spellings written out, before overrides reach into it."""
        return data

    @classmethod
    def redirect(cls, loc: Loc, value: Any) -> Loc:
        """Where an override of `loc` really goes. For schemas that accept a short spelling."""
        return loc

    def to_yaml(self) -> str:
        """The whole recipe, defaults included. Reads back equal through `load_yaml_recipe`."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


RecipeT = TypeVar("RecipeT", bound=RecipeModel)


# ---- files and overrides ------------------------------------------------------------------------------------


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file, laid over that of the file it `extends`, unvalidated. Its key `kind` ("train"
    when absent) names the schema."""
    data = _read_mapping(path)
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise ImageRLError(f'{path}: "extends" should be the path of another recipe, not {_shown(base)}')
    below = _read_mapping(Path(path).parent / base)
    if "extends" in below:
        raise ImageRLError(
            f"{path} extends {base}, which extends another; a recipe has one file below it at most"
        )
    return lay_over(below, data)


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One mapping over another, key by key within sections. null takes a key away, so that its default holds."""
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


def _read_mapping(path: str | Path) -> dict[str, Any]:
    data = parse_yaml(read_text(path, MAX_RECIPE_BYTES), str(path))
    if data is None:
        raise ImageRLError(f"{path} is empty; a recipe is a mapping of sections, see recipes/")
    if not isinstance(data, dict):
        raise ImageRLError(
            f"{path} holds {_type_name(data)}; a recipe is a mapping of sections, see recipes/"
        )
    return data


def apply_override(cls: type[RecipeModel], data: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in `data`. Missing sections on the way are created, list entries are
    counted from 0, and the value is YAML.

    Raises:
        ImageRLError: the override has no `=`, or leads below a plain value or past the end of a list.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    shown = f'override "{one_line(override, 80)}"'
    if not equals or not all(parts) or len(parts) > MAX_DEPTH or not key.isprintable():
        raise ImageRLError(f"cannot read the {shown}; write dotted.key=value, as in run.steps=50")
    value = parse_yaml(text, shown)
    loc = cls.redirect(tuple(int(p) if re.fullmatch("[0-9]{1,9}", p) else p for p in parts), value)
    here: Any = data
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        above = ".".join(map(str, loc[:depth])) or "the recipe"
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                entries = f"0 to {len(here) - 1}" if here else "none, it is empty"
                raise ImageRLError(f"{shown}: {above} is a list with entries {entries}")
            if not last and here[part] is None:
                here[part] = {}
        elif isinstance(here, dict):
            part = str(part)
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            raise ImageRLError(f"{shown}: {above} is {_type_name(here)}, there is nothing below it")
        if last:
            here[part] = value
        else:
            here = here[part]


# ---- validation --------------------------------------------------------------------------------------------


def load_yaml_recipe(cls: type[RecipeT], path: str | Path, overrides: Sequence[str] = ()) -> RecipeT:
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
                f'{path} is a recipe of kind {_shown(theirs)}; this command takes kind "{ours}"'
            )
    try:
        return cls.model_validate(_overridden(cls, data, overrides))
    except ValidationError as error:
        mistake = _explain(cls, error.errors())
    raise ImageRLError(f"{_blamed(cls, data, overrides, mistake) or path}: {mistake}")


def validate_recipe(cls: type[RecipeT], data: dict[str, Any], source: str) -> RecipeT:
    """Build a recipe from plain data; `source` begins the message of the ImageRLError that it may raise."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ImageRLError(f"{source}: {_explain(cls, error.errors())}") from None


def _overridden(cls: type[RecipeModel], data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changed = deepcopy(data)
    for override in overrides:
        apply_override(cls, changed, override)
    return changed


def _blamed(cls: type[RecipeModel], data: dict[str, Any], overrides: Sequence[str], mistake: str) -> str:
    """The overrides without which a mistake is not made; none when the file makes it alone."""

    def makes(chosen: Sequence[str]) -> bool:
        try:
            cls.model_validate(_overridden(cls, data, chosen))
        except ValidationError as error:
            return _explain(cls, error.errors()) == mistake
        except ImageRLError:  # another one may need what this one sets
            pass
        return False

    rest = ([*overrides[:index], *overrides[index + 1 :]] for index in range(len(overrides)))
    guilty = [
        f'"{one_line(override, 80)}"'
        for override, others in zip(overrides, rest, strict=True)
        if not makes(others)
    ]
    return f"override{'s' * (len(guilty) > 1)} {' and '.join(guilty)}" if guilty else ""


def iter_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a schema with what pydantic knows of it, sections included. List entries: `0`."""
    for name, info in cls.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info
        section = _section(info.annotation)
        if section is not None:
            yield from iter_fields(section, f"{key}.0." if _holds_list(info.annotation) else f"{key}.")


def iter_keys(cls: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Every dotted key of a schema with its one-line description."""
    return ((key, info.description or "") for key, info in iter_fields(cls))


def _explain(cls: type[BaseModel], errors: Sequence[ErrorDetails]) -> str:
    """The first error in one line. A value refused by each member of a union is one error."""
    # An unknown key often explains the missing one, so it goes first.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key, section = _locate(cls, first)
    value = first["input"]
    if first["type"] == "extra_forbidden":
        return _unknown_key(cls, section, key)
    if first["type"] == "missing":
        about = dict(iter_keys(cls)).get(re.sub(r"[.][0-9]+[.]", ".0.", key))
        return f'"{key}" is missing: {about}' if about else f'"{key}" is missing in {_shown(value)}'
    if first["type"] == "value_error":
        message = one_line(first["ctx"]["error"], 300)
        return message if not key or key in message else f'"{key}": {message}'
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\b[0-9]+\b)", first["ctx"]["expected"])
        names = [a or b for a, b in allowed]
        near = difflib.get_close_matches(str(value), names, 1)
        hint = f'; did you mean "{near[0]}"?' if near else ";"
        return f'"{key}" cannot be {_shown(value)}{hint} Allowed: {", ".join(names)}'
    wants = dict.fromkeys(_wanted(e) for e in errors if _locate(cls, e)[0] == key)
    return f'"{key}" should be {" or ".join(wants)}, not {_shown(value)}'


def _locate(cls: type[BaseModel], error: ErrorDetails) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of an error and the section it lies in. Pydantic also puts the names of union members
    and validators into the location; they are no keys."""
    section: type[BaseModel] | None = cls
    parent: type[BaseModel] | None = cls
    parts: list[str] = []
    for depth, part in enumerate(error["loc"]):
        if isinstance(part, int):
            parts.append(str(part))
        elif section is not None and part in section.model_fields:
            parent, section = section, _section(section.model_fields[part].annotation)
            parts.append(part)
        elif error["type"] == "extra_forbidden" and depth == len(error["loc"]) - 1:
            parent = section
            parts.append(part)
    return ".".join(parts), parent


def _unknown_key(cls: type[BaseModel], section: type[BaseModel] | None, key: str) -> str:
    head, _, last = key.rpartition(".")
    siblings = list(section.model_fields) if section else []
    near = difflib.get_close_matches(last, siblings, 1)
    if near:
        meant = f"{head}.{near[0]}" if head else near[0]
    else:  # perhaps it stands in the wrong section
        by_leaf = {k.rpartition(".")[2]: k for k in reversed([k for k, _ in iter_keys(cls)])}
        leaf = difflib.get_close_matches(last, list(by_leaf), 1, 0.8)
        meant = by_leaf[leaf[0]] if leaf else ""
    hint = f'; did you mean "{meant}"?' if meant else ";"
    where = f'"{head}"' if head else "the top level"
    return f"unknown key {_shown(key)}{hint} Keys of {where}: {', '.join(siblings)}"


# What pydantic wants, by the type of its error; other messages are good as they are.
WANTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "a mapping",
    "none_required": "null",
    "string_too_short": "a text that is not empty",
    "string_type": "a string (put it in quotes)",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def _wanted(error: ErrorDetails) -> str:
    """What pydantic asks for, without its account of what it got."""
    if error["type"] in WANTED:
        return WANTED[error["type"]].format(**error.get("ctx", {}))
    message = error["msg"].removeprefix("Input should be ").split(", got ")[0]
    return message[:1].lower() + message[1:]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class within an annotation such as `Lora | None` or `list[RewardSpec]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for s in map(_section, get_args(annotation)) if s is not None), None)


def _holds_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list or any(map(_holds_list, get_args(annotation)))


def _type_name(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{one_line(value, 60)}"'
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return one_line(text.removesuffix("\n...\n"), 60)
