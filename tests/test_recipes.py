"""Every recipe that ships is valid, complete and says how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.rl.compare.plan import refuse_incomparable
from imagerl.rl.config.algorithm_table import ALGORITHMS
from imagerl.rl.config.flow_table import FLOW_ALGORITHMS
from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe, read_recipe
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.config.train import Recipe, load_recipe
from imagerl.rl.run.folder import differing_keys
from tools.tiny.config import ClipRecipe, PretrainRecipe

SCHEMAS: dict[str, type[RecipeModel]] = {
    "train": Recipe,
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "clip": ClipRecipe,
}
FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.y*ml"))
TINY = sorted((FOLDER.parent / "tools" / "tiny").glob("*.yaml"))
COMPARED = sorted((FOLDER / "compare").glob("*.yaml"))
FAINT = sorted((FOLDER / "faint").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "tiny_ocr_grpo.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES + COMPARED + FAINT + TINY, ids=lambda path: path.name)
def test_recipe_is_valid_and_round_trips(path: Path, tmp_path: Path) -> None:
    schema = SCHEMAS[read_recipe(path).get("kind", "train")]
    recipe = load_yaml_recipe(schema, path)
    (tmp_path / path.name).write_text(recipe.to_yaml())
    assert load_yaml_recipe(schema, tmp_path / path.name) == recipe


@pytest.mark.parametrize("path", RECIPES + TINY, ids=lambda path: path.name)
def test_recipe_header_gives_the_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:15] if line.startswith("#")]
    program = "python -m tools.tiny" if path in TINY else "imagerl"
    command = f"{program} {read_recipe(path).get('kind', 'train')} {path.relative_to(FOLDER.parent)}"
    assert any(command in line for line in header)


@pytest.mark.parametrize(
    ("base", "paths", "more"),
    [
        ("tiny_compare.yaml", COMPARED, {"engine.micro_batch_size"}),
        ("tiny_faint.yaml", FAINT, {"model.freeze", "optim.lr"}),  # of the tokens, where they train too
    ],
)
def test_compared_recipes_differ_in_their_algorithm_alone(
    base: str, paths: list[Path], more: set[str]
) -> None:
    """The table of docs/compare.md says what is held equal: here is the list of what is not."""
    may_differ = {"algorithm", "rollout.group_size", "rollout.decodes"} | more
    shared = load_recipe(FOLDER / base)
    assert len(paths) >= 5
    for path in paths:
        recipe = load_recipe(path)
        changed = {key for key in differing_keys(shared, recipe) if not key.startswith("algorithm.")}
        assert changed <= may_differ, path.name
        rollout = recipe.rollout
        assert rollout.prompts_per_step * rollout.group_size * rollout.decodes == 96
        assert recipe.algorithm.updates_per_rollout == shared.algorithm.updates_per_rollout
    refuse_incomparable({path.stem: load_recipe(path) for path in paths})


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_compared_algorithms_have_their_own_defaults(path: Path) -> None:
    """What the row of an algorithm says is not overridden, but for what the tiny model cannot do."""
    algorithm = load_recipe(path).algorithm
    for key, value in ALGORITHMS[algorithm.name].defaults().items():
        assert getattr(algorithm, key) == value
    if algorithm.flow is not None:
        changed = {
            key
            for key, value in FLOW_ALGORITHMS[algorithm.flow.name].defaults().items()
            if getattr(algorithm.flow, key) != value
        }
        assert changed <= {"window_size"}  # it has 4 denoising steps
