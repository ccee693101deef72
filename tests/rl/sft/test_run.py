"""Whole fine-tuning runs through the command line: what they leave, and that stops, kills and ranks do not change
it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from imagerl.rl.commands.cli import main
from imagerl.rl.engine.checkpoint import list_checkpoints
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.sft.trainer import SFTTrainer
from tests.command import call, logged_steps, measured, results
from tests.micro import micro_folder
from tests.models.helpers import load_policy
from tests.ranks import Ranks
from tests.small_sft import recipe, small_trainer, write_pictures, write_recipe

ROOT = Path(__file__).parents[3]
STEPS = 6
VARIANTS = {"full": ("train.decoder=full",), "lora": ("train={ar: lora, lora: {r: 4}}", "data.workers=0")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    micro_folder(folder / "model")
    write_pictures(folder)
    (folder / "train" / "000003.txt").write_text(" ")  # bad samples, so that places differ from counts
    (folder / "train" / "000007.png").write_bytes(b"no picture")
    for name, overrides in VARIANTS.items():
        write_recipe(folder, *overrides, name=f"{name}.yaml")
    return folder


def arguments(place: Path, variant: str, run: str, *more: str) -> list[str]:
    return ["sft", str(place / f"{variant}.yaml"), f"run.output_dir={place / run}", *more]


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, Path]:
    for variant in VARIANTS:
        assert call(*arguments(place, variant, f"{variant}_whole")) == 0
    return {variant: place / f"{variant}_whole" for variant in VARIANTS}


def outcome(run: Path) -> dict[str, Any]:
    """All that a run found out, bit for bit, and its place in the data."""
    (*_, newest) = list_checkpoints(run / "checkpoints")
    return {**results(run), "data": json.loads((newest / "state.json").read_text())["data"]}


# ---- what a run leaves behind ------------------------------------------------------------------------------


def test_run_folder(undisturbed: dict[str, Path]) -> None:
    run = undisturbed["full"]
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "tb"),
        *("samples", "checkpoints", "eval", "model"),
    }
    records = read_metrics(run)
    assert [r["step"] for r in records] == [0, *range(1, STEPS + 1), STEPS]
    first, *training, last = records
    keys = {"loss", "cross_entropy", "prompt_cross_entropy", "flow", "grad_norm", "lr", "images_per_s"}
    assert all(keys | {"data/seen", "data/bad", "data/epoch", "time/step_s"} <= r.keys() for r in training)
    assert training[-1]["data/bad"] == sum(
        training[-1].get(f"data/bad/{r}", 0) for r in ("empty_caption", "corrupt")
    )
    assert training[-1]["data/seen"] == 4 * STEPS + training[-1]["data/bad"] > 4 * STEPS
    losses = ("loss", "cross_entropy", "prompt_cross_entropy", "flow")
    assert all(f"eval/heldout/{name}" in record for name in losses for record in (first, last))
    assert last["eval/heldout/loss"] < first["eval/heldout/loss"]
    evaluation = json.loads((run / "eval" / f"heldout_step_{STEPS:06d}.json").read_text())
    rows = evaluation["per_prompt"]
    assert [row["index"] for row in rows] == list(range(6)) and rows[0]["prompt"].startswith("a sign")
    mean = sum(row["loss"] for row in rows) / 6
    assert last["eval/heldout/loss"] == evaluation["metrics"]["loss"]["mean"] == pytest.approx(mean)
    assert {p.name for p in (run / "samples").iterdir()} == {"step_000000.png", f"step_{STEPS:06d}.png"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_that_is_left_is_the_trained_one(
    place: Path, undisturbed: dict[str, Path], variant: str
) -> None:
    """Loaded again, adapters merged, it has the held-out losses that the run measured last."""
    run = undisturbed[variant]
    policy, _ = load_policy(str(run / "model"))
    overrides = VARIANTS[variant] if variant == "full" else ()
    trainer = small_trainer(policy, recipe(place, *overrides))
    from imagerl.api.fine_tuning import open_sources
    from imagerl.rl.data.image_data import first_examples
    from imagerl.rl.data.image_files import load_example
    from imagerl.rl.data.seeding import generator
    from tests.small_sft import LIMITS

    sources = open_sources(trainer.recipe.data.heldout, trainer.recipe.data, 0)
    heldout, _ = first_examples(
        sources, 6, lambda entry: load_example(entry, policy.decoder.picture_size, LIMITS)
    )
    randomness = [generator(0, "held-out flow", number) for number in range(6)]
    rows = trainer.measure(trainer.collate(heldout, randomness))
    evaluation = json.loads((run / "eval" / f"heldout_step_{STEPS:06d}.json").read_text())
    for row, wanted in zip(rows, evaluation["per_prompt"], strict=True):
        assert row == pytest.approx({name: wanted[name] for name in row}, rel=1e-5)
    start = load_file(place / "model" / "model.safetensors")
    end = load_file(run / "model" / "model.safetensors")
    assert start.keys() == end.keys()
    frozen = ("model.sana_vae.", "image_tokenizer.")
    assert all(torch.equal(start[name], end[name]) for name in start if name.startswith(frozen))
    assert not torch.equal(
        start["model.layers.0.mlp.up_proj.weight"], end["model.layers.0.mlp.up_proj.weight"]
    )


def test_other_commands_take_the_model(place: Path, undisturbed: dict[str, Path]) -> None:
    model = undisturbed["lora"] / "model"
    out = place / "drawn"
    assert call("sample", "a sign", "--model", str(model), "-n", "1", "--out", str(out)) == 0
    assert (out / "000_00.png").is_file()
    again = arguments(place, "full", "on_top", f"model.path={model}", "run.steps=1", "run.model_dtype=bf16")
    assert call(*again) == 0
    stored = load_file(place / "on_top" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_exported(place: Path, undisturbed: dict[str, Path], variant: str) -> None:
    run = undisturbed[variant]
    assert call("export", str(run), str(place / f"{variant}_exported")) == 0
    stored = load_file(place / f"{variant}_exported" / "model.safetensors")
    left = load_file(run / "model" / "model.safetensors")
    assert stored.keys() == left.keys() and all(torch.equal(left[name], stored[name]) for name in left)


def test_frozen_weights_in_bfloat16(place: Path) -> None:
    options = (
        "model.dtype=bf16",
        "engine.precision=bf16",
        "run.steps=2",
        "train.gradient_checkpointing=true",
    )
    assert call(*arguments(place, "lora", "rounded", *options)) == 0
    assert call(*arguments(place, "lora", "exact", "run.steps=2")) == 0
    rounded, exact = (read_metrics(place / name)[-1]["eval/heldout/loss"] for name in ("rounded", "exact"))
    assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact


def test_without_heldout_pictures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments(place, "lora", "no_heldout", "data.heldout=[]", "run.steps=1")) == 0
    run = place / "no_heldout"
    assert (run / "model" / "model.safetensors").is_file() and logged_steps(run) == [1]
    assert not (run / "samples").exists() and not (run / "eval").exists()
    assert "held-out" not in capsys.readouterr().out


def test_the_closing_line(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "finished"
    shutil.copytree(undisturbed["lora"], run)
    before = outcome(run)
    assert call(*arguments(place, "lora", run.name, "--resume")) == 0  # nothing is left to do
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("held-out cross entropy ") and line.count("→") == line.count(", n=6: ") == 2
    assert outcome(run) == before


def test_the_moving_average_is_what_is_judged_and_left(place: Path) -> None:
    """Average after step n = 3/4 of itself + 1/4 of the weights, from the model's own; resumed bit for bit."""
    more = (
        "optim.ema=0.75",
        "optim.schedule=constant",
        "run.steps=3",
        "checkpoint={every: 1, keep: 3}",
        "eval.every=1",
    )
    assert call(*arguments(place, "full", "ema", *more)) == 0
    for steps, resume in (("run.steps=2", ()), ("run.steps=3", ("--resume",))):
        assert call(*arguments(place, "full", "ema_parts", *more, steps, *resume)) == 0
    assert results(place / "ema") == results(place / "ema_parts")
    policy, _ = load_policy(str(place / "model"))
    module = small_trainer(policy, recipe(place, *VARIANTS["full"])).module
    average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for step in (1, 2, 3):
        folder = place / "ema" / "checkpoints" / f"step_{step:06d}"
        weights, kept = (load_file(folder / f"{name}.safetensors") for name in ("model", "average"))
        for name in kept:
            average[name] = 0.75 * average[name] + 0.25 * weights[name]
            torch.testing.assert_close(kept[name], average[name], rtol=1e-6, atol=1e-7)
    left, _ = load_policy(str(place / "ema" / "model"))
    trained = dict(small_trainer(left, recipe(place, *VARIANTS["full"])).module.named_parameters())
    assert all(torch.equal(trained[name], kept[name]) for name in kept)
    assert any(not torch.equal(weights[name], kept[name]) for name in kept)


