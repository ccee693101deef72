"""One model, or what stands in for one, measured by a suite; or two, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    import numpy as np

    from imagerl.api.recipes import Rewards
    from imagerl.rl.evaluation.evaluate import Evaluation
    from imagerl.rl.evaluation.stats import Interval
    from imagerl.rl.evaluation.suites import Suite
    from imagerl.rl.rollout.engine import RolloutEngine
    from imagerl.rl.types import Prompt, RolloutGroup, Source

STAND_INS = ("ground truth", "unchanged sources")  # scored instead of what a model draws
SAME = ("suite_sha256", "seed", "samples")  # what two results must share to be compared prompt by prompt
PICTURES_SHOWN = 8  # in a notebook


@dataclass(frozen=True, slots=True)
class Drawing:
    """The way pictures are drawn; None: as the model's own settings or the suite say."""

    seed: int
    samples: int | None
    batch_size: int
    temperature: float | None
    guidance: float | None
    flow_steps: int | None
    token_guidance: float | None = None
    family: str | None = None

    def rollout(self, model: str) -> RolloutEngine:
        from imagerl.api.drawing import loaded_rollout

        drawn_by = (self.temperature, self.guidance, self.flow_steps, self.token_guidance)
        return loaded_rollout(model, self.seed, *drawn_by, self.family)


def facts_of(suite: Suite, prompts: Sequence[Prompt], how: Drawing) -> dict[str, object]:
    """Return what results say of the measurement itself, whatever was measured.

    Raises ImageRLError for a reward that cannot be imported, or asks for what the prompts do not have."""
    from imagerl.rewards.base import check_entries
    from imagerl.rl.engine.checkpoint import package_versions
    from imagerl.rl.evaluation.suites import fingerprint

    columns = prompts[0].columns
    rewards, gold = (check_entries(entries, columns) for entries in (suite.rewards, suite.gold))
    return {
        "suite_sha256": fingerprint(suite, prompts),
        "seed": how.seed,
        "samples": how.samples or 1,
        "rewards": rewards,
        "gold": gold,
        "versions": package_versions(),
    }


