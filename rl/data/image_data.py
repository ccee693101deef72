"""An endless, shuffled, weighted stream of training samples, repeatable from any point.

Draw number d names a source and the next sample of that source's epoch; both are pure functions of the seed. With R
processes, draw d belongs to process d mod R, so no sample is drawn twice and one process or many see the same
samples. A bad sample is counted and its process takes its next draw instead.

A source is shuffled by shards, then within groups of `open_shards` of them: a shuffle buffer that never has to be
refilled, so that a stream is resumed by its numbers alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from imagerl.rl.data.image_files import BadSample, Entry, Example
from imagerl.rl.data.image_sources import Shard
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.errors import ImageRLError

JUDGED_FROM = 20  # samples seen before their share of bad ones can stop a run

Load = Callable[[Entry], Example]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample and the number of its draw, which seeds whatever is random about its use."""

    number: int
    example: Example


class ShuffledSource:
    """One source, epoch after epoch. Its place is (epoch, group, position): the next entry to give."""

    def __init__(self, name: str, shards: Sequence[Shard], seed: int, number: int, open_shards: int) -> None:
        self.name = name
        self.shards = shards
        self.key = ("image data", seed, number)
        self.open_shards = open_shards
        self.epoch = self.group = self.position = 0
        self._entries: list[Entry] | None = None
        self._files = 0

    def next(self) -> Entry:
        """Return the next entry. Raises ImageRLError when a whole epoch holds nothing, not even bad samples."""
        empty = 0
        while self.position >= len(self.entries):
            empty += not self.entries
            if empty > self.groups:
                raise ImageRLError(f"data: {self.name} holds no samples; check its path and file names")
            self.epoch, self.group = divmod(self.epoch * self.groups + self.group + 1, self.groups)
            self.position = 0
            self._entries = None
        self.position += 1
        return self.entries[self.position - 1]

    @property
    def groups(self) -> int:
        return -(-len(self.shards) // self.open_shards)

    @property
    def entries(self) -> list[Entry]:
        """The present group in its order."""
        if self._entries is None:
            order = list(range(len(self.shards)))
            random.Random(derive_seed(*self.key, "shards", self.epoch)).shuffle(order)
            start = self.group * self.open_shards
            chosen = order[start : start + self.open_shards]
            self._entries = [entry for index in chosen for entry in self.shards[index].entries()]
            # Names, not contents: reading a terabyte to see whether it changed would take longer than to train on it.
            shards = [shard.path for shard in self.shards]
            self._files = derive_seed(*shards, *(entry.key for entry in self._entries))
            random.Random(derive_seed(*self.key, "entries", self.epoch, self.group)).shuffle(self._entries)
        return self._entries

    @property
    def place(self) -> dict[str, int]:
        """The place, with a fingerprint of the shards and of the samples in the present group that shows any change."""
        self.entries  # noqa: B018  lists the group where that is still to be done
        return {"epoch": self.epoch, "group": self.group, "position": self.position, "files": self._files}

    def go_to(self, place: Mapping[str, int]) -> None:
        """Go to a `place`. Raises ImageRLError when the files are no longer those that it was made from."""
        # The place alone: the order of a group follows from the seed, so nothing else was kept.
        self.epoch, self.group, self.position = place["epoch"], place["group"], place["position"]
        self._entries = None
        if self.group >= self.groups or self.place != dict(place):
            raise ImageRLError(
                f"data: the files of {self.name} are not those of the checkpoint; put them back, or start anew in "
                "another run.output_dir"
            )


@dataclass(slots=True)
class Counts:
    """The samples that a process has seen so far."""

    seen: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)  # reason -> the first sample

    def add(self, entry: Entry, bad: BadSample) -> None:
        """Count one more bad sample."""
        self.bad[bad.reason] += 1
        self.example.setdefault(bad.reason, f"{entry.key} ({bad.detail})" if bad.detail else entry.key)

    def refuse(self, limit: float) -> None:
        """Raise ImageRLError with the reasons when more than the share `limit` is bad."""
        total = self.bad.total()
        if self.seen < JUDGED_FROM or total <= limit * self.seen:
            return
        reasons = [
            f"{reason} {count}" + (f" such as {self.example[reason]}" if reason in self.example else "")
            for reason, count in self.bad.most_common()
        ]
        raise ImageRLError(
            f"{total} of {self.seen} samples are bad (data.max_bad_share is {limit:g}): {', '.join(reasons)}"
        )


