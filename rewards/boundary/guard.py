"""The boundary to users' code: whatever a reward does or returns becomes numbers, and one line where it failed.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`)."""

from __future__ import annotations

import os
import random
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from imagerl.rewards.boundary.wire import Reply
from imagerl.rl.errors import ImageRLError, one_line

LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
# Those that a reward may handle for a while, for a time limit of its own for example.
SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")
LONGEST_LINE = 1000  # characters of a message that ends the run
LONGEST_REASON = 400
OUTPUT_FIELDS = ("rewards", "breakdown", "reason", "regions")
MOST_REGIONS = 256  # of a picture


class Failure(Exception):
    """Users' code raised. The message says what in one line."""


class Unusable(Failure):
    """Users' code returned something unusable; the same call would return it again."""


# ---- words ---------------------------------------------------------------------------------------------------


def text_of(value: object, most: int = 200, to_text: Callable[[object], str] = str) -> str:
    """Write a value as one line that can be written anywhere: printable, without lone surrogates, at most
    `most` characters. Never raises, whatever the value's own methods do."""
    try:
        plain = isinstance(value, str) and to_text is str
        text = str.__str__(value if plain else to_text(value))  # an exact str, also from a subclass
    except BaseException:
        text = f"<{_kind(value)} without a text>"
    return one_line(text[: 4 * most], most)


def _kind(value: object) -> str:
    try:
        return str.__str__(type(value).__name__)
    except BaseException:  # a metaclass may do anything
        return "object"


def error_line(error: BaseException) -> str:
    """Write "ValueError: too red (my_reward.py:7)": the error, and the last line of a user's file that led to it: where
    a library raised it, such as <frozen os>:679, tells nobody what to mend. Never raises."""
    text = text_of(error)
    try:
        frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
        file, line = ([at for at in frames if not at[0].startswith(LIBRARIES)] or frames)[-1]
        place = f" ({Path(file).name}:{line})"
    except BaseException:
        place = ""
    return text_of(f"{_kind(error)}{': ' if text else ''}{text}{place}", LONGEST_REASON)


# ---- what users' code may change of the process --------------------------------------------------------------

Switch = tuple[str, Callable[[], Any], Callable[[Any], Any]]

TORCH_SWITCHES = (
    ("get_default_dtype", "set_default_dtype"),
    ("is_grad_enabled", "set_grad_enabled"),
    ("get_num_threads", "set_num_threads"),
    ("get_float32_matmul_precision", "set_float32_matmul_precision"),
    ("get_deterministic_debug_mode", "set_deterministic_debug_mode"),
    ("is_anomaly_enabled", "set_anomaly_enabled"),
    ("get_rng_state", "set_rng_state"),
)


def _switches() -> Iterator[Switch]:
    """Yield state of the process that the trainer's results or files depend on: name, how it is read, how it is set."""
    yield "folder", os.getcwd, os.chdir
    yield "environment", lambda: dict(os.environ), _set_environment
    yield "random", random.getstate, random.setstate
    yield "warnings", lambda: list(warnings.filters), _set_filters
    yield "recursion", sys.getrecursionlimit, sys.setrecursionlimit
    yield from _attributes(sys, "stdout", "stderr")
    numpy: Any = sys.modules.get("numpy")
    torch: Any = sys.modules.get("torch")
    if hasattr(numpy, "seterr"):
        yield "numpy errors", numpy.geterr, lambda kept: numpy.seterr(**kept)
        yield "numpy random", numpy.random.get_state, numpy.random.set_state
    if not hasattr(torch, "set_rng_state"):  # absent, or still being imported
        return
    for getter, setter in TORCH_SWITCHES:
        if hasattr(torch, getter):
            yield setter, getattr(torch, getter), getattr(torch, setter)
    if hasattr(torch, "get_default_device"):
        yield (
            "device",
            torch.get_default_device,
            lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        )
    if torch.cuda.is_initialized():
        yield "cuda random", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield from _attributes(torch.backends.cudnn, "benchmark", "deterministic", "allow_tf32")


def _attributes(owner: object, *names: str) -> Iterator[Switch]:
    for name in names:
        yield name, partial(getattr, owner, name), partial(setattr, owner, name)


def _set_environment(kept: Mapping[str, str]) -> None:
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    os.environ.update(kept)


