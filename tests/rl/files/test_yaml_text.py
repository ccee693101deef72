"""The one reader of YAML and what it refuses; `tests/rl/config/test_train.py` has the scalars."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from imagerl.rl.config.train import load_recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.yaml_text import MAX_RECIPE_VALUES, Dumper, parse_yaml, parse_yaml_lines

BOMB = "b0: &b0 [1]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "line 1, column 5: more than 20000 keys and values, with what aliases stand for"),
        ("a: &a [*a]", "nested more than 32 deep"),
        ("a: &a {b: *a}", "nested more than 32 deep"),
        ("[" * 100_000, "line 1, column 33: nested more than 32 deep"),
        ("- " * 100_000, "nested more than 32 deep"),
        (f"[{'1,' * (MAX_RECIPE_VALUES + 1)}]", "more than 20000 keys and values"),
        ("a: !!timestamp foo", "line 1, column 4: the tag tag:yaml.org,2002:timestamp is not read here"),
        ("a: !!int foo", "is not read here"),
        ("a: !!python/object:os.system {}", "is not read here"),
        ("a: !mine 1", "the tag !mine is not read here"),
        ("a: *b", "found undefined alias 'b'"),
        ("{[a]: 1}", "a key must be a plain word"),
        (f"{'k' * 201}: 1", "a key has 201 letters, more than 200"),
        ("a: 1e300", "line 1, column 4: 1e300 cannot be computed with; numbers lie between 1e-30 and 1e+30"),
        ("a: 1e999", "1e999 cannot be computed with"),
        ("a: -1e-300", "-1e-300 cannot be computed with"),
        ("a: 1e-999", "1e-999 cannot be computed with"),
        ("a: .nan", ".nan cannot be computed with"),
        ("a: 9223372036854775808", "9223372036854775808 cannot be computed with"),
        (f"a: {'9' * 5000}", "cannot be computed with"),
        (r'a: "\ud800"', r"the character '\ud800' cannot stand in a text"),
        (r'"a\0b": 1', r"the character '\x00' cannot stand in a text"),
        (r'a: "\x1b[2J"', r"the character '\x1b' cannot stand in a text"),
        ("a: \x07", "not YAML (unacceptable character #x0007"),
        ("--- 1\n--- 2", "line 2, column 1: expected a single document in the stream but found another document"),
    ],
)  # fmt: skip
def test_what_is_beyond_the_limits_is_refused_with_its_place(text: str, part: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        parse_yaml(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml") and part in message, message
    assert message.isprintable() and len(message) < 300


def test_what_is_within_the_limits_is_read() -> None:
    deep = "[" * 31 + "1" + "]" * 31
    assert yaml.safe_load(deep) == parse_yaml(deep, "it")
    text = 'a: [0, -0.0, 0e999, 1e30, 1e-30, 9223372036854775807, .inf]\nb: "tab\\t, line\\n, é, 😀, \\x85"'
    read = parse_yaml(text, "it")
    assert read["a"] == [0, 0.0, 0.0, 1e30, 1e-30, 2**63 - 1, float("inf")]
    assert read["b"] == "tab\t, line\n, é, 😀, \x85"
    assert parse_yaml_lines("- 1\n\n- 2\n", "it") == ([1, 2], [1, 3])


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    """PyYAML builds one object for both places: an override of one changed the other."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "run: {steps: 1, output_dir: x}\nrewards: [{name: ocr}]\n"
        "data: {train: &set {name: tiny_world, split: train}, heldout: *set}\n"
    )
    data = load_recipe(file, ["data.heldout.split=heldout"]).data
    assert (data.train.split, data.heldout.split) == ("train", "heldout")


def test_what_is_dumped_needs_no_aliases() -> None:
    shared = [1, 2]
    assert yaml.dump({"a": shared, "b": shared}, Dumper=Dumper) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\n"