class ImageStream:
    """The samples of one process out of `world_size`. Pictures are read ahead by threads; `state` counts only
    what `take` has given."""

    def __init__(
        self,
        sources: Sequence[ShuffledSource],
        weights: Sequence[float],
        seed: int,
        load: Load,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        ahead: int = 0,
        max_bad_share: float = 0.1,
        states: Sequence[Mapping[str, object]] | None = None,
    ) -> None:
        """Resume from `states`, those of all processes at a checkpoint.

        Raises:
            ImageRLError: the files are no longer those of the checkpoint.
        """
        self.sources = sources
        self.weights = weights
        self.seed = seed
        self.load = load
        self.rank, self.world_size = rank, world_size
        self.ahead = ahead
        self.max_bad_share = max_bad_share
        self.counts = Counts()
        self._draws = 0  # made or passed over, by all processes
        if states:
            self._restore(states)
        self._places = [source.place for source in sources]
        self._taken = self._draws
        self._pool = ThreadPoolExecutor(workers, "pictures") if workers else None
        self._queue: deque[tuple[Entry, Future[Example] | None, int, list[dict[str, int]]]] = deque()

    def take(self, count: int) -> list[Drawn]:
        """Return the next `count` good samples.

        Raises:
            ImageRLError: too many are bad, or a source is empty.
        """
        taken: list[Drawn] = []
        while len(taken) < count:
            while len(self._queue) < max(1, self.ahead):
                self._queue.append(self._draw())
            # What is read ahead is not counted: the state is that of the sample handed out.
            entry, future, self._taken, self._places = self._queue.popleft()
            self.counts.seen += 1
            try:
                example = future.result() if future else self.load(entry)
            except BadSample as bad:
                self.counts.add(entry, bad)
                self.counts.refuse(self.max_bad_share)
            else:
                taken.append(Drawn(self._taken - 1, example))
        return taken

    @property
    def epoch(self) -> int:
        """The epoch of the source that is furthest along."""
        return max(place["epoch"] for place in self._places)

    def state(self) -> dict[str, object]:
        """Return plain data from which a stream with the same sources, weights and seed goes on."""
        return {
            "draws": self._taken,
            "sources": self._places,
            "seen": self.counts.seen,
            "bad": dict(self.counts.bad),
        }

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self) -> tuple[Entry, Future[Example] | None, int, list[dict[str, int]]]:
        """Return this process's next draw: entry, its future, the number of draws after it and the sources' places."""
        while True:
            source = self._source(self._draws)
            entry = source.next()
            # Every process walks through all draws, so that all agree on them without a word.
            own = self._draws % self.world_size == self.rank
            self._draws += 1
            if own:
                future = self._pool.submit(self.load, entry) if self._pool else None
                return entry, future, self._draws, [source.place for source in self.sources]

    def _source(self, draw: int) -> ShuffledSource:
        if len(self.sources) == 1:
            return self.sources[0]
        # A generator of its own for each draw, so that a stream begins anywhere without its past.
        return random.Random(derive_seed("mix", self.seed, draw)).choices(self.sources, self.weights)[0]

    def _restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resume; with another number of processes each goes on from the furthest. Only after bad samples, which
        push processes apart, does that pass over some."""
        same = len(states) == self.world_size
        # The furthest: to give a sample twice would be worse than to pass over some.
        state = states[self.rank] if same else max(states, key=lambda one: one["draws"])
        self._draws = state["draws"]
        for source, place in zip(self.sources, state["sources"], strict=True):
            source.go_to(place)
        counted = [state] if same else states if self.rank == 0 else []
        self.counts.seen = sum(one["seen"] for one in counted)
        for one in counted:
            self.counts.bad.update(one["bad"])


def first_examples(sources: Sequence[ShuffledSource], count: int, load: Load) -> tuple[list[Example], Counts]:
    """Read the first `count` good samples in file order, of several sources in turn; fewer when there are no more."""
    counts = Counts()
    examples: list[Example] = []
    listed = [(entry for shard in source.shards for entry in shard.entries()) for source in sources]
    while listed and len(examples) < count:
        entries = listed.pop(0)
        for entry in entries:
            counts.seen += 1
            try:
                examples.append(load(entry))
            except BadSample as bad:
                counts.add(entry, bad)
                continue
            listed.append(entries)
            break
    return examples, counts
