"""Mistakes that pydantic found, in a line with the key, what should stand there and what does. Knows no schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from imagerl.rl.errors import ImageRLError, nearest, one_line
from imagerl.rl.files.yaml_text import Dumper

T = TypeVar("T")


def iter_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of a schema with what pydantic knows of it, sections included. List entries: `0`."""
    for name, info in cls.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info
        section = _section(info.annotation)
        if section is not None:
            yield from iter_fields(section, f"{key}.0." if holds_list(info.annotation) else f"{key}.")


def iter_keys(cls: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield every dotted key of a schema with its one-line description."""
    return ((key, info.description or "") for key, info in iter_fields(cls))


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """Tell the first mistake in one line. A value refused by each member of a union is one mistake."""
    errors = error.errors()
    # An unknown key often explains the missing one, so it goes first.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key, section = _locate(cls, first)
    value = first["input"]
    if first["type"] == "extra_forbidden":
        return _unknown_key(cls, section, key)
    if first["type"] == "missing":
        about = dict(iter_keys(cls)).get(re.sub(r"[.][0-9]+[.]", ".0.", key))
        return f'"{key}" is missing: {about}' if about else f'"{key}" is missing in {shown(value)}'
    if first["type"] == "value_error":
        message = one_line(first["ctx"]["error"], 300)
        return message if not key or key in message else f'"{key}": {message}'
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\b[0-9]+\b)", first["ctx"]["expected"])
        names = [a or b for a, b in allowed]
        near = nearest(str(value), names)
        hint = f'; did you mean "{near}"?' if near else ";"
        return f'"{key}" cannot be {shown(value)}{hint} Allowed: {", ".join(names)}'
    here = [e for e in errors if _locate(cls, e)[0] == key]
    # Of a union, the member of the right type says more than those of another.
    here = [e for e in here if not e["type"].endswith(("_type", "literal_error"))] or here
    wants = dict.fromkeys(map(_wanted, here))
    return f'"{key}" should be {" or ".join(wants)}, not {shown(here[0]["input"])}'


def validated(schema: type[T], value: object, place: str) -> T:
    """Turn plain data into what a pydantic schema makes of it. Raises ImageRLError with the first mistake: `place`, the
    dotted key, and what should stand there."""
    kind: object = schema
    try:
        return cast(T, _adapter(kind).validate_python(value))
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        named = f'"{key}" ' if key else ""
        if first["type"] == "extra_forbidden":
            what = f"{named}is no setting that is known here"
        elif first["type"] == "missing":
            what = f"{named}is missing"
        elif first["type"] == "value_error":
            what = named.replace('" ', '": ') + one_line(first["ctx"]["error"])
        else:
            what = f"{named}should be {_wanted(first)}, not {shown(first['input'])}"
        raise ImageRLError(f"{place}: {what}") from None


@lru_cache(maxsize=64)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _locate(cls: type[BaseModel], error: ErrorDetails) -> tuple[str, type[BaseModel] | None]:
    """Return the dotted key of an error and the section it lies in. Pydantic also puts the names of union members
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
    if near := nearest(last, siblings):
        meant = [f"{head}.{near}" if head else near]
    else:  # perhaps it stands in the wrong section
        keys = sorted((key for key, _ in iter_keys(cls)), key=lambda key: key.count("."))
        leaf = nearest(last, [key.rpartition(".")[2] for key in keys], 0.8)
        meant = [key for key in keys if key.rpartition(".")[2] == leaf][:3]
        if head and len(meant) > 1:
            meant = []
    hint = "; did you mean " + " or ".join(f'"{key}"' for key in meant) + "?" if meant else ";"
    where = f'"{head}"' if head else "the top level"
    return f"unknown key {shown(key)}{hint} Keys of {where}: {one_line(', '.join(siblings), 250)}"


# What pydantic wants, by the type of its error; other messages are good as they are.
WANTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a number",
    "float_type": "a number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "list_type": "a list",
    "model_type": "a mapping",
    "none_required": "null",
    "sequence_str": "a list",
    "string_too_short": "a text that is not empty",
    "string_type": "a string (put it in quotes)",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def _wanted(error: ErrorDetails) -> str:
    """Say what pydantic asks for, without its account of what it got."""
    if error["type"] in WANTED:
        return WANTED[error["type"]].format(**error.get("ctx", {}))
    message = error["msg"].removeprefix("Input should be ").split(", got ")[0]
    return message[:1].lower() + message[1:]


def _section(annotation: object) -> type[BaseModel] | None:
    """Return the section class within an annotation such as `Lora | None` or `list[RewardSpec]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for s in map(_section, get_args(annotation)) if s is not None), None)


def holds_list(annotation: object) -> bool:
    """Tell whether a field of this type may be a list."""
    return getattr(annotation, "__origin__", None) is list or any(map(holds_list, get_args(annotation)))


def shown(value: object) -> str:
    """Write a value as YAML has it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{one_line(value, 60)}"'
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return one_line(text.removesuffix("\n...\n"), 60)
