"""Writes the tables of docs/recipes.md from the schemas; everything outside its markers is written by hand.

Run by `make docs`. tests/test_docs.py fails when the page and the schemas differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.files.mistakes import iter_fields

PAGE = Path(__file__).with_name("recipes.md")
SCHEMAS: dict[str, type[RecipeModel]] = {
    "train": Recipe,
    "sft": SFTRecipe,
}
MARKERS = re.compile(r"(<!-- keys of (\w+), from the schema: make docs -->\n).*?(<!-- end -->)", re.DOTALL)
TYPES = {bool: "true, false", int: "integer", float: "number", str: "text", dict: "mapping"}
SIGNS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def page(text: str) -> str:
    """The page with its tables replaced by those of the present schemas."""
    return MARKERS.sub(lambda found: found[1] + tables(SCHEMAS[found[2]]) + found[3], text)


def tables(schema: type[RecipeModel]) -> str:
    """One table a section, under a heading with the section's description."""
    parts: list[str] = []
    for section, rows in sections(schema).items():
        about = schema.model_fields[section].description if rows[0][0] != section else None
        parts.append(f"### `{section}`\n\n" + (f"{about[0].upper()}{about[1:]}.\n\n" if about else ""))
        parts.append("| key | default | values | meaning |\n|---|---|---|---|\n")
        parts += [
            f"| `{key}` | {default(info)} | {values(info)} | {info.description or ''} |\n"
            for key, info in rows
        ]
        parts.append("\n")
    return "\n" + "".join(parts)


def sections(schema: type[RecipeModel]) -> dict[str, list[tuple[str, FieldInfo]]]:
    """Top-level key -> its rows. One that is itself a value, such as a list, has a row of its own."""
    found: dict[str, list[tuple[str, FieldInfo]]] = {}
    for key, info in iter_fields(schema):
        rows = found.setdefault(key.partition(".")[0], [])
        if "." in key or not is_section(info.annotation):
            rows.append((key, info))
    return found


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, RecipeModel)


def default(info: FieldInfo) -> str:
    """A default as YAML writes it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "" if isinstance(value, RecipeModel) else f"`{yaml_value(value)}`"


def yaml_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    return re.sub(r"e([-+])0+", r"e\1", str(value)).replace("e+", "e")


def bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else yaml_value(f"{value:g}")


def values(info: FieldInfo) -> str:
    """What may stand there, in words."""
    bounds = [
        f"{SIGNS[kind]} {bound(getattr(limit, kind.lower()))}"
        for limit in dict.fromkeys(limits(info))
        if (kind := type(limit).__name__) in SIGNS
    ]
    allowed = list(dict.fromkeys(kinds(info.annotation)))
    null = ["or null"] if "null" in allowed else []
    named = " or ".join(name for name in allowed if name != "null")
    return " ".join([f"{named} {', '.join(bounds)}".strip(), *null])


def limits(info: FieldInfo) -> Iterator[Any]:
    """Bounds of a value, also those of one member of a union, as in `Steps | None`."""
    yield from info.metadata
    for member in get_args(info.annotation):
        for described in getattr(member, "__metadata__", ()):
            yield from getattr(described, "metadata", ())


def kinds(annotation: Any) -> Iterator[str]:
    """The members of an annotation, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        yield "null"
    elif origin is Literal:
        yield ", ".join(f"`{argument}`" for argument in arguments)
    elif origin is list:
        yield "list"
    elif origin is tuple:
        yield f"list of {len(arguments)} numbers"
    elif origin is Callable:
        yield "function"
    elif origin is dict or is_section(annotation):
        yield "mapping"
    elif origin is Annotated:
        yield from kinds(arguments[0])
    elif arguments:
        for argument in arguments:
            yield from kinds(argument)
    else:
        yield TYPES[annotation]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
