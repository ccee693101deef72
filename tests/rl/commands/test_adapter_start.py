"""Runs that begin from an adapter: they go on training it, or a new one on top, and their reference is that start."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from imagerl.api.exporting import proof_samples, recipe_of, trained_policy, write_export
from imagerl.models.common.adapters import adapter_base
from imagerl.rl.commands.plan import plans
from imagerl.rl.config.recipe import load_yaml_recipe, validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.engine.checkpoint import load_checkpoint
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.sft.objective import lessons_for
from imagerl.rl.types import SamplingParams
from tests import small_sft
from tests.command import call
from tests.micro import micro_folder
from tests.models.helpers import load_policy
from tests.small_run import low_tokens, recipe_data, small_trainer, write_recipe
from tools.tiny.config import PretrainRecipe
from tools.tiny.pretrain import starting_policy

ROOT = Path(__file__).parents[3]
# how a run begins: from what export of the first one, with which adapters
STARTS = {
    "goes_on": ("adapter", "null"),
    "on_an_adapter": ("adapter", "{r: 2}"),
    "on_a_merge": ("merged", "{r: 2}"),
}


def train(place: Path, run: Path, *overrides: str) -> None:
    options = (f"run.output_dir={run}", "optim.lr=0.02", "checkpoint.every=1", "algorithm.kl_coef=0.05")
    resume = [word for word in overrides if word == "--resume"]
    recipe = write_recipe(place, *options, *(word for word in overrides if word != "--resume"))
    assert call("train", str(recipe), *resume) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps, exported as `adapter` and `merged`, and runs of three steps from these."""
    folder = tmp_path_factory.mktemp("starts")
    micro_folder(folder / "model")
    train(folder, folder / "first", "model.lora={r: 4}", "run.steps=2")
    write_export(folder / "first", folder / "adapter", adapter_only=True)
    file = folder / "adapter" / "adapter_config.json"  # as other trainers leave it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5}))
    write_export(folder / "first", folder / "merged")
    for name, (start, lora) in STARTS.items():
        train(folder, folder / name, f"model.path={folder / start}", f"model.lora={lora}", "run.steps=3")
    return folder


