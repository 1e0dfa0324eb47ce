"""What the choice accepts; operands of scores are checked as those of logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_deepgemm.ops.topk.api import ORDERS
from jax_deepgemm.ops.topk.problem import MOST_CHOSEN


def check_choice(op: str, k: Any, order: Any, scratch: Any) -> None:
    """Raises ValueError for options that no plan has."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= MOST_CHOSEN:
        raise ValueError(
            f"{op}: k is {k!r}, need a whole number from 1 to {MOST_CHOSEN}; it is static. For more keys of "
            "each token: topk(mqa_logits(..), k)."
        )
    if order not in ORDERS:
        raise ValueError(f"{op}: order is {order!r}, need 'value' or 'index'.")
    if isinstance(scratch, bool) or not isinstance(scratch, (int, np.integer)) or scratch < 1:
        raise ValueError(f"{op}: scratch_bytes is {scratch!r}, need a positive int: bytes, such as 1 << 28.")
