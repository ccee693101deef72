"""`imagerl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError


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
    import torch

    from imagerl.api.exporting import export as write_export

    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise ImageRLError(f"--dtype must be fp32 or bf16, not {dtype!r}")
    provenance = write_export(source, target, adapter, dtypes[dtype], layout)
    proved = " and ".join(key.removesuffix("_sha256") for key in provenance["proof"] if key != "prompts")
    print(f"{target}: step {provenance['step']}, {provenance['what']}; reloaded and proved equal in {proved}")
