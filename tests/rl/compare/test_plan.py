"""What a comparison plans and refuses, and how it runs processes: nothing is trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import pytest

from imagerl.rl.commands.cli import main
from imagerl.rl.compare.jobs import execute, job_environments, log_path, start_training
from imagerl.rl.compare.plan import BudgetSpec, Plan, PlannedRun, parse_budget, plan_runs, split_arguments
from imagerl.rl.errors import ImageRLError
from tests.small_run import write_recipe


def plan(folder: Path, *names: str, unit: str = "images", amount: float = 100, **options: object) -> Plan:
    recipes = {name: str(folder / f"{name}.yaml") for name in names}
    budget = BudgetSpec("minutes" if unit == "minutes" else "images", amount)
    return Plan(budget, [0, 1], recipes, names[0], [], **options)  # type: ignore[arg-type]


def test_budgets_are_read() -> None:
    assert parse_budget("images=3000") == BudgetSpec("images", 3000)
    assert parse_budget("minutes=2.5") == BudgetSpec("minutes", 2.5)
    for text in (
        "3000",
        "images=",
        "images=0",
        "images=1.5",
        "hours=3",
        "minutes=-1",
        "minutes=" + "9" * 400,
        "images=1" + "0" * 10,
    ):
        with pytest.raises(ImageRLError, match="images=N or minutes=M"):
            parse_budget(text)


def test_recipes_and_overrides_are_told_apart() -> None:
    words = ["a.yaml", "optim.lr=1", "dir=x/b.yaml", "./c=d.yaml", "eval.size=4"]
    assert split_arguments(words) == (["a.yaml", "./c=d.yaml"], ["optim.lr=1", "dir=x/b.yaml", "eval.size=4"])
    for key in ("run.steps", "run.seed", "run.output_dir", "run.images"):
        with pytest.raises(ImageRLError, match=f"{key} follows from"):
            split_arguments([f"{key}=3"])


def test_steps_follow_from_the_images_of_each_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path, name="plain.yaml")  # 2 prompts x 4
    write_recipe(tmp_path, "rollout.decodes=2", name="decodes.yaml")
    write_recipe(tmp_path, "algorithm={name: dapo}", name="dapo.yaml")
    runs = plan_runs(plan(tmp_path, "plain", "decodes", "dapo", evals=3), tmp_path / "out")
    assert [run.name for run in runs[:4]] == [
        *("plain, seed 0", "decodes, seed 0", "dapo, seed 0", "plain, seed 1")
    ]
    by = {run.label: run.recipe for run in runs if run.seed == 1}
    assert {label: recipe.run.steps for label, recipe in by.items()} == {
        "plain": 12,
        "decodes": 6,
        "dapo": 12,
    }
    assert {label: recipe.run.images for label, recipe in by.items()} == {
        "plain": None,
        "decodes": None,
        "dapo": 100,
    }
    assert {label: recipe.eval.every for label, recipe in by.items()} == {"plain": 4, "decodes": 2, "dapo": 4}
    assert {recipe.run.seed for recipe in by.values()} == {1}
    assert by["dapo"].run.output_dir == str(tmp_path / "out" / "dapo" / "seed-1")
    with pytest.raises(ImageRLError, match="less than one step of decodes, 16 images"):
        plan_runs(plan(tmp_path, "plain", "decodes", amount=15), tmp_path / "out")
    clock = plan_runs(plan(tmp_path, "plain", unit="minutes", amount=2.5), tmp_path / "out")[0].recipe.run
    assert (clock.minutes, clock.images) == (2.5, None)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.path=elsewhere", "model.path"),
        ("data.heldout.size=8", "data.heldout.size"),
        ("eval.size=2", "eval.size"),
        ("eval.seed=3", "eval.seed"),
        ("rollout.guidance=1.0", "eval.guidance"),
        ("rollout.flow_steps=3", "eval.flow_steps"),
        ("rollout.temperature=0.9", "rollout.temperature"),
        ("gold=[{name: colours}]", "colours"),
    ],
)
def test_what_would_be_judged_differently_is_refused(
    tmp_path: Path, override: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = write_recipe(tmp_path, name="one.yaml"), write_recipe(tmp_path, override, name="other.yaml")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "compare",
                str(one),
                str(other),
                "--seeds=2",
                "--budget=images=16",
                f"--output={tmp_path / 'out'}",
            ]
        )
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.count("\n") == 1
    assert f"one and other cannot be compared: {key}" in message.replace("the reward or gold metric ", "")
    assert not (tmp_path / "out").exists()


def test_what_is_only_trained_differently_passes(tmp_path: Path) -> None:
    write_recipe(tmp_path, name="one.yaml")
    options = ["rollout.guidance=1.0", "eval.guidance=2.0", "rollout.flow_steps=2", "eval.flow_steps=1"]
    write_recipe(tmp_path, *options, "optim.lr=0.1", "rewards.functions.0.weight=2.0", name="other.yaml")
    assert len(plan_runs(plan(tmp_path, "one", "other"), tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["optim.lr=1"], "nothing to compare"),
        (["one.yaml", "sub/one.yaml"], 'two recipes are called "one"'),
        (["one.yaml", "--baseline=two"], '--baseline "two" is none of one'),
        (["one.yaml", "--budget=minutes=1", "--evals=2"], "evals needs a budget of images"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, name="one.yaml")
    with pytest.raises(SystemExit):
        main(["compare", "--seeds=1", "--budget=images=16", "--output=out", *arguments])
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1


# ---- processes ---------------------------------------------------------------------------------------------


class Fake:
    """A run that ends when told to, or when it is asked to stop."""

    made: list[Fake] = []  # noqa: RUF012

    def __init__(self, run: PlannedRun, environment: Mapping[str, str], lock: IO[bytes]) -> None:
        self.run, self.environment, self.code = run, environment, None
        self.signals: list[int] = []
        self.together = sum(other.code is None for other in self.made) + 1
        self.made.append(self)

    def poll(self) -> int | None:
        if self.signals:
            self.code = 0
        elif self.code is None and self.run.seed == 0:
            self.finish()
        return self.code

    def finish(self) -> None:
        (self.run.folder / "eval").mkdir(parents=True)
        (self.run.folder / "eval" / "comparison.json").touch()
        self.code = 0

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)


@pytest.fixture
def runs(tmp_path: Path) -> list[PlannedRun]:
    Fake.made = []
    for name in ("a", "b"):
        write_recipe(tmp_path, name=f"{name}.yaml")
    return plan_runs(plan(tmp_path, "a", "b"), tmp_path / "out")


def test_jobs_run_at_a_time_each_on_a_gpu_of_its_own(
    runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [run for run in runs if run.seed == 0]
    environments = [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    outcomes = execute(first, environments, note=lambda _: None, start=Fake, pause=0)
    assert outcomes == dict.fromkeys(first, "finished")
    assert [made.environment["CUDA_VISIBLE_DEVICES"] for made in Fake.made] == ["3", "5"]
    assert [made.together for made in Fake.made] == [1, 2]
    assert execute(first, environments, note=lambda _: None, start=Fake) == outcomes and len(Fake.made) == 2

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert job_environments(3, first) == [{}, {}, {}]  # engine.device is cpu
    on_gpus = [object_with_device("auto")]
    assert job_environments(2, on_gpus) == environments
    with pytest.raises(ImageRLError, match="--jobs 3 needs a GPU each but 2"):
        job_environments(3, on_gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job_environments(2, on_gpus) == [{}, {}]


def object_with_device(device: str) -> PlannedRun:
    from types import SimpleNamespace

    engine = SimpleNamespace(device=device)
    return SimpleNamespace(recipe=SimpleNamespace(engine=engine))  # type: ignore[return-value]


def test_ctrl_c_stops_all_runs_once_and_starts_no_more(runs: list[PlannedRun]) -> None:
    second = [run for run in runs if run.seed == 1] + [run for run in runs if run.seed == 0]
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it

    def interrupt(text: str) -> None:
        if text == "b, seed 1: starts":
            os.kill(os.getpid(), signal.SIGINT)

    outcomes = execute(second, [{}, {}], note=interrupt, start=Fake, pause=0)
    assert set(outcomes.values()) == {"stopped"} and len(outcomes) == 4
    assert [made.run.name for made in Fake.made] == ["a, seed 1", "b, seed 1"]
    assert [made.signals for made in Fake.made] == [[signal.SIGTERM], [signal.SIGTERM]]  # b was just starting
    assert signal.getsignal(signal.SIGINT) is before


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_training_process_keeps_its_lock_and_writes_a_log(
    runs: list[PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"\nread line < "$GATE"\nexit 3\n')
    program.chmod(0o755)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("GATE", str(gate))
    run, told, processes = runs[0], [], []

    def start(run: PlannedRun, environment: Mapping[str, str], lock: IO[bytes]) -> subprocess.Popen[bytes]:
        process = start_training(run, environment, lock)
        processes.append(process)
        lock.close()  # as if the comparison had been killed
        assert execute([run], [{}], note=told.append, start=Fake) == {run: "elsewhere"}
        wait_until(lambda: log_path(run).read_text().endswith("\n"))
        gate.write_text("go\n")
        return process

    outcomes = execute([run], [{"CUDA_VISIBLE_DEVICES": "7"}], note=told.append, start=start)
    assert outcomes == {run: "failed"} and not Fake.made
    line = log_path(run).read_text().strip()
    assert line.startswith("7 -m imagerl train") and "--resume" not in line and "run.seed=0" in line
    assert "a, seed 0: failed with exit code 3" in told[-1] and line in told[-1]
