"""The Ray of a run: a cluster of our own on loopback, or the one of RAY_ADDRESS. Nothing of it outlives the run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from ray import ObjectRef

CONNECT_S, JOIN_S = 5.0, 30.0  # to a cluster that is said to run: a port, and the whole of it
LOOK_EVERY_S, TRIES = 2.0, 3  # at a cluster that was joined: without its head Ray ends us in a minute
JOIN_OURS_S = 300.0  # to one that runs, on a machine that may be busy
OBJECT_STORE_BYTES = 512 * 2**20  # of shared memory, for what is under way; Ray spills to disk beyond
AUTH_MODE = "RAY_AUTH_MODE"  # Ray sets it where it starts a cluster, to which it then admits this user alone
OURS = (
    "imagerl"  # a resource by which every process of a cluster knows that the run has started it for itself
)


def ended_part_of_ray() -> str | None:
    """Name the process that has ended of the Ray started here, or the head of the one joined; else None."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None:
        return None
    started = node.all_processes
    for name in ("raylet", "gcs_server"):
        if any(part.process.poll() is not None for part in started.get(name, ())):
            return name
    return None if "gcs_server" in started or _answers(node.gcs_address) else f"head at {node.gcs_address}"


@lru_cache(maxsize=1)
def _answered(address: str, moment: int) -> None:
    """Raise OSError when nobody listens at an address. Where one does, it is not asked again at this moment."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def _answers(address: str) -> bool:
    """Tell whether the head of a cluster can be reached, at one of a few tries."""
    for _ in range(TRIES):
        try:
            _answered(address, int(time.monotonic() / LOOK_EVERY_S))
            return True
        except OSError:
            time.sleep(0.3)
    return False


def wait_for_ray(reference: ObjectRef, patience_s: float) -> bool:
    """Wait for Ray's answer; False when there is none. Raises ImageRLError when Ray itself is gone meanwhile."""
    import ray

    end = time.monotonic() + patience_s
    while (left := end - time.monotonic()) > 0:
        refuse_ended_ray()
        if ray.wait([reference], timeout=min(left, LOOK_EVERY_S), fetch_local=False)[0]:
            return True
    return False


def refuse_ended_ray() -> None:
    """Raise ImageRLError when Ray itself is gone: its library would end this process at the next call, without a
    word."""
    ended = ended_part_of_ray()
    if ended is not None:
        again = "start it again, " if ended.startswith("head") else ""
        raise ImageRLError(
            f"Ray ended: its {ended} was killed or crashed, perhaps for want of memory; {again}continue with --resume, "
            "or without Ray: rewards.workers=0 rollout.workers=0"
        )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cluster_address() -> str | None:
    """Return the cluster to join; None: one of our own is started."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def _join(name: str, place: str, remedy: str, patience_s: float, **options: str) -> None:
    """Connect to a running cluster, `name` in words. Raises ImageRLError when that fails or takes too long: Ray itself
    tries for minutes, for example when a variable still names yesterday's cluster."""
    import ray

    parts = urlsplit(place if "://" in place else f"//{place}")
    try:
        if parts.port is not None:  # "auto" has none
            socket.create_connection((parts.hostname, parts.port), CONNECT_S).close()
        joining: Future[None] = Future()

        def join() -> None:
            try:
                ray.init(logging_level="error", log_to_driver=False, **options)
                joining.set_result(None)
            except BaseException as error:
                joining.set_exception(error)

        threading.Thread(target=join, daemon=True, name="ray-join").start()
        joining.result(patience_s)
    except Exception as error:
        why = f"no answer within {patience_s:g} s" if isinstance(error, TimeoutError) else str(error)
        raise ImageRLError(f"no Ray cluster can be joined at {name} ({why}); {remedy}") from error


_reaper: subprocess.Popen[bytes] | None = None  # of the Ray that was started here


def _private_folder() -> str:
    """Make a new folder for Ray's logs and sockets that other users cannot enter. It goes when this process ends."""
    global _reaper
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    # a socket's path has 107 bytes at most, of which Ray's names take 64
    folder = tempfile.mkdtemp(prefix="imagerl-", dir=place if len(os.fsencode(place)) <= 24 else "/tmp")
    program = os.path.join(os.path.dirname(__file__), "reaper.py")
    _reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", program, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    return os.path.join(folder, "ray")  # Ray opens its own to everybody


