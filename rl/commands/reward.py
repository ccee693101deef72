"""`imagerl reward`: checks whether a function is fit to be a reward, and serves one to other machines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError

reward = typer.Typer(no_args_is_help=True, help="Check and serve rewards.")

Target = Annotated[
    str,
    typer.Argument(help="a reward that ships, file.py:name, package.module:name, or a served one's address"),
]
Python = Annotated[
    str | None, typer.Option(metavar="PATH", help="Python interpreter with its own packages that runs it")
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings of the reward, values in YAML")
]


@reward.command("check")
def check_reward(
    target: Target,
    settings: Settings = None,
    prompts: Annotated[int, typer.Option(min=2, help="prompts of the tiny world, 12 pictures each")] = 9,
    seed: Annotated[int, typer.Option(help="seed of the pictures")] = 0,
    grouped: Annotated[bool, typer.Option("--grouped", help="it compares the pictures of a prompt")] = False,
    penalty: Annotated[
        bool, typer.Option("--penalty", help="less is better: its weight is negative")
    ] = False,
    max_ms: Annotated[float | None, typer.Option(min=0, help="fail above this time per picture")] = None,
    page: Annotated[Path | None, typer.Option(help="write an HTML page with the pictures here")] = None,
    python: Python = None,
) -> None:
    """Put a reward through what every reward must stand; the exit code is 1 when it fails."""
    from imagerl.api import checking

    words = ["imagerl", "reward", "check", target, *(settings or [])]
    words += [*([f"--python={python}"] if python else []), f"--prompts={prompts}", f"--seed={seed}"]
    result = checking.check_reward(
        target,
        parse_settings(settings or []),
        prompts=prompts,
        seed=seed,
        grouped=grouped,
        penalty=penalty,
        max_ms=max_ms,
        python=python,
        command=shlex.join(words),
    )
    print(result)
    if page is not None:
        print(f"written: {result.save(page)}")
    result.require()


@reward.command("serve")
def serve_reward(
    target: Target,
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: every interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 0,
    token_env: Annotated[
        str, typer.Option(help="environment variable with the token")
    ] = "IMAGERL_REWARD_TOKEN",
    python: Python = None,
    max_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="largest picture")] = 4096 * 4096,
    waiting: Annotated[int, typer.Option(min=1, help="requests held at a time")] = 16,
) -> None:
    """Serve a reward over HTTP to those who know the token: `{url: http://host:port/name}` in a recipe."""
    from imagerl.api.checking import parameters_of
    from imagerl.rewards.base import RewardSpec, columns_needed, load_spec
    from imagerl.rewards.base import check_reward as check_signature
    from imagerl.rewards.boundary.wire import Limits
    from imagerl.rewards.workers.server import reward_app
    from imagerl.rl.commands.serving import run_app, token_from

    token = token_from(token_env)
    spec = RewardSpec(target, settings=parse_settings(settings or []), python=python).absolute()
    check_signature(spec)
    label, function = load_spec(spec)
    limits = Limits(body=max_mib * 2**20, pixels=max_pixels)
    app = reward_app(label, function, parameters_of(spec, function), columns_needed(spec), limits)
    announce = lambda address: print(f"serving {address}/{label}", flush=True)  # noqa: E731
    run_app(app, host, port, token, announce, waiting)


def parse_settings(entries: Sequence[str]) -> dict[str, object]:
    """Parse `key=value` with values in YAML. Raises ImageRLError for an entry without a key."""
    from imagerl.rl.files.yaml_text import parse_yaml

    settings = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (equals and key.isidentifier()):
            raise ImageRLError(f"{entry!r} is no setting; write key=value, for example mode=recognise")
        settings[key] = parse_yaml(value, f"setting {key}")
    return settings
