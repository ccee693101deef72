"""`imagerl pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl.commands.options import Overrides


def pretrain(
    recipe: Annotated[str, typer.Argument(help="pretraining recipe YAML")], overrides: Overrides = None
) -> None:
    """Pretrain a tiny model from pictures rendered on the fly. Finished stages are kept and not repeated."""
    import torch

    from models.building import new_policy
    from models.loading import load_state, read_weights, save_policy
    from rl.pretrain import captions, resolve_device
    from rl.pretrain import pretrain as run_stages
    from rl.pretrain_config import PretrainRecipe
    from rl.recipe import load_yaml_recipe
    from rl.seeding import derive_seed

    settings = load_yaml_recipe(PretrainRecipe, recipe, overrides or [])
    seed = settings.run.seed
    torch.manual_seed(derive_seed(seed, "init"))
    policy, config = new_policy(settings.model, captions(seed, 500), settings.text_tokenizer.vocabulary)
    policy.to(resolve_device(settings.run.device))

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(policy, folder, config, torch.bfloat16)

    def load(folder: Path) -> None:
        load_state(policy, read_weights(folder), folder)

    run_stages(policy, settings, save, load)
    print(f"model: {Path(settings.run.output_dir) / 'model'}")
