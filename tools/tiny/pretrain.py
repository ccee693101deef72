"""A pretraining recipe, stage by stage, and the record of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.blip3o_next.loading import load_state, read_weights, save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.families import load_policy
from imagerl.rl.config.engine import EngineConfig
from imagerl.rl.config.recipe import load_yaml_recipe
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.engine.engine import Engine
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.environment import write_environment
from imagerl.rl.files.reading import read_json
from imagerl.rl.files.writing import atomic_folder, write_atomic
from imagerl.rl.run.folder import RECIPE_FILE, RunFolder, differing_keys
from tools.tiny.config import PretrainRecipe
from tools.tiny.decoder import fit_decoder
from tools.tiny.model import grow, new_policy, turns
from tools.tiny.samples import captions, edits, questions
from tools.tiny.stages import fit_generator, fit_reconstruction, latent_scale
from tools.tiny.tasks import fit_tasks

RECORD = "pretraining.json"
STAGES = ("tokenizer", "autoencoder", "generator", "tasks")  # whose weights are kept, in their order


def run(recipe: PretrainRecipe) -> Path:
    """Make the model of a recipe; returns its folder."""
    place = RunFolder(recipe.run.output_dir)
    try:
        place.lock()
        place.refuse_shared(recipe)
        torch.manual_seed(derive_seed(recipe.run.seed, "init"))
        policy, config = starting_policy(recipe)
        policy.to(Engine(EngineConfig(device=recipe.run.device, threads=recipe.run.threads)).device)

        def save(target: Path) -> None:
            with atomic_folder(target, replace=True) as folder:
                save_policy(policy, folder, config, torch.bfloat16)

        pretrain(policy, recipe, save, lambda folder: load_state(policy, read_weights(folder), folder))
    finally:
        place.release()
    return Path(recipe.run.output_dir) / "model"


def starting_policy(recipe: PretrainRecipe) -> tuple[ImagePolicy, dict[str, Any]]:
    """Return an untrained policy, or `init`, for `tasks` made able to learn editing and reading."""
    seed, vocabulary = recipe.run.seed, recipe.text_tokenizer.vocabulary
    if recipe.init is None:
        assert recipe.model is not None  # the schema wants one of the two
        return new_policy(recipe.model, captions(seed, 500, recipe.generator), vocabulary)
    policy = load_policy(recipe.init)
    if not isinstance(policy, ImagePolicy):
        raise ImageRLError(f"init: {recipe.init} is no BLIP3o-NEXT model; give one, such as tiny")
    policy.merge_lora()
    if recipe.tasks is None:
        return policy, policy.config
    instructions = [edit.instruction for edit in edits(seed, "captions", 0, 500, 1 / 3)]
    asked = questions(seed, "captions", 0, 200, 1 / 3)
    corpus = turns(
        captions(seed, 500), instructions, [one.text for one in asked], [one.answer for one in asked]
    )
    return grow(policy, policy.config, corpus, vocabulary)


def pretrain(
    policy: Any, recipe: PretrainRecipe, save: Callable[[Path], None], load: Callable[[Path], None]
) -> None:
    """Run all stages of a recipe, in place. `save` writes the policy as a model folder, `load` fills it from one.

    What a finished stage has made is kept in the output folder and reused, so that an interrupted run continues
    with the stage it was in. Raises ImageRLError when that was made with other settings."""
    out, seed, device = Path(recipe.run.output_dir), recipe.run.seed, policy.device
    refuse_foreign_stages(out, recipe)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / RECIPE_FILE, recipe.to_yaml())
    record = out / "pretrain.jsonl"

    def log(stage: str, step: int, metrics: dict[str, float]) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{stage} {step}: {shown}", flush=True)

    if recipe.tokenizer is not None and recipe.autoencoder is not None:
        fit_reconstructions(policy, recipe, out, log)
        scale = latent_scale(
            lambda pixels: policy.decoder.vae.encode(pixels).latent, recipe.autoencoder, seed, device
        )
        policy.decoder.vae.register_to_config(scaling_factor=scale)

    def language_model(name: str, train: Callable[[Callable[[int], None]], None]) -> None:
        folder = out / name
        if folder.is_dir():
            load(folder)
            print(f"{name}: kept {folder}")
        else:
            train(lambda step: save(out / f"snapshot_{step:06d}"))
            save(folder)

    if (generator := recipe.generator) is not None:
        language_model(
            "generator", lambda snapshot: fit_generator("generator", policy, generator, seed, log, snapshot)
        )
    if (tasks := recipe.tasks) is not None:
        language_model("tasks", lambda snapshot: fit_tasks(policy, tasks, seed, log, snapshot))
    if recipe.decoder is not None:
        fit_decoder(policy, recipe.decoder, seed, log)
    save(out / "model")
    write_record(out, recipe)


def refuse_foreign_stages(out: Path, recipe: PretrainRecipe) -> None:
    """Kept weights continue the run that made them only: they fit one seed, one text tokenizer and one start. Raises
    ImageRLError too where the folder holds a run of another kind."""
    kept = [name for name in STAGES if (out / name).is_dir() or (out / f"{name}.safetensors").exists()]
    file = out / RECIPE_FILE
    if not kept and not file.exists():
        return
    if not file.exists():
        raise ImageRLError(f"{out} holds {', '.join(kept)}, but no {RECIPE_FILE}; set another run.output_dir")
    fixed = {"init", "text_tokenizer", "model", *kept} if kept else set()
    keys = differing_keys(load_yaml_recipe(PretrainRecipe, file), recipe)
    if changed := [key for key in keys if (kept and key == "run.seed") or key.split(".")[0] in fixed]:
        raise ImageRLError(
            f"{out} was begun with another {', '.join(changed)}; set another run.output_dir, or delete it"
        )


def fit_reconstructions(
    policy: Any, recipe: PretrainRecipe, out: Path, log: Callable[[str, int, dict[str, float]], None]
) -> None:
    """Fit the two parts that learn to draw their input again; what an earlier run has finished is kept."""
    from safetensors.torch import load_file, save

    vae, tokenizer = policy.decoder.vae, policy.image_tokenizer

    def autoencode(pixels: Tensor) -> Tensor:
        return vae.decode(vae.encode(pixels).latent).sample

    parts = (
        ("tokenizer", tokenizer, tokenizer, recipe.tokenizer),
        ("autoencoder", vae, autoencode, recipe.autoencoder),
    )
    for name, module, reconstruct, stage in parts:
        weights = out / f"{name}.safetensors"
        if weights.exists():
            try:
                module.load_state_dict(load_file(weights))
            except (
                Exception
            ) as error:  # what safetensors and torch say of a file that is not ours, or cut short
                raise ImageRLError(f"{weights} is damaged; delete it to train that part again") from error
            print(f"{name}: kept {weights}")
        elif stage is not None:
            fit_reconstruction(name, module, reconstruct, stage, recipe.run.seed, policy.device, log)
            write_atomic(weights, save(module.state_dict()))


def write_record(out: Path, recipe: PretrainRecipe) -> None:
    """Write `pretraining.json` beside the weights: recipe, hardware, minutes and last losses of every stage, and under
    `init` the same of the model that it began with, where its folder has it."""
    last: dict[str, dict[str, Any]] = {}
    for line in (out / "pretrain.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        last[values.pop("stage")] = values
    write_environment(out, [])
    document = {
        "recipe": recipe.model_dump(mode="json"),
        "stages": last,
        "environment": json.loads((out / "environment.json").read_text(encoding="utf-8")),
    }
    if recipe.init is not None and (begun := Path(recipe.init, RECORD)).is_file():
        document["init"] = read_json(begun)
    write_atomic(out / "model" / RECORD, json.dumps(document, indent=1) + "\n")
