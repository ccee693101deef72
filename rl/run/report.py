"""One page that tells a run: verdict, pictures, curves, settings. Made from the run folder alone."""

from __future__ import annotations

import datetime
import math
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.evaluation.against import read_evaluation
from imagerl.rl.evaluation.stats import (
    HEADLINES,
    TOTAL,
    Interval,
    compare,
    direction,
    headline,
    number,
    span,
    summarise,
    verdict,
)
from imagerl.rl.evaluation.temperatures import words
from imagerl.rl.files.grids import embedded_grid
from imagerl.rl.files.metrics import is_timing, read_metrics
from imagerl.rl.files.reading import read_json, read_text
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.files.yaml_text import parse_yaml
from imagerl.rl.run.charts import SMOOTH_FROM, Chart, Series, as_float, parts, training_charts
from imagerl.rl.run.monitors_report import alarms, monitor_charts
from imagerl.rl.run.svg import render

COST = 0.02  # of a run's time, at most, goes into its page
MAX_FRAMES = 24  # pictures in the page; a longer run shows an even choice with both ends
Content = Mapping[str, Any]  # of a JSON or YAML file of a run: whatever it holds
Load = Callable[[Path, Callable[[Path], object]], dict[str, Any]]  # of a file, by what reads it


def write_report(run_dir: Path | str) -> Path:
    """Build `report.html` in the run folder, from whatever the run has written so far.

    A file that is missing is passed over; one that cannot be read is named at the foot of the page.

    Raises:
        ImageRLError: metrics.jsonl is damaged, or the page cannot be written.
    """
    path = Path(run_dir) / "report.html"
    write_atomic(path, render_page("report.html.j2", gather(Path(run_dir))))
    return path


