"""Processes that come, go, hang and die: the run goes on with other ones as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from imagerl.rl.engine.checkpoint import list_checkpoints
from tests.command import call, logged_steps, measured
from tests.ranks import ROOT, Ranks
from tests.rl.run.helpers import arguments
from tests.small_run import Command

ZERO2 = ("engine.name=deepspeed", "engine.zero_stage=2")
# After two steps the other rank gets no further, or ends; the first one waits for it in a collective.
FATE = """
shares = low_tokens

def low_tokens(completions, **_):
    import os, pathlib, time
    done = pathlib.Path({metrics!r})
    if os.environ.get("RANK") == "1" and done.exists() and done.read_text().count('"loss"') == 2:
        {what}
    return shares(completions)
"""


def with_fate(place: Path, name: str, what: str) -> list[str]:
    """The arguments of a run of two ranks on which a fate falls."""
    file = place / f"{name}.py"
    fate = FATE.format(metrics=str(place / name / "metrics.jsonl"), what=what)
    file.write_text((place / "reward.py").read_text() + fate)
    reward = f"rewards.functions=[{{import_path: {file}:low_tokens}}]"
    return arguments(place, "full", name, reward, "checkpoint.every=0", "checkpoint.grace_s=1", *ZERO2)


def compared(run: Path) -> list[dict[str, Any]]:
    """Every step, and the last evaluation without its monitors: a run that ended in between evaluated more often."""
    records = measured(run)
    last = {key: value for key, value in records[-1].items() if key.startswith("eval/")}
    return [*(record for record in records if "loss" in record), last]


def assert_like(run: Path, whole: Path) -> None:
    for one, other in zip(compared(run), compared(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_other_processes_take_over(
    place: Path, undisturbed: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks with ZeRO-2, stopped while one hangs; one with torch; two again, until one is killed; then one."""
    pytest.importorskip("deepspeed")
    moved, stuck, killed = place / "moved", place / "stuck", place / "killed"
    ranks = Ranks(
        place,
        2,
        arguments(place, "full", "moved", "run.steps=2", "engine.micro_batch_size=3", *ZERO2),
        with_fate(place, "stuck", "time.sleep(600)"),
    )
    while 2 not in logged_steps(stuck) and ranks.process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)  # into the step that does not end
    ranks.process.send_signal(signal.SIGTERM)
    output = ranks.output()
    assert "stopped after step 2; continue with --resume" in output, output
    assert [path.name for path in list_checkpoints(stuck / "checkpoints")] == ["step_000002"]

    assert call(*arguments(place, "full", "moved", "run.steps=4", "eval.batch_size=1", "--resume")) == 0
    told = capfd.readouterr().err
    for change in ('engine.name "torch" (was "deepspeed")', "engine.zero_stage null (was 2)",
                   "engine.micro_batch_size 8 (was 3)", "the number of processes 1 (was 2)"):  # fmt: skip
        assert change in told

    back = arguments(place, "full", "moved", "--resume", *ZERO2)
    ranks = Ranks(place, 2, back, with_fate(place, "killed", "os.kill(os.getpid(), 9)"))
    output = ranks.output()
    assert_like(moved, undisturbed["full"])
    assert "step 2 is saved; continue with --resume" in output or "stopped after step 2" in output, output
    assert "Traceback" not in output.split("held-out after step 0")[-1].split("torch/distributed")[0]
    assert [path.name for path in list_checkpoints(killed / "checkpoints")] == ["step_000002"]

    reward = f"rewards.functions=[{{import_path: {killed}.py:low_tokens}}]"
    assert call(*arguments(place, "full", "killed", reward, "--resume")) == 0
    assert_like(killed, undisturbed["full"])


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_prompts(place: Path) -> None:
    pytest.importorskip("deepspeed")
    more = ("run.steps=3", "rollout.prompts_per_step=4", "eval.batch_size=1", "engine.micro_batch_size=4")
    engines = {"ddp": (), "zero3": ("engine.name=deepspeed", "engine.zero_stage=3")}
    alone = Command(place, *arguments(place, "full", "divided_alone", *more))
    runs = [arguments(place, "full", f"divided_{name}", *more, *engine) for name, engine in engines.items()]
    ranks = Ranks(place, 3, *runs)
    output = ranks.output()
    assert ranks.process.returncode == 0, output
    assert alone.wait() == 0, alone.output
    for name in engines:
        assert_like(place / f"divided_{name}", place / "divided_alone")
        evaluations = [
            json.loads((place / f"divided_{which}" / "eval" / "ocr_step_000000.json").read_text())
            for which in (name, "alone")
        ]
        assert evaluations[0]["per_prompt"] == evaluations[1]["per_prompt"]  # bit for bit


