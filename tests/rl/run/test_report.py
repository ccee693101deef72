import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from imagerl.rl.evaluation.stats import compare, summarise
from imagerl.rl.files import environment as environment_module
from imagerl.rl.files import grids
from imagerl.rl.files.environment import write_environment
from imagerl.rl.files.grids import image_grid, save_image
from imagerl.rl.files.metrics import MetricsLog, to_json
from imagerl.rl.run import report as report_module
from imagerl.rl.run.charts import SMOOTH_FROM, Chart, Series, smooth, training_charts
from imagerl.rl.run.report import gold_metrics, write_report
from imagerl.rl.run.svg import render

HOSTILE = '<script>alert("x")</script>&"\''
VOID = {"meta", "img", "input", "br", "wbr", "link"}


class _Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "wbr":
            self.text = self.text.removesuffix(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _page(run_dir):
    page = _Page(write_report(run_dir).read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    return page


def _rows(hits, n=40):
    return [
        {"index": i, "prompt": HOSTILE, "exact_match": float(i < hits), "total": i / n, "colours": 1.0}
        for i in range(n)
    ]


def _evaluation(run_dir, step, rows, suite="ocr"):
    metrics = {name: asdict(interval) for name, interval in summarise(rows).items()}
    content = {"suite": suite, "step": step, "n": len(rows), "metrics": metrics, "per_prompt": rows}
    (run_dir / "eval").mkdir(exist_ok=True)
    (run_dir / f"eval/{suite}_step_{step:06d}.json").write_text(to_json(content))


def _train(run_dir, steps):
    with MetricsLog(run_dir) as log:
        for step in range(1, steps + 1):
            log.log(
                step,
                {
                    "reward/mean": step / 100,
                    "reward/std": 0.1,
                    f"reward/{HOSTILE}/mean": step / 100,
                    "kl/k1": math.nan if step == 2 else 1e-3,
                    "kl/k3": 1e-3,
                    "policy/ratio_mean": 1.0,
                    "policy/ratio_is_one_expected": True,
                    "rollout/logprob_diff_max": 0.0,
                    "time/step_s": 30.0,
                    "share/rollout": 0.75,
                    "share/other": 0.25,
                },
            )


@pytest.fixture(autouse=True)
def quick_charts(request, monkeypatch):
    """Drawing takes most of a second a page; only tests marked with `draws` look at what is drawn."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(report_module, "render", lambda chart: "<svg></svg>")


@pytest.fixture
def draws():
    """Marks a test of the drawn charts."""


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of four steps whose held-out exact match goes from 10 to 30 of 40."""
    _train(tmp_path, 4)
    for step, hits in [(0, 10), (4, 30)]:
        _evaluation(tmp_path, step, _rows(hits))
    for step in (0, 2, 4):
        grid = image_grid(np.full((2, 8, 16, 3), 10 * step, np.uint8), 2)
        save_image(grid, tmp_path / f"samples/step_{step:06d}.png")
    (tmp_path / "recipe.yaml").write_text(
        f"run: {{steps: 4, seed: 7}}\ngold: [{{name: colours}}]\n# {HOSTILE}\n"
    )
    write_environment(tmp_path, ["/a b/bin/imagerl", "train", "r.yaml", f"run.output_dir={HOSTILE}"])
    return tmp_path


def test_the_page_tells_the_result(run_dir):
    page = _page(run_dir)
    assert "Held-out exact match rose 25.0 % → 75.0 %" in page.text
    assert "+50.0 points, 95 % interval" in page.text and "over 40 prompts" in page.text
    assert "finished, step 4 of 4" in page.text and "Training time 2.0 min" in page.text
    low, high = compare(_rows(10), _rows(30))["exact_match"]["difference"].low, 0.0
    assert f"{100 * low:+.1f} to" in page.text and high < low
    assert "colours gold 100.0 %" in page.text
    assert "It is 1 by design here" in page.text


def test_the_comparison_file_wins_over_our_own_bootstrap(run_dir):
    difference = {"mean": 0.5, "low": 0.123, "high": 0.877}
    content = {"before_step": 0, "after_step": 4, "metrics": {"exact_match": {"difference": difference}}}
    (run_dir / "eval/comparison.json").write_text(to_json(content))
    assert "+50.0 points, 95 % interval +12.3 to +87.7" in _page(run_dir).text
    content["after_step"] = 2  # of another stage of the run
    (run_dir / "eval/comparison.json").write_text(to_json(content))
    assert "+12.3" not in _page(run_dir).text


def test_the_page_tells_both_models_at_their_best_temperatures(run_dir):
    rows = {"before": _rows(20), "after": _rows(36)}
    told = {
        "metric": "exact_match",
        "chosen": {"before": [0.4, 0.4], "after": [1.0, 0.4]},
        "per_prompt": rows,
    }
    result = compare(*rows.values())["exact_match"]
    told["metrics"] = {"exact_match": {**result, "difference": asdict(result["difference"])}}
    content = {"before_step": 0, "after_step": 4, "metrics": {}, "best_temperature": told}
    (run_dir / "eval/comparison.json").write_text(to_json(content))
    text = _page(run_dir).text
    assert "same seeds, temperature 1)" in text
    assert "best temperature, chosen on the other prompts: 50.0 % → 90.0 %, +40.0 points" in text
    assert "exact_match at temperature 0.4 → 1 and 0.4" in text


def test_a_page_of_a_run_that_goes_on_takes_a_small_share_of_its_time(run_dir, monkeypatch):
    clock, said = [1000.0], []
    monkeypatch.setattr(report_module.time, "monotonic", lambda: clock[0])

    def write(_):
        clock[0] += 3.0

    monkeypatch.setattr(report_module, "write_report", write)
    page = report_module.LivePage(run_dir, said.append)
    page.write()
    assert clock[0] == 1003.0
    page.write()  # 3 s are 2 % of 150 s
    assert clock[0] == 1003.0
    clock[0] += 151.0
    page.write()
    assert clock[0] == 1157.0
    monkeypatch.setattr(report_module, "write_report", lambda _: 1 / 0)
    clock[0] += 999.0
    page.write()
    assert said == ["the report page could not be written: division by zero"]


def test_what_is_gold():
    """A gold metric that is named like the suite owns the names without a label; the total is never gold."""
    recipe = {"rewards": [{"import_path": "b.py:bold"}], "gold": [{"name": "ocr"}, {"name": "colours"}]}
    names = ["total", "bold", "ocr", "exact_match", "colours/ink"]
    assert gold_metrics(recipe, "ocr", names) == ["ocr", "exact_match", "colours/ink"]
    assert gold_metrics(recipe, "mine", names) == ["ocr", "colours/ink"]


@pytest.mark.parametrize(("hits", "words"), [(2, "fell"), (10, ": no difference shown"), (15, ": no diff")])
def test_the_verdict_claims_no_more_than_the_interval(run_dir, hits, words):
    _evaluation(run_dir, 4, _rows(hits))
    text = " ".join(_page(run_dir).text.split())
    assert f"Held-out exact match {words}".replace(" :", ":") in text
    assert ("too few to tell" in text.partition("Held-out results")[0]) is (hits > 2)  # five flips are none


@pytest.mark.parametrize(
    "content",
    [
        '{"metrics": 7}',
        '{"metrics": {"exact_match": {"mean": "much"}}}',
        '{"metrics": {"exact_match": {}}}',
        '{"metrics": {}, "per_prompt": [7]}',
        '{"metrics": {}, "per_prompt": [{"index": 0, "exact_match": [1]}]}',
        '{"metrics": {}, "metrics": {}}',
        "[" * 50_000,
    ],
)
def test_an_evaluation_that_no_run_wrote_is_left_out_and_named(run_dir, content):
    (run_dir / "eval/ocr_step_000003.json").write_text(content)
    (run_dir / "eval/comparison.json").write_text('{"before_step": 0, "after_step": 4, "metrics": {"a": 1}}')
    text = _page(run_dir).text
    for name in ("ocr_step_000003", "comparison"):
        assert f"eval/{name}.json could not be read" in text


def test_the_page_needs_nothing_but_itself(run_dir, draws):
    page = _page(run_dir)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert len(page.all("img")) == 2 + 3


def test_text_from_the_run_stays_text(run_dir, draws):
    page = _page(run_dir)
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) >= 3  # recipe, legend, command
    assert "imagerl train r.yaml" in " ".join(page.text.split()) and "/a b/bin" not in page.text


def test_ids_are_unique_and_references_resolve(run_dir, draws):
    page = _page(run_dir)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_an_unfinished_run_has_a_page(run_dir):
    (run_dir / "recipe.yaml").write_text("run: {steps: 9}")
    (run_dir / "eval/ocr_step_000004.json").unlink()
    page = _page(run_dir)
    assert "unfinished, step 4 of 9" in page.text
    assert "Held-out exact match at step 0 25.0 %" in page.text and "no second measurement" in page.text


def test_an_empty_folder_has_a_page(tmp_path):
    page = _page(tmp_path)
    assert "No held-out results yet" in page.text and "imagerl train recipe.yaml" in page.text


def test_every_piece_may_be_missing(run_dir):
    for path in [*run_dir.glob("eval/*"), *run_dir.glob("samples/*"), *run_dir.glob("*.json*")]:
        path.rename(run_dir / "aside")
        _page(run_dir)
        (run_dir / "aside").rename(path)
    (run_dir / "recipe.yaml").unlink()
    assert "finished, step 4 of 4" in _page(run_dir).text


def test_what_cannot_be_read_is_named(run_dir):
    (run_dir / "environment.json").write_text("{")
    (run_dir / "recipe.yaml").write_text("a: [")
    (run_dir / "samples/step_000002.png").write_bytes(b"no picture")
    text = _page(run_dir).text
    for name in ("environment.json", "recipe.yaml", "samples/step_000002.png"):
        assert f"{name} could not be read." in text


def test_metrics_alone_give_held_out_means(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(0, {"eval/ocr/exact_match": 0.4, "eval/ocr/time_s": 3.0})
        log.log(5, {"eval/ocr/exact_match": 0.6})
    text = _page(tmp_path).text
    assert "Held-out exact match: no difference shown so far 40.0 % → 60.0 %" in text
    assert "+20.0 points, too few to tell (steps" in text and "time s" not in text


def test_many_or_large_pictures_keep_the_page_small(run_dir, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_FRAMES", 2)
    monkeypatch.setattr(grids, "MAX_PICTURE", 10)
    page = _page(run_dir)
    assert "1 of 3 sample grids are left out of this page." in page.text
    assert [a["src"][:22] for a in page.all("img")] == ["data:image/jpeg;base64"] * 2
    assert "Step 0" in page.text and "Step 4" in page.text


def test_svg_is_themed_and_well_formed():
    chart = Chart("A & <b>", "note", [Series("s", [1, 2, 3], [1.0, math.nan, 3.0], [0, 0, 0], [4, 4, 4])])
    svg = render(chart)
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.get("role") == "img"
    assert root.get("aria-label") == "A & <b>. s: 1 at step 1, 3 at step 3"
    assert "var(--s1)" in svg and "var(--rule)" in svg and not re.search(r"#0([1-9a-f])0\1", svg)
    assert svg == render(chart)


@pytest.mark.parametrize("kind", ["line", "points", "stack"])
def test_charts_survive_odd_data(kind):
    for values in ([0.0], [math.nan, math.nan], [0.0] * 50):
        steps = list(range(1, len(values) + 1))
        for log in (False, True):
            chart = Chart("t", "n", [Series("$x_1$", steps, values)], kind=kind, log=log, zero=True)
            assert render(chart).startswith("<svg")


def test_smoothing_is_a_trailing_mean_that_skips_gaps():
    values = np.arange(100.0)
    values[50] = np.nan
    result = smooth(values)
    assert result[99] == np.mean([95, 96, 97, 98, 99]) and result[1] == 0.5
    assert result[52] == pytest.approx(np.mean([48, 49, 51, 52]))
    short = np.arange(SMOOTH_FROM - 1.0)
    assert np.array_equal(smooth(short), short)


def test_a_change_is_coloured_by_what_is_better(tmp_path):
    """Fewer faults are good, and less of a penalty; of the KL and of what a judge costs nobody can tell."""
    names = ("composition", "fault_missing", "judge", "length", "length/words", "kl", "judge/tokens_in")
    falls = [-1.0, -1.0, 0.0, -1.0, -1.0, 1.0, 1.0]
    for step in (0, 4):
        rows = [
            {"index": i} | {n: 2 + f * step / 4 + i / 100 for n, f in zip(names, falls, strict=True)}
            for i in range(20)
        ]
        _evaluation(tmp_path, step, rows, suite="composition")
    rewards = "[{name: composition}, {name: judge}, {import_path: 'a.py:length', weight: {0: -1, 9: -0.5}}]"
    (tmp_path / "recipe.yaml").write_text(f"run: {{steps: 4}}\nrewards: {rewards}\n")
    with MetricsLog(tmp_path) as log:
        log.log(4, {"reward/mean": 0.5})
    tones = {row.metric: row.tone for row in report_module.gather(tmp_path)["rows"]}
    assert list(map(tones.get, names)) == ["bad", "good", "", "good", "", "", ""]
    assert 'class="good">−1.000' in write_report(tmp_path).read_text(encoding="utf-8")


def test_no_metric_is_left_out_for_want_of_a_colour(tmp_path):
    _train(tmp_path, 2)
    _evaluation(
        tmp_path, 0, [{"index": i} | {f"part_{n}": float(i % 2) for n in range(9)} for i in range(20)]
    )
    charts = report_module.gather(tmp_path)["heldout"]
    assert [len(chart.series) for chart in charts] == [7, 2]
    assert write_report(tmp_path).read_text(encoding="utf-8").count("<li style=") >= 9


def test_every_component_gets_a_curve():
    records = [{"step": 1, **{f"reward/r{i}/mean": 0.5 for i in range(9)}}]
    shown = [s.label for c in training_charts(records) if c.title == "Rewards in training" for s in c.series]
    assert shown == [f"r{i}" for i in range(9)]


def test_environment_is_kept_and_resumed_sessions_are_added(tmp_path):
    first = json.loads(write_environment(tmp_path, ["imagerl", "train"]).read_text())
    assert first["command"] == ["imagerl", "train"] and first["cores"] >= 1 and first["memory_gib"] > 0
    assert first["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", first["packages"]["numpy"])
    second = json.loads(write_environment(tmp_path, ["imagerl", "train", "--resume"]).read_text())
    assert second.pop("resumed")[0]["command"] == ["imagerl", "train", "--resume"]
    assert second == first


def test_commit_is_that_of_our_code(monkeypatch):
    commit = environment_module._git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)
    monkeypatch.setenv("PATH", "")
    assert environment_module._git_commit() is None
