"""The Ray actor that draws: a process, on this machine or another, that holds the whole generator.

It is handed pieces of work: a few prompts and the weights to draw by. Pictures go from here to the rewards; tokens,
log-probs and statistics of pictures go back. Weights lie in Ray's object store, where an actor reads those of a version
that it does not hold. (`ray.util.collective` cannot bring them: it admits actors only, which a trainer is not; its GLOO
takes the process group that a trainer under torchrun has, its NCCL needs CuPy.)"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.environment import leave_to_the_recipe
from imagerl.rl.rollout.engine import RolloutEngine, reward_request
from imagerl.rl.rollout.picture_stats import group_stats
from imagerl.rl.types import (
    FlowSampling,
    FlowTrajectory,
    Prompt,
    RewardRequest,
    RolloutGroup,
    SamplingParams,
    Thoughts,
)

BUCKET_BYTES = 2**28  # of weights in one object
Build = Callable[[], tuple[RolloutEngine, nn.Module]]  # what draws, and the module whose weights train


# ---- weights -----------------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Some of the weights, in Ray's object store."""

    arrays: object  # reference to {name: array}
    checksum: int


class Weights(NamedTuple):
    """The trained weights before step `version`."""

    version: int
    buckets: list[Bucket]


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Return CRC-32 over names and contents."""
    crc = 0
    for name, array in arrays.items():
        crc = zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(name.encode(), crc))
    return crc


def store_weights(version: int, weights: Mapping[str, Tensor]) -> Weights:
    """Put float32 weights on the CPU into Ray's object store, in buckets."""
    import ray

    parts: list[dict[str, np.ndarray]] = [{}]
    held = 0
    for name, tensor in weights.items():
        if held and held + tensor.nbytes > BUCKET_BYTES:
            parts.append({})
            held = 0
        parts[-1][name] = tensor.numpy()
        held += tensor.nbytes
    with ThreadPoolExecutor() as pool:  # CRC-32 leaves the interpreter to others
        sums = list(pool.map(checksum, parts))
    return Weights(version, [Bucket(ray.put(part), own) for part, own in zip(parts, sums, strict=True)])


def load_weights(weights: Weights, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give parameters the stored weights. Raises ImageRLError when some are damaged or missing."""
    import ray

    loaded = set()
    for bucket in weights.buckets:
        arrays = ray.get(bucket.arrays)
        if checksum(arrays) != bucket.checksum:
            raise ImageRLError(f"the weights of version {weights.version} arrived damaged at a rollout actor")
        for name, array in arrays.items():
            parameters[name].data = torch.tensor(array).to(parameters[name].device)
            loaded.add(name)
    if missing := parameters.keys() - loaded:
        raise ImageRLError(f"the weights of version {weights.version} lack {sorted(missing)[0]}")


# ---- in the actor ------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """How pictures are drawn that are judged: they come back whole, and are scored where they are judged."""

    sampling: SamplingParams
    seed: int
    occasion: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Prompts of one process, to be drawn together."""

    rank: int
    step: int
    steps: int  # of training, in all
    prompts: Sequence[Prompt]
    group_size: int
    decode_chunk: int | None
    flow: FlowSampling | None
    looks: bool  # whether statistics of the pictures are wanted
    parts: int  # that a request is cut into
    weights: Weights
    judged: Judged | None = None  # None: for training

    @property
    def occasion(self) -> str:
        """What it is drawn for, in words."""
        return self.judged.occasion if self.judged else f"step {self.step + 1}"


class Head(NamedTuple):
    """What an actor says of some groups, once the parts of their reward request are handed over."""

    version: int  # of the weights that drew
    groups: list[RolloutGroup]  # on the CPU, mostly without pictures, prompts known by their index
    sizes: list[int]  # pictures of each part
    group_size: int  # pictures of a group


class RolloutActor:
    """Runs in a Ray process: holds the generator and draws one piece at a time."""

    def __init__(self, folder: str) -> None:
        leave_to_the_recipe()
        if os.path.isdir(folder):
            os.chdir(folder)
        self._version = -1

    def load(self, build: Build) -> str | None:
        """Load the generator; return None, or what the user has to mend."""
        try:
            self._rollout, module = build()
        except ImageRLError as error:
            return str(error)
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return None

    def draw(self, piece: Piece) -> Iterator[int | RewardRequest | Head | str]:
        """Yield, for the groups of `decode_chunk` prompts at a time, the number of parts of their request, the parts,
        and their `Head`, which proves that the parts are whole. A string is what the user has to mend."""
        try:
            if self._version != piece.weights.version:
                self._version = -1  # until all are there
                load_weights(piece.weights, self._parameters)
                self._rollout.policy.refresh_sampler()
                self._version = piece.weights.version
            rollout, occasion = self._rollout, piece.judged.occasion if piece.judged else piece.step
            if piece.judged:
                policy, autocast = rollout.policy, rollout.autocast
                rollout = RolloutEngine(policy, piece.judged.sampling, piece.judged.seed, autocast)
            for groups in rollout.generate(
                piece.prompts, piece.group_size, occasion, piece.decode_chunk, flow=piece.flow
            ):
                parts = [] if piece.judged else cut(groups, piece.parts)
                yield len(parts)
                for part in parts:
                    yield reward_request(part, piece.step, piece.steps)
                size = len(groups[0].images)
                sizes = [len(part) * size for part in parts]
                shown = [told(group, piece.looks, piece.judged is not None) for group in groups]
                yield Head(self._version, shown, sizes, size)
        except ImageRLError as error:
            yield str(error)


def cut(groups: Sequence[RolloutGroup], parts: int) -> list[Sequence[RolloutGroup]]:
    """Cut groups into at most so many parts of nearly equal size, in order."""
    parts = max(1, min(parts, len(groups)))
    bounds = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[first:last] for first, last in pairwise(bounds)]


def told(group: RolloutGroup, looks: bool, pictures: bool) -> RolloutGroup:
    """Return a group as the trainer is told it: with its pictures, or with their statistics, where wanted."""
    return replace(
        moved(group, torch.device("cpu")),
        prompt=Prompt(group.prompt.index, group.prompt.text),
        images=group.images if pictures else group.images[:0],
        looks=group_stats(group) if looks else {},
    )


def moved(group: RolloutGroup, device: torch.device) -> RolloutGroup:
    """Copy a group's tensors to a device: of views, which are sent with all they are views of, only what they show."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    flow = group.flow
    if flow is not None:
        condition = {name: copied(rows) for name, rows in flow.condition.items()}
        flow = FlowTrajectory(condition, copied(flow.latents), copied(flow.rollout_logprobs))
    thoughts = group.thoughts
    if thoughts is not None:
        thoughts = Thoughts(*(copied(getattr(thoughts, name)) for name in Thoughts.__slots__))
    return replace(
        group,
        tokens=copied(group.tokens),
        rollout_logprobs=copied(group.rollout_logprobs),
        action_mask=copied(group.action_mask),
        flow=flow,
        thoughts=thoughts,
    )
