"""The memory that `imagerl plan` foretells, beside the memory that a run takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from imagerl.models.blip3o_next.loading import save_policy
from imagerl.models.families import load_outline
from imagerl.rl.commands.plan import fitting, plans
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import PromptSetConfig, Recipe, load_recipe
from imagerl.rl.data.prompt_sets import load_prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.training.memory import StepShape
from imagerl.rl.training.plan import GIB, Plan, make_plan, step_shape, table
from imagerl.rl.types import Canvas, Prompt
from tests.command import exit_code
from tests.micro import micro_folder
from tests.models.helpers import edit_policy
from tests.resident import alone
from tests.small_run import recipe_data

ROOT = Path(__file__).parents[3]
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
OVERRIDES = (
    "engine.micro_batch_size=4",
    "eval.batch_size=4",
    "rollout.flow_steps=2",
    "rollout.prompts_per_step=4",
)
MEASURE = """
import json, sys
from imagerl.models.blip3o_next.loading import load_policy
from tests.resident import grown
from tests.small_run import small_trainer
folder, *overrides = sys.argv[1:]
trainer = small_trainer()
trainer.step(0), trainer.step(1)  # whatever the libraries keep for themselves is there now
def run():
    trainer = small_trainer(*overrides, policy=load_policy(folder)[0])
    trainer.step(0), trainer.step(1)
    return trainer
print(json.dumps(grown(run)))
"""


def recipe(*overrides: str, path: str = "tiny") -> Recipe:
    return validate_recipe(Recipe, recipe_data(Path("x"), f"model.path={path}", *overrides), "test")


@pytest.mark.slow
def test_a_measured_run_takes_what_its_plan_says(tmp_path: Path) -> None:
    """Adam's state exists from the second step on, hence two."""
    folder = micro_folder(tmp_path / "model", **SIZES)
    measured = alone(MEASURE, str(folder), *OVERRIDES)
    (planned,) = plans(recipe(*OVERRIDES, path=str(folder)), [1])
    assert measured > 300e6
    assert planned.peak == pytest.approx(measured, rel=0.15)
    assert planned.busiest == "forward and backward"


COST = {
    **{"frozen language model": 0.0, "trained language model": 100.0, "reference": 100.0, "trained": 100.0},
    **{"frozen connector and decoder": 20.0, "frozen autoencoder": 10.0, "frozen image tokenizer": 5.0},
    **{"largest": 30.0, "gradients": 400.0, "drawing": 500.0, "scoring": 80.0},
    **{"sampler": 200.0, "laying_out": 210.0, "sampling": 60.0, "hidden": 7.0},
    **{"update": 1000.0, "waiting": 135.0},
}
CANVAS = Canvas(8, (32, 64), (4, 2, 4))


def put_together(gpus: int, *overrides: str) -> tuple[dict[str, float], dict[str, float]]:
    settings = recipe(
        "rollout.prompts_per_step=8", "engine.micro_batch_size=4", "engine.device=auto", *overrides
    )
    plan = make_plan(settings, gpus, step_shape(settings, gpus, 20, CANVAS), COST)
    assert plan.peak == sum(plan.parts.values()) + max(plan.phases.values())
    return dict(plan.parts), dict(plan.phases)


def test_one_gpu_by_hand() -> None:
    parts, phases = put_together(1)
    assert parts == {
        "language model, trained": 400,
        "KL reference": 400,
        "connector and decoder, frozen": 80,
        "autoencoder, frozen": 40,
        "image tokenizer, frozen": 20,
        "optimizer state": 800,
    }
    assert phases == {
        "copying weights for sampling": 210,  # the sampler's copy and a tensor
        "sampling tokens": 260,
        "drawing pictures": 707,
        "scoring by the reference": 80,
        "forward and backward": 1000,
        "optimizer step": 800,  # gradients, and one more tensor for each parameter
    }


def test_zero_divides_what_it_says() -> None:
    parts, phases = put_together(4, "engine.name=deepspeed", "engine.zero_stage=1")
    assert parts["optimizer state"] == 200 and parts["ZeRO's own float32 copy"] == 100
    assert parts["language model, trained"] == 400
    assert phases["forward and backward"] == 1000 and phases["optimizer step"] == 400 + 100 + 100
    parts, phases = put_together(4, "engine.name=deepspeed", "engine.zero_stage=2")
    assert phases["forward and backward"] == 600 + 100 + 2 * 800  # two buckets, smaller than the model here
    parts, phases = put_together(4, "engine.name=deepspeed", "engine.zero_stage=3")
    assert parts["language model, trained"] == 100
    assert phases["copying weights for sampling"] == 210 + 400  # whole on each rank for a moment


def test_plain_data_parallelism_keeps_its_gradients() -> None:
    parts, phases = put_together(2)
    assert parts["gradients"] == 400 and phases["forward and backward"] == 600
    assert parts["optimizer state"] == 800


