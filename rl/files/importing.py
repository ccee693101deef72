"""Import what users name as `file.py:name` or `package.module:name`: rewards, losses, families.

Standard library only: this file also runs in interpreters that have none of our dependencies
(`rewards.boundary.child`)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from imagerl.rl.errors import ImageRLError, hint, why


def split_target(target: str, key: str) -> tuple[str, str]:
    """Return place and name of an import path; `key` begins the message. Raises ImageRLError when it is none."""
    place, _, name = target.rpartition(":")
    if not (place and name):
        raise ImageRLError(f"{key} {target!r} must read file.py:name or package.module:name")
    return place, name


def import_object(target: str, key: str) -> Any:
    """Return what stands at an import path.

    Raises ImageRLError, whose message begins with `key`, for a path that leads nowhere and for a syntax error, and
    whatever else importing raises."""
    place, name = split_target(target, key)
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            if not path.is_file():
                raise ImageRLError(f"{key} {target!r}: {path} does not exist; correct its import_path")
            module = _import_file(path)
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(place)
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ImageRLError(f"{key} {target!r}: syntax error in {where}: {error.msg}") from error
    if not hasattr(module, name):
        names = [other for other, value in vars(module).items() if callable(value) and other[0] != "_"]
        raise ImageRLError(f"{key} {target!r}: {place} has no {name}; {hint(name, names)}")
    return getattr(module, name)


def import_callable(target: str, key: str) -> Any:
    """Return the function or class at an import path. Raises ImageRLError for whatever goes wrong."""
    try:
        found = import_object(target, key)
    except ImageRLError:
        raise
    except (Exception, SystemExit) as error:  # users' code may fail in any way
        raise ImageRLError(f"{key} {target!r}: importing it failed: {why(error)}") from error
    if not callable(found):
        raise ImageRLError(f"{key} {target!r} is no function or class")
    return found


def _import_file(path: Path) -> ModuleType:
    """Import a file once, however often it is asked for, unless it changed."""
    state = path.stat()
    identity = f"{path} {state.st_mtime_ns} {state.st_size}"
    name = f"user_code_{path.stem}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:  # so that it may import its neighbours; last, to shadow nothing
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