def stop_ray() -> None:
    """End the Ray that `start_ray` started, and wait until nothing of it is left."""
    import ray

    global _reaper
    ray.shutdown()
    if _reaper is not None:
        _reaper.communicate()
        _reaper = None


def start_ray(cpus: int, store_bytes: int = OBJECT_STORE_BYTES) -> bool:
    """Connect to the cluster of RAY_ADDRESS or start one on loopback; True when it is ours to stop.

    Must be called from the main thread: Ray's processes die with the thread that started them. `cpus` is how many
    actors it prepares processes for."""
    address = cluster_address()
    if address is None:
        # Ray listens on every interface unless told, before its import, that there will be no other node.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    # Paragraphs of Ray's own about what our lines say too; `log_to_driver` does not stop them.
    ray._private.worker._worker_logs_enabled = False
    if ray.is_initialized():
        return False
    if address is not None:
        remedy = "unset RAY_ADDRESS to let the run start its own, or set it to a cluster that runs"
        if AUTH_MODE not in os.environ:  # then Ray shows no token, although `ray start` asks for one
            remedy += f", and {AUTH_MODE}=token where it asks for a token"
        _join(f"RAY_ADDRESS={address}", address, remedy, JOIN_S)
        return False
    variables = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # GPUs stay visible to actors that reserve none
    variables["RAY_worker_niceness"] = "0"  # rather than 15: actors that draw hold up the training
    for last in (False, True):  # it gives its own processes 30 s to start, too few on a machine that is busy
        try:
            with _environment(**variables, **free_gpus()):
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    resources={OURS: 1},
                    include_dashboard=False,
                    object_store_memory=store_bytes,
                    logging_level="error",
                    log_to_driver=False,
                    _temp_dir=_private_folder(),
                )
            break
        except Exception as error:
            stop_ray()
            if last:
                raise ImageRLError(
                    f"Ray does not start ({one_line(str(error), 200)}); try again when the machine is less busy, or "
                    "run without it: rewards.workers=0 rollout.workers=0"
                ) from error
    return True


def how_to_join(others: Sequence[int]) -> dict[str, str]:
    """Return the arguments of `join_ray` for other processes of this run, which do not end with a Ray of ours."""
    import ray

    if _reaper is not None and _reaper.stdin is not None:
        _reaper.stdin.write(" ".join(map(str, others)).encode())
        _reaper.stdin.flush()
    return {"address": ray.get_runtime_context().gcs_address, "mode": os.environ.get(AUTH_MODE, "")}


def join_ray(address: str, mode: str) -> None:
    """Connect to the Ray that another process of this run has joined or started. To be called before Ray is imported,
    which otherwise looks for one on loopback at the address of the machine, and does not show that it may join."""
    if mode:
        os.environ.setdefault(AUTH_MODE, mode)
    if address.startswith("127."):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    ray._private.worker._worker_logs_enabled = False
    if not ray.is_initialized():
        _join(address, address, "continue with --resume", JOIN_OURS_S, address=address)


def free_gpus() -> dict[str, str]:
    """Return the variable that shows Ray the GPUs behind those of this machine's training processes, which take one
    each, from the first. Empty where there are no others: then Ray shares theirs."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    others = visible.split(",")[int(os.environ.get("LOCAL_WORLD_SIZE", "1")) :]
    return {"CUDA_VISIBLE_DEVICES": ",".join(others)} if others else {}


def actor_cpus() -> int:
    """Return the CPUs that an actor reserves: none on a cluster of our own, where nothing else is to be scheduled."""
    import ray

    return 0 if OURS in ray.cluster_resources() else 1


def refuse_too_many_gpus(wanted: float, what: str) -> None:
    """Raise ImageRLError where the cluster can never have so many GPUs: Ray would wait for them for good."""
    import ray

    has = ray.cluster_resources().get("GPU", 0.0)
    if wanted > has:
        raise ImageRLError(
            f"{what} reserve {wanted:g} GPUs and Ray has {has:g} (those of training processes left out); lower "
            "num_gpus or the number of workers, or set RAY_ADDRESS to a cluster that has them"
        )