def test_lora_and_bfloat16_storage() -> None:
    settings = recipe("model.lora={r: 4}", "model.dtype=bf16", "engine.precision=bf16")
    counts = {"trained": 6.0, "trained language model": 6.0, "frozen language model": 100.0}
    cost = COST | counts | {"reference": 0.0, "gradients": 24.0}
    plan = make_plan(settings, 1, step_shape(settings, 1, 20, CANVAS), cost)
    assert "KL reference" not in plan.parts  # the base with its adapters off
    assert plan.parts["language model, trained"] == 24
    assert plan.parts["language model, frozen"] == 200
    assert plan.parts["autoencoder, frozen"] == 20 and plan.parts["optimizer state"] == 48


def test_frozen_weights_wait_while_others_train() -> None:
    """Away during the update, there while pictures are drawn: the busiest moment may become another."""

    def planned(update: float, *more: str) -> Plan:
        chosen = recipe(
            "rollout.prompts_per_step=8", "engine.micro_batch_size=4", "engine.device=auto", *more
        )
        return make_plan(chosen, 1, step_shape(chosen, 1, 20, CANVAS), COST | {"update": update})

    here = planned(1000.0)
    away, large = (planned(update, "engine.offload_frozen=true") for update in (1000.0, 2000.0))
    assert here.parts == away.parts and away.waiting == 135 * 4
    assert here.busiest == "forward and backward" and here.peak - sum(here.parts.values()) == 1000
    assert away.busiest == "drawing pictures" and away.peak - sum(away.parts.values()) == 707
    assert large.busiest == "forward and backward" and large.peak - sum(large.parts.values()) == 2000 - 540
    assert "in host memory in these two" in table([away], None)
    assert "in host memory" not in table([here], None)


def test_a_single_microbatch_has_no_gradients_yet() -> None:
    one_pass = "rollout.prompts_per_step=2", "rollout.group_size=4", "engine.micro_batch_size=8"
    plain = recipe(*one_pass)
    divided = recipe(*one_pass, "engine.name=deepspeed", "engine.zero_stage=1", "engine.device=auto")
    assert not step_shape(plain, 1, 20, CANVAS).later and not step_shape(divided, 2, 20, CANVAS).later
    assert step_shape(plain, 2, 20, CANVAS).later  # gradients in buckets that stay
    assert step_shape(recipe("engine.micro_batch_size=1"), 1, 20, CANVAS).later


def test_step_shapes() -> None:
    settings = recipe("rollout.prompts_per_step=8", "rollout.sample_chunk=4", "rollout.decode_chunk=2",
                      "eval.batch_size=4", "engine.micro_batch_size=8")  # fmt: skip
    one, four = (step_shape(settings, gpus, 20, CANVAS) for gpus in (1, 4))
    assert (one.sampled, one.pictures, one.micro_batch) == (4, 8, 8)
    assert (four.sampled, four.pictures) == (2, 8)
    assert step_shape(recipe("eval.batch_size=64"), 1, 20, CANVAS).pictures == 64
    assert step_shape(settings, 3, 20, CANVAS).sampled == 3  # of the busiest
    with pytest.raises(ImageRLError, match="9 GPUs cannot share 8 prompts"):
        step_shape(settings, 9, 20, 8)


def test_edits_cost_their_pictures(tmp_path: Path) -> None:
    """Prompts hold a picture's tokens, denoising is twice as wide, and pictures are read."""
    policy, config = edit_policy()
    path = str(tmp_path / "model")
    Path(path).mkdir()
    save_policy(policy, Path(path), config)
    prompts = load_prompt_set(PromptSetConfig(name="tiny_edits", split="train", size=8))
    ids, _ = policy.encode_prompts([p.text for p in prompts], torch.zeros(8, 8, dtype=torch.long))
    assert load_outline(path).prompts.longest(prompts.prompts) == ids.shape[1]
    assert load_outline("BLIP3o/BLIP3o-NEXT-edit-VAE").prompts.longest(prompts.prompts) > 729 + 2 + 40
    edits = ("data.train.name=tiny_edits", "data.heldout.name=tiny_edits")
    (captioned,) = plans(recipe("eval.batch_size=4", path=path), [1], 60)
    (edited,) = plans(recipe("eval.batch_size=4", *edits, path=path), [1], 60)
    assert edited.phases["reading pictures to edit"] > 4 * 3 * 32 * 64 * 4
    assert "reading pictures to edit" not in captioned.phases
    assert edited.phases["drawing pictures"] > captioned.phases["drawing pictures"]
    assert edited.parts == captioned.parts


