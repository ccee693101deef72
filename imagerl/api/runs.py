"""A run that has been trained, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.stats import change, number
from imagerl.rl.files.metrics import is_timing, read_metrics

if TYPE_CHECKING:
    from imagerl.api.cards import Plot
    from imagerl.models.base import Policy
    from imagerl.rl.config.sft import AnyRecipe

SHOWN = (
    "Held-out results",
    "Held-out scores",
    "Training total",
    "Rewards in training",
    "KL to the reference",
)


class TrainingResult:
    """A run in its folder. It prints its verdict, and shows it in a notebook with pictures and curves."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ImageRLError when the folder holds no run."""
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise ImageRLError(f"{self.folder} holds no run; give its run.output_dir")

    @property
    def recipe(self) -> AnyRecipe:
        """The recipe as it ran, every default written out."""
        from imagerl.api.recipes import load_recipe

        return load_recipe(self.folder / "recipe.yaml")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each step, evaluations included, ready for a data frame."""
        steps: dict[int, dict[str, Any]] = {}
        for record in read_metrics(self.folder):
            steps.setdefault(record["step"], {}).update(record)
        return [steps[step] for step in sorted(steps)]

    @property
    def comparison(self) -> dict[str, Any]:
        """Held-out results after training less those before, by metric; empty where the run was stopped early."""
        from imagerl.rl.evaluation.against import read_evaluation

        path = self.folder / "eval" / "comparison.json"
        if not path.is_file():
            return {}
        told = read_evaluation(path, comparison=True)["metrics"]
        assert isinstance(told, dict)  # by its schema
        return told

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / "eval" / "comparison.json").is_file()

    @property
    def report(self) -> Path:
        """The page that tells all of it."""
        return self.folder / "report.html"

    def policy(self) -> Policy:
        """Load the policy of the last checkpoint."""
        from imagerl.api.exporting import recipe_of, trained_policy

        return trained_policy(*recipe_of(self.folder))

    def plot(self, *keys: str) -> Plot:
        """Draw curves of metrics.jsonl, such as "kl/k3", each in a chart; without keys all that the report has.

        Raises ImageRLError for a key that was never logged."""
        from imagerl.api.cards import Plot
        from imagerl.rl.files.mistakes import nearest
        from imagerl.rl.run.charts import Chart, Series, as_float
        from imagerl.rl.run.report import gather

        if not keys:
            return Plot(gather(self.folder, drawn=False)["charts"])
        metrics, charts = self.metrics, []
        for key in keys:
            points = [(record["step"], as_float(record[key])) for record in metrics if key in record]
            if not points:
                known = sorted({name for record in metrics for name in record if not is_timing(name)})
                near = nearest(key, known) or ", ".join(known[:8])
                raise ImageRLError(f'{self.folder} has no metric "{key}"; it has: {near}')
            steps, values = zip(*points, strict=True)
            charts.append(
                Chart(key, f"{len(points)} values.", [Series(key, steps, values)], last_step=steps[-1])
            )
        return Plot(charts)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        steps = max((record["step"] for record in read_metrics(self.folder)), default=0)
        told = [f"{self.folder}: {'finished' if self.finished else 'unfinished'}, step {steps}"]
        told += [f"  held-out {line}" for line in _lines(self.comparison)]
        return "\n".join([*told, f"  report: {self.report}"])

    def _repr_html_(self) -> str:
        from imagerl.api.cards import card
        from imagerl.rl.run.report import gather, title

        told = gather(self.folder, drawn=False)
        row, frames = told["verdict"], told["frames"]
        content: dict[str, object] = {
            "title": told["name"],
            "good": told["finished"],
            "state": f"{'finished' if told['finished'] else 'unfinished'}, step {told['done']} of {told['total']}",
            "notes": [*told["alarms"], f"The whole report: {self.report}"],
        }
        if row is not None and row.difference is not None:
            content |= {
                "verdict": f"Held-out {title(row.metric)}: {row.change}",
                "figures": (
                    number(row.before.mean, row.rate),
                    number(row.after.mean, row.rate),
                    row.tone,
                ),
                "lead": change(row.difference, row.rate),
            }
        shown = [frames[0], frames[-1]] if len(frames) > 1 else frames
        content["pictures"] = [{"uri": one["uri"], "caption": f"Step {one['step']}"} for one in shown]
        return card(**content, charts=[chart for chart in told["charts"] if chart.title in SHOWN][:4])


def load_run(folder: str | Path) -> TrainingResult:
    """Open the folder of a run that was trained earlier. Raises ImageRLError when it holds none."""
    return TrainingResult(folder)


def _lines(comparison: Mapping[str, Any]) -> list[str]:
    """Tell differences by metric, each in a line."""
    from imagerl.rl.evaluation.stats import HEADLINES, Interval
    from imagerl.rl.run.report import title

    return [
        f"{title(name)}: {change(Interval.read(row['difference']), name in HEADLINES)}"
        for name, row in comparison.items()
    ]
