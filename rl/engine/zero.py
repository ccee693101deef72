"""The parts that DeepSpeed's ZeRO needs beyond Accelerate. Only `rl.engine.engine` uses this.

ZeRO stages 1 and 2 keep Adam's state, stage 3 the weights too, on flat slices of which each rank owns one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from imagerl.rl.config.engine import EngineConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_POSING = "IMAGERL_POSES_AS_LAUNCHER"


def create_accelerator(settings: EngineConfig, use_cpu: bool, timeout: timedelta) -> Accelerator:
    """Create an Accelerator that will wrap its module in DeepSpeed, alone or as a launcher's environment says."""
    _import_deepspeed(use_cpu)
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations import unset_hf_deepspeed_config

    stage: dict[str, object] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": not use_cpu}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own speed report only
        "gradient_accumulation_steps": 1,  # boundaries are set by hand, see `Engine.microbatch`
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam would be compiled first
        "zero_optimization": stage,
        # DeepSpeed overrules an autocast from outside unless it knows of it. With an empty list gradients
        # still travel in float32.
        "torch_autocast": {
            "enabled": settings.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    # without a GPU Accelerate has to be told of a backend, or each process takes itself for the only one
    handlers = [InitProcessGroupKwargs(backend="gloo" if use_cpu else "nccl", timeout=timeout)]
    if pose_as_launcher() and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # needs no port
        backend = "gloo" if use_cpu else "nccl"
        torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    unset_hf_deepspeed_config()  # or from_pretrained would split models loaded later, such as a reference
    return accelerator


def fit_config(accelerator: Accelerator, module: nn.Module, max_grad_norm: float | None) -> None:
    """Complete the configuration with what depends on the module and the optimizer."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    # stage 0 would not report the norm, so `Engine.step` clips there
    config["gradient_clipping"] = (max_grad_norm or 0.0) if zero["stage"] else 0.0
    # the default bucket of 5e8 numbers is allocated even for the smallest model; sizes have to be even
    bucket = min(50_000_000, 2 * sum(p.numel() for p in module.parameters()))
    config["zero_optimization"] = zero | {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}


def pose_as_launcher() -> bool:
    """Set the launcher's variables, on which DeepSpeed insists at any time, in a process that has none.
    Returns whether it did."""
    if "LOCAL_RANK" in os.environ:
        return False
    os.environ |= _ALONE | {_POSING: "1"}
    return True


def stop_posing() -> None:
    """Undo `pose_as_launcher`, so that neither a later engine nor a child process takes itself for a rank. Other values
    are those of a launcher that a posing process has started: they stay."""
    if os.environ.pop(_POSING, None) and _ALONE.items() <= os.environ.items():
        for name in _ALONE:
            del os.environ[name]


@contextlib.contextmanager
def gathered(module: nn.Module, unwrapped: nn.Module) -> Iterator[None]:
    """Make all weights of a ZeRO-3 module whole on every rank, and usable without its hooks."""
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(unwrapped.parameters())):
        remove_hooks(module)  # they would split each weight again after its first use
        try:
            yield
        finally:
            add_hooks(module)


def whole_state(parameter: nn.Parameter, updates: int) -> dict[str, Tensor]:
    """Gather weight, step, exp_avg and exp_avg_sq of a parameter; the last three once it was updated."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = {"weight": safe_get_full_fp32_param(parameter)}
    if updates:
        whole["step"] = torch.tensor(float(updates))
        whole |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    return whole


def make_moments(module: Any, stage: int, updates: int) -> None:
    """Create the state that Adam would create at its first update, so that it can be filled in."""
    optimizer = module.optimizer
    partitions = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    for partition in partitions:
        moments = {key: torch.zeros_like(partition) for key in MOMENTS}
        optimizer.optimizer.state[partition] = {"step": torch.tensor(float(updates)), **moments}
    link_moments(module, stage)


def link_moments(module: Any, stage: int) -> None:
    """Let the getters and setters below find Adam's state. DeepSpeed does so itself for stages 1 and 2, but too early
    where there are several parameter groups: before any but the first has a state."""
    if stage != 3:
        module.optimizer._hp_optimizer_states_linked = False
        module.optimizer._lazy_init_hp_params_optimizer_state()


def scatter_moments(parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
    """Give each rank its slice of whole moments."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key, moment in moments.items():
        if not hasattr(parameter, "ds_tensor"):
            safe_set_full_optimizer_state(parameter, moment, key)
            continue
        # the whole-tensor setter of ZeRO-3 fails where the last rank's slice is padded
        size = parameter.ds_tensor.numel()
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        padded = nn.functional.pad(moment.flatten(), (0, size * ranks - moment.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size :][:size], key)


def _import_deepspeed(use_cpu: bool) -> None:
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImageRLError("engine.name=deepspeed needs DeepSpeed; pip install deepspeed") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's use of torch, repeated at every collective
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # Between processes of one machine DeepSpeed would compile a shared-memory collective (50 s, and a C++
    # compiler must be there). Declared incompatible, it leaves the work to gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
