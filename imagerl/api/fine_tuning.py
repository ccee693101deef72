"""A fine-tuning run put together: the model, the pictures and the trainer meet here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.rl.config.sft import ImageDataConfig, SFTRecipe, SourceConfig
    from imagerl.rl.data.image_data import ShuffledSource
    from imagerl.rl.data.image_files import Entry, Example, Limits
    from imagerl.rl.evaluation.stats import Comparison


def closing_line(comparison: Comparison) -> str:
    """Tell held-out losses before → after."""
    from imagerl.rl.evaluation.stats import change

    parts = [
        f"{name.replace('_', ' ')} {result['before']:.4f} → {result['after']:.4f} "
        f"({change(result['difference'], digits=4)})"
        for name, result in (
            (name, comparison[name]) for name in ("cross_entropy", "flow") if name in comparison
        )
    ]
    return f"held-out {'; '.join(parts)}"


def run_sft(
    recipe: SFTRecipe,
    resume: bool | int = False,
    overwrite: bool = False,
    command: Sequence[str] | None = None,
) -> Comparison | None:
    """Put a run together and execute it; returns the held-out comparison (empty when nothing is held out), None when
    it was stopped early and on all but the main process."""
    import torch

    from imagerl.api.exporting import with_model
    from imagerl.api.running import begin_run, open_run
    from imagerl.models.families import base_folder, family_of, load_policy
    from imagerl.rl.data.image_data import ImageStream, first_examples
    from imagerl.rl.data.image_files import BadSample, load_example
    from imagerl.rl.engine.engine import Engine
    from imagerl.rl.rollout.engine import RolloutEngine
    from imagerl.rl.run.folder import RunFolder
    from imagerl.rl.sft.objective import learning_rate_share, lessons_for
    from imagerl.rl.sft.run import SFTRun
    from imagerl.rl.sft.trainer import Collator, SFTTrainer
    from imagerl.rl.types import Prompt

    recipe = with_model(recipe, resume is not False)
    data, seed = recipe.data, recipe.run.seed
    train_sources = open_sources(data.train, data, seed)
    heldout_sources = open_sources(data.heldout, data, seed)
    folder = RunFolder(recipe.run.output_dir)
    engine = Engine(recipe.engine)
    stream = None
    try:
        if data.batch_size % engine.world_size:
            raise ImageRLError(
                f"data.batch_size ({data.batch_size}) must be divisible by the {engine.world_size} processes"
            )
        checkpoint = open_run(engine, folder, recipe, resume, overwrite)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        path, family = recipe.model.path, recipe.model.family
        policy = load_policy(path, engine.device, dtypes[recipe.model.dtype], family)
        policy.sampler_dtype = dtypes[recipe.engine.precision]
        lessons = lessons_for(policy, recipe)
        read = partial(load_example, size=policy.prompts.canvas(Prompt(0, "")).pixels, limits=limits(data))

        def load(entry: Entry) -> Example:
            example = read(entry)
            columns = {} if example.reference is None else {"reference": example.reference}
            try:
                policy.prompts.require([Prompt(0, example.caption, columns, source="caption")])
            except ImageRLError as error:
                raise BadSample("long_caption", str(error)) from None
            return example

        heldout, counts = first_examples(heldout_sources, recipe.eval.size, load)
        counts.refuse(data.max_bad_share)
        if heldout_sources and not heldout:
            raise ImageRLError(f"data.heldout holds no usable sample: {dict(counts.bad) or 'no files'}")
        engine.prepare(
            lessons.trainable,
            recipe.optim,
            recipe.run.steps,
            checkpoint.tensors if checkpoint else None,
            partial(learning_rate_share, recipe, lessons),
        )
        stream = ImageStream(
            train_sources,
            [source.weight for source in data.train],
            seed,
            load,
            rank=engine.rank,
            world_size=engine.world_size,
            workers=data.workers,
            ahead=data.batch_size // engine.world_size if data.workers else 0,
            max_bad_share=data.max_bad_share,
            states=checkpoint.state["data"] if checkpoint else None,
        )
        trainer = SFTTrainer(recipe, lessons, stream, Collator(policy, lessons, engine), engine)
        rollout = RolloutEngine(policy, policy.sampling, recipe.eval.seed, engine.autocast)

        def save_model(target: Path) -> None:
            policy.merge_lora()  # the run is over
            base = base_folder(path)
            layout = next(iter(family_of(base, family).layouts))
            policy.save(target, layout, base, dtypes[recipe.run.model_dtype])
            origin = {"base_model": recipe.model.path, "recipe": recipe.model_dump(mode="json")}
            (target / "provenance.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")

        begin_run(engine, folder, recipe, overwrite, command)
        run = SFTRun(recipe, folder, trainer, heldout, rollout, checkpoint, save_model)
        return run.execute(resume is not False)
    finally:
        if stream is not None:
            stream.close()
        folder.release()
        engine.close()


def open_sources(configs: Sequence[SourceConfig], data: ImageDataConfig, seed: int) -> list[ShuffledSource]:
    from imagerl.rl.data.image_data import ShuffledSource
    from imagerl.rl.data.image_sources import open_source

    return [
        ShuffledSource(one.path, open_source(one.path, one.caption_field), seed, number, data.open_shards)
        for number, one in enumerate(configs)
    ]


def limits(data: ImageDataConfig) -> Limits:
    from imagerl.rl.data.image_files import Limits

    return Limits(data.max_pixels, data.min_side, data.max_aspect, data.max_caption_chars)
