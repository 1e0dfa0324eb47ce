"""Mixture of experts: routing, dispatch, experts in FP8 or BF16, on one device and over a mesh."""

from __future__ import annotations

from jax_deepgemm.moe.decode import moe_mlp_decode
from jax_deepgemm.moe.dispatch import DispatchPlan, combine, dispatch, plan_dispatch, spread_weights
from jax_deepgemm.moe.experts import expert_mlp
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.moe.layer import moe_mlp
from jax_deepgemm.moe.parallel import expert_parallel_moe, moe_layer
from jax_deepgemm.moe.prepared import prepare_weights
from jax_deepgemm.moe.route import DEEPSEEK_V3, route
from jax_deepgemm.moe.shared import SharedExperts

__all__ = [
    "DEEPSEEK_V3",
    "DispatchPlan",
    "ExpertForm",
    "SharedExperts",
    "combine",
    "dispatch",
    "expert_mlp",
    "expert_parallel_moe",
    "moe_layer",
    "moe_mlp",
    "moe_mlp_decode",
    "plan_dispatch",
    "prepare_weights",
    "route",
    "spread_weights",
]
