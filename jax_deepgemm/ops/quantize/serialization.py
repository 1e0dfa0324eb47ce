"""QuantizedArray and PreparedFp4 in flax.serialization: state dicts, to_bytes and from_bytes.

Flax knows the types that are registered with it. As this package imports Flax in jax_deepgemm.flax only, the
arrays register there, and, if Flax is imported already, with the arrays themselves.
"""

from __future__ import annotations

import sys
from typing import Any

from jax_deepgemm.ops.quantize.array import QuantizedArray
from jax_deepgemm.ops.quantize.prepared_fp4 import PreparedFp4


def register() -> None:
    """Registers with flax.serialization if it is imported; once."""
    flax = sys.modules.get("flax.serialization")
    if flax is not None and not flax.is_serializable(QuantizedArray):
        flax.register_serialization_state(QuantizedArray, _to_state, _from_state)
        flax.register_serialization_state(PreparedFp4, _slabs, _of_slabs)


def _to_state(q: QuantizedArray) -> dict[str, Any]:
    return {"values": q.values, "scales": q.scales}


def _from_state(target: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
    """The block is that of the target, as it is part of the tree's structure."""
    if set(state) != {"values", "scales"}:
        raise ValueError(
            f"flax.serialization: a QuantizedArray is to be restored from {sorted(state)}, need values and "
            "scales. Restore what was saved unquantised into an array, and quantise that."
        )
    return QuantizedArray(state["values"], state["scales"], target.block).check("flax.serialization")


def _slabs(w: PreparedFp4) -> dict[str, Any]:
    return {"slabs": w.slabs}


def _of_slabs(target: PreparedFp4, state: dict[str, Any]) -> PreparedFp4:
    if set(state) != {"slabs"} or state["slabs"].shape != target.slabs.shape:
        raise ValueError(
            f"flax.serialization: a PreparedFp4 {list(target.slabs.shape)} is to be restored from "
            f"{ {name: getattr(x, 'shape', x) for name, x in state.items()} }, need slabs of this shape."
        )
    return PreparedFp4(state["slabs"], target.activations).check("flax.serialization")
