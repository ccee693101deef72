"""The table and how a recipe chooses from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from imagerl.rl.config.algorithm import AlgorithmConfig
from imagerl.rl.config.algorithm_table import ALGORITHMS, Name
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe, load_recipe
from imagerl.rl.errors import ImageRLError
from tests.small_run import recipe_data

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"


def recipe(*overrides: str) -> Recipe:
    return validate_recipe(Recipe, recipe_data(Path("unused"), *overrides), "test")


def test_the_table_has_every_name() -> None:
    assert tuple(ALGORITHMS) == get_args(Name)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_is_the_defaults_of_its_name(name: Name) -> None:
    config = recipe(f"algorithm.name={name}").algorithm
    row = ALGORITHMS[name].defaults()
    assert {key: getattr(config, key) for key in row} == row
    assert config.updates_per_rollout == 1 and config.entropy_coef == 0


def test_the_fields_of_the_schema_default_to_grpo() -> None:
    assert AlgorithmConfig() == AlgorithmConfig(name="grpo")
    for key, value in ALGORITHMS["grpo"].defaults().items():
        assert AlgorithmConfig.model_fields[key].default == value


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_field_of_a_row_can_be_overridden(name: Name) -> None:
    other: dict[str, Any] = {
        "baseline": "leave_one_out",
        "scale_rewards": "batch",
        "decouple_rewards": False,
        "advantage_eps": 0.5,
        "ratio_level": "sequence",
        "clip": "none",
        "clip_low": 0.11,
        "clip_high": 0.12,
        "normaliser": "sequence",
        "kl_coef": 0.123,
        "kl_estimator": "k1",
        "kl_in": "loss",
        "max_resamples": 7,
    }
    assert set(other) == set(ALGORITHMS[name].defaults())
    config = recipe(
        f"algorithm.name={name}", *(f"algorithm.{key}={str(v).lower()}" for key, v in other.items())
    )
    assert {key: getattr(config.algorithm, key) for key in other} == other


def test_a_stored_recipe_says_everything(tmp_path: Path) -> None:
    """It names each value, so that a later version with another table reads the same run."""
    path = tmp_path / "recipe.yaml"
    given = recipe("algorithm.name=dapo", "algorithm.clip_low=0.1")
    path.write_text(given.to_yaml())
    assert load_recipe(path) == given
    assert "clip_high: 0.28" in path.read_text() and "clip_low: 0.1" in path.read_text()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["name=dapoo"], 'did you mean "dapo"?'),
        (["import_path=redness"], "should look like file.py:function"),
        (["advantage_import_path=x"], "should look like file.py:function"),
        (["baseline=batch_mean"], "set scale_rewards to batch, whiten or none"),
        (["name=reinforce", "max_resamples=2"], "max_resamples needs a baseline within the group"),
        (["name=reinforce", "decouple_rewards=true"], "decouple_rewards needs a baseline within the group"),
        (["name=gdpo", "kl_in=reward"], "decouple_rewards needs kl_in: loss"),
        (["name=gdpo", "scale_rewards=whiten"], "scale_rewards other than whiten"),
        (["clip=geometric"], "set ratio_level: sequence"),
        (["name=rloo", "normaliser=tokens"], "set algorithm.normaliser: sequence"),
        (["kl_coef=0", "kl_target=0.1"], "algorithm.kl_target is 0.1 but algorithm.kl_coef is 0"),
        (["name=dapo", "reference_every=5"], "set algorithm.kl_coef or algorithm.measure_kl"),
        (["reference_every=1", "kl_target=0.1", "updates_per_rollout=2"], "would run kl_coef to nothing"),
        (["reference_every=1"], "the KL of its first update is 0"),
        (["top_entropy=0"], '"algorithm.top_entropy" should be greater than 0'),
        (["importance_cap=0"], '"algorithm.importance_cap" should be greater than or equal to 1e-12'),
    ],
)
def test_impossible_combinations(overrides: list[str], part: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        recipe(*(f"algorithm.{override}" for override in overrides))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_renewed_reference_needs_full_weights() -> None:
    with pytest.raises(ImageRLError, match=r"with model\.lora the reference is the base model"):
        recipe("algorithm.reference_every=5", "model.lora={r: 4}")


def test_a_corrected_difference_does_not_stop_a_run() -> None:
    assert recipe().logprob_limit == 0.01
    assert recipe("algorithm.importance_cap=2").logprob_limit == float("inf")
    assert recipe("algorithm.importance_cap=2", "rollout.max_logprob_diff=0.5").logprob_limit == 0.5


def test_the_page_has_the_table() -> None:
    """docs/algorithms.md shows each row as it is."""
    lines = {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert set(lines) >= set(ALGORITHMS)
    for name, row in ALGORITHMS.items():
        bounds = f"{1 - row.clip_low:g}, {1 + row.clip_high:g}"
        if row.clip == "geometric":
            bounds = f"e^{-row.clip_low:g}, e^{row.clip_high:g}"
        clip = row.clip if row.clip in ("none", "soft") else f"{row.clip} [{bounds}]"
        kl = "none" if row.kl_coef == 0 else f"{row.kl_coef:g} in {row.kl_in}"
        if row.kl_coef and row.kl_in == "loss":
            kl += f", {row.kl_estimator}"
        decoupled = ", each reward alone" if row.decouple_rewards else ""
        resampled = f", {row.max_resamples} resamples" if row.max_resamples else ""
        advantage = f"{row.baseline} / {row.scale_rewards}{decoupled}{resampled}"
        cells = [advantage, row.ratio_level, clip, row.normaliser, kl]
        assert [cell.strip() for cell in lines[name].split("|")[2:7]] == cells
