"""The Ray of a run: a cluster that is said to run, and one that does not start."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from imagerl.rl.engine.cluster import start_ray
from imagerl.rl.types import ImageRLError


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{port}", "refused"),
        ("ray://127.0.0.1:{port}", "refused"),
        ("127.0.0.1:99999", "Port out of range"),
    ],
)
def test_a_cluster_that_is_gone_is_one_line_at_once(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("RAY_ADDRESS", address.format(port=free.getsockname()[1]))
    with pytest.raises(
        ImageRLError, match=rf"no Ray cluster .* at RAY_ADDRESS=.* \(.*{why}.*\); unset RAY_ADDRESS"
    ):
        start_ray(1)


def test_a_cluster_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens at the port of yesterday's cluster."""
    over = threading.Event()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: over.wait(600))
    monkeypatch.setattr("imagerl.rl.engine.cluster.JOIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(ImageRLError, match=r"\(no answer within 0\.2 s\); unset RAY_ADDRESS"):
            start_ray(1)
    over.set()


def test_a_ray_that_does_not_start_is_tried_again_then_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits 30 s for its own processes, on a busy machine in vain."""
    folders: list[Path] = []

    def init(**options: Any) -> None:
        folders.append(Path(options["_temp_dir"]).parent)
        raise Exception("The current node timed out during startup.\nIt may be busy.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ImageRLError, match=r"Ray does not start \(The current node timed out") as caught:
        start_ray(1)
    assert "\n" not in str(caught.value) and len(folders) == 2 and not any(map(Path.exists, folders))


def test_a_cluster_that_answers_is_joined_and_not_ours_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options))
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{cluster.getsockname()[1]}")
        assert start_ray(1) is False
    assert joined == [{"logging_level": "error", "log_to_driver": False}]
