"""`python -m tools.tiny`: how the models that ship were made. For those who work on ImageRL; not in the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.cli import main
from imagerl.rl.commands.options import Overrides

tiny = typer.Typer(
    no_args_is_help=True, help="Make the tiny models that ship with ImageRL, and pictures to try."
)
Recipe = Annotated[str, typer.Argument(help="recipe YAML, such as tools/tiny/tiny_pretrain.yaml")]
Out = Annotated[Path, typer.Argument(help="new folder")]
Steps = Annotated[int, typer.Option(min=1, help="updates of the part that draws, 16 pictures each")]
Count = Annotated[int, typer.Option(min=1, help="pictures to fine-tune on")]
Seed = Annotated[int, typer.Option(min=0, help="seed of everything random")]


@tiny.command()
def pretrain(recipe: Recipe, overrides: Overrides = None) -> None:
    """Pretrain a tiny model on pictures rendered on the fly. Finished stages are kept and not repeated."""
    from imagerl.rl.config.recipe import load_yaml_recipe
    from tools.tiny.config import PretrainRecipe
    from tools.tiny.pretrain import run

    print(f"model: {run(load_yaml_recipe(PretrainRecipe, recipe, overrides or []))}")


@tiny.command()
def clip(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a small CLIP, a judge of pictures for rewards, from pictures rendered on the fly."""
    from imagerl.rl.config.recipe import load_yaml_recipe
    from tools.tiny.clip import run
    from tools.tiny.config import ClipRecipe

    print(f"model: {run(load_yaml_recipe(ClipRecipe, recipe, overrides or []))}")


@tiny.command()
def render(
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="pictures")] = 200,
    split: Annotated[str, typer.Option(help="whose texts: train or heldout")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="seed of colours and fonts")] = 0,
    font: Annotated[list[str] | None, typer.Option(help="matplotlib font file; may be repeated")] = None,
    shard: Annotated[int, typer.Option(min=0, help="samples of a tar shard; 0: loose files")] = 0,
) -> None:
    """Render pictures of the tiny world with captions, as a folder or as tar shards: something to fine-tune on."""
    from tools.tiny.render import write

    write(out, count, split, seed, font, shard)
    print(f"{count} pictures in {out}")


@tiny.command()
def janus(out: Out, steps: Steps = 1500, count: Count = 8000, seed: Seed = 0) -> None:
    """Make a small Janus-Pro that can draw numbers and has not learnt to, with pictures and prompts to teach it by."""
    from tools.tiny.janus import run

    run(out, steps, count, seed)
    print(f"model, pictures and prompts in {out}")


@tiny.command()
def glm(out: Out, steps: Steps = 600, count: Count = 4000, seed: Seed = 0) -> None:
    """Make a small GLM-Image that has not learnt to draw numbers, with pictures and prompts to teach it by."""
    from tools.tiny.glm_image import run

    run(out, steps, count, seed)
    print(f"model, pictures and prompts in {out}")


if __name__ == "__main__":
    main(program=tiny, called="python -m tools.tiny")
