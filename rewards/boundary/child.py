"""Serve a reward from an interpreter that need not have any of our dependencies: `PYTHON rewards/boundary/child.py`.

A line of JSON on stdin says what to load and which token to ask for. A line on stdout says on which port of this
machine requests of `rewards.boundary.wire` are taken, or what must be mended. The end of stdin ends the process.
Pictures are PIL's where Pillow is installed, else the bytes of PNG files. What the reward prints goes to stderr. Keep
this file to the Python of old environments."""

from __future__ import annotations

import hmac
import io
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import ModuleType
from typing import Any


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


def opener() -> Callable[[bytes], object]:
    """Return a function from a PNG file to a picture."""
    try:
        from PIL import Image
    except ImportError:
        return bytes

    def open_picture(data: bytes) -> object:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture.copy()

    return open_picture


def serve(token: str, jobs: queue.SimpleQueue[Any]) -> int:
    """Take requests of those who know the token, each in a thread of its own: (body, where the answer goes). Return
    the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = 401, b'{"error": "the token is missing or wrong"}'
            if hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
            ):
                reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
                jobs.put((self.rfile.read(int(self.headers["Content-Length"])), reply))
                status, answer = reply.get()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def main() -> None:
    inlet, outlet = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    guard, targets, wire = _own_modules()
    wanted = json.loads(inlet.readline().decode())

    def watch() -> None:
        inlet.read()
        os._exit(0)  # whoever started this is gone, even if the reward is still at work

    threading.Thread(target=watch, daemon=True).start()
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    label = wanted["target"].rpartition(":")[2]
    try:
        found = targets.import_target(wanted["target"])
        targets.check_settings(label, found, wanted["settings"])
        if wanted["columns"] is not None:
            targets.check_columns(label, targets.needed_columns(found, wanted["settings"]), wanted["columns"])
        reward = targets.construct(label, found, wanted["settings"])
        names = [parameter.name for parameter in targets.call_parameters(found)]
        told = {"parameters": names, "port": serve(wanted["token"], jobs)}
    except guard.ImageRLError as error:
        told = {"mend": str(error)}
    print(json.dumps(told), file=outlet, flush=True)
    open_picture, limits = opener(), wire.Limits(*[2**40] * 4)  # the parent is not an adversary

    def answer(body: bytes) -> tuple[int, bytes]:
        try:
            samples = wire.unpack_request(body, open_picture, limits)
            return 200, wire.pack_reply(*guard.score_samples(reward, samples))
        except (wire.WireError, guard.ImageRLError) as error:
            status = getattr(error, "status", 422)
            return status, json.dumps({"error": str(error)}).encode()

    while True:  # in the main thread, where a reward may expect to be
        body, reply = jobs.get()
        reply.put(answer(body))


if __name__ == "__main__":
    main()
