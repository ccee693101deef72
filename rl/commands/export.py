"""`imagerl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="run folder, or one of its checkpoints/step_*")],
    target: Annotated[Path, typer.Argument(help="new folder")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="keep a LoRA adapter instead of merging it")
    ] = False,
    dtype: Annotated[str, typer.Option(help="how weights are stored: fp32 or bf16")] = "fp32",
    layout: Annotated[
        str | None,
        typer.Option(
            help="default: the model's own to go on with; of BLIP3o-NEXT also blip3o, qwen3 or diffusers"
        ),
    ] = None,
) -> None:
    """Write a trained policy for others and prove that it does the same when it is loaded again."""
    from imagerl.api import exporting

    print(exporting.export(source, target, adapter=adapter, dtype=dtype, layout=layout))
