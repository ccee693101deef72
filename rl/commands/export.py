"""`imagerl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="run folder, or one of its checkpoints/step_*")],
    target: Annotated[Path, typer.Argument(help="new folder")],
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="keep a LoRA adapter instead of merging it, for PEFT or (of a decoder) diffusers",
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="how weights are stored: fp32 or bf16")] = "fp32",
    layout: Annotated[
        str | None,
        typer.Option(
            help="default: the model's own to go on with; of BLIP3o-NEXT also blip3o, qwen3 or diffusers"
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="where the policy is loaded: cpu, or cuda, much faster")
    ] = "cpu",
    proof: Annotated[
        int,
        typer.Option(
            min=0,
            max=64,
            help="prompts whose tokens and pixels must be repeated; weights are compared in any case",
        ),
    ] = 2,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload it there, with a model card")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public")] = False,
) -> None:
    """Write a trained policy for others and prove that it does the same when it is loaded again."""
    from imagerl.api import exporting
    from imagerl.api.publishing import push, reserve

    exporting.check_storage(dtype, device)
    if push_to_hub:
        reserve(push_to_hub, public)
    written = exporting.export(
        source, target, adapter=adapter, dtype=dtype, layout=layout, device=device, proof=proof
    )
    print(written)
    if push_to_hub:
        print(push(target, push_to_hub, written.provenance))