class EvaluationResult:
    """Results of a model on a suite, and of another one beside them where it was asked for.

    `document` is what `save` writes; `images` are the first few pictures, in the order of its rows `per_prompt`."""

    def __init__(self, document: dict[str, Any], images: Sequence[np.ndarray], other: str = "") -> None:
        self.document = document
        self.images = images
        self._other = other  # how the caller named what it is held against

    @property
    def metrics(self) -> dict[str, Interval]:
        """Means with their 95 % intervals, by metric."""
        from imagerl.rl.evaluation.stats import Interval

        return {name: Interval.read(told) for name, told in self.document["metrics"].items()}

    @property
    def per_prompt(self) -> list[dict[str, Any]]:
        """Values of every picture, ready for a data frame."""
        rows: list[dict[str, Any]] = self.document["per_prompt"]
        return rows

    @property
    def against(self) -> dict[str, Any]:
        """Paired differences (this model less the other), by metric; empty where there is no other."""
        return dict(self.document.get("against", {}).get("metrics", {}))

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON: what `against` takes too."""
        from imagerl.rl.files.metrics import to_json
        from imagerl.rl.files.writing import write_atomic

        write_atomic(Path(path), to_json(self.document, indent=1) + "\n")
        return Path(path)

    def __repr__(self) -> str:
        from imagerl.rl.evaluation.against import differing_settings
        from imagerl.rl.evaluation.stats import Interval, change, number, span

        lines = []
        for name, value in self.metrics.items():
            kind = ", gold" if name.partition("/")[0] in self.document["gold"] else ""
            level = "95 % " if value.bounded else ""
            lines.append(f"{name:>20}  {number(value.mean)}  ({level}{span(value)}, n={value.n}{kind})")
        other = self.document.get("against")
        if other is not None:
            if differing := differing_settings(self.document, other):
                lines.append(f"\nnote: more differs than the model: {', '.join(differing)}")
            lines.append(f"\nagainst {self._other}, at the same prompts and random numbers:")
            for name, row in other["metrics"].items():
                means = f"{number(row['model'])} against {number(row['against'])}"
                lines.append(f"{name:>20}  {means}: {change(Interval.read(row['difference']))}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from PIL import Image

        from imagerl.api.cards import card, interval_cell
        from imagerl.rewards.pictures import data_url
        from imagerl.rl.evaluation.stats import Interval, number, span

        head, other = ["Metric", "Mean"], self.document.get("against")
        rows: list[list[object]] = [
            [name, interval_cell(told)] for name, told in self.document["metrics"].items()
        ]
        if other is not None:
            head += [f"Against {self._other}", "Difference", "Verdict"]
            for row in rows:
                told = other["metrics"].get(row[0])
                if told is not None:
                    gap = Interval.read(told["difference"])
                    row += [number(told["against"]), (number(gap.mean, sign=True), span(gap, sign=True))]
                    row.append(told["verdict"])
        pictures = [
            {"uri": data_url(Image.fromarray(image)), "caption": row["prompt"]}
            for image, row in zip(self.images[:PICTURES_SHOWN], self.per_prompt, strict=False)
        ]
        notes = [
            f"{self.document['n']} prompts, seed {self.document['seed']}. Small figures are 95 % intervals."
        ]
        title = f"{self.document['model']} on {self.document['suite']}"
        return card(title=title, head=head, rows=rows, pictures=pictures, notes=notes)


def evaluate(
    model: str | PathLike[str] | None = None,
    suite: str | Suite = "ocr",
    n: int | None = None,
    *,
    rewards: Rewards | None = None,
    gold: Rewards | None = None,
    against: str | PathLike[str] | EvaluationResult | None = None,
    samples: int | None = None,
    pictures: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    temperature: float | None = None,
    guidance: float | None = None,
    flow_steps: int | None = None,
    token_guidance: float | None = None,
    family: str | None = None,
) -> EvaluationResult:
    """Measure a model on held-out prompts, and with `against` another one, or results of one, prompt by prompt.

    `model` is a folder, "tiny", the result of `train`, whose last checkpoint is meant, or one of STAND_INS; None: the
    suite's own. `suite` is a name or a YAML file. `rewards`, in place of the suite's, and `gold` may be functions: see
    `reward_entries`. None elsewhere: as the suite, or the model's own settings, say.

    Raises ImageRLError for whatever the caller can mend."""
    from dataclasses import replace

    from imagerl.api.recipes import reward_specs
    from imagerl.models.families import load_prompts
    from imagerl.rl.evaluation.against import compared
    from imagerl.rl.evaluation.kept_pictures import refuse_filled
    from imagerl.rl.evaluation.suites import find_suite

    chosen = find_suite(suite) if isinstance(suite, str) else suite
    if rewards is not None:
        chosen = replace(chosen, rewards=[spec.model_dump() for spec in reward_specs(rewards)])
    if gold is not None:
        chosen = replace(chosen, gold=[spec.model_dump() for spec in reward_specs(gold)])
    how = Drawing(seed, samples, batch_size, temperature, guidance, flow_steps, token_guidance, family)
    kept = None if pictures is None else Path(pictures)
    if kept is not None:
        refuse_filled(kept)
    prompts = chosen.prompts(n or chosen.size)
    facts = facts_of(chosen, prompts, how)
    earlier: dict[str, Any] | None = None
    if isinstance(against, EvaluationResult):
        earlier = alike(against.document, "the earlier result", facts)
    elif against is not None and str(fspath(against)).endswith(".json"):
        earlier = earlier_results(str(fspath(against)), facts)
    with ExitStack() as scratch:
        measured, *others = (
            scratch.enter_context(as_model(one))
            for one in (
                model or chosen.model,
                *([against] if against is not None and earlier is None else []),
            )
        )
        for _, path in (measured, *others):
            if path not in STAND_INS:
                load_prompts(path, family).require(prompts, chosen.reads)  # before anything is drawn
        result, own_facts = measure(chosen, prompts, measured[1], how, kept)
        document: dict[str, Any] = result.to_dict(**own_facts | {"model": measured[0]}, **facts)
        for name, path in others:
            beside = kept / "against" if kept is not None else None
            other, other_facts = measure(chosen, prompts, path, how, beside)
            earlier = other.to_dict(**other_facts | {"model": name}, **facts)
    if earlier is not None:
        document["against"] = compared(earlier, result.per_prompt)
        given = earlier["model"] if isinstance(against, EvaluationResult) else fspath(against or "")
        return EvaluationResult(document, result.images, given)
    return EvaluationResult(document, result.images)


@contextmanager
def as_model(given: str | PathLike[str] | EvaluationResult) -> Iterator[tuple[str, str]]:
    """Yield a model's name and folder; of a run that was trained here, a folder for as long as it is needed."""
    from imagerl.api.runs import TrainingResult

    assert not isinstance(given, EvaluationResult)
    name = fspath(given)
    if not isinstance(given, TrainingResult):
        yield name, name
        return
    from tempfile import TemporaryDirectory

    from imagerl.api.exporting import export

    with TemporaryDirectory() as scratch:
        export(given.folder, Path(scratch) / "model")
        yield name, f"{scratch}/model"


