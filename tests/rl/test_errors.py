"""Text of others on one line, and nothing in it that a terminal would obey."""

import io

import pytest
from rich.console import Console

from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.metrics import Progress


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("  two\n lines\tand\u00a0more ", "two lines and more"),
        ("\x1b[31;1mred\x1b[0m and \x9b4munderlined", "red and underlined"),  # colours, 7 and 8 bits
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "ablink"),  # title and link
        ("a\x1bPdevice\x1b\\b\x1b(0c\x1bcd", "abcd"),  # device string, character set, reset
        ("never ended \x1b]0;title", "never ended"),
        ("over\rwritten\x08\x00", "over written\ufffd\ufffd"),
        ("\u202egnp.exe \ud800 ü 漢 🙂", "\ufffdgnp.exe \ufffd ü 漢 🙂"),  # turned round; half a character
        (ValueError("an\nerror"), "an error"),
        ("", ""),
    ],
)
def test_one_line(text: object, line: str) -> None:
    assert one_line(text) == line


def test_a_long_line_is_cut() -> None:
    assert one_line("abcdef", 6) == "abcdef" and one_line("abcdefg", 6) == "abcde…"


def test_an_error_is_one_clean_line_whoever_prints_it() -> None:
    error = ImageRLError("no file \x1b[2J\x1b[31mname\n.yaml")
    assert str(error) == f"{error}" == "no file name .yaml" and error.args == (
        "no file \x1b[2J\x1b[31mname\n.yaml",
    )


def test_notes_of_a_run_cannot_write_to_the_terminal() -> None:
    file = io.StringIO()
    Progress(3, console=Console(file=file, width=200)).note(
        "reward: \x1b]0;title\x07\x1b[31mred\x1b[0m\nagain"
    )
    assert file.getvalue() == "reward: red again\n"
