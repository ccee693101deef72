"""The one place that opens what users give."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files import reading
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import is_regular, read_json, read_text, require_plain


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=1)


class Whole(BaseModel):
    parts: list[Part]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"parts": [{"size": 1}, {"size": 0}]},
            'a: "parts.1.size" should be greater than or equal to 1, not 0',
        ),
        ({"parts": [{"size": 0, "sise": 1}]}, 'a: "parts.0.sise" is no setting that is known here'),
        ({"parts": [{}]}, 'a: "parts.0.size" is missing'),
        ({"parts": [{"size": "x" * 500}]}, 'a: "parts.0.size" should be an integer'),
        (None, "a: should be a mapping"),
    ],
)
def test_the_first_mistake_is_named_by_its_key(value: Any, message: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        validated(Whole, value, "a")
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 300
    assert validated(Whole, {"parts": [{"size": 1}]}, "a").parts[0].size == 1


def test_what_is_parsed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one part stands in many places, as aliases of YAML do, or in itself."""
    assert require_plain({"a": [1, 2.5, "é", None, True]}, "x") == {"a": [1, 2.5, "é", None, True]}
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(ImageRLError, match=r"x: .*nested more than 32 deep"):
        require_plain(itself, "x")
    with pytest.raises(ImageRLError, match=r"'2026-01-01' is a date; write it as text, in quotes"):
        require_plain([datetime.date(2026, 1, 1)], "x")
    monkeypatch.setattr(reading, "MAX_VALUES", 1000)
    many: list[Any] = ["ha"]
    for _ in range(20):
        many = [many] * 10
    with pytest.raises(ImageRLError, match="x: holds more than 1000 values"):
        require_plain(many, "x")


def test_files_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_json(tmp_path / "words.json") == {"a": 1}
    assert read_text(tmp_path / "words.json") == '{"a": 1}\n'
    for name, message in (
        ("word.json", 'no file ".*word.json"; did you mean ".*words.json"'),
        (".", "Is a directory"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "null"),
    ):
        assert not is_regular(tmp_path / name)
        with pytest.raises(ImageRLError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(ImageRLError, match="has 13 bytes; at most 12"):
        read_text(tmp_path / "words.json", 12)
    with pytest.raises(ImageRLError, match=r"pipe, a socket or a device"):
        read_text("/dev/zero")
