"""Import functions and classes by path, and check them before they are called.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`)."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from imagerl.rewards.boundary.guard import Failure, users_code
from imagerl.rl.errors import ImageRLError

SAMPLE_NAMES = ("prompts", "completions", "completion_ids", "images")
# Keys of a recipe's entry that are no settings of the reward.
ENTRY_KEYS = ("name", "import_path", "url", "python", "runtime_env", "weight", "gate")


class KeywordReward:
    """Calls a user's function with the keywords it accepts, and with the recipe's settings."""

    def __init__(self, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        parameters = inspect.signature(function).parameters.values()
        self._function = function
        self._settings = dict(settings)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if _is_keyword(p)}

    def __call__(self, **columns: Any) -> Any:
        keywords = {**columns, **self._settings}
        if not self._takes_all:
            keywords = {name: value for name, value in keywords.items() if name in self._names}
        return self._function(**keywords)


@contextmanager
def before_scoring(what: str) -> Iterator[None]:
    """Run users' code before there is anything to score: what it does wrong is an ImageRLError."""
    try:
        with users_code():
            yield
    except Failure as failure:
        raise ImageRLError(f"{what}: {failure}") from failure


def _is_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _needed(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Return the names that the caller must give by keyword."""
    return [p.name for p in parameters if _is_keyword(p) and p.default is p.empty]


def call_parameters(found: Any) -> list[inspect.Parameter]:
    """Return the parameters of the call that scores samples, without `self`."""
    if inspect.isclass(found):
        return list(inspect.signature(_instance_call(found)).parameters.values())[1:]
    return list(inspect.signature(found).parameters.values())


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ImageRLError(f"reward file {path} does not exist; correct its import_path")
    # Imported once, however often it is asked for, unless it changed.
    state = path.stat()
    identity = f"{path} {state.st_mtime_ns} {state.st_size}"
    name = f"reward_file_{path.stem}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImageRLError(f"reward file {path} is not a Python file; correct its import_path")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:  # so that it may import its neighbours; last, to shadow nothing
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def split_target(target: str) -> tuple[str, str]:
    """Return place and attribute of an import path. Raises ImageRLError when it does not look like one."""
    place, _, attribute = target.rpartition(":")
    if not (place and attribute):
        raise ImageRLError(f"reward {target!r} must read file.py:function or package.module:function")
    return place, attribute


def import_target(target: str) -> Any:
    """Return the function or class behind an import path; an ImageRLError says what is wrong with it."""
    place, attribute = split_target(target)
    with before_scoring(f"reward {target!r}: importing {place} failed"):
        try:
            if place.endswith(".py"):
                module = _import_file(Path(place))
            else:
                if str(Path.cwd()) not in sys.path:
                    sys.path.append(str(Path.cwd()))
                module = importlib.import_module(place)
        except SyntaxError as error:
            where = f"{error.filename}, line {error.lineno}"
            raise ImageRLError(f"reward {target!r}: syntax error in {where}: {error.msg}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'no function'}"
        raise ImageRLError(f"reward {target!r}: {place} has no {attribute}; {hint}")
    found = getattr(module, attribute)
    if not callable(found) or (inspect.isclass(found) and _instance_call(found) is None):
        raise ImageRLError(f"reward {target!r}: {attribute} is not a function or a class with __call__")
    return found


def _instance_call(cls: type) -> Any:
    """Return `__call__` as instances of a class see it, or None; `cls.__call__` may be the metaclass's."""
    return next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)


def setting_parameters(label: str, found: Any) -> list[inspect.Parameter]:
    """Return the parameters that a recipe's settings may fill: a class's constructor, or a function.

    Raises ImageRLError for a signature that cannot be read."""
    with before_scoring(f"reward {label!r} has no readable signature; wrap it in a def"):
        call_parameters(found)
        return list(inspect.signature(found).parameters.values())


def check_settings(label: str, found: Any, settings: Mapping[str, Any]) -> None:
    """Raise ImageRLError when a function or class cannot be a reward with these settings."""
    is_class = inspect.isclass(found)
    if inspect.iscoroutinefunction(_instance_call(found) if is_class else found):
        raise ImageRLError(f"reward {label!r} is async; make it an ordinary function")
    takers = setting_parameters(label, found)
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in call_parameters(found)):
        raise ImageRLError(f"reward {label!r} must take keywords; write def {label}(images, **kwargs)")
    names = [p.name for p in takers if _is_keyword(p) and (is_class or p.name not in SAMPLE_NAMES)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takers)
    for name in settings:
        if name in names:
            continue
        key = difflib.get_close_matches(name, ENTRY_KEYS, n=1, cutoff=0.75)
        if takes_all and not key:
            continue
        close = difflib.get_close_matches(name, names, n=1) or key
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'none'}"
        also = f" If not, let its signature name {name}" if takes_all else ""
        raise ImageRLError(f"reward {label!r} has no setting {name!r}; {hint}{also}")
    missing = [name for name in _needed(takers) if is_class and name not in settings]
    if missing:
        raise ImageRLError(f"reward {label!r} needs the setting {missing[0]!r}; add it to its entry")


def needed_columns(found: Any, settings: Mapping[str, Any]) -> list[str]:
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


def construct(label: str, found: Any, settings: Mapping[str, Any]) -> KeywordReward:
    """Make a user's function or class ready to be called. Raises ImageRLError when its constructor fails."""
    if not inspect.isclass(found):
        return KeywordReward(found, settings)
    with before_scoring(f"reward {label!r} could not be constructed"):
        instance: Any = found(**settings)
        return KeywordReward(instance, {})
