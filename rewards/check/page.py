"""One HTML page for a check of a reward: the findings, and every picture with what it earned."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagerl.rewards.check.checks import CheckReport
from imagerl.rl.types import CheckPicture


def check_page(report: CheckReport, pictures: Sequence[CheckPicture], command: str) -> str:
    """Return a page that needs no other file. `pictures` are those that were checked; `command` made them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    return templates.get_template("check.html.j2").render(
        report=report,
        command=command,
        parts=list(dict.fromkeys(name for row in report.kinds for name in row.parts)),
        prompts=_by_prompt(report, pictures),
    )


def number(value: float) -> str:
    """Write three digits; a dash where there is no value."""
    return f"{value:.3g}" if np.isfinite(value) else "–"


def _by_prompt(report: CheckReport, pictures: Sequence[CheckPicture]) -> list[dict[str, Any]]:
    """Return the prompts in order, each with its pictures and what they earned."""
    prompts: dict[int, dict[str, Any]] = {}
    verdicts = {row.kind: row.verdict for row in report.kinds}
    values = report.values if len(report.values) else np.full(len(pictures), np.nan)
    for picture, value in zip(pictures, values, strict=True):
        entry = prompts.setdefault(picture.prompt.index, {"text": picture.prompt.text, "pictures": []})
        source = _data_uri(picture.image)
        verdict = verdicts.get(picture.kind, "pass")
        entry["pictures"].append(
            {"kind": picture.kind, "value": float(value), "source": source, "verdict": verdict}
        )
    return list(prompts.values())


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
