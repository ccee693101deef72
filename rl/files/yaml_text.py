"""YAML of users, in files or on the command line, read within limits into plain data. Whatever is wrong with it is an
ImageRLError in one line. Importable without torch."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.reading import MAX_DEPTH, MAX_INTEGER

MAX_RECIPE_BYTES = 1 << 20  # of a file that is written by hand
MAX_RECIPE_VALUES = 20_000  # keys and values in it, each alias counted with all it stands for
MAX_VALUES = 200_000  # the same of a list of prompts; larger ones are better kept as JSON lines
MAX_KEY = 200  # letters of a key
LARGEST, SMALLEST = 1e30, 1e-30  # single precision ends at 3e38 and 1e-38; products need room

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
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no keys but texts, no more than `most` values."""

    yaml_implicit_resolvers: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self._values, self._depth, self._most = 0, 0, most

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self._values, self._depth = self._values + 1, self._depth + 1
        _refuse_excess(self._depth, self._values, self._most, event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _problem(f"the tag {event.tag} is not read here; write the plain value", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a plain word", key.start_mark)
            if len(key.value) > MAX_KEY:
                raise _problem(f"a key has {len(key.value)} letters, more than {MAX_KEY}", key.start_mark)
            if key.value in seen:
                raise _problem(f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something other than a string."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _yaml_class in (_Loader, Dumper):
        _regex = re.compile(rf"^(?:{_pattern})$")
        _yaml_class.add_implicit_resolver(_tag, _regex, [c if c != "\0" else "" for c in _first])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(node.value))
Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def parse_yaml(text: str, source: str, most: int = MAX_RECIPE_VALUES) -> Any:
    """Parse one YAML document as plain data, a tree in which nothing is shared.

    Raises ImageRLError with line and column: a syntax error, a double key, a tag, more than `most` values, deep
    nesting, a number beyond computing, or a text that cannot be written to a file."""
    return parse_yaml_lines(text, source, most)[0]


def parse_yaml_lines(text: str, source: str, most: int = MAX_VALUES) -> tuple[object, list[int]]:
    """Parse like `parse_yaml`, and return the line numbers of the entries when the document is a list."""
    try:
        loader = _Loader(text, most)
        node = loader.get_single_node()
        if node is None:
            return None, []
        # Before anything is built: a few lines of aliases stand for more than memory holds.
        _check(node, most)
        lines = [e.start_mark.line + 1 for e in node.value] if isinstance(node, yaml.SequenceNode) else []
        return unshared(loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or ""
        told = f"{error.context} {problem}" if problem.startswith("but") else problem
        raise ImageRLError(f"{source}{where}: {one_line(told, 200)}") from None
    except yaml.YAMLError as error:
        raise ImageRLError(f"{source}: not YAML ({one_line(error, 200)})") from None


def _problem(text: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _refuse_excess(depth: int, entries: int, most: int, mark: yaml.Mark | None) -> None:
    if depth > MAX_DEPTH:
        raise _problem(f"nested more than {MAX_DEPTH} deep", mark)
    if entries > most:
        raise _problem(f"more than {most} keys and values, with what aliases stand for", mark)


def _check(root: yaml.Node, most: int) -> None:
    """Walk the document as the tree that it stands for. An alias is a second way to the same node, or, within
    itself, a way without an end."""
    left, entries = [(root, 1)], 0
    while left:
        node, depth = left.pop()
        entries += 1
        _refuse_excess(depth, entries, most, node.start_mark)
        if isinstance(node, yaml.MappingNode):
            left += [(child, depth + 1) for pair in reversed(node.value) for child in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            left += [(child, depth + 1) for child in reversed(node.value)]
        elif found := _UNWRITABLE.search(node.value):
            raise _problem(f"the character {found[0]!a} cannot stand in a text", node.start_mark)
        elif node.tag.endswith((":int", ":float")) and not _computable(node.value, node.tag):
            shown = one_line(node.value, 40)
            raise _problem(
                f"{shown} cannot be computed with; numbers lie between {SMALLEST:g} and {LARGEST:g} in size",
                node.start_mark,
            )


def _computable(text: str, tag: str) -> bool:
    if tag.endswith(":int"):
        return len(text) <= 20 and abs(int(text)) < MAX_INTEGER
    size = abs(_float(text))
    if "n" in text.lower():  # .inf is meant: a reward of one's own may want it, and bounds refuse it by name
        return not math.isnan(size)
    is_zero = not re.search("[1-9]", text.lower().partition("e")[0])
    return is_zero or SMALLEST <= size <= LARGEST


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def unshared(value: object) -> object:
    """Copy lists and mappings, each wherever it stands, so that a change is one change; all within them stays what it
    is."""
    if isinstance(value, dict):
        return {key: unshared(entry) for key, entry in value.items()}
    return [unshared(entry) for entry in value] if isinstance(value, list) else value
