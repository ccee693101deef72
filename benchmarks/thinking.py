"""Does thinking before drawing help? `python -m benchmarks.thinking runs/thinking` (docs/algorithms.md).

A model of a tenth of a million parameters is to draw one of two pictures: is the number of ones among eight bits odd
(`parity`, which takes a step a bit), or is the last bit one (`last`, which takes a look)? Two copies of each seed's
model are taught the same prompts and pictures; one of them first writes the bits' running parity, or the last bit. Then
GRPO trains both on as many pictures, rewarded for the right picture alone. Bits are held out from all of it."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import accumulate, product
from operator import xor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import imagerl
from imagerl.models.blip3o_next.ar import TAGS
from imagerl.models.blip3o_next.loading import save_policy
from imagerl.models.common.tokens import pad_left
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.evaluation.stats import crossed_interval, mean_interval, paired_scores, span
from imagerl.rl.files.writing import write_atomic
from tests.micro import MODEL
from tools.tiny.config import StageConfig
from tools.tiny.model import new_policy
from tools.tiny.stages import fit, token_loss

KINDS = ("parity", "last")
BITS, HELDOUT = 8, 64
BATCH = 32
PICTURES = (3, 12)  # the code of all tokens for 0, and for 1
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def thought_of(kind: str, bits: Sequence[int]) -> str:
    """Return what is worth writing down; its last digit is the answer."""
    return "".join(map(str, accumulate(bits, xor) if kind == "parity" else bits[-1:]))


def prompts_of(split: str) -> list[dict[str, str | int]]:
    """List both questions about the bits of a split, with what is to be written and drawn."""
    numbers = list(product((0, 1), repeat=BITS))
    random.Random(derive_seed("thinking")).shuffle(numbers)
    chosen = numbers[:HELDOUT] if split == "heldout" else numbers[HELDOUT:]
    rows: list[dict[str, str | int]] = []
    for bits, kind in product(chosen, KINDS):
        thought = thought_of(kind, bits)
        words = f"{kind} of {''.join(map(str, bits))}"
        rows.append({"prompt": words, "thought": thought, "wanted": PICTURES[int(thought[-1])]})
    return rows


def right(completions: Sequence[Sequence[int]], wanted: Sequence[int], **_: object) -> list[float]:
    """Whether all of a picture is as it should be."""
    return [float(all(t == code for t in tokens)) for tokens, code in zip(completions, wanted, strict=True)]


def teach(out: Path, seed: int, steps: int, thinking: bool) -> None:
    """Write a model folder: fresh weights of a seed after so many steps of BATCH prompts, the same for both copies."""
    rows = prompts_of("train")
    corpus = [str(row["prompt"]) for row in rows]
    torch.manual_seed(seed)
    policy, config = new_policy({**MODEL, "qwen3": {**MODEL["qwen3"], **WIDTH}}, corpus, 384)
    ar, reader = policy.trainable, policy.prompts
    stage = StageConfig(steps=steps, batch_size=BATCH, lr=3e-3, warmup_steps=20, decay_share=0, bf16=False)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = random.Random(derive_seed(seed, "thinking", step)).sample(rows, BATCH)
        thoughts = [reader.plain(str(row["thought"])) if thinking else [] for row in batch]
        prompts = zip(reader.captions([str(row["prompt"]) for row in batch]), thoughts, strict=True)
        ids, mask = pad_left([[*row[:-TAGS], *text, *row[-TAGS:]] for row, text in prompts], reader.pad)
        tokens = torch.tensor([[int(row["wanted"])] * policy.num_actions for row in batch])
        states = ar.sequence_states(ids, mask, tokens)
        image = token_loss(ar, states[:, ids.shape[1] - 1 :], tokens)
        place = torch.arange(ids.shape[1]) - (ids.shape[1] - TAGS)  # 0: the tag that ends a thought
        lengths = torch.tensor([len(text) for text in thoughts])
        text = torch.where((place <= 0) & (place >= -lengths[:, None]), ids, -100)[:, 1:]
        logits = ar.lm.lm_head(states[:, : ids.shape[1] - 1])
        words = F.cross_entropy(logits.flatten(0, 1).float(), text.flatten())
        return image + words, {"image": image.item(), "text": words.item()}

    fit(out.name, ar, loss_of, stage, lambda name, step, seen: print(name, step, seen, flush=True))
    out.mkdir(parents=True)
    save_policy(policy, out, config)


def train(folder: Path, seed: int, taught: int, steps: int, thinking: bool) -> None:
    """Teach a copy, then train it by GRPO."""
    name = f"{'thinking' if thinking else 'direct'}-{seed}"
    if (folder / name / "eval" / "comparison.json").exists():
        return  # done before: more seeds add to it
    teach(folder / f"taught-{name}", seed, taught, thinking)
    rollout = {"prompts_per_step": 8, "group_size": 8, "flow_steps": 1}
    recipe = {
        "run": {"steps": steps, "seed": seed, "output_dir": str(folder / name), "sample_every": 0},
        "model": {"path": str(folder / f"taught-{name}")},
        "data": {split: {"path": str(folder / f"{split}.jsonl")} for split in ("train", "heldout")},
        "rollout": {**rollout, "thought_tokens": BITS + 2 if thinking else 0},
        "rewards": {"workers": 0, "functions": [{"import_path": f"{__file__}:right"}]},
        "optim": {"lr": 5e-4},
        "engine": {"threads": 1, "micro_batch_size": 64},
        "eval": {"size": 2 * HELDOUT, "batch_size": 128},
        "monitors": {"pictures": False},
        "checkpoint": {"every": 0},
    }
    write_atomic(folder / f"{name}.yaml", json.dumps(recipe))
    imagerl.train(folder / f"{name}.yaml")


def scores(run: Path, kind: str, last: bool) -> np.ndarray:
    """Read [P] of a kind's held-out prompts, before or after GRPO."""
    files = sorted((run / "eval").glob("ocr_step_*.json"))
    rows = json.loads(files[-1 if last else 0].read_text())["per_prompt"]
    return np.array([row["right"] for row in rows if row["prompt"].startswith(kind)])


def table(folder: Path, seeds: int) -> str:
    """Write what became of both copies, and the paired difference after GRPO, over seeds and prompts."""
    lines = ["| | direct: taught → GRPO | thinking: taught → GRPO | difference (95 %) |", "|---|---|---|---|"]
    for kind in KINDS:
        cells, after = [], []
        for arm in ("direct", "thinking"):
            runs = [folder / f"{arm}-{seed}" for seed in range(seeds)]
            ends = [np.stack([scores(run, kind, last) for run in runs]) for last in (False, True)]
            cells.append(" → ".join(", ".join(f"{100 * v:.1f}" for v in end.mean(axis=1)) for end in ends))
            after.append(ends[1])
        gaps = paired_scores(after[1], after[0])
        gap = crossed_interval(gaps) if seeds > 1 else mean_interval(gaps[0])
        lines.append(f"| {kind} | {' | '.join(cells)} | {100 * gap.mean:+.1f} ({span(gap, True, True)}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--taught", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    for part in ("train", "heldout"):
        rows_of = [{key: row[key] for key in ("prompt", "wanted")} for row in prompts_of(part)]
        write_atomic(asked.folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows_of))
    for number in range(asked.seeds):
        for think in (False, True):
            train(asked.folder, number, asked.taught, asked.steps, think)
    print(table(asked.folder, asked.seeds))