def measure(
    suite: Suite, prompts: Sequence[Prompt], measured: str, how: Drawing, pictures: Path | None
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure a model, or one of STAND_INS; also return what is to be known of it."""
    from imagerl.models.families import fingerprint

    if suite.reads:
        facts = {"model": measured, "model_sha256": fingerprint(measured)}
        return _answers(suite.name, prompts, measured, how), facts
    if measured in STAND_INS:
        source = _perfect(suite) if measured == STAND_INS[0] else _unchanged(suite, prompts)
        return _score(suite, prompts, source, how, pictures), {"model": measured}
    rollout = how.rollout(measured)
    facts = {"model": measured, "model_sha256": fingerprint(measured), **asdict(rollout.sampling)}
    return _score(suite, prompts, rollout, how, pictures), facts


def _score(
    suite: Suite, prompts: Sequence[Prompt], source: Source, how: Drawing, pictures: Path | None
) -> Evaluation:

    from imagerl.rewards.workers.pool import RewardWorkers
    from imagerl.rl.evaluation.evaluate import evaluate, try_rewards
    from imagerl.rl.evaluation.kept_pictures import save_group

    scorer = RewardWorkers(suite.rewards, gold=suite.gold, workers=0, columns=prompts[0].columns)
    try_rewards(suite.name, prompts, source, scorer)
    shown: list[np.ndarray] = []

    def keep(group: RolloutGroup) -> None:
        shown.extend(group.images[: PICTURES_SHOWN - len(shown)])
        if pictures is not None:
            save_group(pictures, group)

    samples = how.samples or 1
    result = evaluate(suite.name, prompts, source, scorer, how.batch_size, samples=samples, each=keep)
    result.images = shown
    return result


def _answers(name: str, prompts: Sequence[Prompt], model: str, how: Drawing) -> Evaluation:
    from imagerl.api.drawing import load_policy
    from imagerl.rl.evaluation.understanding import evaluate_answers

    return evaluate_answers(name, prompts, load_policy(model, how.family), how.batch_size)


def _perfect(suite: Suite) -> Source:
    from imagerl.rl.evaluation.evaluate import GroundTruth

    if suite.truth is None:
        raise ImageRLError(
            f"suite {suite.name!r} does not say what a perfect picture is; leave out --ceiling"
        )
    return GroundTruth(suite.truth)


def _unchanged(suite: Suite, prompts: Sequence[Prompt]) -> Source:
    from imagerl.rl.evaluation.evaluate import GroundTruth

    if any(prompt.columns.get("reference") is None for prompt in prompts):
        raise ImageRLError(f"--copy scores the sources of edits; suite {suite.name!r} has none")
    return GroundTruth(lambda prompt: prompt.columns["reference"])


def earlier_results(file: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Read results that `--json` wrote. Raises ImageRLError when not of the same prompts and random numbers."""
    from imagerl.rl.evaluation.against import read_evaluation

    try:
        document = read_evaluation(file)
    except ImageRLError as error:
        raise ImageRLError(f"{error}; give what imagerl eval --json wrote") from None
    if not document.get("per_prompt"):
        raise ImageRLError(f"{file} holds no results; give what imagerl eval --json wrote")
    return alike(document, file, facts)


def alike(document: dict[str, Any], file: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return earlier results. Raises ImageRLError when not of the same prompts and random numbers."""
    for key in SAME:
        if document.get(key) != facts[key]:
            raise ImageRLError(
                f"{file} has another {key} ({document.get(key)}, here {facts[key]}): these are not the same prompts "
                "and random numbers; give the model itself to --against"
            )
    return document
