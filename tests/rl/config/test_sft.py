"""Fine-tuning recipes: short spellings, and mistakes told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.rl.config.sft import SFTRecipe, load_sft_recipe
from imagerl.rl.errors import ImageRLError

SMALL = """
kind: sft
run: {steps: 10, output_dir: runs/x}
data: {train: [pictures], heldout: [others]}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_defaults_are_the_published_settings(small: Path) -> None:
    recipe = load_sft_recipe(small)
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.optim.schedule) == (5e-5, 1e-5, "cosine")
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (recipe.train.ar, recipe.train.connector, recipe.train.decoder) == ("full", "full", "caption")
    objective = recipe.objective
    assert (objective.cross_entropy_weight, objective.flow_weight) == (1.0, 1.0)
    assert (objective.condition_dropout, objective.on_prompt) == (0.1, True)
    assert recipe.data.batch_size == 512  # 16 on each of 32 GPUs


def test_paths_may_stand_alone(small: Path) -> None:
    recipe = load_sft_recipe(small, ["data.train=[a, {path: b, weight: 0.5, caption_field: text}]"])
    assert [(one.path, one.weight, one.caption_field) for one in recipe.data.train] == [
        ("a", 1.0, "caption"),
        ("b", 0.5, "text"),
    ]
    assert load_sft_recipe(small, ["data.train=a"]).data.train[0].path == "a"
    again = SFTRecipe.model_validate(recipe.model_dump())
    assert again == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=train", 'is a recipe of kind "train"; this command takes kind "sft"'),
        ("data.trian=[x]", 'unknown key "data.trian"; did you mean "data.train"?'),
        ("data.train=[]", '"data.train"'),
        ("data.train=[{paht: x}]", 'unknown key "data.train.0.paht"; did you mean "data.train.0.path"?'),
        ("data.train=[others]", "data.heldout (others) is also in data.train"),
        ("train.decoder=captions", '"train.decoder" cannot be "captions"; did you mean "caption"?'),
        ("train={ar: frozen, connector: frozen, decoder: frozen}", "everything is frozen"),
        ("train={ar: lora, lora: {dropout: 0.1}}", "dropout must be 0"),
        ("objective={cross_entropy_weight: 0, flow_weight: 0}", "both weights are 0"),
        ("objective.flow_weight=0", "flow_weight is 0 but train.connector is full"),
        ("optim.lr=1e-6", "optim.min_lr (1e-05) is more than optim.lr (1e-06)"),
        ("optim.warmup_steps=10", "optim.warmup_steps (10) must be below run.steps (10)"),
        ("engine.zero_stage=2", "engine.zero_stage needs engine.name: deepspeed"),
        ("optim.ema=0.9", "optim.ema needs whole weights"),
        ("model.dtype=bf16", "model.dtype: bf16 needs engine.precision: bf16"),
        ("data.max_bad_share=1", '"data.max_bad_share"'),
    ],
)
def test_mistakes_are_one_line(small: Path, override: str, message: str) -> None:
    overrides = [override, *(["engine.name=deepspeed"] if "ema" in override else [])]
    if override.startswith("kind"):
        small.write_text(SMALL.replace("kind: sft", "kind: train"))
        overrides = []
    with pytest.raises(ImageRLError) as error:
        load_sft_recipe(small, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_rate_for_a_frozen_part_is_refused(small: Path) -> None:
    with pytest.raises(ImageRLError, match=r"optim.decoder_lr is set but train.decoder is frozen"):
        load_sft_recipe(small, ["train.decoder=frozen", "optim.decoder_lr=1e-4"])
