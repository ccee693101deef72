"""Every recipe that ships is valid, complete and says how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.clip_config import ClipRecipe
from rl.config import Recipe
from rl.pretrain_config import PretrainRecipe
from rl.recipe import RecipeModel, load_yaml_recipe, read_recipe
from rl.sft_config import SFTRecipe

SCHEMAS: dict[str, type[RecipeModel]] = {
    "train": Recipe,
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "clip": ClipRecipe,
}
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.y*ml"))


def test_there_are_recipes() -> None:
    assert "tiny_ocr_grpo.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_round_trips(path: Path, tmp_path: Path) -> None:
    schema = SCHEMAS[read_recipe(path).get("kind", "train")]
    recipe = load_yaml_recipe(schema, path)
    (tmp_path / path.name).write_text(recipe.to_yaml())
    assert load_yaml_recipe(schema, tmp_path / path.name) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_header_gives_the_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:15] if line.startswith("#")]
    assert any(
        f"imagerl {read_recipe(path).get('kind', 'train')} recipes/{path.name}" in line for line in header
    )
