"""Requests and replies as bytes: what goes in comes out, and what is broken is refused with a status."""

import io
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from imagerl.rewards.boundary.wire import (
    Limits,
    WireError,
    pack_reply,
    pack_request,
    unpack_reply,
    unpack_request,
)
from imagerl.rewards.pictures import open_png, to_png, to_quick_png


def picture(seed: int, size: tuple[int, int] = (5, 3), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def packed(**columns: list[object]) -> bytes:
    return pack_request(["a", "b"], [[1, 2], [3]], [picture(0), picture(1)], columns, to_png)


def header(**changes: object) -> bytes:
    """A request of one sample with a header that is wrong in one place."""
    png = to_png(picture(0))
    assert png is not None
    fields = {"version": 1, "prompts": ["a"], "completions": [[1]], "columns": {}, "pictures": [len(png)]}
    return json.dumps({**fields, **changes}).encode() + b"\n" + png


def test_a_request_comes_back_whole() -> None:
    shared = picture(7, (4, 4))
    body = packed(
        reference=[shared, shared], mask=[None, picture(8)], n=[np.int64(2), 0.5], d=[{"a": [1]}, "ü"]
    )
    samples = unpack_request(body, open_png)
    assert samples["prompts"] == ["a", "b"] and samples["completions"] == [[1, 2], [3]]
    assert samples["completion_ids"] is samples["completions"]
    for seed, image in enumerate(samples["images"]):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(seed)))
    assert samples["reference"][0] is samples["reference"][1]  # sent once
    np.testing.assert_array_equal(np.asarray(samples["reference"][0]), np.asarray(shared))
    assert samples["mask"][0] is None and samples["mask"][1].size == (5, 3)
    assert samples["n"] == [2, 0.5] and samples["d"] == [{"a": [1]}, "ü"]


@pytest.mark.parametrize("write", [to_png, to_quick_png])
@pytest.mark.parametrize("mode", ["RGB", "1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_any_mode_survive(mode: str, write: Callable[[Image.Image], bytes | None]) -> None:
    sent = picture(0, mode=mode)
    opened = open_png(write(sent) or b"")
    assert opened.mode == ("RGB" if mode == "CMYK" else mode)
    np.testing.assert_array_equal(np.asarray(opened.convert("RGBA")), np.asarray(sent.convert("RGBA")))


@pytest.mark.parametrize("value", [object(), math.nan, {1, 2}, b"bytes"])
def test_a_column_that_cannot_be_sent_is_named(value: object) -> None:
    with pytest.raises(WireError, match="column 'odd' cannot be sent"):
        packed(odd=[None, value])


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "not a line of JSON"),
        (b"\x80\x04K\x01.", 400, "not a line of JSON"),
        (b"\x80\x04K\x01.\n", 400, "first line is not JSON"),
        (b"[" * 100_000 + b"\n", 400, "first line is not JSON"),
        (b"[]\n", 400, "not a JSON object"),
        (b'{"version": NaN}\n', 400, "NaN is not JSON"),
        (header(version=2), 400, "version 2"),
        (header(prompts=[]), 400, "at least one"),
        (header(prompts=[3]), 400, "must be texts"),
        (header(completions=[]), 400, "1 lists of token ids"),
        (header(completions=[["1"]]), 400, "1 lists of token ids"),
        (header(columns=[]), 400, "'columns' is missing or is no object"),
        (header(columns={"a": [1, 2]}), 400, "'a' must be a list of 1"),
        (header(columns={"images": [1]}), 400, "cannot be the name"),
        (header(columns={"a b": [1]}), 400, "cannot be the name"),
        (header(columns={"a": [{"$picture": 5}]}), 400, "names no picture"),
        (header(columns={"a": [{"$picture": -1}]}), 400, "names no picture"),
        (header(pictures=[-4]), 400, "sizes in bytes"),
        (header(pictures=[True]), 400, "sizes in bytes"),
        (header(pictures=[10**9]), 400, "were announced"),
        (header() + b"more", 400, "were announced"),
        (header(prompts=["a", "b"], completions=[[], []]), 400, "2 prompts came with 1 pictures"),
    ],
)
def test_malformed_requests_are_refused(body: bytes, status: int, text: str) -> None:
    with pytest.raises(WireError, match=text) as refusal:
        unpack_request(body, open_png)
    assert refusal.value.status == status


def _with_picture(png: bytes) -> bytes:
    line = {"version": 1, "prompts": ["a"], "completions": [[]], "columns": {}, "pictures": [len(png)]}
    return json.dumps(line).encode() + b"\n" + png


