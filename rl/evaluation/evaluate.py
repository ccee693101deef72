"""Held-out evaluation: one sample of each prompt with fixed random numbers, scored and summed up."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from imagerl.rl.algorithms.kl import k3
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.stats import TOTAL, Interval, summarise
from imagerl.rl.rollout.engine import RolloutEngine, replayed, reward_request, with_pictures
from imagerl.rl.rollout.scores import component
from imagerl.rl.types import Prompt, RewardScorer, RolloutGroup, Source

T = TypeVar("T")
TRIED = 8  # pictures at most, before an evaluation


@dataclass(slots=True)
class Evaluation:
    """Results of one suite. `per_prompt` rows hold `index`, `prompt`, where several were drawn `sample`, where there
    are rewards their weighted sum `total`, and every metric; NaN where a sample could not be scored."""

    suite: str
    metrics: dict[str, Interval]
    per_prompt: list[dict[str, Any]]
    images: Sequence[np.ndarray]  # N of [H, W, 3] uint8, in the order of `per_prompt`; none where not kept

    def flat(self) -> dict[str, float]:
        """Return the means for metrics.jsonl: `eval/<suite>/<metric>`."""
        return {f"eval/{self.suite}/{name}": interval.mean for name, interval in self.metrics.items()}

    def to_dict(self, **facts: object) -> dict[str, object]:
        """Return the JSON document of an evaluation; see docs/run-folder.md."""
        return {
            "suite": self.suite,
            **facts,
            "n": len({row["index"] for row in self.per_prompt}),
            "metrics": {name: asdict(interval) for name, interval in self.metrics.items()},
            "per_prompt": self.per_prompt,
        }


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Perfect pictures instead of a model's: evaluated, they give the ceiling of every metric."""

    draw: Callable[[Prompt], Image.Image]

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        nothing, size = torch.zeros(group_size, 0), None
        for prompt in map(with_pictures, prompts):
            picture = self.draw(prompt)
            size = size or picture.size
            if picture.size != size:
                raise ImageRLError(
                    f'the picture of "{prompt.text}" is {picture.width}x{picture.height} pixels, others '
                    f"{size[0]}x{size[1]}; give pictures of one size"
                )
            images = np.stack([np.asarray(picture)] * group_size)
            yield [RolloutGroup(prompt, nothing.long(), nothing, nothing.bool(), images)]


class Ranks(Protocol):
    """The processes that share an evaluation: a `rl.engine.engine.Engine`."""

    rank: int
    world_size: int

    def gather_objects(self, value: T) -> list[T]: ...


