"""Recipes from YAML: reading, command-line overrides, and errors that name the key. Knows no schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rl.errors import ImageRLError

Loc = tuple[str | int, ...]


class RecipeModel(BaseModel):
    """Base of every section of a recipe: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

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
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
        )


RecipeT = TypeVar("RecipeT", bound=RecipeModel)


# ---- YAML --------------------------------------------------------------------------------------------------

# The scalars of YAML 1.2's core schema. PyYAML follows 1.1, where `1e-6` is a string, `no` is False,
# `010` is 8 and `1:30` is 90.
_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something other than a string."""


for _tag, _pattern, _first in _SCALARS:
    for _yaml_class in (_Loader, _Dumper):
        _regex = re.compile(rf"^(?:{_pattern})$")
        _yaml_class.add_implicit_resolver(_tag, _regex, [c if c != "\0" else "" for c in _first])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def parse_yaml(text: str, source: str) -> Any:
    """One YAML document as plain data. Raises ImageRLError with the line of a syntax error or double key."""
    return parse_yaml_lines(text, source)[0]


def parse_yaml_lines(text: str, source: str) -> tuple[Any, list[int]]:
    """Like `parse_yaml`, with the line numbers of the entries when the document is a list."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = [e.start_mark.line + 1 for e in node.value] if isinstance(node, yaml.SequenceNode) else []
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ImageRLError(f"{source}{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ImageRLError(f"{source}: not YAML ({_one_line(error)})") from None


def read_text(path: str | Path) -> str:
    """A user's text file. Raises ImageRLError when it cannot be read as UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).name, _names_beside(Path(path)), 1)
        hint = f'; did you mean "{Path(path).parent / near[0]}"?' if near else ""
        raise ImageRLError(f'no file "{path}"{hint}') from None
    except UnicodeDecodeError as error:
        raise ImageRLError(f'"{path}" is not UTF-8 text (byte {error.start}); save it as UTF-8') from None
    except OSError as error:
        raise ImageRLError(f'cannot read "{path}": {error.strerror or error}') from None


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
    data = parse_yaml(read_text(path), str(path))
    if data is None:
        raise ImageRLError(f"{path} is empty; a recipe is a mapping of sections, see recipes/")
    if not isinstance(data, dict):
        raise ImageRLError(
            f"{path} holds {_type_name(data)}; a recipe is a mapping of sections, see recipes/"
        )
    return data


# ---- overrides ---------------------------------------------------------------------------------------------


def apply_override(cls: type[RecipeModel], data: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in `data`. Missing sections on the way are created, list entries are
    counted from 0, and the value is YAML.

    Raises:
        ImageRLError: the override has no `=`, or leads below a plain value or past the end of a list.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ImageRLError(
            f'cannot read the override "{override}"; write dotted.key=value, as in run.steps=50'
        )
    value = parse_yaml(text, f'override "{override}"')
    loc = cls.redirect(tuple(int(p) if p.isdecimal() else p for p in parts), value)
    here: Any = data
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        above = ".".join(map(str, loc[:depth])) or "the recipe"
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                entries = f"0 to {len(here) - 1}" if here else "none, it is empty"
                raise ImageRLError(f'override "{override}": {above} is a list with entries {entries}')
            if not last and here[part] is None:
                here[part] = {}
        elif isinstance(here, dict):
            part = str(part)
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            raise ImageRLError(
                f'override "{override}": {above} is {_type_name(here)}, there is nothing below it'
            )
        if last:
            here[part] = value
        else:
            here = here[part]


# ---- validation --------------------------------------------------------------------------------------------


def load_yaml_recipe(cls: type[RecipeT], path: str | Path, overrides: Sequence[str] = ()) -> RecipeT:
    """Read, override and validate a recipe.

    Raises:
        ImageRLError: one line with the file, the dotted key, and what it should be.
    """
    data = cls.prepare(read_recipe(path))
    if "kind" in cls.model_fields:
        ours = cast(str, get_args(cls.model_fields["kind"].annotation)[0])
        theirs = data.get("kind", "train")
        if theirs != ours:
            raise ImageRLError(f'{path} is a recipe of kind "{theirs}"; this command takes kind "{ours}"')
    for override in overrides:
        apply_override(cls, data, override)
    return validate_recipe(cls, data, str(path))


def validate_recipe(cls: type[RecipeT], data: dict[str, Any], source: str) -> RecipeT:
    """Build a recipe from plain data; `source` begins the message of the ImageRLError that it may raise."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ImageRLError(f"{source}: {_explain(cls, error.errors())}") from None


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
    if first["type"] == "extra_forbidden":
        return _unknown_key(cls, section, key)
    if first["type"] == "missing":
        return f'"{key}" is missing: {dict(iter_keys(cls)).get(re.sub(r"[.][0-9]+[.]", ".0.", key), "")}'
    if first["type"] == "value_error":
        message = _one_line(first["ctx"]["error"])
        return message if not key or key in message else f'"{key}": {message}'
    value = first["input"]
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\b[0-9]+\b)", first["ctx"]["expected"])
        names = [a or b for a, b in allowed]
        near = difflib.get_close_matches(str(value), names, 1, 0.4)
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
        keys = [k for k, _ in iter_keys(cls)]
        by_leaf = {k.rpartition(".")[2]: k for k in reversed(keys)}
        leaf = difflib.get_close_matches(last, list(by_leaf), 1, 0.8)
        meant = by_leaf[leaf[0]] if leaf else next(iter(difflib.get_close_matches(key, keys, 1)), "")
    hint = f'; did you mean "{meant}"?' if meant else ";"
    where = f'"{head}"' if head else "the top level"
    return f'unknown key "{key}"{hint} Keys of {where}: {", ".join(siblings)}'


def _wanted(error: ErrorDetails) -> str:
    """What pydantic asks for, without its account of what it got."""
    message = error["msg"].removeprefix("Input should be ").split(", got ")[0]
    for pattern, words in (
        ("valid string", "a string (put it in quotes)"),
        ("valid integer", "an integer"),
        ("valid number|finite number", "a number"),
        ("valid boolean", "true or false"),
        ("valid list|valid tuple", "a list"),
        ("valid dictionary", "a mapping"),
        ("None", "null"),
    ):
        if re.search(pattern, message):
            return words
    return message[:1].lower() + message[1:]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class within an annotation such as `Lora | None` or `list[RewardSpec]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for s in map(_section, get_args(annotation)) if s is not None), None)


def _holds_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list or any(map(_holds_list, get_args(annotation)))


def _names_beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _type_name(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{_shortened(_one_line(value))}"'
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return _shortened(_one_line(text.removesuffix("\n...\n")))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
