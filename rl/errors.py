import re

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


class ImageRLError(Exception):
    """Something the user can mend. The message is one line that names the fix; the command line
    prints it without a traceback."""


def one_line(text: object, most: int | None = None) -> str:
    """Text of any origin as one printable line of at most `most` characters: runs of white space are one blank, and
    what would steer a terminal is left out."""
    line = " ".join(_ESCAPES.sub("", str(text)).split())
    return line if most is None or len(line) <= most else line[: most - 3] + "..."
