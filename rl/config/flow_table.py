"""The table of flow algorithms. A row names a sampler, where it is stochastic, a loss and its bounds, and is the set
of defaults that `algorithm.flow.name` gives a recipe; any key of the recipe overrides its part of the row.

docs/flow.md has each row's equations and where we differ from other libraries on purpose. Importable without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Sampler = Literal["ode", "sde", "dance", "cps"]
Place = Literal["all", "random", "sliding"]
FlowLoss = Literal["flow_grpo", "grpo_guard", "flow_dppo", "nft", "awm"]
KLForm = Literal["exact", "flow_grpo"]
Weight = Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber"]

FlowName = Literal[
    "flow_grpo",
    "flow_grpo_fast",
    "mixgrpo",
    "dance",
    "cps",
    "grpo_guard",
    "flow_dppo",
    "nft",
    "awm",
]
MATCHING: tuple[FlowLoss, ...] = ("nft", "awm")  # losses on the forward process: no step is an action


@dataclass(frozen=True, slots=True)
class FlowRow:
    """One algorithm: those fields of `FlowConfig` in which algorithms differ. The defaults are
    Flow-GRPO's, its KL weight of 0.04 carried over to the exact KL at ten steps."""

    sampler: Sampler = "sde"
    noise_level: float = 0.7
    window: Place = "all"
    window_size: int = 2
    loss: FlowLoss = "flow_grpo"
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    advantage_max: float = 5.0
    kl_coef: float = 0.004

    def defaults(self) -> dict[str, object]:
        """Map each recipe key within `algorithm.flow` to its value."""
        return asdict(self)


# The settings are those of the papers named in docs/flow.md, or of their code; kl_coef is 0 where there is no KL.
FLOW_ALGORITHMS: dict[FlowName, FlowRow] = {
    "flow_grpo": FlowRow(),
    "flow_grpo_fast": FlowRow(window="random", clip_low=1e-5, clip_high=1e-5, kl_coef=0.0),
    "mixgrpo": FlowRow(window="sliding", window_size=4, kl_coef=0.0),
    "dance": FlowRow(sampler="dance", noise_level=0.3, kl_coef=0.0),
    "cps": FlowRow(sampler="cps", noise_level=0.8),
    "grpo_guard": FlowRow(loss="grpo_guard", clip_low=2e-6, clip_high=2e-6),
    "flow_dppo": FlowRow(loss="flow_dppo", kl_coef=0.0),
    "nft": FlowRow(sampler="ode", noise_level=0.0, loss="nft", kl_coef=1e-4),
    "awm": FlowRow(sampler="ode", noise_level=0.0, loss="awm", clip_low=1.0, clip_high=1.0, kl_coef=1e-3),
}
