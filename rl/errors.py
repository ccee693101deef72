"""Errors that the user can mend, and text of others made fit for one line of a terminal or log.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# What a terminal obeys instead of showing: colours and cursor (CSI), titles and links (OSC), device strings, and
# the two-character commands. 7-bit and 8-bit forms.
TERMINAL_COMMANDS = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)


def one_line(text: object, most: int | None = None) -> str:
    """Write text from anywhere (a server, a file, an exception) as one line of at most `most` characters.

    White space becomes single blanks and terminal commands are left out; every other character that cannot be
    printed, a lone surrogate or a bidirectional mark for example, becomes a question mark in a diamond."""
    plain = TERMINAL_COMMANDS.sub("", str(text))
    line = " ".join(plain.split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def why(error: BaseException, most: int = 200) -> str:
    """Write an exception of others' code as "ValueError: too long", in one line."""
    return f"{type(error).__name__}: {one_line(error, most)}"


def nearest(word: str, names: Iterable[str], alike: float = 0.0) -> str | None:
    """Find the name that a word is a slip of the pen for: case aside it begins alike or has most letters in common, a
    share of `alike` at least."""
    known = {name.lower(): name for name in names}
    word = word[:80].lower()
    near = difflib.get_close_matches(word, known, 1, max(alike, 0.66 if len(word) <= 4 else 0.75))
    longer = (
        name for name in known if len(word) > 1 and (name.startswith(word) or word.startswith(f"{name}_"))
    )
    found = near[0] if near else next(longer, None)
    return None if found is None else known[found]


def hint(word: str, names: Sequence[str], otherwise: str = "it has") -> str:
    """Say which of the names was meant, or which there are: "did you mean width?", "it has: width, height"."""
    near = nearest(word, names)
    return f"did you mean {near}?" if near else f"{otherwise}: {', '.join(names) or 'none'}"


class ImageRLError(Exception):
    """Something the user can mend. The message is one line that names the fix; the command line
    prints it without a traceback."""

    def __str__(self) -> str:  # names of files, prompts and servers' words are part of many messages
        return one_line(super().__str__())
