"""The command line: every command under its name, and how mistakes are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from rl.commands.ask import ask
from rl.commands.bench import bench
from rl.commands.clip import clip
from rl.commands.compare import compare
from rl.commands.evaluate import evaluate_model
from rl.commands.export import export
from rl.commands.plan import plan
from rl.commands.pretrain import pretrain
from rl.commands.reward import reward
from rl.commands.sample import sample
from rl.commands.serve import serve
from rl.commands.sft import sft
from rl.commands.tokenize import tokenize
from rl.commands.train import train
from rl.environment import leave_to_the_recipe
from rl.errors import ImageRLError, one_line

INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for autoregressive + flow-matching image generators.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"imagerl {version('imagerl')}")
        raise typer.Exit()


@app.callback()
def _options(
    told: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None: ...


app.command()(train)
app.command()(sft)
app.command()(sample)
app.command()(ask)
app.command()(serve)
app.command("eval")(evaluate_model)
app.command()(tokenize)
app.command()(export)
app.command()(compare)
app.command()(pretrain)
app.command()(clip)
app.command()(plan)
app.add_typer(bench, name="bench")
app.add_typer(reward, name="reward")


def main(arguments: Sequence[str] | None = None) -> None:
    """The `imagerl` command. What the user can mend is one line on stderr; the exit code is then 1, or 2 when the
    command itself was misspelt."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = sys.argv[1:] if arguments is None else list(arguments)
    rank = os.environ.get("RANK", "0")
    name = "imagerl" if rank == "0" else f"imagerl (process {rank})"
    ignored = leave_to_the_recipe()
    if ignored and rank == "0":
        print(f"{name}: ignores {', '.join(ignored)}; recipe and command alone decide", file=sys.stderr)
    try:
        code = app(args=given or ["--help"], prog_name="imagerl", standalone_mode=False)
    except ImageRLError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 1
    except TyperException as error:  # usage
        print(f"{name}: {one_line(error.format_message()).rstrip('.')}; see imagerl --help", file=sys.stderr)
        code = error.exit_code
    if code == INTERRUPTED:
        print(f"{name}: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
