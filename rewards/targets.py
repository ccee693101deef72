"""Functions and classes by import path, and what may be said of them before they are called.

Standard library only: this file also runs in interpreters that have none of our dependencies (`rewards.child`)."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rl.errors import ImageRLError

LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
SAMPLE_NAMES = ("prompts", "completions", "completion_ids", "images")


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


def one_line(error: BaseException) -> str:
    """ "ValueError: too red (my_reward.py:7)": the error, and the last line of a user's file that led to it: where a
    library raised it, such as <frozen os>:679, tells nobody what to mend."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
    text = " ".join(str(error).split())[:200]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _is_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _needed(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Names that the caller must give by keyword."""
    return [p.name for p in parameters if _is_keyword(p) and p.default is p.empty]


def call_parameters(found: Any) -> list[inspect.Parameter]:
    """Parameters of the call that scores samples, without `self`."""
    if inspect.isclass(found):
        return list(inspect.signature(_instance_call(found)).parameters.values())[1:]
    return list(inspect.signature(found).parameters.values())


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ImageRLError(f"reward file {path} does not exist; correct its import_path")
    name = f"reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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
    """Place and attribute of an import path. Raises ImageRLError when it does not look like one."""
    place, _, attribute = target.rpartition(":")
    if not (place and attribute):
        raise ImageRLError(f"reward {target!r} must read file.py:function or package.module:function")
    return place, attribute


def import_target(target: str) -> Any:
    """The function or class behind an import path; an ImageRLError says what is wrong with it."""
    place, attribute = split_target(target)
    try:
        if place.endswith(".py"):
            module = _import_file(Path(place))
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(place)
    except ImageRLError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ImageRLError(f"reward {target!r}: syntax error in {where}: {error.msg}") from error
    except Exception as error:
        raise ImageRLError(f"reward {target!r}: importing {place} failed: {one_line(error)}") from error
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
    """`__call__` as instances of a class see it, or None; `cls.__call__` may be the metaclass's."""
    return next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)


def setting_parameters(label: str, found: Any) -> list[inspect.Parameter]:
    """Parameters that a recipe's settings may fill: a class's constructor, or a function.

    Raises ImageRLError for a signature that cannot be read."""
    try:
        call_parameters(found)
        return list(inspect.signature(found).parameters.values())
    except ValueError as error:
        raise ImageRLError(f"reward {label!r} has no readable signature; wrap it in a def") from error


def check_settings(label: str, found: Any, settings: Mapping[str, Any]) -> None:
    """Raises ImageRLError when a function or class cannot be a reward with these settings."""
    is_class = inspect.isclass(found)
    if inspect.iscoroutinefunction(_instance_call(found) if is_class else found):
        raise ImageRLError(f"reward {label!r} is async; make it an ordinary function")
    takers = setting_parameters(label, found)
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in call_parameters(found)):
        raise ImageRLError(f"reward {label!r} must take keywords; write def {label}(images, **kwargs)")
    names = [p.name for p in takers if _is_keyword(p) and (is_class or p.name not in SAMPLE_NAMES)]
    for name in settings if not any(p.kind is p.VAR_KEYWORD for p in takers) else ():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'none'}"
            raise ImageRLError(f"reward {label!r} has no setting {name!r}; {hint}")
    missing = [name for name in _needed(takers) if is_class and name not in settings]
    if missing:
        raise ImageRLError(f"reward {label!r} needs the setting {missing[0]!r}; add it to its entry")


def needed_columns(found: Any, settings: Mapping[str, Any]) -> list[str]:
    """Columns of the prompt set without which a reward cannot be called."""
    given = SAMPLE_NAMES if inspect.isclass(found) else (*SAMPLE_NAMES, *settings)
    return [name for name in _needed(call_parameters(found)) if name not in given]


def check_columns(label: str, needed: Iterable[str], columns: Iterable[str]) -> None:
    """Raises ImageRLError when a prompt set with these columns lacks one."""
    given = [*SAMPLE_NAMES, *columns]
    for name in needed:
        if name not in given:
            raise ImageRLError(
                f"reward {label!r} asks for {name!r}, which is no column of the prompt set; "
                f"it gets: {', '.join(given)}"
            )


def construct(label: str, found: Any, settings: Mapping[str, Any]) -> KeywordReward:
    """A user's function or class, ready to be called. Raises ImageRLError when its constructor fails."""
    if not inspect.isclass(found):
        return KeywordReward(found, settings)
    try:
        instance: Any = found(**settings)
    except ImageRLError:
        raise
    except Exception as error:
        raise ImageRLError(f"reward {label!r} could not be constructed: {one_line(error)}") from error
    return KeywordReward(instance, {})