class LivePage:
    """The page of a run that goes on: written now and then, at most COST of the time, and never the end of the run."""

    def __init__(self, run_dir: Path, note: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.note = note
        self.written, self.took = -math.inf, 0.0  # seconds

    def write(self) -> None:
        """Write the page, unless the last one took more than its share of the time since."""
        begun = time.monotonic()
        if (begun - self.written) * COST < self.took:
            return
        try:
            write_report(self.run_dir)
        except Exception as error:  # a run goes on without its page
            self.note(f"the report page could not be written: {one_line(error, 200)}")
        self.written = time.monotonic()
        self.took = self.written - begun


def render_page(template: str, content: Mapping[str, object]) -> str:
    """Render a page from one of the templates beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": number,
        "span": span,
        "command": _command,
        "title": title,
        "breaks": _breaks,
    }
    return templates.get_template(template).render(content)


def gather(run_dir: Path, drawn: bool = True) -> dict[str, Any]:
    """Return all that a page tells of a run's folder; `charts` are not `drawn` yet where somebody else will.

    Raises ImageRLError when metrics.jsonl is damaged."""
    problems: list[str] = []

    def load(path: Path, read: Callable[[Path], object]) -> dict[str, Any]:
        """Load the mapping in a file; empty, with a line in `problems`, when it cannot be read."""
        if not path.exists():
            return {}
        with suppress(ImageRLError):
            if isinstance(content := read(path), dict):
                return content
        problems.append(f"{path.relative_to(run_dir)} could not be read")
        return {}

    records = read_metrics(run_dir)
    recipe_file = run_dir / "recipe.yaml"
    recipe = load(recipe_file, lambda path: parse_yaml(read_text(path), str(path)))
    environment = load(run_dir / "environment.json", read_json)
    training = [r for r in records if "reward/mean" in r or "loss" in r]
    done = max((r["step"] for r in training), default=0)
    suites = _evaluations(run_dir, records, load)
    comparison = load(run_dir / "eval" / "comparison.json", partial(read_evaluation, comparison=True))
    # written when a run ends, which a budget or a monitor may decide before its last step
    finished = done > 0 and comparison.get("after_step") == done
    total = done if finished else _dig(recipe, "run", "steps") or done
    rows = [row for suite, steps in suites.items() for row in _rows(suite, steps, comparison, recipe)]
    best = _best_row(comparison, rows) if comparison.get("after_step") == done else None
    rows += [best] if best else []
    _add_bars(rows)
    suite = _dig(recipe, "eval", "suite") or next(iter(suites), "")
    watch, heldout = monitor_charts(records, suite), _heldout_charts(suites)
    charts = [c for c in [*heldout, *watch, *training_charts(training)] if c.series]
    for chart in charts:
        chart.last_step = total
        chart.svg = Markup(render(chart)) if drawn else ""
    return {
        "name": run_dir.resolve().name,
        "done": done,
        "total": total,
        "finished": done > 0 and done >= total,
        "alarms": alarms(records, _dig(recipe, "monitors", "window") or MonitorsConfig().window),
        "best": best,
        "temperature": _dig(recipe, "rollout", "temperature") or 1.0,
        "verdict": next((row for row in rows if row.metric in HEADLINES), rows[0] if rows else None),
        "rows": rows,
        "many_suites": len(suites) > 1,
        "reward": _reward_trend(training),
        "charts": charts,
        "heldout": heldout,
        "training": training,
        "smoothed": len(training) >= SMOOTH_FROM,
        "frames": _frames(run_dir, problems),
        "recipe": recipe_file.read_text(encoding="utf-8") if recipe_file.exists() else None,
        "facts": _facts(recipe, training),
        "environment": environment,
        "problems": problems,
        "live": False,
        "state": "",
        "several": False,
        "made": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    }


def _breaks(name: str) -> Markup:
    """Let a name break where its words end."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name))))


def title(metric: str) -> str:
    """Write the name of a metric as the subject of a sentence: ours in plain words, all others as they are."""
    return metric.replace("_", " ") if metric in HEADLINES else metric


@dataclass(slots=True)
class Row:
    """One held-out metric before and after."""

    suite: str
    metric: str
    rate: bool  # a share of prompts, shown in per cent
    gold: bool  # measured, never trained on
    direction: int  # 1: more of it is better, -1: less, 0: neither
    prompts: int | None
    before_step: int
    after_step: int
    before: Interval
    after: Interval | None = None
    difference: Interval | None = None
    bar: Mapping[str, float] | None = None  # the difference as positions between 0 and 150, no change at 75

    @property
    def change(self) -> str:
        told = verdict(self.difference) if self.difference else "no difference shown"
        return {"higher": "rose", "lower": "fell"}.get(told, told)

    @property
    def tone(self) -> str:
        """Say whether the change is `good` or `bad`; empty where none is shown or nobody can tell."""
        way = self.direction * {"rose": 1, "fell": -1}.get(self.change, 0)
        return {1: "good", -1: "bad"}.get(way, "")


def _evaluations(
    run_dir: Path, records: Sequence[Content], load: Load
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return suite -> step -> evaluation, from eval/*.json; means alone come from metrics.jsonl where a file is
    missing."""
    suites: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((run_dir / "eval").glob("*_step_*.json")):
        found = re.fullmatch(r"(.+)_step_(\d+)", path.stem)
        content = load(path, read_evaluation) if found else {}
        if found and "metrics" in content:
            suites.setdefault(found[1], {})[int(found[2])] = content
    for record in records:
        for key, value in record.items():
            match key.split("/", 2):
                case ["eval", suite, metric] if value is not None and not is_timing(key):
                    content = suites.setdefault(suite, {}).setdefault(record["step"], {"metrics": {}})
                    content["metrics"].setdefault(metric, {"mean": value})
    return {suite: dict(sorted(steps.items())) for suite, steps in sorted(suites.items())}


def _rows(
    suite: str,
    steps: Mapping[int, Content],
    comparison: Content,
    recipe: Content,
) -> list[Row]:
    first, last = min(steps), max(steps)
    gold = gold_metrics(recipe, suite, steps[first]["metrics"])
    penalties = [name for name, reward in _labelled(recipe, "rewards").items() if _is_penalty(reward)]
    compared = comparison.get("before_step"), comparison.get("after_step")
    if comparison.get("suite", suite) == suite and compared == (first, last):
        told = comparison.get("metrics") or {}
        differences = {name: Interval.read(row["difference"]) for name, row in told.items()}
    else:
        before, after = (steps[step].get("per_prompt") or [] for step in (first, last))
        differences = {
            name: result["difference"]
            for name, result in (compare(before, after) if first != last else {}).items()
        }
    rows = []
    for metric, before in steps[first]["metrics"].items():
        values = {row.get(metric) for row in steps[first].get("per_prompt") or []} - {None}
        row = Row(
            suite,
            metric,
            rate=values <= {0, 1} if values else metric.endswith(HEADLINES),
            gold=metric in gold,
            direction=direction(metric, penalties),
            prompts=steps[last].get("n"),
            before_step=first,
            after_step=last,
            before=Interval.read(before),
        )
        if first != last and metric in steps[last]["metrics"]:
            row.after = Interval.read(steps[last]["metrics"][metric])
            means = {"mean": row.after.mean - row.before.mean}
            row.difference = differences.get(metric) or Interval.read(means)
        rows.append(row)
    first_of_all = headline(row.metric for row in rows if not row.gold)
    return sorted(rows, key=lambda row: (row.gold, row.metric != first_of_all))


def _best_row(comparison: Content, rows: Sequence[Row]) -> Row | None:
    """Return the headline's row with each model at its best temperature; None where one was tried only."""
    told = comparison.get("best_temperature") or {}
    name = str(told.get("metric"))
    usual = next((row for row in rows if row.metric == name), None)
    if usual is None or name not in told["metrics"]:
        return None
    result, chosen = told["metrics"][name], told["chosen"]
    before, after = (summarise(told["per_prompt"][when])[name] for when in ("before", "after"))
    label = f"{name} at temperature {words(chosen['before'])} → {words(chosen['after'])}"
    difference = Interval.read(result["difference"])
    return replace(usual, metric=label, before=before, after=after, difference=difference)


def _add_bars(rows: Sequence[Row]) -> None:
    """Place the difference of every row; rates share one scale, because they share a unit."""
    common = max((reach(row.difference) for row in rows if row.rate), default=0.0)
    for row in rows:
        row.bar = bar(row.difference, common if row.rate else reach(row.difference))


def reach(interval: Interval | None) -> float:
    """Return the larger bound, without its sign; 0 without bounds."""
    return max(abs(interval.low), abs(interval.high)) if interval and interval.bounded else 0.0


def bar(interval: Interval | None, scale: float) -> dict[str, float] | None:
    """Place an interval as positions between 0 and 150, no difference at 75 and `scale` at 143; None without bounds."""
    if interval is None or not interval.bounded or not scale:
        return None
    return {k: round(75 + 68 * getattr(interval, k) / scale, 1) for k in ("low", "mean", "high")}


def _heldout_charts(suites: Mapping[str, Mapping[int, Content]]) -> list[Chart]:
    charts = []
    for suite, steps in suites.items():
        rows = _rows(suite, steps, {}, {})
        for rate in (True, False):
            series = []
            for row in (r for r in rows if r.rate == rate):
                points = [
                    (s, e["metrics"][row.metric]) for s, e in steps.items() if row.metric in e["metrics"]
                ]
                low, high, mean = (
                    [as_float(p.get(k, p["mean"])) for _, p in points] for k in ("low", "high", "mean")
                )
                series.append(Series(row.metric, [s for s, _ in points], mean, low, high))
            unit = "share of prompts" if rate else "mean score"
            note = f"Suite {suite}, {unit} with 95 % intervals, on prompts never trained on."
            title = "Held-out results" if rate else "Held-out scores"
            charts += parts(title, note, series, kind="points", percent=rate)
    return charts


def _reward_trend(training: Sequence[Content]) -> tuple[float, float, int] | None:
    """Return the mean training reward of the first and of the last tenth of the steps, and how many steps that is."""
    values = [r["reward/mean"] for r in training if r.get("reward/mean") is not None]
    count = max(1, len(values) // 10)
    return (sum(values[:count]) / count, sum(values[-count:]) / count, count) if values else None


def _frames(run_dir: Path, problems: list[str]) -> list[dict[str, object]]:
    """Read the sample grids in step order as data URIs."""
    paths = sorted((run_dir / "samples").glob("step_*.png"))
    if len(paths) > MAX_FRAMES:
        problems.append(f"{len(paths) - MAX_FRAMES} of {len(paths)} sample grids are left out of this page")
        paths = [paths[round(i * (len(paths) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    frames = []
    for path in paths:
        try:
            frames.append(embedded_grid(path, path.stat().st_mtime_ns))
        except OSError:
            problems.append(f"samples/{path.name} could not be read")
    return frames


def _facts(recipe: Content, training: Sequence[Content]) -> dict[str, str]:
    """Pick the few settings that identify a run at a glance."""
    seconds = sum(r.get("time/step_s") or 0.0 for r in training)
    prompts, group = _dig(recipe, "rollout", "prompts_per_step"), _dig(recipe, "rollout", "group_size")
    facts = {
        "Algorithm": _dig(recipe, "algorithm", "name"),
        "Rewards": ", ".join(_labelled(recipe, "rewards")),
        "Model": _dig(recipe, "model", "path"),
        "Samples a step": f"{prompts} prompts × {group}" if prompts and group else None,
        "Seed": _dig(recipe, "run", "seed"),
        "Training time": f"{seconds / 60:.1f} min" if seconds else None,
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def gold_metrics(recipe: Content, suite: str, metrics: Iterable[str]) -> list[str]:
    """List the metrics of an evaluation that are measured and never trained on. Names that begin with no label are
    parts of the reward or gold metric that is named like the suite; the total is of rewards alone."""
    trained, gold = _labelled(recipe, "rewards"), _labelled(recipe, "gold")
    owners = {
        m: next((n for n in [*trained, *gold] if f"{m}/".startswith(f"{n}/")), suite)
        for m in metrics
        if m != TOTAL
    }
    return [metric for metric, owner in owners.items() if owner in gold]


def _labelled(recipe: Content, section: str) -> dict[str, Content]:
    """Return the settings of the rewards, or of the gold metrics, by the names that metrics give them."""
    specs = _dig(recipe, section, "functions") or recipe.get(section) or []
    return {
        s.get("name") or str(s.get("import_path")).rpartition(":")[2]: s for s in specs if isinstance(s, dict)
    }


def _is_penalty(reward: Content) -> bool:
    weight = reward.get("weight", 1)
    weights = [as_float(one) for one in (weight.values() if isinstance(weight, dict) else [weight])]
    return any(w < 0 for w in weights) and not any(w > 0 for w in weights)


def _dig(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _command(argv: object) -> Markup:
    """Return a command line to paste: the program by its bare name, `imagerl` where it was started as a module,
    arguments quoted for a shell and not broken at their hyphens."""
    words = [str(word) for word in argv] if isinstance(argv, list) else []
    words[:1] = [Path(word).name.replace("cli.py", "imagerl") for word in words[:1]]
    return Markup(" ").join(Markup('<span class="word">{}</span>').format(shlex.quote(w)) for w in words)
