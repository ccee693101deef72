"""A grid of settings: its points, their names, and the recipes that a comparison runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.api import comparing
from imagerl.rl.compare.plan import BudgetSpec, Plan
from imagerl.rl.compare.sweep import grid_names, split_axes, write_grid
from imagerl.rl.config.train import load_recipe
from imagerl.rl.errors import ImageRLError
from tests.command import call

WORDS = ["optim.lr=[1e-4, 2e-4]", "rollout.group_size=[8, 16]", "eval.size=16"]


def test_every_combination_is_a_recipe_that_differs_in_nothing_else(tmp_path: Path) -> None:
    axes, others = split_axes(WORDS)
    assert others == ["eval.size=16"]
    paths = write_grid("tiny_ocr_grpo", axes, tmp_path)
    names = [f"lr={lr},group_size={size}" for lr in ("0.0001", "0.0002") for size in (8, 16)]
    assert [Path(path).stem for path in paths] == names == list(grid_names(axes))
    base = load_recipe("tiny_ocr_grpo").model_dump()
    for path, (lr, size) in zip(paths, [(lr, g) for lr in (1e-4, 2e-4) for g in (8, 16)], strict=True):
        point = load_recipe(path).model_dump()
        assert (point["optim"].pop("lr"), point["rollout"].pop("group_size")) == (lr, size)
        rest = base | {
            k: {n: v for n, v in base[k].items() if n not in ("lr", "group_size")}
            for k in ("optim", "rollout")
        }
        assert point == rest


def test_the_command_compares_the_grid_at_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(comparing, "run_comparison", lambda plan, *_, **__: plans.append(plan))
    given = ("--seeds", "2", "--budget", "images=1920", "--output", str(tmp_path))
    assert call("sweep", "tiny_ocr_grpo", *WORDS, *given) == 0
    (plan,) = plans
    assert list(plan.recipes) == list(grid_names(split_axes(WORDS)[0])) and plan.baseline in plan.recipes
    assert (plan.budget, plan.seeds) == (BudgetSpec("images", 1920), [0, 1])
    assert plan.overrides == ["eval.size=16"]


def test_a_list_is_an_axis_only_where_a_key_takes_one_value() -> None:
    fixed = [
        "eval.temperatures=[]",
        "eval.temperatures=[0.4, 0.2]",
        "rewards=[{name: ocr}, {name: clip}]",
        "gold=[]",
    ]
    axes, others = split_axes([*fixed, "rewards=[[{name: ocr}], [{name: clip}]]", "optim.lr=[1e-4, 2e-4]"])
    assert others == fixed and list(axes) == ["rewards", "optim.lr"]


def test_names_keep_keys_apart_and_hold_no_slashes() -> None:
    assert list(grid_names({"a.lr": [1, 2], "b.lr": ["x/y", None]}))[:2] == [
        "a.lr=1,b.lr=x_y",
        "a.lr=1,b.lr=None",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.size=16"], "nothing to sweep"),
        (["optim.lr=[1e-4]"], "two values or more"),
        (["optim.lr=[1, 2]", "optim.lr=[3, 4]"], "each key once"),
        (["optim.lr=[1e-4, 1e-4]"], "no value twice"),
        (["optim.lr=[1e-4, fast]"], "lr=fast: .optim.lr. should be a number"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match=said):
        write_grid("tiny_ocr_grpo", split_axes(words)[0], tmp_path)
