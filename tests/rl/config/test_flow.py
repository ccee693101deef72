"""The decoder's section of a recipe: rows of the table as defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imagerl.rl.config.flow_table import FLOW_ALGORITHMS
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from tests.command import exit_code
from tests.micro import micro_folder
from tests.small_run import recipe_data, write_recipe


def recipe(*overrides: str) -> Recipe:
    data = recipe_data(Path("unused"), "rollout.flow_steps=6", *overrides)
    return validate_recipe(Recipe, data, "test")


@pytest.mark.parametrize("name", FLOW_ALGORITHMS)
def test_a_name_sets_its_row_and_any_key_overrides_it(name: Any) -> None:
    flow = recipe(f"algorithm.flow.name={name}").algorithm.flow
    assert flow is not None
    assert {key: getattr(flow, key) for key in FLOW_ALGORITHMS[name].defaults()} == FLOW_ALGORITHMS[
        name
    ].defaults()
    changed = recipe(f"algorithm.flow={{name: {name}, kl_coef: 0.5}}").algorithm.flow
    assert changed is not None and changed.kl_coef == 0.5 and changed.loss == flow.loss


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["algorithm.flow={name: nft, sampler: sde}"], "set algorithm.flow.sampler to ode"),
        (["algorithm.flow={sampler: ode}"], "set algorithm.flow.sampler to sde, dance or cps"),
        (["algorithm.flow={noise_level: 0}"], "without noise no step has a log-prob"),
        (["algorithm.flow={name: cps, noise_level: 1}"], "must be below 1"),
        (["algorithm.flow={name: mixgrpo, window_size: 6}"], "needs 6 stochastic steps but only 5 of 6"),
        (["algorithm.flow={name: mixgrpo, window_stop: 3}"], "needs 4 stochastic steps but only 3 of 6"),
        (["algorithm.flow={steps: 1}"], "only 0 of 1"),
        (["algorithm.flow={}", "engine={name: deepspeed, zero_stage: 3}"], "engine.zero_stage to 2 or less"),
        (["algorithm.flow={}", "model.lora={r: 2}"], "algorithm.flow.joint: true"),
        (["algorithm.flow={}", "algorithm.kl_in=reward"], "of the tokens, which do not train"),
        (["algorithm.flow={name: flow_gpro}"], "flow_grpo"),
        (["algorithm.flow={name: nft}", "rollout.guidance=2.0"], "rollout.guidance is 2, but nft matches"),
        (["algorithm.flow={name: awm, guidance: 4.5}"], "algorithm.flow.guidance is 4.5, but awm matches"),
        (["algorithm.flow={name: awm, old_policy: {}}"], "old_policy is of nft, and the loss is awm"),
        (["algorithm.flow={name: nft, old_policy: {}}", "engine.name=deepspeed"], "set engine.name: torch"),
        (["algorithm.flow={loss: nft, sampler: ode, guidance: 0.0}"], "algorithm.flow.allow_guidance: true"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(overrides: list[str], part: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        recipe(*overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FLOW_ALGORITHMS)
def test_matching_draws_without_guidance_unless_told_twice(name: Any) -> None:
    matching = name in ("nft", "awm")
    assert recipe(f"algorithm.flow.name={name}").rollout.guidance == (1.0 if matching else 2.0)
    told = recipe("algorithm.flow={name: nft, allow_guidance: true}", "rollout.guidance=2.0")
    assert told.rollout.guidance == 2.0
    apart = recipe("algorithm.flow={name: nft, guidance: 1.0}", "rollout.guidance=2.0")  # only judged at 2
    assert apart.rollout.guidance == 2.0


def test_unscaled_rewards_with_nft_are_doubted() -> None:
    (doubt,) = recipe("algorithm.flow={name: nft}", "algorithm.scale_rewards=none").doubts
    assert "a tenth of the signal" in doubt and "\n" not in doubt
    assert not recipe("algorithm.flow={name: awm}", "algorithm.scale_rewards=none").doubts
    assert not recipe("algorithm.flow={name: nft}").doubts and not recipe().doubts


def test_the_tokens_may_have_adapters_where_both_train() -> None:
    assert recipe("algorithm.flow={joint: true}", "model.lora={r: 2}").algorithm.flow is not None
    assert recipe("algorithm.flow={name: nft}", "rollout.flow_steps=1").algorithm.flow is not None


def test_a_run_tells_its_doubts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    micro_folder(tmp_path / "model")
    recipe = write_recipe(
        tmp_path, "run.steps=1", "algorithm.flow={name: nft}", "algorithm.scale_rewards=none"
    )
    assert exit_code(["train", str(recipe)]) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "a tenth" in line]
    assert told.startswith("imagerl: algorithm.scale_rewards is none")
