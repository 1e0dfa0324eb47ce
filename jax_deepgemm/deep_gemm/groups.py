"""Which rows belong to which group, as DeepGEMM's users say it: an index per row, ends, sizes on the host.

What is known while tracing (NumPy arrays) is checked: both layouts are silently wrong where they are not as
a kernel takes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm import config
from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.calls import check_dims, check_given, check_not_written
from jax_deepgemm.deep_gemm.utils.math import align
from jax_deepgemm.ops.gemm.checks import describe
from jax_deepgemm.ops.grouped.checks import as_int32
from jax_deepgemm.ops.grouped.layouts import ranges_of_ends


def described(
    op: str, layout: Any, ends: bool, expected: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The groups of rows, as the package's own functions take them."""
    check_given(op, grouped_layout=layout)
    if not ends:
        if expected is not None:
            raise ValueError(
                f"{op}: expected_m_for_psum_layout is {expected} with an index layout, need None, or "
                "use_psum_layout=True."
            )
        _check_together(op, unwrapped(layout))
        return {"m_indices": layout}
    _check_aligned(op, unwrapped(layout), _alignment(options))
    return {"ends": layout, "expected_m": expected}


def _alignment(options: dict[str, Any]) -> int:
    alignment: int = options.get("mk_alignment", config.get().mk_alignment)
    return alignment


def _check_together(op: str, layout: Any) -> None:
    """Of an index layout in NumPy, that rows of a group stand together."""
    if not isinstance(layout, np.ndarray) or layout.ndim != 1:
        return
    first: dict[int, int] = {}
    for row in np.flatnonzero(np.diff(layout, prepend=-1)).tolist():
        group = int(layout[row])
        if group >= 0 and first.setdefault(group, row) != row:
            raise ValueError(
                f"{op}: grouped_layout[{row}] is {group}, and rows of that group begin at {first[group]}, "
                "with others between. Need rows of a group together: order = np.argsort(grouped_layout, "
                "kind='stable'), and a[order]."
            )


def _check_aligned(op: str, ends: Any, alignment: int) -> None:
    """Of ends in NumPy, that none lies before its group can start."""
    if not isinstance(ends, np.ndarray) or ends.ndim != 1:
        return
    for group, (before, end) in enumerate(itertools.pairwise(ends.tolist()), 1):
        start = align(before, alignment)
        if before < end < start or end < before:
            raise ValueError(
                f"{op}: grouped_layout[{group}] is {end}, and group {group} starts at {start}: where the one "
                f"before ended, {before}, rounded up to the alignment {alignment}. If groups follow each "
                "other without gaps, say mk_alignment=1."
            )


def k_groups(
    op: str,
    d: Any,
    ks_cpu: Sequence[int] | None,
    layout: Any,
    compiled_dims: str,
    ends: bool,
    options: dict[str, Any],
) -> Any:
    """The groups of k: sizes, or ends."""
    check_not_written(op, d)
    check_dims(op, compiled_dims)
    if layout is None and ks_cpu is not None and not ends:
        return np.asarray(ks_cpu, np.int32)
    check_given(op, grouped_layout=layout)
    if not ends:
        return layout
    _check_aligned(op, unwrapped(layout), _alignment(options))
    return ranges_of_ends(as_int32(op, "grouped_layout", layout, "[g]"), _alignment(options))


def side_by_side(op: str, name: str, given: Any, ks_cpu: Sequence[int] | None) -> Any:
    """Of values in one dimension, a matrix [rows, k_g] for each group, the matrix [rows, k]."""
    x = unwrapped(given)
    if not isinstance(x, (tuple, list)) or len(x) != 2 or getattr(unwrapped(x[0]), "ndim", 2) != 1:
        return given
    values, scales = map(unwrapped, x)
    rows = scales.shape[0]
    if ks_cpu is None or rows * sum(ks_cpu) != values.shape[0]:
        raise ValueError(
            f"{op}: values of {name} are {describe(values)} and ks_cpu {ks_cpu}; need ks_cpu of which each "
            f"stands for {rows} x k values (scales are {list(scales.shape)}), or values [{rows}, k]."
        )
    bounds = [0, *itertools.accumulate(rows * k for k in ks_cpu)]
    parts = [values[i:j].reshape(rows, -1) for i, j in itertools.pairwise(bounds) if j > i]
    return jnp.concatenate(parts or [values.reshape(rows, 0)], axis=1), scales
