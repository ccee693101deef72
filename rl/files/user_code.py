"""Import what users name as `file.py:name` or `package.module:name`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from imagerl.rl.errors import ImageRLError


def import_name(target: str, key: str, what: str = "function") -> Any:
    """Return the function or class at a target; `key` of the recipe or option names it in errors.

    Raises ImageRLError: no such file, module or name, or an error while importing."""
    place, _, name = target.rpartition(":")
    try:
        module = import_file(Path(place), key) if place.endswith(".py") else importlib.import_module(place)
    except ImageRLError:
        raise
    except (Exception, SystemExit) as error:  # users' code may fail in any way
        message = " ".join(str(error).split())[:200]
        raise ImageRLError(
            f"{key} {target!r}: importing it failed: {type(error).__name__}: {message}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and n[0] != "_" and _is_of(v, module)]
        close = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(own) or f'no {what}'}"
        raise ImageRLError(f"{key} {target!r}: {place} has no {what} {name}; {hint}")
    return found


def import_file(path: Path, key: str) -> ModuleType:
    """Import a Python file, once, however often it is asked for, unless it changed."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ImageRLError(f"{key}: {path} does not exist; correct it")
    state = path.stat()
    identity = f"{path} {state.st_mtime_ns} {state.st_size}"
    name = f"user_code_{path.stem}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py there always is
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


def _is_of(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__