def test_published_names_need_no_files() -> None:
    published = load_outline("BLIP3o/BLIP3o-NEXT-SFT-3B")
    assert published.policy().trainable.lm.config.num_hidden_layers == 28
    assert published.prompts.canvas(Prompt(0, "")).tokens == 729
    assert load_outline("BLIP3o/BLIP3o-NEXT-edit-VAE").policy().decoder.reference_connector is not None
    with pytest.raises(ImageRLError, match="no folder"):
        load_outline("./nowhere")


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    micro_folder(tmp_path / "model")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_data(tmp_path)))
    assert exit_code(["plan", str(file), "eval.batch_size=4", "--gpu-memory", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MiB", "per", "GPU", "1", "GPU", "2", "GPUs"]  # 2 prompts cannot feed 4
    assert lines[-1].split()[-2:] == ["fits", "fits"]
    assert sum("*" in line for line in lines) >= 2  # the busiest phase, and the sum
    assert exit_code(["plan", str(file), "--gpus", "3"]) == 1
    assert "3 GPUs cannot share 2 prompts" in capsys.readouterr().err


def test_too_much_is_said() -> None:
    settings = recipe()
    plan = make_plan(settings, 1, step_shape(settings, 1, 20, CANVAS), COST | {"frozen image tokenizer": 5e9})
    assert "too much" in table([plan], plan.peak / GIB) and "too much" not in table(
        [plan], plan.peak / GIB * 1.2
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip3o_next_ocr_grpo.yaml", "blip3o_next_edit_grpo.yaml"])
def test_the_full_size_recipe_says_what_the_plan_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / name
    (line,) = re.findall(r"^# Memory by `imagerl plan`: .*$", path.read_text(), re.MULTILINE)
    said = [float(number) for number in re.findall(r"\d+\.\d", line)]
    assert said == [round(plan.peak / GIB, 1) for plan in plans(load_recipe(path), (1, 2, 4, 8))]


def test_rollout_actors_and_rewards_take_gpus_of_their_own(tmp_path: Path) -> None:
    """The training process then draws the evaluations alone, an actor holds no gradients and no moments."""
    folder = micro_folder(tmp_path / "model")
    settings = recipe("rollout.prompts_per_step=8", "eval.batch_size=4", path=str(folder))
    apart = recipe(
        "rollout.prompts_per_step=8",
        "eval.batch_size=4",
        "rollout.workers=4",
        "rewards.workers=2",
        "rewards.functions=[{import_path: x.py:f, num_gpus: 0.5}]",
        path=str(folder),
    )
    (whole,), (trains, draws) = plans(settings, [1]), plans(apart, [6])
    assert (trains.title, draws.title) == ("1 GPU", "4 GPUs to draw")
    assert (
        trains.parts == whole.parts and trains.phases["drawing pictures"] < whole.phases["drawing pictures"]
    )
    assert trains.phases["forward and backward"] == whole.phases["forward and backward"]
    assert set(draws.phases) < set(trains.phases) and "optimizer state" not in draws.parts
    assert draws.peak < trains.peak and draws.phases["sampling tokens"] < whole.phases["sampling tokens"]
    with pytest.raises(ImageRLError, match="reserve 5 GPUs, and 5 leave none to train"):
        plans(apart, [5])


def by_shape(policy: object, settings: Recipe, shape: StepShape, known: object) -> dict[str, float]:
    """Costs of a larger model that grow with what is done at once."""
    cost = {name: 1e6 * value for name, value in COST.items()}
    kept = 0.2 if settings.engine.activation_checkpointing else 1.0
    update = cost["gradients"] + 1e8 * kept * shape.micro_batch
    work = {"sampling": 3e7 * shape.sampled, "drawing": 4e7 * shape.pictures}
    return cost | work | {"update": update}


def test_settings_are_found_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proposed is really enough, changes time alone, and is no more than needed."""
    monkeypatch.setattr("imagerl.rl.training.memory.step_bytes", by_shape)
    folder = micro_folder(tmp_path / "model")
    settings = recipe(*OVERRIDES, path=str(folder))
    (whole,) = plans(settings, [2])
    room = 0.8 * whole.peak / 0.9 / GIB
    (found,), changes = fitting(settings, 2, room)
    assert found.peak <= 0.9 * room * GIB and changes
    assert {key.partition(".")[0] for key in changes} <= {"engine", "rollout", "eval"}
    assert fitting(settings, 2, whole.peak / 0.89 / GIB)[1] == {}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_data(tmp_path, f"model.path={folder}", *OVERRIDES)))
    assert exit_code(["plan", str(file), "--gpus", f"2x{room}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last.startswith("set: ")
        and exit_code(["plan", str(file), *last.split()[1:], "--gpus", f"2x{room}"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == "the recipe fits as it is"
    assert exit_code(["plan", str(file), "--gpus", "2x0.1"]) == 1
    assert "do not fit 2 GPUs of 0.1 GiB, even with" in capsys.readouterr().err
    assert exit_code(["plan", str(file), "--gpus", "many"]) == 1
    assert "--gpus is 'many'; give a number" in capsys.readouterr().err
