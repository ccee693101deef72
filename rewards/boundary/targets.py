"""Import rewards by path, and check them before they are called.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagerl.rewards.boundary.guard import Failure, users_code
from imagerl.rl.errors import ImageRLError, hint, nearest
from imagerl.rl.files.importing import import_object

RUN_NAMES = ("groups", "progress", "policy")  # what a run knows beside the samples, for rewards that name it
SAMPLE_NAMES = ("prompts", "completions", "completion_ids", "images", *RUN_NAMES)
# Keys of a recipe's entry that are no settings of the reward.
ENTRY_KEYS = ("name", "import_path", "url", "python", "runtime_env", "weight", "gate", "half", "num_gpus")


class KeywordReward:
    """Calls a user's function with the keywords it accepts, and with the recipe's settings. What a run knows beside the
    samples it gets by naming it: `groups` (the number of each sample's group, and then never a torn group), `progress`
    (one number) and `policy`."""

    def __init__(self, function: Callable[..., object], settings: Mapping[str, object]) -> None:
        parameters = inspect.signature(function).parameters.values()
        self._function = function
        self._settings = dict(settings)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if is_keyword(p)}
        self.grouped = "groups" in self._names

    def __call__(self, **columns: list[Any]) -> Any:
        if "progress" in columns:  # it came as one number a sample
            columns["progress"] = columns["progress"][0]
        keywords = {**columns, **self._settings}
        named = self._names | (keywords.keys() - RUN_NAMES if self._takes_all else set())
        return self._function(**{name: value for name, value in keywords.items() if name in named})


@contextmanager
def before_scoring(what: str) -> Iterator[None]:
    """Run users' code before there is anything to score: what it does wrong is an ImageRLError."""
    try:
        with users_code():
            yield
    except Failure as failure:
        raise ImageRLError(f"{what}: {failure}") from failure


def is_keyword(parameter: inspect.Parameter) -> bool:
    """Tell whether an argument can be given by its name."""
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _needed(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Return the names that the caller must give by keyword."""
    return [p.name for p in parameters if is_keyword(p) and p.default is p.empty]


def call_parameters(found: Callable[..., object]) -> list[inspect.Parameter]:
    """Return the parameters of the call that scores samples, without `self`."""
    if inspect.isclass(found):
        return list(inspect.signature(_instance_call(found)).parameters.values())[1:]
    return list(inspect.signature(found).parameters.values())


def import_target(target: str) -> Any:
    """Return the function or class behind an import path; an ImageRLError says what is wrong with it."""
    with before_scoring(f"reward {target!r}: importing {target.rpartition(':')[0]} failed"):
        found = import_object(target, "reward")
    if not callable(found) or (inspect.isclass(found) and _instance_call(found) is None):
        raise ImageRLError(f"reward {target!r} is not a function or a class with __call__")
    return found


def _instance_call(cls: type) -> Any:
    """Return `__call__` as instances of a class see it, or None; `cls.__call__` may be the metaclass's."""
    return next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)


def setting_parameters(label: str, found: Callable[..., object]) -> list[inspect.Parameter]:
    """Return the parameters that a recipe's settings may fill: a class's constructor, or a function.

    Raises ImageRLError for a signature that cannot be read."""
    with before_scoring(f"reward {label!r} has no readable signature; wrap it in a def"):
        call_parameters(found)
        return list(inspect.signature(found).parameters.values())


def check_settings(label: str, found: Callable[..., object], settings: Mapping[str, object]) -> None:
    """Raise ImageRLError when a function or class cannot be a reward with these settings."""
    is_class = inspect.isclass(found)
    if inspect.iscoroutinefunction(_instance_call(found) if inspect.isclass(found) else found):
        raise ImageRLError(f"reward {label!r} is async; make it an ordinary function")
    takers = setting_parameters(label, found)
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in call_parameters(found)):
        raise ImageRLError(f"reward {label!r} must take keywords; write def {label}(images, **kwargs)")
    names = [p.name for p in takers if is_keyword(p) and (is_class or p.name not in SAMPLE_NAMES)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takers)
    for name in settings:
        if name in names:
            continue
        key = nearest(name, ENTRY_KEYS)
        if takes_all and not key:
            continue
        meant = hint(name, names) if key is None or nearest(name, names) else f"did you mean {key}?"
        also = f" If not, let its signature name {name}" if takes_all else ""
        raise ImageRLError(f"reward {label!r} has no setting {name!r}; {meant}{also}")
    missing = [name for name in _needed(takers) if is_class and name not in settings]
    if missing:
        raise ImageRLError(f"reward {label!r} needs the setting {missing[0]!r}; add it to its entry")


def needed_columns(found: Callable[..., object], settings: Mapping[str, object]) -> list[str]:
    """Return the columns of the prompt set without which a reward cannot be called."""
    given = SAMPLE_NAMES if inspect.isclass(found) else (*SAMPLE_NAMES, *settings)
    return [name for name in _needed(call_parameters(found)) if name not in given]


def check_columns(label: str, needed: Iterable[str], columns: Iterable[str]) -> None:
    """Raise ImageRLError when a prompt set with these columns lacks one."""
    given = [*SAMPLE_NAMES, *columns]
    for name in needed:
        if name not in given:
            raise ImageRLError(
                f"reward {label!r} asks for {name!r}, which is no column of the prompt set; "
                f"it gets: {', '.join(given)}"
            )


def construct(
    label: str, found: Callable[..., object], settings: Mapping[str, object], policy: object = None
) -> KeywordReward:
    """Make a user's function or class ready to be called. Raises ImageRLError when its constructor fails, and when it
    asks for a policy and there is none here."""
    asks = any(parameter.name == "policy" for parameter in call_parameters(found))
    if asks and policy is None:
        raise ImageRLError(
            f"reward {label!r} asks for the policy, which only rewards in the training process get: set "
            "rewards.workers=0, and leave out python"
        )
    given = {"policy": policy} if asks else {}
    if not inspect.isclass(found):
        return KeywordReward(found, {**settings, **given})
    with before_scoring(f"reward {label!r} could not be constructed"):
        instance: Any = found(**settings)
        return KeywordReward(instance, given)
