"""One model, or what stands in for one, measured by a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.rl.evaluation.evaluate import Evaluation, Source
    from imagerl.rl.evaluation.suites import Suite
    from imagerl.rl.rollout.engine import RolloutEngine
    from imagerl.rl.types import Prompt

STAND_INS = ("ground truth", "unchanged sources")  # scored instead of what a model draws
SAME = ("suite_sha256", "seed", "samples")  # what two results must share to be compared prompt by prompt


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


def facts_of(suite: Suite, prompts: Sequence[Prompt], how: Drawing) -> dict[str, Any]:
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
    return evaluate(
        suite.name,
        prompts,
        source,
        scorer,
        how.batch_size,
        samples=how.samples or 1,
        each=(lambda group: None) if pictures is None else partial(save_group, pictures),
    )


def _answers(name: str, prompts: Sequence[Prompt], model: str, how: Drawing) -> Evaluation:
    from imagerl.api.drawing import loaded_policy
    from imagerl.rl.evaluation.understanding import evaluate_answers

    return evaluate_answers(name, prompts, loaded_policy(model, how.family), how.batch_size)


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
    for key in SAME:
        if document.get(key) != facts[key]:
            raise ImageRLError(
                f"{file} has another {key} ({document.get(key)}, here {facts[key]}): these are not the same prompts "
                "and random numbers; give the model itself to --against"
            )
    return document