@pytest.mark.slow
def test_processes_share_one_pool_of_rewards_and_of_actors(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them find what one finds alone, by one Ray, of which nothing is left."""
    # Of their own, as other tests have a Ray at the same time; short, as its sockets have no more than 107 letters.
    temporary = Path(tempfile.mkdtemp(prefix="r"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    more = ("run.steps=2", "rollout.sample_chunk=1", "eval.batch_size=1")
    alone = Command(place, *arguments(place, "full", "unshared", *more))
    shared = ("rewards.workers=1", "rollout.workers=1", *more)
    ranks = Ranks(place, 2, arguments(place, "full", "shared", *shared))
    output = ranks.output()
    assert ranks.process.returncode == 0, output
    assert alone.wait() == 0, alone.output
    assert_like(place / "shared", place / "unshared")
    assert not list(temporary.glob("imagerl-*"))
    shutil.rmtree(temporary)


@contextmanager
def cluster_of(home: Path, mode: str) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray as others start it, which asks for a token or for none: its address, and the process of its head."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={address[10:]}"]
    options = [
        "--num-cpus=3",
        "--include-dashboard=false",
        f"--temp-dir={home / mode}",
        "--disable-usage-stats",
    ]
    settings = os.environ | {"HOME": str(home), "RAY_AUTH_MODE": mode}
    begun = subprocess.Popen([*command, *options], env=settings, stdout=subprocess.PIPE, text=True)
    assert begun.stdout is not None
    try:
        for line in begun.stdout:
            if "--block" in line:  # said last
                break
        parts = psutil.Process(begun.pid).children(recursive=True)
        (head,) = (part for part in parts if part.name() == "gcs_server")
        yield address, head
    finally:
        for part in psutil.Process(begun.pid).children(recursive=True):
            part.kill()
        begun.kill()
        begun.communicate()


@pytest.mark.slow
def test_a_head_that_dies_ends_the_run_in_a_line_and_another_takes_over(
    place: Path, undisturbed: dict[str, Path]
) -> None:
    """On clusters of `ray start`: the first asks for a token, the other one for none."""
    run, home = (
        place / "headless",
        Path(tempfile.mkdtemp(prefix="r")),
    )  # short, for the names of Ray's sockets
    reward = (
        (place / "reward.py")
        .read_text()
        .replace("    return", "    __import__('time').sleep(0.5)\n    return")
    )
    (place / "later.py").write_text(reward)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(64 * "a")
    later = f"rewards.functions=[{{import_path: {place}/later.py:low_tokens}}]"
    workers = "rewards.workers=1", "rollout.workers=1", later
    given = [
        sys.executable,
        "-m",
        "imagerl",
        *arguments(place, "full", run.name, *workers, "checkpoint.every=0"),
    ]

    def begun(address: str, mode: str, *more: str) -> subprocess.Popen[str]:
        settings = os.environ | {"HOME": str(home), "RAY_ADDRESS": address, "RAY_AUTH_MODE": mode}
        return subprocess.Popen([*given, *more], cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True)

    try:
        with cluster_of(home, "token") as (address, head):
            process = begun(address, "token")
            while 2 not in logged_steps(run) and process.poll() is None:
                time.sleep(0.01)
            head.kill()
            said = process.communicate(timeout=120)[1]
        told = "".join(line for line in said.splitlines() if line.startswith("imagerl:"))
        assert process.returncode == 1 and "Ray ended: its head at" in told and "--resume" in told, said
        (*_, saved) = list_checkpoints(run / "checkpoints")
        assert saved.name == f"step_{logged_steps(run)[-1]:06d}"  # nothing is lost
        with cluster_of(home, "disabled") as (address, _):
            process = begun(address, "disabled", "--resume")
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said
    finally:
        shutil.rmtree(home)
    assert_like(run, undisturbed["full"])
