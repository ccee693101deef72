"""Runs in a browser while they go on: what is served, to whom, and that the page changes by itself."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import MetricsLog
from imagerl.rl.run.charts import Chart, Series
from imagerl.rl.run.svg import render
from imagerl.rl.run.watch import distinct_names, find_runs, key_of, side_by_side, watch_app
from tests.command import logged_steps
from tests.rl.run.helpers import arguments
from tests.small_run import Command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _run(folder: Path, *steps: int, value: float = 0.5) -> Path:
    with MetricsLog(folder) as log:
        for step in steps:
            log.log(step, {"reward/mean": value, "kl/k3": 0.01, "eval/ocr/exact_match": 0.25})
    return folder


def _ask(places: list[Path], *requests: tuple[str, dict[str, str]]) -> list[tuple[int, str, str]]:
    """Status, ETag and text of each answer."""

    async def ask() -> list[tuple[int, str, str]]:
        async with TestClient(TestServer(watch_app(places))) as client:
            answers = [await client.get(path, headers=headers) for path, headers in requests]
            return [(a.status, a.headers.get("ETag", ""), await a.text()) for a in answers]

    return asyncio.run(ask())


def test_runs_are_found_wherever_a_comparison_puts_them(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, 1) for name in ("a/seed-0", "a/seed-1", "b/seed-0")]
    assert find_runs([tmp_path, runs[0]]) == runs
    assert distinct_names(runs) == ["a/seed-0", "a/seed-1", "b/seed-0"]
    assert find_runs([runs[1]]) == [runs[1]] and distinct_names([runs[1]]) == ["seed-1"]
    with pytest.raises(ImageRLError, match="is no folder; name a run"):
        find_runs([tmp_path / "none"])


def test_several_runs_stand_beside_each_other_and_one_is_shown_whole(tmp_path: Path) -> None:
    one, other = _run(tmp_path / "one", 1, 2), _run(tmp_path / "two_of_us", 1, value=1e300)
    (status, tag, page), (again, _, _), (_, _, whole) = _ask(
        [tmp_path], ("/", {}), ("/", {"If-None-Match": "later"}), (f"/run/{key_of(one)}", {})
    )
    assert status == again == 200 and tag in page.replace("&#34;", '"')
    for word in ("two_of_us", "exact_match", "Training total", key_of(other), "1e+300"):
        assert word in page
    assert "0000000000" not in page
    assert "All runs" in whole and "step 2 of 2" in whole
    ((_, _, alone),) = _ask([one], ("/", {}))
    assert "Curves" in alone and "All runs" not in alone


def test_a_run_has_the_same_colour_in_every_chart() -> None:
    def content(metric: str, **record: float) -> dict[str, Any]:
        return {"heldout": [Chart("", "", [Series(metric, [0], [1.0])])], "training": [{"step": 1} | record]}

    runs = {"one": content("exact_match", loss=1.0), "two": content("success", loss=2.0)}
    charts = {chart.title: chart for chart in side_by_side(runs)}
    assert [series.label for series in charts["success"].series] == ["one", "two"]
    assert not charts["success"].series[0].steps and set(charts) == {"exact_match", "success", "Loss"}
    assert "var(--s2)" in render(charts["success"]) and "var(--s1)" not in render(charts["success"])


def test_a_page_that_is_known_is_not_sent_again_and_strangers_get_none(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 1)
    ((_, tag, _),) = _ask([run], ("/", {}))
    known, other, missing = _ask(
        [run], ("/", {"If-None-Match": tag}), ("/", {"Host": "evil.example"}), ("/run/0123456789", {})
    )
    assert (known[0], other[0], missing[0]) == (304, 403, 404)
    with MetricsLog(run, resume_step=1) as log:
        log.log(2, {"reward/mean": 0.6})
    ((status, later, _),) = _ask([run], ("/", {"If-None-Match": tag}))
    assert status == 200 and later != tag


def _shown(address: str, profile: Path) -> str:
    """What a browser makes of a page, seven of its seconds later."""
    command = [BROWSER or "", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=7000", f"--user-data-dir={profile}", address]
    return subprocess.run(command, capture_output=True, timeout=60).stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 10])
def test_a_run_that_was_killed_has_its_page(place: Path, tmp_path: Path, every: int) -> None:
    """kill -9 in mid-run, after the first step or while pages are written: the page is whole and tells the steps."""
    run = tmp_path / "killed"
    given = arguments(place, "full", "killed", f"run.output_dir={run}", f"run.report_every={every}")
    command = Command(tmp_path, *given, "checkpoint.every=0")
    command.wait_for(lambda: 3 in logged_steps(run))
    command.kill()
    assert command.wait() == -signal.SIGKILL
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.endswith("</html>")
    told = re.search(r"step (\d) of 8", page)
    assert told and 1 <= int(told[1]) <= logged_steps(run)[-1] and (every == 1 or told[1] == "1")
    if BROWSER is not None:
        assert told[0] in _shown(run.joinpath("report.html").as_uri(), tmp_path / "profile")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_shows_the_next_step_by_itself(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 1)

    async def look() -> str:
        app, served = watch_app([run]), 0

        @web.middleware
        async def goes_on(request: web.Request, handler: Any) -> web.StreamResponse:
            nonlocal served
            answer: web.StreamResponse = await handler(request)
            served += 1
            if served == 1:
                with MetricsLog(run, resume_step=1) as log:
                    log.log(2, {"reward/mean": 0.75})
            return answer

        app.middlewares.append(goes_on)
        async with TestServer(app) as server:
            return await asyncio.to_thread(_shown, str(server.make_url("/")), tmp_path / "profile")

    page = asyncio.run(look())
    assert "step 2 of 2" in page and "step 1 of 1" not in page
