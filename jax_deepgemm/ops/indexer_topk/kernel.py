"""From the operands of the op to the problem that its plan solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_deepgemm.core.family import OpKernel
from jax_deepgemm.ops.indexer.kernel import scaled
from jax_deepgemm.ops.indexer_topk.family import FAMILY, IndexerTopkProblem

_PARTS = ("q", "k", "scales", "weights", "start", "end")


def _dense(
    avals_in: Sequence[Any], avals_out: Sequence[Any], *, best: int, by_index: bool, scratch: int, **_: Any
) -> IndexerTopkProblem:
    out = jax.ShapeDtypeStruct((avals_in[0].shape[0], avals_in[1].shape[0]), "float32")
    p = scaled.problem(avals_in, [out])
    return IndexerTopkProblem(p.tokens, p.keys, p.heads, p.depth, best, p.dtype, by_index, scratch)


dense = OpKernel(FAMILY, _dense, _PARTS)