def try_rewards(
    suite: str, prompts: Sequence[Prompt], rollout: Source, scorer: RewardScorer, success: str = TOTAL
) -> None:
    """Score a picture of each of a few prompts from all over the set, so that a reward that cannot work is found
    before a whole evaluation is drawn for it.

    Raises ImageRLError for the first reward or gold metric that has no value for any of them, and when none of what
    they give is the `success` that a curriculum goes by."""
    # Spread over the set: its first prompts may be the ones that a reward happens to understand.
    few = prompts[:: -(-len(prompts) // TRIED)]
    groups = [group for part in rollout.generate(few, 1, f"eval {suite}") for group in part]
    scores = scorer.collect(scorer.submit(reward_request(groups), with_gold=True))
    for label, lost in scores.failures.items():
        if lost == len(few):
            raise ImageRLError(
                f"reward {label!r} has no value for {lost} of {lost} pictures that were tried first: "
                f"{scores.reasons[label]}; mend it (imagerl reward check shows more)"
            )
    component(scores, success)


def evaluate(
    suite: str,
    prompts: Sequence[Prompt],
    rollout: Source,
    scorer: RewardScorer,
    batch_size: int,
    *,
    samples: int = 1,
    each: Callable[[RolloutGroup], None] | None = None,
    shown: int | None = None,
    ranks: Ranks | None = None,
    beside: Callable[[Sequence[RolloutGroup]], Mapping[str, Sequence[float]]] | None = None,
) -> Evaluation:
    """Draw `samples` pictures of each prompt, `batch_size` at a time, and score them.

    Random numbers depend on the rollout's seed, the prompt and the sample alone, so that two policies are compared
    on the same draws. `total` is the weighted sum of the rewards; each of them and of the gold metrics is reported
    under its own name, and a part of the one that is named like the suite, `<suite>/<part>`, as `<part>`. `each` gets
    every group as it is drawn, for pictures that should be kept; `images` is then left empty, else it holds those of
    the first `shown` prompts, or of all. `beside` measures more than pictures show: a value of each sample in the
    order of the groups, by name.

    `ranks` take the batches in turn, and all of them return the whole. Batches are the same however many ranks there
    are: what a sample is drawn together with decides how it is rounded. Collective.

    Raises ImageRLError for a reward whose name is that of another field."""
    rank, count = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    chunk = max(1, batch_size // samples)
    own = [place for place in range(len(prompts)) if place // chunk % count == rank]
    images: dict[int, np.ndarray] = {}  # by place, as the rows
    rows: dict[int, list[dict[str, object]]] = {}
    tickets, places = [], defaultdict[int, deque[int]](deque)
    for place in own:
        places[prompts[place].index].append(place)
    for groups in rollout.generate([prompts[place] for place in own], samples, f"eval {suite}", chunk, chunk):
        # Prompts of one size are drawn together, so groups come in another order where there are several.
        placed = [(places[group.prompt.index].popleft(), group.prompt) for group in groups]
        ticket = scorer.submit(reward_request(groups), with_gold=True)
        tickets.append((placed, ticket, beside(groups) if beside else {}))
        for (place, _), group in zip(placed, groups, strict=True):
            if each is not None:
                each(group)
            elif shown is None or place < shown:
                images[place] = group.images
    for placed, ticket, further in tickets:
        # Collected only now: rewards work on one batch while the next one is drawn.
        scores = scorer.collect(ticket)
        names = _metric_names(scores.components, suite, further)
        for row, ((place, prompt), sample) in enumerate(product(placed, range(samples))):
            fields = {"index": prompt.index, "prompt": prompt.text}
            if samples > 1:
                fields["sample"] = sample
            fields[TOTAL] = float(scores.totals[row])
            values = {names[component]: float(v[row]) for component, v in scores.components.items()}
            values |= {name: float(v[row]) for name, v in further.items()}
            rows.setdefault(place, []).append(fields | values)
    for others_rows, others_images in ranks.gather_objects((rows, images)) if ranks else ():
        rows |= others_rows
        images |= others_images
    ordered = [row for place in sorted(rows) for row in rows[place]]
    pictures = [picture for place in sorted(images) for picture in images[place]]
    return Evaluation(suite, summarise(ordered), ordered, pictures)


@torch.no_grad()
def kl_to_reference(rollout: RolloutEngine, groups: Sequence[RolloutGroup]) -> list[float]:
    """Estimate, for every sample that a rollout drew, the KL to its policy's frozen reference: the mean of k3 over its
    tokens, in nats a token."""
    rows, tokens, mask, logprobs = replayed(rollout.policy, groups)
    device = rollout.policy.device
    with rollout.autocast():
        reference = rollout.policy.reference_scores(rows, tokens.to(device), rollout.sampling)
    differences = k3(logprobs.to(device), reference.logprobs).where(mask.to(device), 0)
    return (differences.sum(1).cpu() / mask.sum(1).cpu()).tolist()


def _metric_names(components: Iterable[str], suite: str, further: Iterable[str] = ()) -> dict[str, str]:
    """Return the name of each component in a row, no two alike and none of `further`."""
    names: dict[str, str] = {}
    taken = {"index", "prompt", "sample", TOTAL, *further}
    for part in components:
        name = part.removeprefix(f"{suite}/")
        if name in taken or name in names.values():
            raise ImageRLError(
                f"reward {part!r}: an evaluation of {suite!r} has another field {name!r}; rename the reward"
            )
        names[part] = name
    return names
