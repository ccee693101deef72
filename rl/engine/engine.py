"""The one seam to Accelerate: plain torch or DeepSpeed ZeRO, on one process or many.

Losses arrive already divided by a denominator that counts the whole batch, so gradients are *summed* over
microbatches and ranks, never averaged, whatever lies underneath. Only the module that trains goes through it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from imagerl.rl.engine import zero
from imagerl.rl.engine.schedule import learning_rate
from imagerl.rl.errors import ImageRLError, one_line
from imagerl.rl.files.environment import leave_to_the_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from imagerl.rl.config.engine import EngineConfig, OptimConfig

AVERAGE = "average"  # the group of the moving average in a checkpoint
OLD = "old"  # that of the moving average that draws pictures
T = TypeVar("T")
StateDict = dict[str, dict[str, Tensor]]  # group -> name -> whole tensor


class Engine:
    """The device, ranks and precision of a run; after `prepare` also its optimizer.

    One update, with n microbatches (the same n on every rank)::

        for i in range(n):
            with engine.microbatch(last=i == n - 1):
                with engine.autocast():
                    loss = ...  # from engine.module(...)
                engine.backward(loss)
        grad_norm = engine.step()
    """

    def __init__(self, settings: EngineConfig) -> None:
        """Raises:
        ImageRLError: the device that the recipe asks for is not there.
        """
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ImageRLError("engine.device is cuda but torch sees no GPU; set engine.device=cpu or auto")
        use_cpu = settings.device == "cpu" or not torch.cuda.is_available()
        if settings.name == "deepspeed" and use_cpu and torch.cuda.is_available():
            raise ImageRLError(
                "DeepSpeed takes the GPU where one is; for engine.device=cpu set CUDA_VISIBLE_DEVICES=''"
            )
        self.zero_stage: int | None = settings.zero_stage if settings.name == "deepspeed" else None
        self.precision: str = settings.precision
        self.timeout = timedelta(seconds=settings.timeout_s)
        self.accelerator = self._accelerator(settings, use_cpu)
        if settings.threads:  # after Accelerate, which may choose for itself
            torch.set_num_threads(settings.threads)
        self.threads: int = torch.get_num_threads()
        self.device: torch.device = self.accelerator.device
        ask_to_repeat(self.device, settings.deterministic)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.rank == 0
        self.updates = 0  # optimizer updates made so far
        self.lr = 0.0  # of the last update
        self.share: float | None = None  # of the run that is over, where a budget and not steps tells
        self._module: Any = None

    def prepare(
        self,
        module: nn.Module,
        optim: OptimConfig,
        total_updates: int,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        lr_factor: Callable[[str], float] = lambda name: 1.0,
        fused: bool = False,
    ) -> None:
        """Take over a module's trainable parameters, fresh or as `state_dict` once described them.

        `lr_factor` maps a parameter's name to its share of the scheduled learning rate. `fused` takes torch's fused
        AdamW, which rounds otherwise.

        Trainable parameters become float32: at learning rates of RL an update is smaller than the spacing
        of bfloat16 numbers and would be rounded away.

        Raises:
            ImageRLError: `state` belongs to other parameters than the module's.
        """
        if self.zero_stage is not None:
            zero.fit_config(self.accelerator, module, optim.max_grad_norm)
        module.to(self.device)
        self.unwrapped = module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ImageRLError("nothing to train: every parameter is frozen; check model.lora in the recipe")
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()
        if state is not None:
            self._load_weights(state["model"])
        self._averages: StateDict = {}
        if optim.ema is not None:
            self.keep_average(AVERAGE, (state or {}).get(AVERAGE))
        self._optim = optim
        self._total_updates = total_updates
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault(lr_factor(name), []).append(parameter)
        self._lr_factors = list(groups)
        self._base_optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=fused or None,
        )
        self._module, self._optimizer = self.accelerator.prepare(module, self._base_optimizer)
        if state is not None:
            self._load_moments(state["optimizer"])

    @property
    def module(self) -> Any:
        """The prepared module. Call this one, so that ranks cooperate; read attributes from `unwrapped`."""
        if self._module is None:
            raise RuntimeError("Engine.prepare must come before Engine.module")
        return self._module

    @contextlib.contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one microbatch; ranks exchange gradients in the last one only."""
        if self.zero_stage is not None:
            self.module.set_gradient_accumulation_boundary(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def leave_cores(self, count: int) -> None:
        """Use `count` CPU threads less than the run has, but one at least, while other processes compute.

        A thread that shares its core with another process holds up the rest at every barrier. When a run leaves
        cores depends on its recipe alone and never on the clock: rounding depends on the number of threads, and
        a run must repeat bit for bit."""
        torch.set_num_threads(max(1, self.threads - count))

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return bfloat16 autocast where the recipe says so; for the forward pass, not for backward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar that is already divided by its global denominator."""
        loss = loss * self.world_size  # undoes the mean over ranks of DDP and DeepSpeed
        if self.zero_stage is not None:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def step(self) -> float:
        """Clip, update and clear the gradients. Returns the norm, over all ranks, that they had before.

        Raises:
            ImageRLError: the gradient is NaN or infinite; the weights are as before.
        """
        self.lr = learning_rate(self.updates, self._total_updates, self._optim, self.share)
        for group, factor in zip(self._base_optimizer.param_groups, self._lr_factors, strict=True):
            group["lr"] = self.lr * factor
        if self.zero_stage:
            self.module.step()  # clips, and skips the update if the norm is not finite
            norm = float(self.module.get_global_grad_norm())
        else:
            max_norm = self._optim.max_grad_norm or math.inf
            norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), max_norm))
            if math.isfinite(norm):
                self.module.step() if self.zero_stage == 0 else self._optimizer.step()
            self._base_optimizer.zero_grad()
        if not math.isfinite(norm):
            raise ImageRLError(
                f"the gradient norm is {norm} at update {self.updates + 1}; lower optim.lr or set "
                "engine.precision=fp32 in a new run"
            )
        self.updates += 1
        if self._optim.ema is not None:
            self.move_average(AVERAGE, self._optim.ema)
        return norm

    def keep_average(self, group: str, begun: Mapping[str, Tensor] | None = None, part: str = "") -> None:
        """Keep a moving average of the trained weights whose names begin with `part`, from their present values or as
        it had `begun`; it is the `group` of that name in checkpoints."""
        if begun is None:
            begun = {name: p.data for name, p in self._parameters.items() if name.startswith(part)}
        self._averages[group] = {name: tensor.to(self.device, copy=True) for name, tensor in begun.items()}

    def move_average(self, group: str, decay: float) -> None:
        """Make an average decay · itself + (1 − decay) · the present weights."""
        for name, tensor in self._averages[group].items():
            tensor.lerp_(self._parameters[name].data, 1 - decay)

    @contextlib.contextmanager
    def averaged(self, group: str = AVERAGE) -> Iterator[None]:
        """Inside, the trained weights are their moving average, where one of that name is kept. Do not train inside."""
        average = self._averages.get(group, {})
        weights = {name: self._parameters[name].data for name in average}
        try:
            for name, tensor in average.items():
                self._parameters[name].data = tensor
            yield
        finally:
            for name, tensor in weights.items():
                self._parameters[name].data = tensor

    def gradient_norms(self, parts: Sequence[str]) -> dict[str, float]:
        """Measure the present gradient's norm of each part of the module, named by its attribute; empty under ZeRO 1
        and above, where no rank holds whole gradients. To be called before `step`, after the last microbatch."""
        if self.zero_stage:
            return {}
        norms = {}
        for part in parts:
            own = [
                p.grad for n, p in self._parameters.items() if n.startswith(f"{part}.") and p.grad is not None
            ]
            norms[part] = float(nn.utils.get_total_norm(own))
        return norms

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Gather the weights, so that `unwrapped` and its parts can be called directly (sampling, reference, export)
        even under ZeRO-3, where each rank otherwise holds a slice of every weight. Collective; do not train
        inside."""
        if self.zero_stage != 3:
            yield
            return
        with zero.gathered(self.module, self.unwrapped):
            yield

    def state_dict(self, moments: bool = True) -> StateDict:
        """Copy the weights, and the optimizer's `moments`, of all that trains, whole, by parameter name, to the CPU.

        Collective: every rank calls it, rank 0 gets the tensors and the others empty groups.
        """
        model: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        updates = self.updates if moments else 0
        if self.zero_stage and updates:
            zero.link_moments(self.module, self.zero_stage)
        for name, parameter in self._parameters.items():
            if self.zero_stage:
                whole = zero.whole_state(parameter, updates)
            else:
                kept = self._base_optimizer.state.get(parameter, {}) if moments else {}
                whole = {"weight": parameter.data, **kept}
            if self.is_main:
                copies = on_host(whole)
                model[name] = copies.pop("weight")
                optimizer |= {f"{key}/{name}": tensor for key, tensor in copies.items()}
        kept_averages = self._averages if self.is_main else {}
        averages = {group: on_host(average) for group, average in kept_averages.items()}
        if not moments:
            return {"model": model} | averages
        if self.is_main:
            optimizer["updates"] = torch.tensor(self.updates)
        return {"model": model, "optimizer": optimizer} | averages

    def sum_over_ranks(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Add up scalars over ranks in float64. Collective, with the same keys everywhere."""
        keys = sorted(values)
        # one transfer from the device for all of them
        scalars = [
            torch.as_tensor(values[key], dtype=torch.float64, device=self.device).detach() for key in keys
        ]
        if not scalars:
            return {}
        total = torch.stack(scalars)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        summed = dict(zip(keys, total.tolist(), strict=True))
        return {key: summed[key] for key in values}

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's `value`, in order of rank, on every rank. Collective; for small Python objects."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on the main process only; what it returns, or its ImageRLError, comes to all. Collective."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = action()
            except ImageRLError as error:
                outcome = error
        if self.world_size > 1:
            shared = [outcome]
            torch.distributed.broadcast_object_list(shared)
            outcome = outcome if self.is_main else shared[0]
        if isinstance(outcome, ImageRLError):
            raise outcome
        result: T = outcome
        return result

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.accelerator.wait_for_everyone()

    def lost_others(self, error: Exception) -> str | None:
        """Tell in words that an error is of a collective whose other ranks are gone; None when it is another one."""
        said = str(error)
        collective = isinstance(error, torch.distributed.DistError) or "gloo" in said or "NCCL" in said
        if self.world_size == 1 or not isinstance(error, RuntimeError) or not collective:
            return None
        return f"another process of this run has ended or does not answer ({one_line(said, 120)})"

    def close(self) -> None:
        """Leave the other processes, if there are any. The last thing a process does with its engine.

        A group of one is left alone: it binds nobody, and DeepSpeed, which made it, keeps handles to it that a
        later engine of the same process would use."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        zero.stop_posing()

    def _accelerator(self, settings: EngineConfig, use_cpu: bool) -> Accelerator:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        # Accelerate keeps one configuration per process; an engine made later must not inherit it.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        leave_to_the_recipe()  # among them what an earlier engine with DeepSpeed has left behind
        zero.stop_posing()
        if self.zero_stage is not None:
            return zero.create_accelerator(settings, use_cpu, self.timeout)
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        group = InitProcessGroupKwargs(timeout=self.timeout)
        return Accelerator(cpu=use_cpu, mixed_precision="no", kwargs_handlers=[ddp, group])

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if weights.keys() != self._parameters.keys():
            odd = sorted(weights.keys() ^ self._parameters.keys())
            raise ImageRLError(
                f"the checkpoint trains other parameters than this recipe ({len(odd)}, first {odd[0]}); "
                "resume with the model and model.lora it was saved with"
            )
        for name, parameter in self._parameters.items():
            if weights[name].shape != parameter.shape:
                raise ImageRLError(
                    f"{name} is {tuple(weights[name].shape)} in the checkpoint, {tuple(parameter.shape)} in "
                    "the model; resume with the model and model.lora it was saved with"
                )
            parameter.data.copy_(weights[name])

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        self.updates = int(saved["updates"])
        if self.zero_stage:
            zero.make_moments(self.module, self.zero_stage, self.updates)
        for name, parameter in self._parameters.items():
            if f"step/{name}" not in saved:
                continue  # never updated: it had no gradient so far
            moments = {key: saved[f"{key}/{name}"].to(self.device, copy=True) for key in zero.MOMENTS}
            if self.zero_stage:
                zero.scatter_moments(parameter, moments)
            else:
                step = saved[f"step/{name}"].clone()
                self._base_optimizer.state[parameter] = {"step": step, **moments}


def ask_to_repeat(device: torch.device, deterministic: bool) -> None:
    """Ask a GPU for kernels that repeat bit for bit, as a resumed run must."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, where nothing changes them any more."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
