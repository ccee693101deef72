"""What results show in a notebook: cards in the look of the report pages. Nothing here needs a trusted notebook: charts
and pictures are images, and the style touches nothing outside the card."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from imagerl.rl.run.charts import Chart
from imagerl.rl.run.report import render_page
from imagerl.rl.run.svg import render

STYLE = Path(render_page.__code__.co_filename).with_name("style.css.j2")
FONT = 'font-family: Inter, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


class Plot:
    """Charts that a notebook shows side by side."""

    def __init__(self, charts: Sequence[Chart]) -> None:
        self.charts = list(charts)

    def __repr__(self) -> str:
        return "\n".join(chart.description for chart in self.charts) or "no curve"

    def _repr_html_(self) -> str:
        return card(charts=self.charts)


def card(*, charts: Sequence[Chart] = (), **content: object) -> str:
    """Render a card: whatever of `title`, `state`, `verdict`, `good`, `figures`, `lead`, `head`, `rows`, `charts`,
    `pictures` and `notes` it is given. A row's cells are texts, or pairs of a text and a smaller one under it."""
    return render_page("card.html.j2", {
        **dict.fromkeys(("title", "state", "verdict", "good", "figures", "lead", "head"), None),
        **dict.fromkeys(("rows", "pictures", "notes"), ()),
        **content,
        "style": Markup(_scoped(STYLE.read_text(encoding="utf-8"))),
        "charts": [(chart, _chart_uri(chart)) for chart in charts],
    })  # fmt: skip


def _scoped(style: str) -> str:
    """Turn the style of a page into that of everything within a card."""
    return re.sub(r"^( *)(?::root|body|html) \{", r"\1& {", style, flags=re.MULTILINE)


def _chart_uri(chart: Chart) -> str:
    """Return a chart as an SVG that stands alone, its colours those of the reader's scheme."""
    colours = re.match(r":root \{.*?\n\}\n@media.*?\n\}\n", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    assert colours is not None
    head, _, rest = render(chart).partition(">")
    whole = f"{head}><style>{colours[0]} svg {{ {FONT} }}</style>{rest}"
    return f"data:image/svg+xml;base64,{base64.b64encode(whole.encode()).decode()}"


def interval_cell(interval: Mapping[str, float | None]) -> tuple[str, str]:
    """Write a mean, and under it its interval."""
    from imagerl.rl.evaluation.stats import Interval, number, span

    read = Interval.read(interval)
    return number(read.mean), span(read)