def _set_filters(kept: Sequence[object]) -> None:
    warnings.resetwarnings()  # which also makes every module look at the filters again
    warnings.filters[:] = kept  # type: ignore[index]


def _state() -> dict[str, Any]:
    found = {}
    for name, read, _ in _switches():
        with suppress(OSError):  # the working folder may be gone
            found[name] = read()
    return found


def _switch(wanted: Mapping[str, object], present: Mapping[str, object]) -> None:
    """Set what differs. Whatever cannot be set, such as a folder that is gone, stays as it is."""
    for name, _, write in _switches():
        if name in wanted and not _same(wanted[name], present.get(name)):
            with suppress(Exception):
                write(wanted[name])


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays; setting them costs less than comparing
        return False


# What users' code set; None for a variable that it removed.
_theirs: dict[str, Any] = {}
_their_variables: dict[str, str | None] = {}


@contextmanager
def users_code() -> Iterator[None]:
    """Let users' code run inside. Afterwards folder, environment, random numbers, torch's defaults, signal handlers
    and the like are as before; what users' code set is kept for the next time that it runs.

    Raises Failure for whatever it raises, SystemExit and KeyboardInterrupt included, and ImageRLError for an error of
    that name, which says that the user must mend something. A real signal passes through."""
    ours = _state()
    variables = {**ours["environment"], **_their_variables}
    variables = {name: value for name, value in variables.items() if value is not None}
    entered = {**ours, **_theirs, "environment": variables}
    with _signals() as heard:
        _switch(entered, ours)
        try:
            yield
        except (Failure, ImageRLError):
            raise
        except BaseException as error:
            if heard and not isinstance(error, Exception):
                raise
            if any(
                kind.__name__ == "ImageRLError" for kind in type(error).__mro__
            ):  # another copy of the class
                raise ImageRLError(text_of(error, LONGEST_LINE)) from error
            raise Failure(error_line(error)) from error
        finally:
            left = _state()
            _switch(ours, left)
            found = left.pop("environment")
            changed = [
                name for name in variables.keys() | found.keys() if variables.get(name) != found.get(name)
            ]
            _their_variables.update({name: found.get(name) for name in changed})
            _theirs.update(
                {name: value for name, value in left.items() if not _same(value, entered.get(name))}
            )


