"""Whole runs through the command line: what they leave behind, and that kills and ranks do not change it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from imagerl.rl.config.train import load_recipe
from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.run import loop
from imagerl.rl.run.folder import LOCK, RunFolder
from imagerl.rl.training.trainer import Trainer
from tests.command import call, logged_steps, measured, results
from tests.rl.run.helpers import STEPS, VARIANTS, arguments, being_written
from tests.small_run import Command

ROOT = Path(__file__).parents[3]


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


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_several_points(place: Path, undisturbed: dict[str, Path], variant: str) -> None:
    run = place / f"{variant}_killed"
    command = Command(place, *arguments(place, variant, run.name))
    command.wait_for(lambda: 1 in logged_steps(run))  # before the first checkpoint
    command.kill()
    assert command.wait() == -signal.SIGKILL and not list_checkpoints(run / "checkpoints")

    command = Command(place, *arguments(place, variant, run.name, "--resume"))
    command.wait_for(lambda: 3 in logged_steps(run) and bool(list_checkpoints(run / "checkpoints")))
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


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_a_long_step_or_evaluation_loses_nothing(
    place: Path,
    undisturbed: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The step before is saved, nothing of the one in flight, and the evaluation is made up for."""
    run = place / f"long_{moment}"
    original, evaluated = Trainer.step, loop.evaluate

    def step(self: Trainer, number: int) -> object:
        result = original(self, number)
        if number == 4:  # the fifth: its update is made, its metrics are not logged yet
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return result

    def evaluation(*given: object, **named: object) -> object:
        result = evaluated(*given, **named)  # type: ignore[arg-type]
        if (run / "samples" / "step_000002.png").exists():  # of step 4
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return result

    more = ("checkpoint.every=0", "checkpoint.grace_s=0.2")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step) if moment == "step" else patch.setattr(
            loop, "evaluate", evaluation
        )
        assert call(*arguments(place, "full", run.name, *more)) == 0
    assert "stopped after step 4; continue with --resume" in capfd.readouterr().out
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_000004"]
    assert call(*arguments(place, "full", run.name, "--resume")) == 0
    assert results(run) == results(undisturbed["full"])


def test_what_fails_in_a_step_costs_that_step_only(
    place: Path,
    undisturbed: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = Trainer.step

    def failing(self: Trainer, number: int) -> object:
        result = original(self, number)
        if number == 3:
            raise RuntimeError("out of memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        patch.setattr("imagerl.rl.run.loop.Run._look", lambda *_: None)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(*arguments(place, "full", "failing", "checkpoint.every=0"))
    assert "step 3 is saved; continue with --resume" in capsys.readouterr().out
    assert call(*arguments(place, "full", "failing", "--resume")) == 0
    ours, theirs = (results(run)["files"] for run in (place / "failing", undisturbed["full"]))
    last = "checkpoints/step_000008/model.safetensors"
    assert ours[last] == theirs[last]


# ---- resuming ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("imagerl.models.families.load_policy", lambda *_: pytest.fail("a model was loaded"))
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
