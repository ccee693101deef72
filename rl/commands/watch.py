"""`imagerl watch`: runs as they go on, in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError


def watch(
    places: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_FOLDER...", help="run folders, or folders of them")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 0,
) -> None:
    """Show runs as they go on, several beside each other, in a browser of this machine."""
    from imagerl.rl.commands.serving import serve_until_signalled
    from imagerl.rl.run.watch import find_runs, watch_app

    if not find_runs(places):
        raise ImageRLError(
            f"there is no run in {', '.join(map(str, places))}; give the run.output_dir of one"
        )
    serve_until_signalled(watch_app(places), "127.0.0.1", port, announce)


def announce(address: str) -> None:
    print(f"watching at {address} (Ctrl-C ends it; the runs go on)", flush=True)
