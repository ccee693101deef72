from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.engine.schedule import learning_rate
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.run import report
from imagerl.rl.run.budget import Budget
from tests.command import exit_code, measured
from tests.micro import micro_folder
from tests.small_run import recipe_data, write_recipe


def test_images_leave_no_room_for_half_a_step() -> None:
    budget = Budget(images=20, step_images=8)
    assert (budget.share, budget.spent, budget.expected_steps()) == (0.0, False, None)
    budget.spend({"rollout/images": 8.0, "time/step_s": 3.0})
    assert (budget.share, budget.spent, budget.expected_steps()) == (0.4, False, 2)
    budget.spend({"rollout/images": 8.0})
    assert (budget.share, budget.spent) == (0.8, True)  # 8 more would be 24
    budget.spend({"rollout/images": 16.0})  # as where groups were drawn again
    assert budget.share == 1.0


def test_minutes_leave_half_a_step() -> None:
    budget = Budget(minutes=1.0)
    for seconds, share, spent in ((20.0, 1 / 3, False), (20.0, 2 / 3, False), (12.0, 52 / 60, True)):
        budget.spend({"time/step_s": seconds})  # at 52 s of 60 the mean step takes 17.3
        assert (budget.share, budget.spent) == (pytest.approx(share), spent)
    again = Budget(minutes=1.0)
    again.restore(json.loads(json.dumps(budget.state())))
    assert again == budget


def test_without_a_budget_steps_decide() -> None:
    budget = Budget()
    budget.spend({"rollout/images": 1e9, "time/step_s": 1e9})
    assert (budget.share, budget.spent, budget.expected_steps()) == (None, False, None)


def optim(**changes: Any) -> Any:
    data = recipe_data(Path("unused"))
    return validate_recipe(Recipe, {**data, "optim": changes}, "test").optim


def test_the_learning_rate_follows_the_share() -> None:
    line = optim(lr=1.0, schedule="linear", decay_share=0.5, min_lr=0.2, warmup_steps=2)
    rates = [
        learning_rate(update, 100, line, share) for update, share in enumerate((0.0, 0.4, 0.5, 0.75, 1.0))
    ]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.6, 0.2])
    # where steps are what is spent, it is the curve that steps give
    for schedule in ("linear", "cosine", "constant"):
        curve = optim(lr=1.0, schedule=schedule, decay_share=0.75)
        for update in range(8):
            assert learning_rate(update, 8, curve, update / 8) == pytest.approx(
                learning_rate(update, 8, curve)
            )


def test_impossible_budgets() -> None:
    data = recipe_data(Path("unused"))
    for run, part in (({"images": 8, "minutes": 1.0}, "only one"), ({"images": 7}, "less than the 8")):
        with pytest.raises(ImageRLError, match=part):
            validate_recipe(Recipe, {**data, "run": {**data["run"], **run}}, "test")


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    micro_folder(folder / "model")
    options = ("run.steps=50", "optim.schedule=linear", "run.sample_every=0", "checkpoint.every=1")
    write_recipe(folder, *options)
    return folder


def train(place: Path, name: str, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "render", lambda chart: "")
        assert exit_code(["train", str(place / "recipe.yaml"), f"run.output_dir={place / name}", *more]) == 0
    return place / name


def test_a_run_ends_with_its_images_and_resumes(place: Path) -> None:
    whole = train(place, "whole", "run.images=28")
    records = [record for record in read_metrics(whole) if "lr" in record]
    assert [r["lr"] for r in records] == pytest.approx([0.003 * (1 - drawn / 28) for drawn in (0, 8, 16)])
    assert [path.name for path in list_checkpoints(whole / "checkpoints")][-1] == "step_000003"
    assert json.loads((whole / "eval" / "comparison.json").read_text())["after_step"] == 3
    assert "finished, step 3 of 3" in (whole / "report.html").read_text()
    before = measured(whole)
    train(place, "whole", "run.images=28", "--resume")  # nothing is left to do
    assert measured(whole) == before

    parts = train(place, "parts", "run.images=28", "run.steps=2")
    assert measured(parts) != before
    train(place, "parts", "run.images=28", "--resume")
    assert [r for r in measured(parts) if "lr" in r] == [r for r in before if "lr" in r]


def test_a_run_ends_with_its_minutes(place: Path) -> None:
    run = train(place, "clock", "run.minutes=0.01")
    seconds = [record["time/step_s"] for record in read_metrics(run) if "lr" in record]
    assert 1 <= len(seconds) < 50
    mean = sum(seconds[:-1]) / max(1, len(seconds) - 1)
    assert len(seconds) == 1 or sum(seconds[:-1]) + mean / 2 <= 0.6
