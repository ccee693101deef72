"""`imagerl eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rl.commands.options import FlowSteps, Guidance, Model, Seed, Temperature, loaded_rollout
from rl.errors import ImageRLError


def evaluate_model(
    model: Model = "tiny",
    suite: Annotated[str, typer.Option(help="what to measure: ocr")] = "ocr",
    n: Annotated[int, typer.Option("--n", min=1, help="held-out prompts, one picture each")] = 256,
    json: Annotated[Path | None, typer.Option(help="write results and every prompt's values here")] = None,
    seed: Seed = 0,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="score perfect pictures, not a model's")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at a time")] = 64,
    temperature: Temperature = 1.0,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
) -> None:
    """Measure a model on held-out prompts, with 95 % intervals."""
    from rewards.suites import SUITES
    from rewards.workers import RewardWorkers
    from rl.evaluate import GroundTruth, Source, evaluate
    from rl.files import write_atomic
    from rl.metrics import to_json
    from rl.tiny_world import prompt_set, truth

    if suite not in SUITES:
        raise ImageRLError(f"no suite is named {suite!r}; there is: {', '.join(SUITES)}")
    prompts = prompt_set("heldout", n)
    scorer = RewardWorkers(SUITES[suite], workers=0, columns=prompts[0].columns)
    _, rollout = loaded_rollout(model, seed, temperature, guidance, flow_steps)
    source: Source = GroundTruth(truth) if ceiling else rollout
    result = evaluate(suite, prompts, source, scorer, batch_size)
    for name, interval in result.metrics.items():
        print(
            f"{name:>20}  {interval.mean:.3f}  (95 % {interval.low:.3f} to {interval.high:.3f}, n={interval.n})"
        )
    if json is not None:
        facts = (
            {"model": "ground truth"}
            if ceiling
            else {"model": model, "seed": seed} | asdict(rollout.sampling)
        )
        document = result.to_dict(**facts)
        write_atomic(json, to_json(document, indent=1) + "\n")
        print(f"written: {json}")
