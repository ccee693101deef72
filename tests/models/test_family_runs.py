"""What a run of every family must keep; `test_family_contract.py` has what its model must."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagerl.models import families
from imagerl.rl.config.train import load_recipe
from imagerl.rl.training.memory import StepShape, step_bytes
from tests.command import call, measured
from tests.models.test_family_contract import FAMILIES_UNDER_TEST, PROMPTS
from tests.ranks import Ranks
from tests.small_run import write_recipe


def run_of(place: Path, name: str, steps: int, *settings: str) -> list[str]:
    """The command of a run of some steps in `place/name`."""
    overrides = (f"run.output_dir={place / name}", f"run.steps={steps}", "checkpoint.every=1")
    more = ("algorithm.kl_coef=0.01", "eval.size=2", "engine.micro_batch_size=4")
    more += (f"model.family={families.FAMILIES[place.name.rstrip('0123456789')]}",)
    return ["train", str(write_recipe(place, *overrides, *more, *settings, name=f"{name}_{steps}.yaml"))]


@pytest.fixture(scope="module", params=FAMILIES_UNDER_TEST)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in one process."""
    place = tmp_path_factory.mktemp(request.param)
    (place / "model").mkdir()
    FAMILIES_UNDER_TEST[request.param](place / "model")
    assert call(*run_of(place, "whole", 2)) == 0
    return place / "whole"


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_exports(whole: Path) -> None:
    place = whole.parent
    assert call(*run_of(place, "parts", 1)) == 0
    assert call(*run_of(place, "parts", 2), "--resume") == 0
    one, other = (run / "checkpoints" / "step_000002" for run in (whole, place / "parts"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert call("export", str(whole), str(place / "out")) == 0


@pytest.mark.slow
def test_two_processes_train_as_one(whole: Path) -> None:
    """The same prompts, pictures and update, to rounding: what each draws depends on its own numbers alone."""
    place = whole.parent
    Ranks(place, 2, run_of(place, "together", 2)).succeed()
    alone, together = measured(whole), measured(place / "together")
    assert len(alone) == len(together) > 2
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_step_is_planned_by_sizes_alone(whole: Path, tmp_path: Path) -> None:
    """The outline has the shapes of the model, and every moment of a step runs on it without content."""
    folder = whole.parent / "model"
    shared = families.load_policy(str(folder))
    outline, canvas = families.load_outline(str(folder)), shared.prompts.canvas(PROMPTS[0])
    sizes = {name: [p.shape for p in part.parameters()] for name, part in shared.parts().items()}
    shape = StepShape(2, 4, outline.prompts.longest(PROMPTS), canvas.tokens, 2, False, canvas.noise)
    for flow in ("null", "{name: nft, joint: true}") if canvas.noise else ("null",):
        policy = outline.policy()
        assert {name: [p.shape for p in part.parameters()] for name, part in policy.parts().items()} == sizes
        settings = (f"model.path={folder}", f"algorithm.flow={flow}", "rollout.guidance=1.0")
        settings += "engine.micro_batch_size=2", "engine.precision=bf16"
        recipe = load_recipe(write_recipe(tmp_path, *settings))
        costs = step_bytes(outline.policy, recipe, shape, {})
        assert all(costs[name] > 0 for name in ("sampling", "drawing", "scoring", "update", "gradients"))
        trained = sum(p.numel() for p in shared.trainable.parameters())
        assert costs["trained"] == trained if flow == "null" else costs["trained"] > trained


@pytest.mark.slow
def test_recomputed_layers_train_as_kept_ones(whole: Path) -> None:
    """Tokens alone, and with the decoder where it trains."""
    place = whole.parent
    noise = families.load_prompts(str(place / "model")).canvas(PROMPTS[0]).noise
    for flow in ("null", "{name: flow_grpo, joint: true}") if noise else ("null",):
        runs = []
        for on in ("false", "true"):
            name = f"{on}_{len(flow)}"
            settings = (
                f"algorithm.flow={flow}",
                f"engine.activation_checkpointing={on}",
                "rollout.guidance=1.0",
                "rollout.flow_steps=3",
            )
            assert call(*run_of(place, name, 2, *settings)) == 0
            runs.append(measured(place / name))
        assert len(runs[0]) == len(runs[1]) > 2
        for one, two in zip(*runs, strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
