"""A training step the way of the public code, to hold ours against: same model, prompts, rewards and sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Report
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.prompt_sets import load_prompt_set
from imagerl.rl.rollout.engine import to_uint8
from imagerl.rl.types import Prompt, RewardRequest, RewardScores, Rows, repeat

TIMESTEPS = 1000  # SANA counts noise levels from 0 to this
Score = Callable[[RewardRequest], RewardScores]


class ReferenceStep:
    """GRPO's step as the public BLIP3o-NEXT trainer takes it: tokens by transformers' `generate`, the prompt read once
    a sample; hidden states by a second pass; the connector asked anew at every denoising step, for both branches of
    guidance; rewards when all is drawn; log-probs over the whole vocabulary.

    Sizes, temperature, guidance, denoising steps, microbatches and the lack of a KL pass are the recipe's. It has no
    EMA and no credit by regions, which cost next to nothing. `policy` is a `models.blip3o_next.policy.ImagePolicy`,
    whose weights are trained."""

    def __init__(self, policy: Any, recipe: Recipe, score: Score) -> None:
        self.policy, self.recipe, self.score = policy, recipe, score
        self.lm, self.decoder = policy.trainable.lm, policy.decoder
        self.first_id = policy.vocabulary.image_start_token_id
        self.prompts = load_prompt_set(recipe.data.train).prompts
        self.optimizer = torch.optim.AdamW(policy.trainable.parameters(), lr=recipe.optim.lr)
        self.seconds: dict[str, list[float]] = {"rollout": [], "reward_wait": [], "update": []}

    def step(self, step: int) -> None:
        size, group = self.recipe.rollout.prompts_per_step, self.recipe.rollout.group_size
        prompts = [self.prompts[(step * size + i) % len(self.prompts)] for i in range(size)]
        rows = repeat(self.policy.encode(prompts), group)
        times = [time.perf_counter()]
        with torch.no_grad():
            ids = self.generate(rows)
            noise = torch.randn(len(ids), *self.decoder.latent_shape)
            pictures = self.decoder.draw(self.latents(self.hidden_states(rows, ids), noise))
        times.append(time.perf_counter())
        rewards = self.rewards(prompts, group, pictures)
        times.append(time.perf_counter())
        self.update(rows, ids, (rewards - rewards.view(size, group).mean(1).repeat_interleave(group)).float())
        times.append(time.perf_counter())
        for (began, ended), spent in zip(pairwise(times), self.seconds.values(), strict=True):
            spent.append(ended - began)

    def generate(self, rows: Rows) -> Tensor:
        """Draw ids [B, T] of image tokens; no other may be drawn."""
        count = self.policy.num_actions
        vocabulary = torch.arange(self.lm.config.vocab_size)
        columns = self.policy.vocabulary.columns
        other = vocabulary[(vocabulary < columns.start) | (vocabulary >= columns.stop)].tolist()
        drawn = self.lm.generate(
            input_ids=rows["ids"],
            attention_mask=rows["mask"].long(),
            do_sample=True,
            temperature=self.recipe.rollout.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=count,
            min_new_tokens=count,
            suppress_tokens=other,
            pad_token_id=0,
        )
        return drawn[:, -count:]

    def sequences(self, rows: Rows, ids: Tensor) -> dict[str, Tensor]:
        mask = torch.cat([rows["mask"].long(), torch.ones_like(ids)], dim=1)
        return {"input_ids": torch.cat([rows["ids"], ids], dim=1), "attention_mask": mask}

    def hidden_states(self, rows: Rows, ids: Tensor) -> Tensor:
        """Read every sequence once more, for hidden states [B, T + 1, D] of `<S0>` and the image tokens."""
        states: Tensor = self.lm.model(**self.sequences(rows, ids)).last_hidden_state
        return states[:, -ids.shape[1] - 1 :]

    def latents(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Integrate the flow from noise x [B, C, h, w] to latents, guided, by the library's own forward pass."""
        settings = self.recipe.rollout
        both = torch.cat([torch.zeros_like(hidden), hidden])
        for sigma, following in pairwise(self.decoder.sigmas(settings.flow_steps)):
            features = self.decoder.connector(both)
            level = (sigma * TIMESTEPS).expand(len(both))
            free, given = self.decoder.sana(
                torch.cat([x, x]), encoder_hidden_states=features, timestep=level, return_dict=False
            )[0].chunk(2)
            x = x + (following - sigma) * (free + settings.guidance * (given - free))
        return x

    def rewards(self, prompts: Sequence[Prompt], group: int, pictures: Tensor) -> Tensor:
        repeated = [prompt for prompt in prompts for _ in range(group)]
        texts, images = [prompt.text for prompt in repeated], to_uint8(pictures)
        columns = {name: [prompt.columns[name] for prompt in repeated] for name in repeated[0].columns}
        scores = self.score(RewardRequest(texts, [[] for _ in texts], images, columns, group))
        return torch.from_numpy(scores.totals).view(-1)

    def update(self, rows: Rows, ids: Tensor, advantages: Tensor) -> None:
        """Take one optimizer step on GRPO's loss, every sequence with a prompt of its own."""
        count, size = ids.shape[1], self.recipe.engine.micro_batch_size
        for first in range(0, len(ids), size):
            part = slice(first, first + size)
            logits = self.lm(
                **self.sequences({name: row[part] for name, row in rows.items()}, ids[part])
            ).logits[:, -count - 1 : -1]
            logprobs = (logits.float() / self.recipe.rollout.temperature).log_softmax(-1)
            chosen = logprobs.gather(-1, ids[part, :, None])[..., 0]
            ratio = (chosen - chosen.detach()).exp()  # on policy: the clip has nothing to do
            loss = -(ratio * advantages[part, None]).mean() * len(ids[part]) / len(ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.trainable.parameters(), self.recipe.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def compared(theirs: ReferenceStep, ours: Callable[[], Report], steps: int) -> Report:
    """Time half of the reference's steps, all of ours, and the other half, so that a machine that slows down slows
    both; the first of each half warms up. `ours` returns what `measuring.bench_step` does."""
    halves: list[dict[str, float]] = []

    def half() -> None:
        start = len(theirs.seconds["rollout"]) + 1
        for step in range(steps // 2 + 1):
            theirs.step(step)
        halves.extend(
            {name: values[i] for name, values in theirs.seconds.items()}
            for i in range(start, start + steps // 2)
        )

    half()
    own = ours()
    half()
    report = {
        "ratio/step_over_reference": statistics.median(sum(row.values()) for row in halves)
        / own["time/step_s"]
    }
    for phase in theirs.seconds:
        median = statistics.median(row[phase] for row in halves)
        report[f"time/reference/{phase}_s"], report[f"time/{phase}_s"] = median, own[f"time/{phase}_s"]
    return report
