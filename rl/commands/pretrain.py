"""`imagerl pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl.commands.options import Overrides

if TYPE_CHECKING:
    from models.image_policy import ImagePolicy
    from rl.pretraining.config import PretrainRecipe


def pretrain(
    recipe: Annotated[str, typer.Argument(help="pretraining recipe YAML")], overrides: Overrides = None
) -> None:
    """Pretrain a tiny model on pictures rendered on the fly. Finished stages are kept and not repeated."""
    import torch

    from models.loading import load_state, read_weights, save_policy
    from rl.files import atomic_folder
    from rl.pretraining.config import PretrainRecipe
    from rl.pretraining.run import pretrain as run_stages
    from rl.pretraining.stages import resolve_device
    from rl.recipe import load_yaml_recipe
    from rl.run_folder import RunFolder
    from rl.seeding import derive_seed

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
    """An untrained policy, or `init`, for `tasks` made able to learn editing and reading."""
    from models.building import new_policy
    from models.growing import grow, turns
    from models.loading import load_policy
    from rl.pretraining.stages import captions
    from rl.pretraining.tasks import edits, questions

    seed, vocabulary = recipe.run.seed, recipe.text_tokenizer.vocabulary
    if recipe.init is None:
        assert recipe.model is not None  # the schema wants one of the two
        return new_policy(recipe.model, captions(seed, 500), vocabulary)
    policy, config = load_policy(recipe.init)
    policy.trainable.merge_adapter()
    if recipe.tasks is None:
        return policy, config
    instructions = [edit.instruction for edit in edits(seed, "captions", 0, 500, 1 / 3)]
    asked = questions(seed, "captions", 0, 200, 1 / 3)
    corpus = turns(
        captions(seed, 500), instructions, [one.text for one in asked], [one.answer for one in asked]
    )
    return grow(policy, config, corpus, vocabulary)
