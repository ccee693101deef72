"""Where a run begins and ends otherwise than at its start and last step: --resume STEP, runs as models, plateaus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from imagerl.api import exporting
from imagerl.rl.commands.options import resume_point
from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.checkpoint import save_checkpoint
from imagerl.rl.errors import ImageRLError
from imagerl.rl.run.folder import RunFolder
from imagerl.rl.run.monitors import Watch
from tests.small_run import recipe_data


def _recipe(folder: Path, *overrides: str) -> Recipe:
    return validate_recipe(Recipe, recipe_data(folder, *overrides), "test")


def _run(folder: Path, *steps: int) -> RunFolder:
    recipe, run = _recipe(folder), RunFolder(folder / "run")
    run.begin(recipe, ["imagerl", "train"])
    for step in steps:
        state = {"recipe": recipe.model_dump(mode="json")}
        tensors = {"model": {"w": torch.full((1,), float(step))}}
        save_checkpoint(run.checkpoints, step, tensors, state, keep=9)
    return run


def test_resume_takes_a_step() -> None:
    assert resume_point(True, ["20", "run.steps=50"]) == (20, ["run.steps=50"])
    assert resume_point(True, None) == (True, []) and resume_point(False, ["a=1"]) == (False, ["a=1"])
    for given in ((False, ["20"]), (True, ["2", "3"])):
        with pytest.raises(ImageRLError, match="write --resume STEP"):
            resume_point(*given)


def test_a_run_goes_on_from_the_step_that_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path, 2, 4)
    for step, expected in ((None, 4), (2, 2)):
        checkpoint = run.resumable(_recipe(tmp_path), step)
        assert checkpoint is not None and float(checkpoint.tensors["model"]["w"]) == expected
    with pytest.raises(ImageRLError, match="has no checkpoint of step 3; there is 2, 4"):
        run.resumable(_recipe(tmp_path), 3)


def test_a_run_is_a_model_once_and_the_path_of_a_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def export(source: Path, target: Path) -> None:
        made.append(source)
        target.mkdir(parents=True)

    monkeypatch.setattr(exporting, "export", export)
    run = _run(tmp_path, 2, 4)
    newest, older = run.checkpoints / "step_000004", run.checkpoints / "step_000002"
    for place, checkpoint in (
        (run.path, newest),
        (older, older),
        (run.path, newest),
    ):
        assert exporting.as_model(str(place)) == str(run.path / "exports" / checkpoint.name)
    assert made == [newest, older]
    os.utime(newest / "manifest.json", (2e9, 2e9))  # the run was made again
    exporting.as_model(str(run.path))
    assert made == [newest, older, newest]
    (tmp_path / "model").mkdir()
    for path in ("tiny", str(tmp_path / "model"), "BLIP3o/BLIP3o-NEXT-SFT-3B"):
        assert exporting.as_model(path) == path
    with pytest.raises(
        ImageRLError, match=r"no checkpoint .*step_000003; kept are: step_000002, step_000004"
    ):
        exporting.as_model(str(run.checkpoints / "step_000003"))


def test_a_resumed_run_keeps_the_model_that_it_began_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _run(tmp_path, 2)
    monkeypatch.setattr(exporting, "export", lambda source, target: target.mkdir(parents=True))
    recipe = _recipe(tmp_path, f"model.path={first.path}", f"run.output_dir={tmp_path / 'second'}")
    began = exporting.with_model(recipe)
    assert began.model.path.endswith("run/exports/step_000002")
    RunFolder(recipe.run.output_dir).begin(began, ["imagerl"])
    save_checkpoint(first.checkpoints, 4, {}, {}, keep=9)
    assert exporting.with_model(recipe, resumed=True).model.path == began.model.path
    for place in (first.path / "exports" / "step_000002", first.checkpoints / "step_000002"):
        from_place = _recipe(tmp_path, f"model.path={place}", f"run.output_dir={tmp_path / 'second'}")
        assert exporting.with_model(from_place, resumed=True).model.path == began.model.path
    assert exporting.with_model(recipe).model.path.endswith("step_000004")


def test_a_plateau_ends_a_run_and_outlives_a_checkpoint() -> None:
    watch = Watch(MonitorsConfig(patience=2), [])
    halts = []
    for step, total in enumerate([0.5, 0.7, 0.7, 0.6]):
        again = Watch(MonitorsConfig(patience=2), [])
        again.restore(watch.state())
        watch = again
        watch.after_evaluation(step, [{"index": 0, "total": total}])
        halts.append(watch.halts)
    assert halts == [False, False, False, True] and watch.best_total == 0.7
    patient = Watch(MonitorsConfig(), [])
    for step in range(9):
        patient.after_evaluation(step, [{"index": 0, "total": 0.5}])
    assert not patient.halts
