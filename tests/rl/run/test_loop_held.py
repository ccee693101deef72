"""What must go on holding, and was tried by hand before: kills and full disks at any moment, no growth, Ray, ranks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.run.folder import LOCK, RunFolder
from tests.command import call, logged_steps, measured, results
from tests.ranks import Ranks
from tests.rl.run.helpers import arguments
from tests.small_run import Command

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kills", "workers"), [(0, 6, 0), (1, 6, 0), (2, 2, 1)])
def test_killed_at_random_moments(
    place: Path, undisturbed: dict[str, Path], seed: int, kills: int, workers: int
) -> None:
    """Wherever kill -9 falls, starting and writing included, a run resumes bit for bit; with rewards in Ray too."""
    run, moments = place / f"random_{seed}", random.Random(seed)
    more = arguments(place, "full", run.name, "checkpoint.every=1", f"rewards.workers={workers}")
    for _ in range(kills):
        resume = ["--resume"] if RunFolder(run).begun else []
        command = Command(place, *more, *resume)
        reached = len(logged_steps(run))
        wanted = moments.randrange(4)  # lines more than before
        with contextlib.suppress(AssertionError):  # it may end before
            command.wait_for(lambda: len(logged_steps(run)) >= reached + wanted)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            command.kill()
        assert command.wait() in (-signal.SIGKILL, 0)
    resume = ["--resume"] if RunFolder(run).begun else []
    command = Command(place, *more, *resume)
    assert command.wait() == 0, command.output
    assert measured(run) == measured(undisturbed["full"])
    ours, theirs = (results(each)["files"] for each in (run, undisturbed["full"]))
    assert ours == theirs
    assert not [path for path in run.rglob(".*") if path.name != LOCK]


def full_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """From its `count`th write on the disk is full: all that we write is also forced to the disk."""
    synced, left = os.fsync, iter(range(count))

    def fsync(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_costs_nothing(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, moments = place / "filling", random.Random(0)
    for _ in range(8):
        resume = ["--resume"] if RunFolder(run).begun else []
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            full_after(patch, moments.randrange(30))
            code = call(*arguments(place, "full", run.name, *resume))
        message = capsys.readouterr().err
        assert code == 0 or ("imagerl: disk full" in message and message.count("\n") == 1)
    resume = ["--resume"] if RunFolder(run).begun else []
    assert call(*arguments(place, "full", run.name, *resume)) == 0
    assert results(run) == results(undisturbed["full"])


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 8, 12, 24, 48, 200])
def test_a_small_disk_is_one_line(
    place: Path, undisturbed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kib: int
) -> None:
    """A real file system of so many KiB; the run goes on when it is larger."""
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size={kib}k tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("needs root and the right to mount")
    try:
        capsys.readouterr()
        given = [*arguments(place, "full", "unused")[:2], f"run.output_dir={tmp_path / 'run'}"]
        assert call(*given) == 1
        message = capsys.readouterr().err
        assert "disk full" in message and message.count("\n") == 1
        os.system(f"mount -o remount,size=64m {tmp_path}")
        assert call(*given, *(["--resume"] if RunFolder(tmp_path / "run").begun else [])) == 0
        assert results(tmp_path / "run") == results(undisturbed["full"])
    finally:
        os.system(f"umount {tmp_path}")


# A run that counts, before each step, its open files, threads and objects.
COUNTING = """
import gc, json, os, sys, threading
from imagerl.rl.commands.cli import main
from imagerl.rl.training.trainer import Trainer
counts, step = [], Trainer.step
def counted(self, number):
    gc.collect()
    counts.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects())))
    return step(self, number)
Trainer.step = counted
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_a_long_run_does_not_grow(place: Path) -> None:
    """In a process of its own: what other tests have left may go meanwhile.

    The least of a stretch is compared: a save may hold its file open while the next steps go on, a leak never lets go.
    """
    given = arguments(place, "full", "long", "run.steps=60", "checkpoint.every=5", "eval.every=20")
    command = [sys.executable, "-c", COUNTING, *given, "run.sample_every=5"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    files, threads, objects = map(min, zip(*counts[22:30], strict=True))
    files_later, threads_later, objects_later = map(min, zip(*counts[52:60], strict=True))
    assert (files_later, threads_later) == (files, threads)
    assert objects_later - objects < 20 * 30  # what a step leaves: none of its arrays, graphs and pictures


# ---- Ray, ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rewards_in_ray_change_nothing_and_ctrl_c_reaches_a_whole_group(
    place: Path, undisturbed: dict[str, Path]
) -> None:
    run = place / "ray"
    command = [sys.executable, "-m", "imagerl", *arguments(place, "full", run.name, "rewards.workers=1")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while 1 not in logged_steps(run) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    (*_, checkpoint) = list_checkpoints(run / "checkpoints")
    assert logged_steps(run)[-1] == int(checkpoint.name[-6:])
    resumed = Command(place, *arguments(place, "full", run.name, "--resume"))  # in process again
    assert resumed.wait() == 0, resumed.output
    assert results(run)["metrics"] == measured(undisturbed["full"])


ENGINES = {
    "zero2": ("engine.name=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine.name=deepspeed", "engine.zero_stage=3"),
    "zero3_lora": ("engine.name=deepspeed", "engine.zero_stage=3", "model.lora={r: 4}"),
    "ddp": (),
}


def resampling(place: Path) -> tuple[str, ...]:
    """DAPO under a curriculum, with rewards under which one rank has silent groups while the other has none."""
    reward = f"rewards.functions=[{{import_path: {place / 'reward.py'}:mostly_low}}]"
    more = "data.curriculum={success: mostly_low, floor: 0.01}"
    return ("algorithm.name=dapo", "rollout.prompts_per_step=4", "rollout.group_size=2", reward, more)


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> str:
    """What two processes print that train with every engine in turn."""
    pytest.importorskip("deepspeed")
    runs = [
        arguments(place, "full", f"ranks_{name}", "run.steps=3", "engine.micro_batch_size=3", *overrides)
        for name, overrides in {**ENGINES, "dapo": resampling(place)}.items()
    ]
    return Ranks(place, 2, *runs).succeed()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_like_one(
    place: Path, undisturbed: dict[str, Path], two_ranks: str, engine: str
) -> None:
    alone = measured(undisturbed["lora" if "lora" in engine else "full"])[:4]
    together = measured(place / f"ranks_{engine}")
    assert [r["step"] for r in together] == [0, 1, 2, 3, 3]
    for one, two in zip(alone, together[:4], strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert together[2]["kl/k3"] > 1e-5  # or it would say nothing of the reference


@pytest.mark.slow
def test_two_processes_resample_like_one(place: Path, two_ranks: str) -> None:
    command = Command(place, *arguments(place, "full", "dapo_alone", "run.steps=3", *resampling(place)))
    assert command.wait() == 0, command.output
    alone, together = measured(place / "dapo_alone"), measured(place / "ranks_dapo")
    assert sum(line.get("rollout/resampled_groups", 0) for line in alone) >= 3
    assert any(0 < line.get("curriculum/success", 0) < 1 for line in alone)
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_only_the_main_process_prints(two_ranks: str) -> None:
    lines = two_ranks.splitlines()
    assert len([line for line in lines if line.startswith("held-out after step 0:")]) == len(ENGINES) + 1
    assert len([line for line in lines if line.startswith("held-out total:")]) == len(ENGINES) + 1
