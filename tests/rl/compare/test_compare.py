"""Comparisons through the command line, with runs of the micro model in processes of their own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from imagerl.rl.commands.cli import main
from imagerl.rl.compare import jobs as comparison_jobs
from imagerl.rl.compare import page as comparison_page
from imagerl.rl.compare.plan import PlannedRun
from imagerl.rl.errors import ImageRLError
from imagerl.rl.run import report
from imagerl.rl.training.trainer import Trainer
from tests.command import exit_code, measured
from tests.micro import micro_folder
from tests.small_run import write_recipe

ALGORITHMS = {"grpo": {"name": "grpo"}, "dapo": {"name": "dapo", "max_resamples": 1}}


class Training:
    """Stands in for `Popen`: the same command in this process, over when it has begun."""

    started: list[str] = []  # noqa: RUF012
    stops: set[str] = set()  # noqa: RUF012 runs that break off after their second step

    def __init__(self, run: PlannedRun, environment: Mapping[str, str], lock: IO[bytes]) -> None:
        self.started.append(run.name)
        if run.name in self.stops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "step", breaking(Trainer.step))
                self.code = train(run)
        else:
            self.code = train(run)

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, sig: int) -> None:
        raise AssertionError("it is over already")


def breaking(step: Callable[..., Any]) -> Callable[..., Any]:
    def broken(self: Trainer, number: int) -> Any:
        if number == 2:
            raise ImageRLError("the disk is full")
        return step(self, number)

    return broken


def train(run: PlannedRun) -> int:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(comparison_jobs.arguments(run))
        except SystemExit as end:
            code = int(end.code or 0)
    comparison_jobs.log_path(run).write_text(output.getvalue())
    return code


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Runs cost no start, and charts, which others test, are not drawn."""
    patch.setattr(comparison_jobs, "start_training", Training)
    for module in (comparison_page, report):
        patch.setattr(module, "render", lambda chart: "<svg></svg>")
    Training.started, Training.stops = [], set()


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    micro_folder(folder / "model")
    for name, algorithm in ALGORITHMS.items():
        options = [f"algorithm={json.dumps(algorithm)}", "optim.schedule=linear", "eval.size=4"]
        write_recipe(folder, *options, "run.sample_every=0", name=f"{name}.yaml")
    return folder


def call(*given: str) -> int:
    return exit_code(["compare", *given])


def arguments(place: Path, *names: str, output: str, seeds: int = 2) -> list[str]:
    paths = [str(place / f"{name}.yaml") for name in names]
    return [*paths, f"--seeds={seeds}", "--budget=images=32", "--evals=2", f"--output={place / output}"]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A comparison never interrupted; what it printed is in said.txt."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        quicken(patch)
        assert call(*arguments(place, "grpo", "dapo", output="whole"), "--jobs=2") == 0
    (place / "said.txt").write_text(said.getvalue())
    return place / "whole"


def test_compare(place: Path, whole: Path) -> None:
    folder, printed = whole, (place / "said.txt").read_text()
    assert re.findall(r"(.+): starts", printed) == [
        *("grpo, seed 0", "dapo, seed 0", "grpo, seed 1", "dapo, seed 1")
    ]
    # every run at one budget of 32 images: 4 steps of 8, fewer where groups are drawn again
    runs = rows(folder / "runs.csv")
    assert [(r["recipe"], r["seed"], r["finished"]) for r in runs] == [
        *(("grpo", "0", "1"), ("grpo", "1", "1"), ("dapo", "0", "1"), ("dapo", "1", "1"))
    ]
    assert [float(r["images"]) for r in runs if r["recipe"] == "grpo"] == [32, 32]
    for row in runs:
        steps = [
            r for r in rows(folder / "steps.csv") if (r["recipe"], r["seed"]) == (row["recipe"], row["seed"])
        ]
        drawn = [float(r["rollout/images"]) for r in steps if r["rollout/images"]]
        assert float(row["images"]) == sum(drawn) == float(steps[-1]["images"])
        assert 24 < sum(drawn) <= 32 + 8 and len(drawn) == int(row["steps"])
        last = json.loads(
            (folder / row["recipe"] / f"seed-{row['seed']}" / "eval" / "comparison.json").read_text()
        )
        assert last["after_step"] == int(row["steps"])
    # the learning rate ends with the budget
    rates = [float(r["lr"]) for r in rows(folder / "steps.csv") if r["recipe"] == "grpo" and r["lr"]]
    assert rates == pytest.approx([0.003, 0.00225, 0.0015, 0.00075] * 2)
    drawn_before = 0.0
    for row in rows(folder / "steps.csv"):
        if (row["recipe"], row["seed"]) == ("dapo", "0") and row["lr"]:
            assert float(row["lr"]) == pytest.approx(0.003 * (1 - drawn_before / 32))
            drawn_before = float(row["images"])
    # one contrast a metric and kind, and the gains; its mean is that of the runs
    (final,) = [
        r
        for r in rows(folder / "contrasts.csv")
        if (r["recipe"], r["baseline"], r["metric"], r["kind"]) == ("dapo", "grpo", "low_tokens", "final")
    ]
    by = {(r["recipe"], r["seed"]): float(r["final/low_tokens"]) for r in runs}
    gaps = [by["dapo", seed] - by["grpo", seed] for seed in "01"]
    assert float(final["difference"]) == pytest.approx(np.mean(gaps), abs=1e-12)
    assert (final["low"], final["high"], final["verdict"]) == ("", "", "no difference shown")
    assert "dapo against grpo, after training: no difference shown (" in printed
    assert "too few to tell, 2 seeds; it takes 3 to say something of others)" in printed
    page = (folder / "report.html").read_text()
    assert "4 of 4 runs finished" in page and "data:image/png" in page and "before training" in page


