"""`imagerl reward`: checks whether a function is fit to be a reward, and serves one to other machines."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from imagerl.rewards.base import LoadedReward, RewardSpec
    from imagerl.rewards.check.checks import CheckReport
    from imagerl.rl.types import CheckPicture

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
SHIPPED_SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"model": "tiny_clip"},
    "clip_direction": {"model": "tiny_clip"},
    "composition": {"detector": "tiny_world"},
    "edit": {"mode": "recognise"},  # the pictures show one line
    "ocr": {"mode": "recognise"},
}


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
    from imagerl.rewards.base import LoadedReward, RewardSpec, load_spec
    from imagerl.rewards.base import check_reward as check_signature
    from imagerl.rewards.check.checks import check
    from imagerl.rl.data.tiny.pictures import check_edits, check_pictures
    from imagerl.rl.files.writing import write_atomic
    from imagerl.rl.run.report import render_page

    given = parse_settings(settings or [])
    spec = RewardSpec(target, settings=given, python=python).absolute()
    check_signature(spec)
    label, function = load_spec(spec)
    grouped = grouped or getattr(function, "grouped", False)  # it names `groups`
    pictures = (check_edits if "reference" in parameters_of(spec, function) else check_pictures)(
        prompts, seed
    )
    check_signature(spec, pictures[0].prompt.columns)
    others = _shipped(but=target)
    report = check(
        LoadedReward(label, function), pictures, others, grouped=grouped, penalty=penalty, max_ms=max_ms
    )
    for line in table(report):
        print(line)
    if page is not None:
        command = [
            "imagerl",
            "reward",
            "check",
            target,
            *(settings or []),
            *([f"--python={python}"] if python else []),
            f"--prompts={prompts}",
            f"--seed={seed}",
        ]
        write_atomic(page, render_page("check.html.j2", page_content(report, pictures, shlex.join(command))))
        print(f"written: {page}")
    if report.failed:
        count, first = len(report.failed), report.failed[0]
        rest = f" (and {count - 1} more)" if count > 1 else ""
        raise ImageRLError(f"reward {label!r} fails {first.check!r}: {first.sentence}{rest}")


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


def parameters_of(spec: RewardSpec, function: Any) -> list[str]:
    """List the names that a reward takes; a reward in another process says them itself."""
    from imagerl.rewards.base import takes

    return list(function.parameters) if spec.is_isolated or spec.is_remote else takes(spec)


def parse_settings(entries: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` with values in YAML. Raises ImageRLError for an entry without a key."""
    from imagerl.rl.files.yaml_text import parse_yaml

    settings = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (equals and key.isidentifier()):
            raise ImageRLError(f"{entry!r} is no setting; write key=value, for example mode=recognise")
        settings[key] = parse_yaml(value, f"setting {key}")
    return settings


def _shipped(but: str) -> list[LoadedReward]:
    """Load the rewards that ship, without the one that is checked, and those that lack packages or settings here."""
    from imagerl.rewards.base import REWARDS, LoadedReward, load_reward
    from imagerl.rewards.preference.presets import PRESETS

    loaded = []
    for name in REWARDS:
        if name != but and name not in PRESETS:  # these would be fetched
            with suppress(ImageRLError):
                loaded.append(LoadedReward(*load_reward(name, **SHIPPED_SETTINGS.get(name, {}))))
    return loaded


def page_content(report: CheckReport, pictures: Sequence[CheckPicture], command: str) -> dict[str, Any]:
    """Return what the page of a check shows: the findings, and every picture with what it earned."""
    from imagerl.rewards.pictures import data_url

    verdicts = {row.kind: row.verdict for row in report.kinds}
    values = report.values if len(report.values) else [math.nan] * len(pictures)
    prompts: dict[int, dict[str, Any]] = {}
    for picture, value in zip(pictures, values, strict=True):
        entry = prompts.setdefault(picture.prompt.index, {"text": picture.prompt.text, "pictures": []})
        shown = {"kind": picture.kind, "verdict": verdicts.get(picture.kind, "pass")}
        entry["pictures"].append({**shown, "value": float(value), "source": data_url(picture.image)})
    parts = list(dict.fromkeys(name for row in report.kinds for name in row.parts))
    return {
        "report": report,
        "command": command,
        "parts": parts,
        "prompts": [*prompts.values()],
        "three": three,
    }


def three(value: float) -> str:
    """Write three digits; a dash where there is no value."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def table(report: CheckReport) -> list[str]:
    """Write the report as lines of text."""
    lines = [f"{f.verdict:>4}  {f.check:<12} {one_line(f.sentence)}" for f in report.findings]
    if report.kinds:
        width = max(len(row.kind) for row in report.kinds)
        lines += ["", f"      {'kind':<{width}} {'mean':>7} {'least':>7} {'most':>7}"]
        lines += [
            f"{row.verdict:>4}  {row.kind:<{width}} {three(row.mean):>7} {three(row.low):>7} "
            f"{three(row.high):>7}  {row.sentence}".rstrip()
            for row in report.kinds
        ]
    return lines
