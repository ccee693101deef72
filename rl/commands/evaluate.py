"""`imagerl eval`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl.commands.options import FlowSteps, Guidance, Seed, Temperature, loaded_rollout
from rl.errors import ImageRLError

if TYPE_CHECKING:
    from PIL import Image

    from rl.evaluate import Evaluation, Source
    from rl.types import Prompt

UNDERSTANDING = "understanding"
NEEDS_EDITOR = ("edit", UNDERSTANDING)  # suites of a model that reads pictures


def evaluate_model(
    model: Annotated[
        str | None,
        typer.Option(help='model or adapter folder; default: "tiny", or "tiny_edit" for edits and reading'),
    ] = None,
    suite: Annotated[str, typer.Option(help="what to measure: ocr, edit or understanding")] = "ocr",
    n: Annotated[int, typer.Option("--n", min=1, help="held-out prompts, one picture or answer each")] = 256,
    json: Annotated[Path | None, typer.Option(help="write results and every prompt's values here")] = None,
    seed: Seed = 0,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="score perfect pictures, not a model's")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="score the unchanged sources of edits")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at a time")] = 64,
    temperature: Temperature = 1.0,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
) -> None:
    """Measure a model on held-out prompts, with 95 % intervals."""
    from rl.files import write_atomic
    from rl.metrics import to_json

    refuse_impossible(suite, ceiling, copy)
    model = model or ("tiny_edit" if suite in NEEDS_EDITOR else "tiny")
    facts: dict[str, Any]
    if suite == UNDERSTANDING:
        facts = {"model": model}
        result = answers(model, n, batch_size)
    else:
        prompts, truth = heldout(suite, n)
        if ceiling or copy:
            facts = {"model": "ground truth" if ceiling else "unchanged sources"}
            result = score(suite, prompts, still(truth if ceiling else source_of), batch_size)
        else:
            _, rollout = loaded_rollout(model, seed, temperature, guidance, flow_steps)
            facts = {"model": model, "seed": seed} | asdict(rollout.sampling)
            result = score(suite, prompts, rollout, batch_size)
    for name, interval in result.metrics.items():
        print(
            f"{name:>20}  {interval.mean:.3f}  (95 % {interval.low:.3f} to {interval.high:.3f}, n={interval.n})"
        )
    if json is not None:
        write_atomic(json, to_json(result.to_dict(**facts), indent=1) + "\n")
        print(f"written: {json}")


def refuse_impossible(suite: str, ceiling: bool, copy: bool) -> None:
    from rewards.suites import SUITES

    names = sorted([*SUITES, UNDERSTANDING])
    if suite not in names:
        raise ImageRLError(f"no suite is named {suite!r}; there is: {', '.join(names)}")
    if ceiling and copy:
        raise ImageRLError("--ceiling scores perfect pictures and --copy unchanged ones; give only one")
    if copy and suite != "edit":
        raise ImageRLError(f"--copy scores the sources of edits; suite {suite!r} has none")
    if ceiling and suite == UNDERSTANDING:
        raise ImageRLError("--ceiling scores perfect pictures; suite 'understanding' draws none")


def heldout(suite: str, n: int) -> tuple[list[Prompt], Callable[[Prompt], Image.Image]]:
    """Held-out prompts of a suite that draws, and what a perfect picture of one is."""
    if suite == "edit":
        from rl.tiny_edits import edit_set

        return edit_set("heldout", n), lambda prompt: prompt.columns["ideal"]
    from rl.tiny_world import prompt_set, truth

    return prompt_set("heldout", n), truth


def source_of(prompt: Prompt) -> Image.Image:
    picture = prompt.reference
    assert picture is not None  # every edit has one
    return picture


def still(draw: Callable[[Prompt], Image.Image]) -> Source:
    from rl.evaluate import GroundTruth

    return GroundTruth(draw)


def score(suite: str, prompts: list[Prompt], source: Source, batch_size: int) -> Evaluation:
    from rewards.suites import SUITES
    from rewards.workers import RewardWorkers
    from rl.evaluate import evaluate

    scorer = RewardWorkers(SUITES[suite], workers=0, columns=prompts[0].columns)
    return evaluate(suite, prompts, source, scorer, batch_size)


def answers(model: str, n: int, batch_size: int) -> Evaluation:
    import torch

    from models.loading import load_policy
    from rl.tiny_edits import question_set
    from rl.understanding import evaluate_answers

    policy, _ = load_policy(model, "cuda" if torch.cuda.is_available() else "cpu")
    return evaluate_answers(UNDERSTANDING, question_set("heldout", n), policy, batch_size)