# ---- stops, kills, resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_crashed_and_stopped_in_the_middle_of_an_epoch(
    place: Path,
    undisturbed: dict[str, Path],
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = place / f"{variant}_disturbed"
    train = SFTTrainer.step

    def crash(trainer: SFTTrainer, step: int) -> dict[str, float]:
        metrics = train(trainer, step)
        if step == 2:  # the third: it is not logged, and the checkpoint is of the second
            raise RuntimeError("the machine has gone")
        return metrics

    def stop(trainer: SFTTrainer, step: int) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train(trainer, step)

    monkeypatch.setattr(SFTTrainer, "step", crash)
    with pytest.raises(RuntimeError, match="the machine has gone"):
        main(arguments(place, variant, run.name))
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_000002"]
    monkeypatch.setattr(SFTTrainer, "step", stop)
    assert call(*arguments(place, variant, run.name, "--resume")) == 0
    assert "stopped after step 3; continue with --resume" in capfd.readouterr().out
    assert logged_steps(run)[-1] == 3 and not (run / "model").exists()
    monkeypatch.setattr(SFTTrainer, "step", train)
    assert call(*arguments(place, variant, run.name, "--resume")) == 0
    assert outcome(run) == outcome(undisturbed[variant])


def test_mistakes_are_told_in_one_line(
    place: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*given: str) -> str:
        capsys.readouterr()
        assert call(*given) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    def full(run: str, *more: str) -> list[str]:
        return arguments(place, "full", run, *more)

    assert "already holds a run; add --resume" in complaint(*full("full_whole"))
    assert "started with another objective.flow_weight" in complaint(
        *full("full_whole", "--resume", "objective.flow_weight=2")
    )
    assert "give only one" in complaint(*full("x", "--resume", "--overwrite"))
    assert "there is nothing at" in complaint(*full("x", "data.train=nowhere"))
    assert "samples are bad" in complaint(*full("x", f"data.train={place / 'train'}", "data.max_bad_share=0.01",
                                                "run.steps=20"))  # fmt: skip
    (place / "taken" / "model").mkdir(parents=True)
    (place / "taken" / "model" / "model.safetensors").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert "holds model/model.safetensors, which is not known" in complaint(*full("taken", *more))
    assert "holds the model that it begins from" in complaint(
        *full("full_whole", "--overwrite", f"model.path={place / 'full_whole' / 'model'}")
    )
    (place / "words").mkdir()
    (place / "words" / "a.png").write_bytes(b"no picture")
    assert "data.heldout holds no usable sample" in complaint(*full("y", f"data.heldout={place / 'words'}"))
    assert not (place / "y").exists()