@contextmanager
def process_kept() -> Iterator[None]:
    """Inside, our own code may change what `users_code` keeps. Afterwards it is as before, and what users' code has set
    is forgotten."""
    ours = _state()
    try:
        yield
    finally:
        _switch(ours, _state())
        _theirs.clear()
        _their_variables.clear()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Put signal handlers back; yield a list of the interruptions that came from outside."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    timer = signal.getitimer(signal.ITIMER_REAL)

    def listen(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        before[number](number, frame)  # type: ignore[operator, misc]

    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(before[number]):
            signal.signal(number, listen)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if timer == (0.0, 0.0):
            signal.setitimer(signal.ITIMER_REAL, 0)


# ---- what users' code returns --------------------------------------------------------------------------------


def answered(reward: Callable[..., Any], samples: Mapping[str, list[Any]]) -> Reply:
    """Call a reward on `prompts`, `completions`, `images` and columns, one entry a sample. It gets copies, so that
    a reward that changes them does not change them for the next one. Raises Failure and ImageRLError."""
    completions = [list(tokens) for tokens in samples["completions"]]
    given = {name: list(values) for name, values in samples.items()}
    given["completions"] = given["completion_ids"] = completions
    given["images"] = [image.copy() if hasattr(image, "copy") else image for image in samples["images"]]
    with users_code():
        return _read(reward(**given), len(samples["prompts"]))  # methods of its objects are users' code too


def _read(output: object, size: int) -> Reply:
    """Read a reward's output for `size` samples: a list of numbers, a RewardOutput, or a dict with its fields. A
    value that is no finite number is NaN, None says that the reward does not apply. Raises Unusable."""
    if isinstance(output, Mapping):
        if "rewards" not in output or any(name not in OUTPUT_FIELDS for name in output):
            raise Unusable(
                "returned a dict; it must have the keys rewards, breakdown, reason or regions, no others"
            )
        rewards, breakdown, reason, regions = (output.get(name) for name in OUTPUT_FIELDS)
    elif hasattr(output, "rewards"):
        rewards, breakdown, reason, regions = (getattr(output, name, None) for name in OUTPUT_FIELDS)
    else:
        rewards, breakdown, reason, regions = output, None, None, None
    values, problem = _column(rewards, size)
    if breakdown is not None and not isinstance(breakdown, Mapping):
        raise Unusable(f"returned {text_of(_kind(breakdown))} as breakdown; return a dict of lists by name")
    parts: dict[str, list[float | None]] = {}
    for name, entries in (breakdown or {}).items():
        label = text_of(name, 100)
        if label in parts:
            raise Unusable(f"returned two parts called {label!r}")
        parts[label] = _column(entries, size)[0]
    told = problem if reason is None else text_of(reason, LONGEST_REASON) or problem
    return Reply(values, parts, told, _regions(regions, size))


def _regions(entries: Any, size: int) -> list[list[list[float]]]:
    """Read the regions of `size` samples, [] where there are none. Raises Unusable for anything else."""
    told = f"returned regions that are not {size} lists of (value, left, top, right, bottom), {MOST_REGIONS} at most"
    try:
        samples = [list(islice(sample, MOST_REGIONS + 1)) for sample in islice(entries or (), size + 1)]
        found = [[[float(number) for number in region] for region in sample] for sample in samples]
    except (TypeError, ValueError) as error:
        raise Unusable(told) from error
    right = all(len(r) == 5 and all(abs(n) < float("inf") for n in r) for regions in found for r in regions)
    if found and not (right and len(found) == size and max(map(len, found)) <= MOST_REGIONS):
        raise Unusable(told)
    return found


def _column(entries: Any, size: int) -> tuple[list[float | None], str | None]:
    """Return [size] numbers, NaN where there is none and None where it is said not to apply, and the last thing
    wrong with one of them. Raises Unusable."""
    if isinstance(entries, (str, bytes, Mapping, Set)) or not hasattr(entries, "__len__"):
        raise Unusable(f"returned {text_of(_kind(entries))}; return a list with one number per sample")
    found = list(islice(entries, size + 1))  # it may have no end
    if len(found) != size:
        count = len(found) if len(found) < size else f"more than {size}"
        raise Unusable(f"returned {count} values for {size} samples")
    values: list[float | None] = []
    problem = None
    for entry in found:
        try:
            if isinstance(entry, (str, bytes)):
                raise TypeError
            value = None if entry is None else float(entry)
        except Exception:
            value, problem = float("nan"), f"returned {text_of(entry, 60, repr)}, which is not a number"
        else:
            if value is not None and not abs(value) < float("inf"):
                value, problem = float("nan"), f"returned {value}"
        values.append(value)
    return values, problem


def score_samples(reward: Callable[..., object], samples: Mapping[str, list[object]]) -> Reply:
    """Score samples by a reward; see `answered`. Whatever it does wrong becomes missing values with a reason, except an
    ImageRLError, which says that the recipe must be mended. A call that raises is repeated by halves, so that only the
    samples that are at fault are lost: one of them in n costs about 2·log2(n) further calls. A reward that is `grouped`
    compares the samples of a group, which then stay together."""
    size = len(samples["prompts"])
    groups = samples.get("groups") if getattr(reward, "grouped", False) else None
    cuts = [place for place in range(1, size) if groups is None or groups[place] != groups[place - 1]]
    try:
        return answered(reward, samples)
    except Failure as failure:
        if not cuts or isinstance(failure, Unusable):
            return failed(size, str(failure))
    half = cuts[(len(cuts) - 1) // 2]
    halves = (slice(0, half), slice(half, size))
    return join(
        [score_samples(reward, {name: values[h] for name, values in samples.items()}) for h in halves]
    )


def failed(size: int, reason: str) -> Reply:
    """Return a reply without a value for any of `size` samples."""
    return Reply([float("nan")] * size, {}, reason)


def join(replies: Sequence[Reply]) -> Reply:
    """Join replies for consecutive samples; a part that one of them lacks has no value there. The last reason
    stands for all."""
    names = dict.fromkeys(name for reply in replies for name in reply.breakdown)
    return Reply(
        [value for reply in replies for value in reply.rewards],
        {
            name: [v for reply in replies for v in reply.breakdown.get(name, [None] * len(reply.rewards))]
            for name in names
        },
        next((reply.reason for reply in reversed(replies) if reply.reason), None),
        [sample for reply in replies for sample in reply.regions or [[]] * len(reply.rewards)]
        if any(reply.regions for reply in replies)
        else [],
    )