@pytest.fixture(params=list(STARTS))
def start(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_reference_is_the_policy_before_the_first_step(place: Path, start: str) -> None:
    kl = [record["kl/k3"] for record in read_metrics(place / start) if "kl/k3" in record]
    assert kl[0] == 0.0 and kl[1] > 0 and kl[2] > 0


def test_before_is_the_evaluation_of_the_folder(place: Path, start: str) -> None:
    """Held to the folder alone, which knows nothing of runs; and the bare base draws something else."""

    def found(folder: Path) -> list[float]:
        rollout = RolloutEngine(load_policy(str(folder))[0], SamplingParams(flow_steps=1), 0, nullcontext)
        (groups,) = rollout.generate(prompt_set("heldout", 4), 1, "eval ocr")
        return [low_tokens(group.tokens.tolist())[0] for group in groups]

    before = json.loads((place / start / "eval" / "ocr_step_000000.json").read_text())["per_prompt"]
    assert found(place / STARTS[start][0]) == [row["low_tokens"] for row in before] != found(place / "model")


def test_only_the_adapter_trains(place: Path, start: str) -> None:
    first, last = (
        load_checkpoint(place / start / "checkpoints" / f"step_{step:06d}").tensors["model"]
        for step in (2, 3)
    )
    rank = {tensor.shape[0] for name, tensor in last.items() if "lora_A" in name}
    assert all(".lora_" in name and "reference" not in name for name in last)
    assert rank == {4 if start == "goes_on" else 2}
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_a_resumed_run_ends_bit_for_bit_alike(place: Path, start: str, tmp_path: Path) -> None:
    folder, lora = STARTS[start]
    options = (f"model.path={place / folder}", f"model.lora={lora}")
    train(place, tmp_path / "parts", *options, "run.steps=1")
    train(place, tmp_path / "parts", *options, "run.steps=3", "--resume")
    whole, parts = (run / "checkpoints" / "step_000003" for run in (place / start, tmp_path / "parts"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    kl = [
        [r["kl/k3"] for r in read_metrics(run) if "kl/k3" in r] for run in (place / start, tmp_path / "parts")
    ]
    assert kl[0] == kl[1]


@pytest.mark.parametrize("adapter_only", [True, False])
def test_its_export_repeats_it(place: Path, start: str, tmp_path: Path, adapter_only: bool) -> None:
    write_export(place / start, tmp_path / "out", adapter_only=adapter_only)
    again = load_policy(str(tmp_path / "out"))[0]
    trained, drawn = proof_samples(trained_policy(*recipe_of(place / start))), proof_samples(again)
    assert all(torch.equal(value, trained[name]) for name, value in drawn.items())
    before = proof_samples(load_policy(str(place / "adapter"))[0])
    assert not torch.equal(drawn["tokens"], before["tokens"])
    assert (again.trainable.adapter is not None) == adapter_only
    if adapter_only:
        stands_on = "model" if start == "goes_on" else STARTS[start][0]
        assert adapter_base(tmp_path / "out") == str(place / stands_on)


def test_other_layouts_are_of_the_model_underneath(place: Path, start: str, tmp_path: Path) -> None:
    write_export(place / start, tmp_path / "out", layout="blip3o")
    drawn = proof_samples(load_policy(str(tmp_path / "out"))[0])
    trained = proof_samples(trained_policy(*recipe_of(place / start)))
    assert torch.equal(drawn["tokens"], trained["tokens"])


# ---- what else begins from an adapter, and what cannot -----------------------------------------------------


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_fine_tuning_begins_from_the_merged_adapter(place: Path, trained: str) -> None:
    merged = load_policy(str(place / "merged"))[0].trainable.lm.state_dict()
    policy = load_policy(str(place / "adapter"))[0]
    lessons = lessons_for(policy, small_sft.recipe(place, f"train.ar={trained}"))
    state = {
        name.replace(".base_layer", ""): tensor for name, tensor in policy.trainable.lm.state_dict().items()
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())
    named = lessons.trainable.named_parameters()
    learning = {name for name, p in named if p.requires_grad and lessons.part_of(name) == "ar"}
    assert all(("lora_" in name) == (trained == "lora") for name in learning) and learning


def test_a_decoder_trains_over_the_merged_adapter(place: Path) -> None:
    policy = load_policy(str(place / "adapter"))[0]
    small_trainer("algorithm.flow={name: flow_grpo}", "rollout.flow_steps=3", policy=policy).step(0)
    assert policy.trainable.adapter is None


def test_zero_3_keeps_the_reference_too(place: Path) -> None:
    lines = []
    for options in ((), ("engine.name=deepspeed", "engine.zero_stage=3")):
        policy = load_policy(str(place / "adapter"))[0]
        trainer = small_trainer("algorithm.kl_coef=0.05", "optim.lr=0.02", *options, policy=policy)
        lines.append([trainer.step(step)["kl/k3"] for step in range(2)])
        trainer.engine.close()
    assert lines[0][0] == lines[1][0] == 0.0 and lines[0][1] > 0
    assert lines[0][1] == pytest.approx(lines[1][1], rel=1e-5)


def test_pretraining_goes_on_with_all_weights_of_the_merged_adapter(place: Path) -> None:
    recipe = load_yaml_recipe(
        PretrainRecipe, "tools/tiny/tiny_unified_pretrain.yaml", [f"init={place / 'adapter'}"]
    )
    policy, _ = starting_policy(recipe)
    assert policy.trainable.adapter is None
    assert all(parameter.requires_grad for parameter in policy.trainable.parameters())


def test_its_memory_is_planned_as_that_of_adapters(place: Path) -> None:
    data = recipe_data(place, f"model.path={place / 'adapter'}", "algorithm.kl_coef=0.1")
    given, asked = (
        plans(validate_recipe(Recipe, data | {"model": model}, "test"), [1])[0]
        for model in ({"path": str(place / "adapter")}, {"path": str(place / "model"), "lora": {"r": 4}})
    )
    assert given.parts == asked.parts and "KL reference" not in given.parts


def test_a_reference_that_moves_needs_full_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (f"model.path={place / 'adapter'}", "algorithm.reference_every=2", "algorithm.kl_coef=0.1")
    assert call("train", str(write_recipe(place, *options, f"run.output_dir={place / 'moving'}"))) == 1
    assert "give its merged export (without --adapter) as model.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("bias", "lora_only"), ("modules_to_save", ["embed_tokens"])]
)
def test_adapters_that_the_sampler_would_not_see_are_refused(
    place: Path, tmp_path: Path, key: str, value: object
) -> None:
    for file in (place / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ImageRLError, match=f"has {key}; merge it into its base"):
        load_policy(str(tmp_path))
