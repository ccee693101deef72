"""The command line: every command under its name, and how mistakes are told."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from imagerl.rl.commands.ask import ask
from imagerl.rl.commands.compare import compare
from imagerl.rl.commands.evaluate import evaluate_model
from imagerl.rl.commands.export import export
from imagerl.rl.commands.plan import plan
from imagerl.rl.commands.recipes import recipes
from imagerl.rl.commands.reward import reward
from imagerl.rl.commands.sample import sample
from imagerl.rl.commands.serve import serve
from imagerl.rl.commands.sft import sft
from imagerl.rl.commands.sweep import sweep
from imagerl.rl.commands.tokenize import tokenize
from imagerl.rl.commands.train import train
from imagerl.rl.commands.watch import watch
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.environment import leave_to_the_recipe

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
app.command()(sweep)
app.command()(watch)
app.command()(plan)
app.add_typer(recipes, name="recipes")
app.add_typer(reward, name="reward")


def main(arguments: Sequence[str] | None = None, program: typer.Typer = app, called: str = "imagerl") -> None:
    """Run the `imagerl` command, or another program `called` so. What the user can mend is one line on stderr; the
    exit code is then 1, or 2 when the command itself was misspelt."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread that spins at a barrier takes its core from reward workers and from whatever else runs here. Results
    # do not depend on how threads wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = sys.argv[1:] if arguments is None else list(arguments)
    rank = os.environ.get("RANK", "0")
    name = called if rank == "0" else f"{called} (process {rank})"
    warnings.formatwarning = lambda message, *_: f"{name}: {message}\n"  # a user needs no line of our source
    # What libraries have to say to each other about their next version.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="(transformers|diffusers|peft|accelerate)[.]"
    )
    ignored = leave_to_the_recipe()
    if ignored and rank == "0":
        print(f"{name}: ignores {', '.join(ignored)}; recipe and command alone decide", file=sys.stderr)
    try:
        code = program(args=given or ["--help"], prog_name=called, standalone_mode=False)
    except ImageRLError as error:
        print(f"{name}: {error}", file=sys.stderr)
        code = 1
    except TyperException as error:  # usage
        print(f"{name}: {one_line(error.format_message()).rstrip('.')}; see {called} --help", file=sys.stderr)
        code = error.exit_code
    if code == INTERRUPTED:
        print(f"{name}: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
