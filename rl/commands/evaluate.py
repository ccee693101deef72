"""`imagerl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.commands.options import Family, FlowSteps, Guidance, Seed, Temperature, TokenGuidance
from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.api.evaluating import Drawing
    from imagerl.rl.evaluation.suites import Suite

LAYOUT_ONLY = "it draws for a scorer and measures nothing"


def evaluate_model(
    model: Annotated[
        str | None,
        typer.Option(help='model or adapter folder; default: "tiny", or "tiny_edit" for edits and reading'),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="what to measure: a suite's name (ocr, edit, ...) or a YAML file of yours")
    ] = "ocr",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="prompts; default: 256, of a suite file all")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="pictures of each prompt; default: 1, with --layout its own")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="another model, or results of one, to compare with prompt by prompt")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write results and every prompt's values here")] = None,
    pictures: Annotated[Path | None, typer.Option(help="folder in which to keep the pictures")] = None,
    layout: Annotated[
        str | None, typer.Option(help="draw for an official scorer instead: geneval, dpg, imgedit, longtext")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="with --layout: the benchmark's own prompt file or folder")
    ] = None,
    sources: Annotated[
        Path | None, typer.Option(help="with --layout imgedit: folder of the benchmark's pictures")
    ] = None,
    seed: Seed = 0,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="score perfect pictures, not a model's")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="score the unchanged sources of edits")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at a time")] = 64,
    temperature: Temperature = None,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
    token_guidance: TokenGuidance = None,
    family: Family = None,
) -> None:
    """Measure a model on held-out prompts with 95 % intervals, compare two, or draw for a benchmark's own scorer."""
    from imagerl.api.evaluating import Drawing, evaluate
    from imagerl.rl.evaluation.suites import find_suite

    how = Drawing(seed, samples, batch_size, temperature, guidance, flow_steps, token_guidance, family)
    if layout is not None:
        for given, option in (
            (against, "--against"),
            (json, "--json"),
            (ceiling, "--ceiling"),
            (copy, "--copy"),
            (n, "--n"),
        ):
            if given:
                raise ImageRLError(f"--layout cannot be combined with {option}: {LAYOUT_ONLY}")
        draw_for_scorer(layout, model, prompts, sources, pictures, how)
        return
    for path, option in ((prompts, "--prompts"), (sources, "--sources")):
        if path is not None:
            raise ImageRLError(f"{option} goes with --layout; prompts of your own stand in a suite file")
    chosen = find_suite(suite)
    refuse_impossible(chosen, ceiling, copy, samples, pictures)
    measured = "ground truth" if ceiling else "unchanged sources" if copy else model
    result = evaluate(
        measured,
        chosen,
        n,
        against=against,
        samples=samples,
        pictures=pictures,
        seed=seed,
        batch_size=batch_size,
        temperature=temperature,
        guidance=guidance,
        flow_steps=flow_steps,
        token_guidance=token_guidance,
        family=family,
    )
    print(result)
    if json is not None:
        print(f"written: {result.save(json)}")


def refuse_impossible(
    suite: Suite, ceiling: bool, copy: bool, samples: int | None, pictures: Path | None
) -> None:
    if ceiling and copy:
        raise ImageRLError("--ceiling scores perfect pictures and --copy unchanged ones; give only one")
    if suite.reads:
        for given, what in (
            (ceiling, "--ceiling scores perfect pictures"),
            (copy, "--copy scores unchanged pictures"),
            (samples, "--samples counts pictures"),
            (pictures, "--pictures keeps pictures"),
        ):
            if given:
                raise ImageRLError(f"{what}; suite {suite.name!r} draws none")


def draw_for_scorer(
    layout: str,
    model: str | None,
    prompts: Path | None,
    sources: Path | None,
    pictures: Path | None,
    how: Drawing,
) -> None:
    """Draw what a benchmark's own scorer needs of the model, in one folder."""
    import sys
    from dataclasses import asdict

    from imagerl.models.families import fingerprint, load_prompts
    from imagerl.rl.engine.checkpoint import package_versions
    from imagerl.rl.evaluation.layouts import draw, entries_of, prompts_sha256, samples_of
    from imagerl.rl.types import Prompt

    if prompts is None or pictures is None:
        raise ImageRLError(
            "--layout needs --prompts, the benchmark's own file or folder, and --pictures, where to draw"
        )
    entries = entries_of(layout, prompts, sources)
    samples = samples_of(layout, how.samples)
    model = model or ("tiny_edit" if layout == "imgedit" else "tiny")
    load_prompts(model, how.family).require(
        Prompt(entry.index, entry.text, {"reference": entry.source}, f"{prompts}, {entry.name}")
        for entry in entries
    )
    rollout = how.rollout(model)
    facts = {
        "layout": layout,
        "prompts": len(entries),
        "prompts_sha256": prompts_sha256(entries),
        "model": model,
        "model_sha256": fingerprint(model),
        "seed": how.seed,
        "samples": samples,
        **asdict(rollout.sampling),
        "versions": package_versions(),
    }
    for done in draw(layout, entries, rollout, pictures, samples, how.batch_size, facts):
        print(f"\r{done} of {len(entries)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{pictures}: {len(entries)} prompts, {samples} pictures each")
