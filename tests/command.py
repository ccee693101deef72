"""Commands as a user gives them, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from imagerl.rl.commands.cli import main


def exit_code(arguments: Sequence[str], *program: Any) -> int:
    """The exit code of `imagerl` with these arguments, or of another program and its name."""
    with pytest.raises(SystemExit) as ended:
        main(arguments, *program)
    return int(ended.value.code or 0)


def call(*arguments: str) -> int:
    return exit_code(arguments)


def imagerl(capsys: pytest.CaptureFixture[str], *arguments: str) -> SimpleNamespace:
    """`code`, `out` and `err` of a command."""
    capsys.readouterr()
    code = exit_code(arguments)
    printed = capsys.readouterr()
    return SimpleNamespace(code=code, out=printed.out, err=printed.err)