def test_broken_and_oversized_pictures_are_refused() -> None:
    png = to_png(picture(0, (64, 64))) or b""
    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    for body, status, text in [
        (_with_picture(b"GIF89a" + b"\0" * 40), 400, "picture 0 is not a PNG"),
        (_with_picture(png[: len(png) // 2]), 400, "picture 0 cannot be decoded"),
        (_with_picture(huge), 413, "picture 0 has 60000×60000 pixels"),
    ]:
        with pytest.raises(WireError, match=text) as refusal:
            unpack_request(body, open_png)
        assert refusal.value.status == status
    limits = [Limits(body=10), Limits(header=10), Limits(pictures=0), Limits(pixels=64 * 64 - 1)]
    for limit in limits:
        with pytest.raises(WireError) as refusal:
            unpack_request(_with_picture(png), open_png, limit)
        assert refusal.value.status == 413
    assert unpack_request(_with_picture(png), open_png, Limits(pixels=64 * 64))["images"][0].size == (64, 64)


def blank(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def with_pictures(files: list[bytes], **columns: list[object]) -> bytes:
    fields = {"version": 1, "prompts": ["a"], "completions": [[1]], "columns": columns}
    return b"".join(
        [json.dumps({**fields, "pictures": [len(file) for file in files]}).encode(), b"\n", *files]
    )


def test_only_pictures_that_are_used_are_unpacked_and_once() -> None:
    opened: list[int] = []

    def opener(data: bytes) -> Image.Image:
        opened.append(len(data))
        return open_png(data)

    files = [blank(8, 8), *[blank(400, 400)] * 28, blank(16, 16)]
    samples = unpack_request(
        with_pictures(files, reference=[{"$picture": 29}], again=[{"$picture": 29}]), opener
    )
    assert opened == [len(files[0]), len(files[29])]
    assert samples["reference"][0] is samples["again"][0] and samples["reference"][0].size == (16, 16)


def test_pictures_are_bounded_together_before_any_is_unpacked() -> None:
    """30 blank pictures of 4096² are 1.5 MB as they come, and 2.4 GB as they are."""
    body, limits = with_pictures([blank(100, 100)] * 30), Limits(body=3 * 290_000)

    def opener(_: bytes) -> None:
        raise AssertionError("it was unpacked")

    with pytest.raises(WireError, match="have 300000 pixels together; at most 290000 are taken") as refusal:
        unpack_request(body, opener, limits)
    assert refusal.value.status == 413 and len(body) < 10_000
    honest = pack_request(
        ["a"] * 29, [[1]] * 29, [picture(s, (100, 100)) for s in range(29)], {}, to_quick_png
    )
    with pytest.raises(
        WireError, match="it was unpacked"
    ):  # what is sent uncompressed is bounded by its bytes
        unpack_request(honest, opener, Limits(body=len(honest)))


def test_a_second_header_does_not_smuggle_a_larger_picture() -> None:
    large = blank(300, 300)
    small_header = blank(2, 2)[8:33]  # length, IHDR, 13 bytes, checksum
    smuggled = large[:8] + small_header + large[8:]
    assert Image.open(io.BytesIO(smuggled)).size == (300, 300)  # Pillow goes by the last
    with pytest.raises(WireError, match="two headers"):
        unpack_request(with_pictures([smuggled]), open_png)


def test_a_refusal_is_short_and_cannot_write_to_the_terminal() -> None:
    with pytest.raises(WireError, match="x…") as refusal:
        unpack_request(header(columns={"a": [{"$picture": "x" * 10_000}]}), open_png)
    assert len(str(refusal.value)) <= 500
    reply = unpack_reply(pack_reply([1.0], {"\x1b[31mred": [2.0]}, "\x1b[2J\x1b]0;title\x07gone\n\x00"), 1)
    assert reply == ([1.0], {"red": [2.0]}, "gone \ufffd", [])


def test_regions_go_with_a_reply() -> None:
    regions = [[[1.0, 0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 0.0, 1.0, 1.0]], []]
    assert unpack_reply(pack_reply([1.0, 2.0], {}, None, regions), 2).regions == regions
    assert unpack_reply(pack_reply([1.0, 2.0], {}), 2).regions == []
    for wrong in (regions[:1], [[[1.0, 0.0]], []], [[["a"] * 5], []], [[[None, 0, 0, 1, 1]], []], {"a": 1}):
        body = json.dumps({"rewards": [1, 2], "regions": wrong}).encode()
        with pytest.raises(WireError, match="no reply"):
            unpack_reply(body, 2)


def test_a_reply_tells_failed_from_not_applicable() -> None:
    reply = unpack_reply(
        pack_reply([0.1, None, math.nan, math.inf], {"p": [1.0, math.nan, None, 2.0]}, "so"), 4
    )
    assert reply.rewards[:2] == [0.1, None]
    assert all(math.isnan(value) for value in reply.rewards[2:] if value is not None)
    assert reply.breakdown == {"p": [1.0, None, None, 2.0]} and reply.reason == "so"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"rewards": [1]}',
        b'{"rewards": [1, "2"]}',
        b'{"rewards": [1, true]}',
        b'{"rewards": [1, 1' + b"0" * 400 + b"]}",
        b'{"rewards": [1, 2], "failed": [2]}',
        b'{"rewards": [1, 2], "breakdown": {"a": [1]}}',
        b'{"rewards": [1, 2], "breakdown": 5}',
    ],
)
def test_rubbish_is_no_reply(body: bytes) -> None:
    with pytest.raises(WireError, match="is no reply"):
        unpack_reply(body, 2)
