"""`imagerl pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerl.rl.commands.options import Overrides

if TYPE_CHECKING:
    from imagerl.models.blip3o_next.policy import ImagePolicy
    from imagerl.rl.sft.pretraining.config import PretrainRecipe


def pretrain(
    recipe: Annotated[str, typer.Argument(help="pretraining recipe YAML")], overrides: Overrides = None
) -> None:
    """Pretrain a tiny model on pictures rendered on the fly. Finished stages are kept and not repeated."""
    import torch

    from imagerl.models.blip3o_next.loading import load_state, read_weights, save_policy
    from imagerl.rl.config.recipe import load_yaml_recipe
    from imagerl.rl.data.seeding import derive_seed
    from imagerl.rl.files.writing import atomic_folder
    from imagerl.rl.run.folder import RunFolder
    from imagerl.rl.sft.pretraining.config import PretrainRecipe
    from imagerl.rl.sft.pretraining.run import pretrain as run_stages
    from imagerl.rl.sft.pretraining.stages import resolve_device

    settings = load_yaml_recipe(PretrainRecipe, recipe, overrides or [])
    place = RunFolder(settings.run.output_dir)
    try:
        place.lock()
        place.refuse_shared(settings)
        torch.manual_seed(derive_seed(settings.run.seed, "init"))
        policy, config = starting_policy(settings)
        policy.to(resolve_device(settings.run.device))

        def save(target: Path) -> None:
            with atomic_folder(target, replace=True) as folder:
                save_policy(policy, folder, config, torch.bfloat16)

        def load(folder: Path) -> None:
            load_state(policy, read_weights(folder), folder)

        run_stages(policy, settings, save, load)
    finally:
        place.release()
    print(f"model: {Path(settings.run.output_dir) / 'model'}")


def starting_policy(recipe: PretrainRecipe) -> tuple[ImagePolicy, dict[str, Any]]:
    """Return an untrained policy, or `init`, for `tasks` made able to learn editing and reading."""
    from imagerl.models.blip3o_next.building import new_policy
    from imagerl.models.blip3o_next.growing import grow, turns
    from imagerl.models.families import load_policy
    from imagerl.rl.sft.pretraining.stages import captions
    from imagerl.rl.sft.pretraining.tasks import edits, questions

    seed, vocabulary = recipe.run.seed, recipe.text_tokenizer.vocabulary
    if recipe.init is None:
        assert recipe.model is not None  # the schema wants one of the two
        return new_policy(recipe.model, captions(seed, 500), vocabulary)
    policy: Any = load_policy(recipe.init)
    policy.merge_lora()
    config = policy.config
    if recipe.tasks is None:
        return policy, config
    instructions = [edit.instruction for edit in edits(seed, "captions", 0, 500, 1 / 3)]
    asked = questions(seed, "captions", 0, 200, 1 / 3)
    corpus = turns(
        captions(seed, 500), instructions, [one.text for one in asked], [one.answer for one in asked]
    )
    return grow(policy, config, corpus, vocabulary)