def test_a_compared_run_is_the_ordinary_one(place: Path, whole: Path) -> None:
    options = ["run.seed=1", "run.steps=4", "eval.every=2", f"run.output_dir={place / 'alone'}"]
    assert exit_code(["train", str(place / "grpo.yaml"), *options]) == 0
    assert measured(place / "alone") == measured(whole / "grpo" / "seed-1")


def test_a_failed_run_costs_only_itself_and_resuming_gives_the_same(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Training.stops = {"grpo, seed 0"}
    folder, given = place / "broken", arguments(place, "grpo", "dapo", output="broken")
    assert call(*given) == 1
    said = capsys.readouterr()
    assert "grpo, seed 0: failed with exit code 1" in said.out and "the disk is full" in said.out
    assert said.err.count("\n") == 1 and "1 of 4 runs failed, the first grpo, seed 0" in said.err
    assert [r["finished"] for r in rows(folder / "runs.csv")] == ["0", "1", "1", "1"]
    assert "grpo lacks a finished run of seed 0" in (folder / "report.html").read_text()

    assert call(*given) == 1 and "add --resume" in capsys.readouterr().err
    Training.started, Training.stops = [], set()
    assert call(*given, "--resume") == 0
    assert Training.started == ["grpo, seed 0"]  # from its checkpoint
    for label in ALGORITHMS:
        for seed in (0, 1):
            run = f"{label}/seed-{seed}"
            assert measured(folder / run) == measured(whole / run)
    assert (folder / "contrasts.csv").read_bytes() == (whole / "contrasts.csv").read_bytes()


def test_another_process_can_take_a_part(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, both = (arguments(place, *names, output="shared") for names in (("grpo",), ("grpo", "dapo")))
    assert call(*first) == 0
    page = (place / "shared" / "report.html").read_text()
    assert "2 of 2 runs finished" in page and "Did each of them learn at all?" in page
    assert call(*arguments(place, "dapo", output="shared"), "--resume") == 0
    assert json.loads((place / "shared" / "comparison.json").read_text())["baseline"] == "grpo"
    assert (place / "shared" / "contrasts.csv").read_bytes() == (whole / "contrasts.csv").read_bytes()
    Training.started = []
    assert call(*both, "--resume") == 0 and Training.started == []
    capsys.readouterr()
    for other, word in (
        ("--budget=images=40", "budget"),
        ("--evals=1", "evals"),
        ("optim.lr=0.1", "overrides"),
    ):
        assert call(*both, "--resume", other) == 1
        assert f"another {word}" in capsys.readouterr().err


def test_runs_do_not_begin_from_one_that_goes_on(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole / "grpo" / "seed-0"
    capsys.readouterr()
    for resume in ((), ("--resume",)):
        assert call(*arguments(place, "dapo", output="from_run"), f"model.path={run}", *resume) == 1
        message = capsys.readouterr().err
        assert f"model.path is a run, {run}, " in message and "imagerl export RUN MODEL" in message
        assert message.count("\n") == 1 and not (place / "from_run").exists()


def test_runs_that_another_process_has_finished_meanwhile_are_not_called_unfinished(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(place, "grpo", output="meanwhile")
    assert call(*given) == 0
    monkeypatch.setattr(comparison_jobs, "execute", lambda runs, _: dict.fromkeys(runs, "elsewhere"))
    capsys.readouterr()
    assert call(*given, "--resume") == 0
    assert "not finished" not in capsys.readouterr().out
    (place / "meanwhile" / "grpo" / "seed-1" / "eval" / "comparison.json").unlink()
    call(*given, "--resume")
    assert "1 runs are not finished or run elsewhere" in capsys.readouterr().out
