"""Pack scoring requests and replies as bytes, which go between a run and a reward that lives elsewhere.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`). Nothing is ever unpickled. A request is one line of JSON and then PNG files, one behind
the other:

    {"version": 1, "prompts": [...], "completions": [[...]], "columns": {...}, "pictures": [<bytes>, ...]}\\n
    <PNG><PNG>...

The first pictures are those to score, one a prompt. Further ones belong to columns, where {"$picture": n} stands
for the n-th. A reply is JSON,

    {"rewards": [...], "failed": [...], "breakdown": {...}, "reason": "...", "regions": [[[...], ...], ...]}

null among the rewards means not applicable, except for the places in `failed`; null in the breakdown means no value."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from imagerl.rl.errors import one_line

VERSION = 1
PICTURE = "$picture"
NAMES = ("prompts", "completions", "columns", "pictures")
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
MIB = 2**20
LONGEST_REASON = 500  # characters


class WireError(ValueError):
    """A message that cannot be accepted, in one line. `status` is HTTP's."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(one_line(text, LONGEST_REASON))
        self.status = status


class Limits(NamedTuple):
    """The most that a receiver takes. All pictures of a request together may have as many pixels as `body` holds in
    RGB: what is sent uncompressed is within it anyway, and nothing else may unpack to more."""

    body: int = 256 * MIB  # bytes of a request
    header: int = 16 * MIB  # bytes of its JSON
    pictures: int = 4096
    pixels: int = 4096 * 4096  # of one picture


LIMITS = Limits()


class Reply(NamedTuple):
    """NaN among the rewards marks a sample that failed, None one to which the reward does not apply."""

    rewards: list[float | None]
    breakdown: dict[str, list[float | None]]
    reason: str | None
    regions: Sequence[
        Sequence[Sequence[float]]
    ] = ()  # of each sample, see `rl.types.RewardOutput`; (): none at all


