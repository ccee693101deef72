"""Writing files so that a crash, a kill or a full disk leaves either the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from imagerl.rl.errors import ImageRLError, one_line

# What `temporary_name` makes. The number of a process says nothing without the place that counts it.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<process>[0-9]+)@(?P<place>.+)")
STALE_S = 24 * 3600.0  # since its last change, after which what another host has left is taken for abandoned
_logger = logging.getLogger(__name__)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8) in one step, durably. Folders on the way are made.

    Raises:
        ImageRLError: nothing could be written (disk full, no permission); the old file is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the folder is a file, there is nothing to remove
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Fill a hidden folder beside `path`; when the block ends well it becomes `path`, durably and at once.

    If the block raises, the hidden folder is removed and `path` is as before. With `replace` an existing
    folder is swapped out; a kill between the two renames is repaired by `clean_leftovers`.

    Raises:
        ImageRLError: `path` exists and `replace` is false, or the disk is full or not writable.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise ImageRLError(f"{path} already exists; choose another place or remove it")
    temporary = temporary_name(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
        temporary.mkdir(parents=True)
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            replaced = temporary_name(path, "old")
            shutil.rmtree(replaced, ignore_errors=True)
            _rename(path, replaced)
            try:
                _rename(temporary, path)
            except BaseException:
                _rename(replaced, path)
                raise
            sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            _rename(temporary, path)
            sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder such that it is never seen under its name with some files missing. What cannot go yet, such as a
    file that somebody has open on a network file system, is left to `clean_leftovers`."""
    condemned = temporary_name(path)
    shutil.rmtree(condemned, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(path, condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename on a network file system too: a request whose answer was lost is sent again, and finds nothing to do."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        if source.exists() or not target.exists():
            raise


def wait_for(path: Path, seconds: float = 90.0) -> None:
    """Wait until a file that another host has written is seen here: network file systems remember for a while what was
    not there.

    Raises:
        ImageRLError: it does not come.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ImageRLError(
                f"{path} is not seen from {platform.node()}; all processes need the same files"
            )
        time.sleep(0.2)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left of `write_atomic`, `atomic_folder` and `remove_folder` in
    `folder`, and finish swaps that they began. Work in progress of living processes is left alone, here and on
    other hosts that share the folder; so is what may not be changed."""
    for leftover in sorted(folder.iterdir()):
        name = _TEMPORARY.fullmatch(leftover.name)
        if name is None or not _abandoned(leftover, int(name["process"]), name["place"]):
            continue
        original = leftover.with_name(name["name"])
        with contextlib.suppress(OSError):
            if name["kind"] == "old" and not original.exists():
                os.rename(leftover, original)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """Return the hidden name beside `path`, under which this process prepares it, or keeps what it replaces ("old")."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}@{process_place()}")


@cache
def process_place() -> str:
    """Name the place in which this process's number is its own: the host, and in it the namespace of a container."""
    namespace = 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{platform.node() or 'localhost'}.{namespace:x}"


def lock_file(path: Path) -> IO[bytes] | None:
    """Open a file that holds the lock of this name until it is closed here and in all processes that inherit it;
    None when somebody else holds it. The kernel frees it when its holder dies, however that comes about.

    On a network file system it holds between hosts where that file system locks (NFS does); where a file system
    knows no locks a warning says so."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            _logger.warning("%s cannot be locked (%s): nothing keeps a second run away", path, error.strerror)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder has removed it in between


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk; a folder's where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_error(path: Path, error: Exception) -> ImageRLError:
    """Return the one-line message for a failed write of `path`."""
    # safetensors reports a full disk in words only
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        free = 0.0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**20
        return ImageRLError(
            f"disk full while writing {path} ({free:.0f} MiB free there), earlier files are intact; "
            "make room and run again, a training run with --resume"
        )
    return ImageRLError(f"cannot write {path}: {one_line(error)}; check the folder and its permissions")


def _abandoned(leftover: Path, process: int, place: str) -> bool:
    """Tell whether the process that named `leftover` is gone (or is this one, not writing now). One that is
    counted elsewhere cannot be asked; its work counts as abandoned when it has not changed for long."""
    if place != process_place():
        try:
            return time.time() - max(p.stat().st_mtime for p in (leftover, *leftover.rglob("*"))) > STALE_S
        except OSError:  # it is being changed
            return False
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
