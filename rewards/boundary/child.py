"""Run a reward in an interpreter that need not have any of our dependencies: `PYTHON rewards/boundary/child.py`.

Frames (a length of 8 bytes, then that many) come on stdin and go to stdout. The first one says what to load, every
other one is a request of `rewards.boundary.wire`; each is answered by one. Pictures are PIL's where Pillow is
installed, else the bytes of PNG files. What the reward prints goes to stderr. Keep this file to the Python of old
environments."""

from __future__ import annotations

import io
import json
import os
import queue
import struct
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO


def _own_modules() -> tuple[Any, Any, Any]:
    """Return our `guard`, `targets` and `wire`, without leaving our packages in the way of the user's imports."""
    folder = Path(__file__).resolve().parent
    sys.path = [path for path in sys.path if not path or Path(path).resolve() != folder]
    top = folder.parents[1]
    for name, place in (
        ("imagerl", top),
        ("imagerl.rewards", folder.parent),
        ("imagerl.rewards.boundary", folder),
        ("imagerl.rl", top / "rl"),
    ):
        package = ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    from imagerl.rewards.boundary import guard, targets, wire

    for name in list(sys.modules):
        if name.split(".")[0] == "imagerl":
            del sys.modules[name]
    return guard, targets, wire


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next frame; None at the end of the stream."""
    start = stream.read(8)
    if len(start) < 8:
        return None
    (size,) = struct.unpack(">Q", start)
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: BinaryIO, body: bytes) -> None:
    stream.write(struct.pack(">Q", len(body)) + body)
    stream.flush()


def opener() -> Any:
    """Return a function from a PNG file to a picture."""
    try:
        from PIL import Image
    except ImportError:
        return bytes

    def open_picture(data: bytes) -> Any:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture.copy()

    return open_picture


def main() -> None:
    inlet, outlet = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    boundary, targets, wire = _own_modules()
    mend = boundary.ImageRLError
    frames: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        body = read_frame(inlet)
        while body is not None:
            frames.put(body)
            body = read_frame(inlet)
        os._exit(0)  # whoever started this is gone, even if the reward is still at work

    threading.Thread(target=read, daemon=True).start()

    def load() -> tuple[Any, bytes]:
        wanted = json.loads(frames.get().decode())
        try:
            label = targets.split_target(wanted["target"])[1]
            found = targets.import_target(wanted["target"])
            targets.check_settings(label, found, wanted["settings"])
            if wanted["columns"] is not None:
                needed = targets.needed_columns(found, wanted["settings"])
                targets.check_columns(label, needed, wanted["columns"])
            names = [parameter.name for parameter in targets.call_parameters(found)]
            reward = targets.construct(label, found, wanted["settings"])
        except mend as error:
            return None, json.dumps({"mend": str(error)}).encode()
        return reward, json.dumps({"parameters": names}).encode()

    def score(body: bytes) -> bytes:
        try:
            samples = wire.unpack_request(body, open_picture, limits)
            return bytes(wire.pack_reply(*boundary.score_samples(reward, samples)))
        except mend as error:
            return json.dumps({"mend": str(error)}).encode()

    reward, answer = load()
    open_picture, limits = opener(), wire.Limits(2**40, 2**40, 2**40, 2**40)  # the parent is not an adversary
    while True:
        write_frame(outlet, answer)
        answer = score(frames.get())


if __name__ == "__main__":
    main()
