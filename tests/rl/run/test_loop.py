"""Whole runs through the command line: what they leave behind, and that kills and ranks do not change it."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from imagerl.rl.commands.cli import main
from imagerl.rl.config.train import load_recipe
from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.files.metrics import is_timing, read_metrics
from imagerl.rl.run.folder import LOCK, RunFolder
from imagerl.rl.training.trainer import Trainer
from tests.micro import micro_folder
from tests.small_run import RANK_PROGRAM, Command, write_recipe

ROOT = Path(__file__).parents[3]
STEPS = 8
VARIANTS = {"full": (), "lora": ("model.lora={r: 4}",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    micro_folder(folder / "model")
    for name, overrides in VARIANTS.items():
        gold = f"gold=[{{import_path: {folder / 'reward.py'}:brightness}}]"
        more = f"run.steps={STEPS}", "eval.every=4", gold, "monitors.window=3"
        write_recipe(folder, *more, *overrides, name=f"{name}.yaml")
    return folder


def arguments(place: Path, variant: str, run: str, *more: str) -> list[str]:
    return ["train", str(place / f"{variant}.yaml"), f"run.output_dir={place / run}", *more]


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, Path]:
    """A finished run of each variant."""
    for variant in VARIANTS:
        command = Command(place, *arguments(place, variant, f"{variant}_whole"))
        assert command.wait() == 0, command.output
    return {variant: place / f"{variant}_whole" for variant in VARIANTS}


def measured(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not is_timing(k)} for record in read_metrics(run)]


def results(run: Path) -> dict[str, Any]:
    """All that a run found out, bit for bit."""
    (*_, newest) = list_checkpoints(run / "checkpoints")
    files = [newest / "model.safetensors", newest / "optimizer.safetensors"]
    files += sorted((run / "samples").iterdir()) + sorted((run / "eval").iterdir())
    digests = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {"metrics": measured(run), "files": digests}


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


# ---- what a run leaves behind ------------------------------------------------------------------------------


def test_run_folder(place: Path, undisturbed: dict[str, Path]) -> None:
    run = undisturbed["full"]
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "report.html"),
        *("samples", "checkpoints", "tb", "eval"),
    }
    given = load_recipe(place / "full.yaml", [f"run.output_dir={run}"])
    assert load_recipe(run / "recipe.yaml") == given
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["command"] and environment["cores"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step_{step:06d}.png" for step in range(0, STEPS + 1, 2)
    ]
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_000006", "step_000008"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step_000006", "step_000008"}
    for kind in ("model", "optimizer"):  # safetensors and JSON, nothing pickled
        assert (run / "checkpoints" / "step_000008" / f"{kind}.safetensors").is_file()
    assert {p.suffix for p in (run / "checkpoints").rglob("*.*")} == {".safetensors", ".json"}
    assert list((run / "tb").glob("events.*"))
    assert "<html" in (run / "report.html").read_text().lower()
    comparison = json.loads((run / "eval" / "comparison.json").read_text())
    assert (comparison["before_step"], comparison["after_step"]) == (0, STEPS)
    evaluation = json.loads((run / "eval" / "ocr_step_000008.json").read_text())
    assert len(evaluation["per_prompt"]) == 4
    values = [row["low_tokens"] for row in evaluation["per_prompt"]]
    assert evaluation["metrics"]["low_tokens"]["mean"] == pytest.approx(sum(values) / 4)


def test_metrics_file(undisturbed: dict[str, Path]) -> None:
    records = read_metrics(undisturbed["full"])
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    evaluations = [r for r in records if "eval/ocr/low_tokens" in r]
    assert [r["step"] for r in evaluations] == [0, 4, STEPS]
    assert [r["eval/ocr/total"] for r in evaluations] == [r["eval/ocr/low_tokens"] for r in evaluations]
    assert "monitor/brightness/correlation" in evaluations[-1] and "alarm/hacking" in evaluations[0]
    training = [r for r in records if r not in evaluations]
    assert all(r.keys() == training[0].keys() for r in training)
    assert all(isinstance(v, int | float) for r in training for v in r.values())
    assert {"reward/mean", "reward/low_tokens/mean", "kl/k3", "time/step_s", "images_per_s"} <= training[
        0
    ].keys()
    assert {"diversity/tokens", "pictures/saturation", "alarm/diversity", "time/monitors_s"} <= training[
        0
    ].keys()


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    place: Path, undisturbed: dict[str, Path]
) -> None:
    for seed, same in ((0, True), (1, False)):
        more = (f"run.seed={seed}", "run.steps=2")
        command = Command(place, *arguments(place, "lora", f"again_{seed}", *more))
        assert command.wait() == 0, command.output
        again = [r for r in measured(place / f"again_{seed}") if "loss" in r]
        assert (again == [r for r in measured(undisturbed["lora"]) if "loss" in r][:2]) is same


# ---- kills and stops ---------------------------------------------------------------------------------------


def being_written(run: Path, pid: int) -> list[Path]:
    return list((run / "checkpoints").glob(f".step_*.tmp-{pid}@*"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_several_points(place: Path, undisturbed: dict[str, Path], variant: str) -> None:
    run = place / f"{variant}_killed"
    command = Command(place, *arguments(place, variant, run.name))
    command.wait_for(lambda: 1 in logged_steps(run))  # before the first checkpoint
    command.kill()
    assert command.wait() == -signal.SIGKILL and not list_checkpoints(run / "checkpoints")

    command = Command(place, *arguments(place, variant, run.name, "--resume"))
    command.wait_for(lambda: 3 in logged_steps(run))  # between two checkpoints
    command.kill()
    assert command.wait() == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_000002"]

    command = Command(place, *arguments(place, variant, run.name, "--resume"))
    command.wait_for(lambda: bool(being_written(run, command.pid)))  # while one is written
    command.kill()
    assert command.wait() == -signal.SIGKILL
    assert being_written(run, command.pid), "the kill came too late"
    assert 4 in logged_steps(run)

    command = Command(place, *arguments(place, variant, run.name, "--resume"))
    assert command.wait() == 0, command.output
    assert results(run) == results(undisturbed[variant])
    assert len(list((run / "checkpoints").iterdir())) == 2  # no leftovers
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 3


def test_ctrl_c_stops_with_a_checkpoint(place: Path, undisturbed: dict[str, Path]) -> None:
    run = place / "stopped"
    command = Command(place, *arguments(place, "full", run.name, "checkpoint.every=0"))
    command.wait_for(lambda: 1 in logged_steps(run))
    command.kill(signal.SIGINT)
    assert command.wait() == 0, command.output
    assert "stopping after this step" in command.output and "continue with --resume" in command.output
    assert "Traceback" not in command.output
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert checkpoint.name == f"step_{logged_steps(run)[-1]:06d}" and checkpoint.name < "step_000008"
    assert (run / "report.html").is_file() and not (run / "eval" / "comparison.json").exists()

    command = Command(place, *arguments(place, "full", run.name, "checkpoint.every=2", "--resume"))
    assert command.wait() == 0, command.output
    assert results(run) == results(undisturbed["full"])


def test_ctrl_c_twice_stops_at_once(place: Path) -> None:
    run = place / "interrupted"
    command = Command(place, *arguments(place, "full", run.name, "run.steps=500"))
    command.wait_for(lambda: 3 in logged_steps(run))
    command.kill(signal.SIGINT)
    command.wait_for(lambda: "stopping after this step" in command.output)
    command.kill(signal.SIGINT)
    code = command.wait()
    # the step may have ended before the second signal
    assert (code, command.output.splitlines()[-1]) == (130, "imagerl: interrupted") or code == 0
    assert "Traceback" not in command.output
    assert list_checkpoints(run / "checkpoints")


# ---- resuming ----------------------------------------------------------------------------------------------


def call(*given: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(given)
    return int(ended.value.code or 0)


def test_what_an_algorithm_remembers_is_part_of_a_checkpoint(place: Path) -> None:
    options = (
        *("algorithm.kl_target=0.0001", "algorithm.reference_every=2", "algorithm.baseline=moving_average"),
        *("algorithm.scale_rewards=batch", "checkpoint.every=0"),
    )
    for run, steps, more in (("remember", 4, ()), ("parts", 3, ()), ("parts", 4, ("--resume",))):
        assert call(*arguments(place, "full", run, f"run.steps={steps}", *options, *more)) == 0
    whole, parts = ([r for r in measured(place / run) if "loss" in r] for run in ("remember", "parts"))
    assert whole == parts and len({r["kl/coef"] for r in whole}) == 4
    for file in ("model", "optimizer", "reference"):
        one, other = (
            place / run / "checkpoints" / "step_000004" / f"{file}.safetensors"
            for run in ("remember", "parts")
        )
        assert one.read_bytes() == other.read_bytes()


def test_resuming_a_finished_run_repeats_its_result(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "finished"
    shutil.copytree(undisturbed["full"], run)
    before = results(run), (run / "metrics.jsonl").read_bytes()
    assert call(*arguments(place, "full", run.name, "--resume")) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("held-out total: ") and "→" in line
    assert line.endswith(", too few to tell, n=4: no difference shown)")
    assert line == (place / "output_0").read_text().splitlines()[-1]
    assert (results(run), (run / "metrics.jsonl").read_bytes()) == before


def test_a_finished_run_can_be_continued_but_not_shortened(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "continued"
    assert call(*arguments(place, "full", run.name, "run.steps=4")) == 0
    assert call(*arguments(place, "full", run.name, "--resume")) == 0
    longer = [record for record in measured(run) if "loss" in record]
    assert longer == [record for record in measured(undisturbed["full"]) if "loss" in record]
    capsys.readouterr()
    assert call(*arguments(place, "full", run.name, "run.steps=6", "--resume")) == 1
    message = capsys.readouterr().err
    assert "is at step 8 already but run.steps is 6" in message and message.count("\n") == 1


def test_there_must_be_a_run_to_resume(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments(place, "full", "new", "run.steps=1", "--resume")) == 1
    message = capsys.readouterr().err
    assert "leave --resume out to begin one" in message and message.count("\n") == 1
    assert not (place / "new").exists()


def test_a_folder_that_cannot_be_written_is_found_before_anything_loads(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "imagerl.models.blip3o_next.loading.load_policy", lambda *_: pytest.fail("a model was loaded")
    )
    assert call(*arguments(place, "full", "full.yaml/run")) == 1
    message = capsys.readouterr().err
    assert "cannot write" in message and message.count("\n") == 1


def test_a_running_run_is_left_alone(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "running"
    shutil.copytree(undisturbed["full"], run)
    before = results(run)
    other = RunFolder(run)
    other.lock()
    for more in ((), ("--resume",), ("--overwrite",)):
        assert call(*arguments(place, "full", run.name, *more)) == 1
        message = capsys.readouterr().err
        assert "is in use by process" in message and message.count("\n") == 1
    assert results(run) == before
    other.release()
    assert call(*arguments(place, "full", run.name, "--resume")) == 0
    assert not (run / LOCK).exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(
    place: Path, undisturbed: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = place / "damaged"
    shutil.copytree(undisturbed["full"], run)
    broken = run / "checkpoints" / "step_000008"
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    caplog.clear()
    assert call(*arguments(place, "full", run.name, "--resume")) == 0
    (line,) = [line for line in caplog.messages if "damaged" in line]
    assert "step_000008" in line and line.endswith("going on from step_000006")
    assert results(run) == results(undisturbed["full"])


# ---- what must go on holding -------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_a_long_run_does_not_grow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[int, int, int]] = []
    step = Trainer.step

    def counted(self: Trainer, number: int) -> Any:
        gc.collect()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects())))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", counted)
    given = arguments(place, "full", "long", "run.steps=60", "checkpoint.every=5", "eval.every=20")
    assert call(*given, "run.sample_every=5") == 0
    (files, threads, objects), (files_later, threads_later, objects_later) = counts[25], counts[58]
    assert (files_later, threads_later) == (files, threads)
    assert objects_later - objects < 20 * 33  # what a step leaves: none of its arrays, graphs and pictures


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
    """DAPO with rewards under which one rank has silent groups while the other has none."""
    reward = f"rewards.functions=[{{import_path: {place / 'reward.py'}:mostly_low}}]"
    return ("algorithm.name=dapo", "rollout.prompts_per_step=4", "rollout.group_size=2", reward)


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> str:
    """What two processes print that train with every engine in turn."""
    pytest.importorskip("deepspeed")
    program = place / "ranks.py"
    program.write_text(RANK_PROGRAM)
    runs = [
        arguments(place, "full", f"ranks_{name}", "run.steps=3", "engine.micro_batch_size=3", *overrides)
        for name, overrides in {**ENGINES, "dapo": resampling(place)}.items()
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*launcher, json.dumps(runs)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


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
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_only_the_main_process_prints(two_ranks: str) -> None:
    lines = two_ranks.splitlines()
    assert len([line for line in lines if line.startswith("held-out after step 0:")]) == len(ENGINES) + 1
    assert len([line for line in lines if line.startswith("held-out total:")]) == len(ENGINES) + 1