# ---- several processes -------------------------------------------------------------------------------------

ENGINES = {
    "ddp": (),
    "zero2": ("engine.name=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine.name=deepspeed", "engine.zero_stage=3"),
}


@pytest.mark.slow
def test_two_processes_train_like_one(place: Path) -> None:
    pytest.importorskip("deepspeed")
    clean = f"data.train={place / 'shards'}"  # bad samples push processes apart
    options = ("run.steps=3", clean, "optim.ar_lr=0.001")
    assert call(*arguments(place, "full", "alone", *options)) == 0
    runs = [arguments(place, "full", f"ranks_{name}", *options, *more) for name, more in ENGINES.items()]
    runs += [arguments(place, "full", f"ranks_{name}", *options, *more, "run.steps=4", "--resume")
             for name, more in ENGINES.items()]  # fmt: skip
    Ranks(place, 2, *runs).succeed()
    alone = measured(place / "alone")
    for name in ENGINES:
        together = measured(place / f"ranks_{name}")
        assert [record["step"] for record in together] == [0, 1, 2, 3, 3, 4, 4]
        for one, two in zip(alone, together, strict=False):
            assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
        state = json.loads((place / f"ranks_{name}" / "checkpoints/step_000004/state.json").read_text())
        assert [one["draws"] for one in state["data"]] == [15, 16]
        load_policy(str(place / f"ranks_{name}" / "model"))
