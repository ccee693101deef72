"""A reward put through what every reward must stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from imagerl.api.recipes import Reward
    from imagerl.rewards.base import LoadedReward, RewardSpec
    from imagerl.rewards.check.checks import CheckReport
    from imagerl.rl.types import CheckPicture

SHIPPED_SETTINGS: dict[str, dict[str, object]] = {
    "clip": {"model": "tiny_clip"},
    "clip_direction": {"model": "tiny_clip"},
    "composition": {"detector": "tiny_world"},
    "edit": {"mode": "recognise"},  # the pictures show one line
    "ocr": {"mode": "recognise"},
}


class CheckResult:
    """The findings about a reward, with the pictures that it was tried on."""

    def __init__(self, report: CheckReport, pictures: Sequence[CheckPicture], command: str) -> None:
        self.report = report
        self.pictures = pictures
        self._command = command

    @property
    def passed(self) -> bool:
        return not self.report.failed

    def require(self) -> None:
        """Raise ImageRLError when it has failed."""
        if self.report.failed:
            count, first = len(self.report.failed), self.report.failed[0]
            rest = f" (and {count - 1} more)" if count > 1 else ""
            raise ImageRLError(f"reward {self.report.label!r} fails {first.check!r}: {first.sentence}{rest}")

    def save(self, page: str | Path) -> Path:
        """Write an HTML page with every picture and what it earned."""
        from imagerl.rl.files.writing import write_atomic
        from imagerl.rl.run.report import render_page

        content = page_content(self.report, self.pictures, self._command)
        write_atomic(Path(page), render_page("check.html.j2", content))
        return Path(page)

    def __repr__(self) -> str:
        findings, kinds = self.report.findings, self.report.kinds
        lines = [f"{f.verdict:>4}  {f.check:<12} {one_line(f.sentence)}" for f in findings]
        if kinds:
            width = max(len(row.kind) for row in kinds)
            lines += ["", f"      {'kind':<{width}} {'mean':>7} {'least':>7} {'most':>7}"]
            lines += [
                f"{row.verdict:>4}  {row.kind:<{width}} {three(row.mean):>7} {three(row.low):>7} "
                f"{three(row.high):>7}  {row.sentence}".rstrip()
                for row in kinds
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from imagerl.api.cards import card
        from imagerl.rewards.pictures import data_url

        first, failed = self.pictures[0].prompt.index, len(self.report.failed)
        shown = [
            {"uri": data_url(picture.image), "caption": f"{picture.kind}: {three(value)}"}
            for picture, value in zip(self.pictures, self.report.values, strict=False)
            if picture.prompt.index == first
        ]
        return card(
            title=self.report.label,
            state="passes every check"
            if self.passed
            else f"fails {failed} of {len(self.report.findings)} checks",
            good=self.passed,
            head=["Check", "Verdict", ""],
            rows=[[f.check, f.verdict, one_line(f.sentence)] for f in self.report.findings],
            pictures=shown,
            notes=[f"Pictures of one prompt, {self.pictures[0].prompt.text!r}, with what each earned."],
        )


def check_reward(
    reward: Reward,
    settings: Mapping[str, object] | None = None,
    *,
    prompts: int = 9,
    seed: int = 0,
    grouped: bool = False,
    penalty: bool = False,
    max_ms: float | None = None,
    python: str | None = None,
    command: str = "",
) -> CheckResult:
    """Try a reward on pictures of known worth: does it answer, repeat itself, cope with odd pictures, and prefer what a
    prompt asks for to what would cheat it?

    `reward` is a function, a name or import path, an address, or a recipe's entry. `prompts` are those of the tiny
    world, with 12 pictures each; `grouped`: it compares the pictures of a prompt; `penalty`: less is better; above
    `max_ms` for a picture it fails.

    Raises ImageRLError for a reward that cannot be called; what it does wrong is in the result."""
    from dataclasses import replace

    from imagerl.api.recipes import reward_specs
    from imagerl.rewards.base import LoadedReward, RewardSpec, load_spec
    from imagerl.rewards.base import check_reward as check_signature
    from imagerl.rewards.check.checks import check
    from imagerl.rl.data.tiny.pictures import check_edits, check_pictures

    if isinstance(reward, str):
        spec = RewardSpec(reward)
    else:
        spec = RewardSpec.from_mapping(reward_specs([reward])[0].model_dump())
    spec = replace(spec, settings={**spec.settings, **(settings or {})}, python=python).absolute()
    check_signature(spec)
    label, function = load_spec(spec)
    grouped = grouped or getattr(function, "grouped", False)  # it names `groups`
    pictures = (check_edits if "reference" in parameters_of(spec, function) else check_pictures)(
        prompts, seed
    )
    check_signature(spec, pictures[0].prompt.columns)
    report = check(
        LoadedReward(label, function),
        pictures,
        _shipped(but=spec.target if spec.ships else None),
        grouped=grouped,
        penalty=penalty,
        max_ms=max_ms,
    )
    return CheckResult(report, pictures, command)


def parameters_of(spec: RewardSpec, function: Any) -> list[str]:
    """List the names that a reward takes; a reward in another process says them itself."""
    from imagerl.rewards.base import takes

    return list(function.parameters) if spec.is_isolated or spec.is_remote else takes(spec)


def _shipped(but: str | None) -> list[LoadedReward]:
    """Load the rewards that ship, without the one that is checked, and those that lack packages or settings here."""
    from imagerl.rewards.base import REWARDS, LoadedReward, load_reward
    from imagerl.rewards.preference.presets import PRESETS

    loaded = []
    for name in REWARDS:
        if name != but and name not in PRESETS:  # these would be fetched
            with suppress(ImageRLError):
                loaded.append(LoadedReward(*load_reward(name, **SHIPPED_SETTINGS.get(name, {}))))
    return loaded


def page_content(report: CheckReport, pictures: Sequence[CheckPicture], command: str) -> dict[str, object]:
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