def pack_request(
    prompts: Sequence[str],
    completions: Sequence[Sequence[int]],
    images: Sequence[object],
    columns: Mapping[str, Sequence[object]],
    to_png: Callable[[object], bytes | None],
) -> bytes:
    """Pack a request. `to_png` returns a picture as PNG, and None for anything else.

    Raises WireError for a column that is neither JSON nor pictures."""
    files: list[bytes] = []
    places: dict[int, int] = {}

    def place(picture: object) -> int | None:
        if id(picture) not in places:
            data = to_png(picture)
            if data is None:
                return None
            places[id(picture)] = len(files)
            files.append(data)
        return places[id(picture)]

    for index, image in enumerate(images):
        files.append(to_png(image) or b"")
        places[id(image)] = index

    def plain(entry: object) -> object:
        number = place(entry)
        if number is not None:
            return {PICTURE: number}
        if hasattr(entry, "tolist"):  # arrays and tensors
            return entry.tolist()
        raise TypeError(f"{type(entry).__name__} is not JSON")

    sent = {}
    for name, values in columns.items():
        try:
            sent[name] = json.loads(json.dumps(list(values), default=plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise WireError(
                f"column {name!r} cannot be sent to another process: {error}; make it JSON or pictures"
            ) from error
    header = {
        "version": VERSION,
        "prompts": list(prompts),
        "completions": [list(tokens) for tokens in completions],
        "columns": sent,
        "pictures": [len(data) for data in files],
    }
    return b"".join([json.dumps(header).encode(), b"\n", *files])


def unpack_request(
    body: bytes, open_picture: Callable[[bytes], object], limits: Limits = LIMITS
) -> dict[str, list[Any]]:
    """Return the keyword arguments of a reward: prompts, completions, completion_ids, images and columns.

    Raises WireError for everything that is not a whole request within the limits."""
    if len(body) > limits.body:
        raise WireError(f"the request has {len(body)} bytes; at most {limits.body} are taken", 413)
    end = body.find(b"\n", 0, limits.header + 1)
    if end < 0:
        if len(body) > limits.header:
            raise WireError(f"the JSON line is longer than {limits.header} bytes", 413)
        raise WireError("the request is not a line of JSON followed by PNG files")
    header = _header(body[:end])
    size = len(header["prompts"])
    data = _split(body, end + 1, header["pictures"], limits)
    if len(data) < size:
        raise WireError(f"{size} prompts came with {len(data)} pictures")
    pixels = sum(_pixels(number, png, limits.pixels) for number, png in enumerate(data))
    if 3 * pixels > limits.body:
        raise WireError(
            f"the pictures have {pixels} pixels together; at most {limits.body // 3} are taken", 413
        )

    @lru_cache(None)  # only what is used is unpacked, and once
    def picture(number: int) -> object:
        try:
            return open_picture(data[number])
        except Exception as error:  # decoders raise whatever they like at a broken file
            raise WireError(f"picture {number} cannot be decoded: {error}") from error

    images = [picture(number) for number in range(size)]
    columns = {name: _filled(values, picture, len(data)) for name, values in header["columns"].items()}
    completions = header["completions"]
    return {
        "prompts": header["prompts"],
        "completions": completions,
        "completion_ids": completions,
        "images": images,
        **columns,
    }


def _header(line: bytes) -> dict[str, Any]:
    """Read the JSON of a request, every type in it checked."""

    def refuse(constant: str) -> None:
        raise WireError(f"{constant} is not JSON")

    try:
        header = json.loads(line.decode(), parse_constant=refuse)
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"the first line is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise WireError("the first line is not a JSON object")
    if header.get("version") != VERSION:
        raise WireError(f"version {header.get('version')!r} of the protocol; this is version {VERSION}")
    for name in NAMES:
        wanted = dict if name == "columns" else list
        if not isinstance(header.get(name), wanted):
            raise WireError(f"{name!r} is missing or is no {'object' if wanted is dict else 'list'}")
    size = len(header["prompts"])
    if not size or not all(isinstance(prompt, str) for prompt in header["prompts"]):
        raise WireError("prompts must be texts, at least one")
    if len(header["completions"]) != size or not all(_are_counts(row) for row in header["completions"]):
        raise WireError(f"completions must be {size} lists of token ids")
    if not _are_counts(header["pictures"]):
        raise WireError("pictures must be sizes in bytes")
    for name, values in header["columns"].items():
        if not name.isidentifier() or name in ("prompts", "completions", "completion_ids", "images"):
            raise WireError(f"{name!r} cannot be the name of a column")
        if not isinstance(values, list) or len(values) != size:
            raise WireError(f"column {name!r} must be a list of {size}")
    return header


def _are_counts(entries: object) -> bool:
    return isinstance(entries, list) and all(type(entry) is int and entry >= 0 for entry in entries)


def _split(body: bytes, start: int, sizes: list[int], limits: Limits) -> list[bytes]:
    if len(sizes) > limits.pictures:
        raise WireError(f"{len(sizes)} pictures; at most {limits.pictures} are taken", 413)
    if start + sum(sizes) != len(body):
        raise WireError(f"{sum(sizes)} bytes of pictures were announced, {len(body) - start} came")
    files = []
    for size in sizes:
        files.append(body[start : start + size])
        start += size
    return files


def _pixels(number: int, data: bytes, most: int) -> int:
    """Count the pixels of a PNG file, from its header."""
    if not data.startswith(PNG_START) or len(data) < 24:
        raise WireError(f"picture {number} is not a PNG file")
    width, height = struct.unpack(">II", data[16:24])
    if width * height > most:
        raise WireError(f"picture {number} has {width}×{height} pixels; at most {most} are taken", 413)
    return int(width * height)


def _filled(entry: object, picture: Callable[[int], object], count: int) -> object:
    """Return a column with its pictures, of which there are `count`, in place."""
    if isinstance(entry, list):
        return [_filled(value, picture, count) for value in entry]
    if not isinstance(entry, dict):
        return entry
    if PICTURE not in entry:
        return {key: _filled(value, picture, count) for key, value in entry.items()}
    number = entry[PICTURE]
    if len(entry) > 1 or type(number) is not int or not 0 <= number < count:
        raise WireError(f"{entry!r} names no picture")
    return picture(number)


def pack_reply(
    rewards: Sequence[float | None],
    breakdown: Mapping[str, Sequence[float | None]],
    reason: str | None = None,
    regions: Sequence[Sequence[Sequence[float]]] = (),
) -> bytes:
    """Pack a reply. Any reward that is not finite has failed."""
    failed = [place for place, value in enumerate(rewards) if value is not None and not math.isfinite(value)]
    reply = {
        "rewards": [_finite(value) for value in rewards],
        "failed": failed,
        "breakdown": {name: [_finite(value) for value in values] for name, values in breakdown.items()},
        "reason": reason,
        **({"regions": regions} if regions else {}),
    }
    return json.dumps(reply, allow_nan=False).encode()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def unpack_reply(body: bytes, size: int) -> Reply:
    """Return the reply for `size` samples. Raises WireError when it is not one."""
    try:
        reply = json.loads(body.decode())
        rewards, breakdown = reply["rewards"], reply.get("breakdown") or {}
        failed, reason = reply.get("failed") or [], reply.get("reason")
        columns = {one_line(name): _numbers(values, size) for name, values in breakdown.items()}
        values = _numbers(rewards, size)
        regions = reply.get("regions") or []
        if regions and len(regions) != size:
            raise ValueError(f"expected regions of {size}")
        regions = [[_finite_numbers(region, 5) for region in sample] for sample in regions]
        for place in failed:
            values[range(size)[place]] = math.nan
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise WireError(f"the answer is no reply ({type(error).__name__}: {error})") from error
    return Reply(values, columns, None if reason is None else one_line(reason, LONGEST_REASON), regions)


def _finite_numbers(entries: object, size: int) -> list[float]:
    numbers = [math.nan if entry is None else entry for entry in _numbers(entries, size)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("expected finite numbers")
    return numbers


def _numbers(entries: object, size: int) -> list[float | None]:
    if not isinstance(entries, list) or len(entries) != size:
        raise ValueError(f"expected a list of {size}")
    if any(entry is not None and type(entry) not in (int, float) for entry in entries):
        raise ValueError("expected numbers")
    return [None if entry is None else float(entry) for entry in entries]
