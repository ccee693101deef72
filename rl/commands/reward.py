"""`imagerl reward`: is a function fit to be a reward?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl.errors import ImageRLError

if TYPE_CHECKING:
    from rewards.base import LoadedReward
    from rewards.check import CheckReport

reward = typer.Typer(no_args_is_help=True, help="Check rewards.")

Target = Annotated[str, typer.Argument(help="a reward that ships, or file.py:name or package.module:name")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings of the reward, values in YAML")
]
SHIPPED_SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"model": "tiny_clip"},
    "clip_direction": {"model": "tiny_clip"},
    "composition": {"detector": "tiny_world"},
    "ocr": {"mode": "recognise"},  # the pictures show one line
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
) -> None:
    """Put a reward through what every reward must stand; the exit code is 1 when it fails."""
    from rewards.base import LoadedReward, RewardSpec, asks_for, load_reward
    from rewards.base import check_reward as check_signature
    from rewards.check import check
    from rewards.check_page import check_page
    from rl.files import write_atomic
    from rl.tiny_pictures import check_edits, check_pictures

    given = parse_settings(settings or [])
    spec = RewardSpec(target, settings=given)
    pictures = (check_edits if asks_for(spec, "reference") else check_pictures)(prompts, seed)
    check_signature(spec, pictures[0].prompt.columns)
    label, function = load_reward(target, **given)
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
            f"--prompts={prompts}",
            f"--seed={seed}",
        ]
        write_atomic(page, check_page(report, pictures, shlex.join(command)))
        print(f"written: {page}")
    if report.failed:
        count, first = len(report.failed), report.failed[0]
        rest = f" (and {count - 1} more)" if count > 1 else ""
        raise ImageRLError(f"reward {label!r} fails {first.check!r}: {first.sentence}{rest}")


def parse_settings(entries: Sequence[str]) -> dict[str, Any]:
    """`key=value` with values in YAML. Raises ImageRLError for an entry without a key."""
    from rl.recipe import parse_yaml

    settings = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (equals and key.isidentifier()):
            raise ImageRLError(f"{entry!r} is no setting; write key=value, for example mode=recognise")
        settings[key] = parse_yaml(value, f"setting {key}")
    return settings


def _shipped(but: str) -> list[LoadedReward]:
    """The rewards that ship, without the one that is checked and those whose packages are not installed."""
    from rewards.base import REWARDS, LoadedReward, load_reward

    loaded = []
    for name in REWARDS:
        if name != but:
            with suppress(ImageRLError):
                loaded.append(LoadedReward(*load_reward(name, **SHIPPED_SETTINGS.get(name, {}))))
    return loaded


def table(report: CheckReport) -> list[str]:
    """The report as lines of text."""
    from rewards.check_page import number

    lines = [f"{f.verdict:>4}  {f.check:<12} {f.sentence}" for f in report.findings]
    if report.kinds:
        width = max(len(row.kind) for row in report.kinds)
        lines += ["", f"      {'kind':<{width}} {'mean':>7} {'least':>7} {'most':>7}"]
        lines += [
            f"{row.verdict:>4}  {row.kind:<{width}} {number(row.mean):>7} {number(row.low):>7} "
            f"{number(row.high):>7}  {row.sentence}".rstrip()
            for row in report.kinds
        ]
    return lines
