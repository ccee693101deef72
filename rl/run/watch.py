"""Runs as they go on, in a browser: every page is made anew from the run folders when these have changed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import METRICS_FILE
from imagerl.rl.run.charts import Chart, Series, as_float, parts
from imagerl.rl.run.folder import RECIPE_FILE
from imagerl.rl.run.report import gather, render_page
from imagerl.rl.run.svg import render

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Handler

DEEPEST = 3  # folders below one that is named: comparisons have their runs two below
HOSTS = (
    "127.0.0.1",
    "localhost",
    "[::1]",
)  # a page of another name, which a browser may be led to, sees nothing
CURVES = (
    ("Training total", "reward/mean", "The weighted sum of the rewards, on training prompts."),
    ("Loss", "loss", "Of the last update of a step."),
    ("KL to the reference", "kl/k3", "Nats per token, k3."),
    ("Entropy", "policy/entropy", "Nats per token."),
)


def find_runs(places: Sequence[Path]) -> list[Path]:
    """List the run folders among `places` and below them, each once, in the order of their names.

    Raises ImageRLError when a place is no folder."""
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise ImageRLError(f"{place} is no folder; name a run's, or one that holds runs")
        below = [
            place,
            *(path for depth in range(1, DEEPEST + 1) for path in sorted(place.glob("/".join("*" * depth)))),
        ]
        found |= dict.fromkeys(p for p in below if (p / METRICS_FILE).exists() or (p / RECIPE_FILE).exists())
    return list(found)


def state_of(run: Path) -> str:
    """Return a word that changes whenever the page of a run would."""
    files = [run / METRICS_FILE, run / RECIPE_FILE, *run.glob("eval/*.json"), *run.glob("samples/*.png")]
    told = [(str(f), s.st_mtime_ns, s.st_size) for f in files if f.exists() and (s := f.stat())]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


class Pages:
    """The pages of the runs at some places; each is made once for every state of its run."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self._contents: dict[Path, tuple[str, dict[str, object]]] = {}

    def content(self, run: Path) -> tuple[str, dict[str, object]]:
        """Return the state of a run, and what its page shows."""
        state = state_of(run)
        known = self._contents.get(run)
        if known is None or known[0] != state:
            known = self._contents[run] = (state, gather(run))
        return known

    def run(self, key: str) -> tuple[str, str] | None:
        """Return state and page of a run; None where there is none of that key."""
        runs = {key_of(run): run for run in find_runs(self.places)}
        if key not in runs:
            return None
        state, content = self.content(runs[key])
        return state, render_page(
            "report.html.j2", content | {"live": True, "state": state, "several": len(runs) > 1}
        )

    def overview(self) -> tuple[str, str]:
        """Return state and page of all runs beside each other, or of the only one."""
        runs = find_runs(self.places)
        if len(runs) == 1 and (only := self.run(key_of(runs[0]))):
            return only
        known = [self.content(run) for run in runs]
        state = hashlib.sha256("".join(state for state, _ in known).encode()).hexdigest()[:16]
        contents = [content for _, content in known]
        names = distinct_names(runs)
        charts = side_by_side(dict(zip(names, contents, strict=True)))
        for chart in charts:
            chart.svg = Markup(render(chart))
        listed = [
            content | {"name": name, "key": key_of(run)}
            for name, content, run in zip(names, contents, runs, strict=True)
        ]
        page = {
            "runs": listed,
            "charts": charts,
            "places": [str(place) for place in self.places],
            "state": state,
        }
        return state, render_page("watch.html.j2", page)


def key_of(run: Path) -> str:
    """Return what the address of a run's page calls it: the same whatever other runs come and go."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:10]


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Name runs by as many of their last folders as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = next((d for d in range(1, 9) if len({p[-d:] for p in parts}) == len(parts)), 9)
    return ["/".join(p[-depth:]) for p in parts]


def side_by_side(contents: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Chart runs together, as many in each chart as there are colours."""
    charts: list[Chart] = []
    heldout: dict[str, dict[str, Series]] = {}
    rates: dict[str, bool] = {}
    for name, content in contents.items():
        for chart in content["heldout"]:
            for series in chart.series:
                rates[series.label] = chart.percent and rates.get(series.label, True)
                heldout.setdefault(series.label, {})[name] = replace(series, label=name)
    for label, known in heldout.items():
        curves = [
            known.get(name, Series(name, [], [])) for name in contents
        ]  # a run has one colour everywhere
        charts += parts(label, "Held-out, with 95 % intervals.", curves, kind="points", percent=rates[label])
    for title, key, note in CURVES:
        curves = []
        for name, content in contents.items():
            told = [r for r in content["training"] if r.get(key) is not None]
            curves.append(Series(name, [r["step"] for r in told], [as_float(r[key]) for r in told]))
        charts += parts(title, note, curves)
    return charts


def watch_app(places: Sequence[Path]) -> web.Application:
    """Return an application with the overview at / and each run at /run/<key>. A page that the client has already
    is 304, so that asking often costs little."""
    from aiohttp import web

    pages, turn = Pages(places), asyncio.Lock()

    async def page(request: web.Request, make: Callable[[], tuple[str, str] | None]) -> web.Response:
        async with turn:  # one at a time: a folder of many runs shall not take every core
            made = await asyncio.to_thread(make)
        if made is None:
            raise web.HTTPNotFound(text="there is no such run")
        state, text = made
        headers = {"ETag": f'"{state}"', "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        return web.Response(text=text, content_type="text/html", headers=headers)

    @web.middleware
    async def ours_only(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.host.rpartition(":")[0] not in HOSTS and request.host not in HOSTS:
            raise web.HTTPForbidden(text="this page is for the machine that it runs on")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def overview(request: web.Request) -> web.Response:
        return await page(request, pages.overview)

    async def one(request: web.Request) -> web.Response:
        return await page(request, lambda: pages.run(request.match_info["key"]))

    app = web.Application(middlewares=[ours_only])
    app.router.add_get("/", overview)
    app.router.add_get("/run/{key:[0-9a-f]{10}}", one)
    return app
