"""How a ragged product becomes one of the forms that ops compute: orders of dimensions, without arrays.

nn   lhs [m, k], rhs [g, k, n]  -> [m, n]       rows are grouped
nt   lhs [m, k], rhs [g, n, k]  -> [m, n]
tn   lhs [k, m], rhs [k, n]     -> [g, m, n]    the contraction is grouped
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.lax import RaggedDotDimensionNumbers
from jax.sharding import PartitionSpec

Dims = Sequence[int]


def mode_of(numbers: RaggedDotDimensionNumbers) -> str:
    """Which of lhs's dimensions are ragged: "rows", "contraction" or "batch"."""
    (lhs_k, _), (lhs_batch, _) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    return "contraction" if ragged in lhs_k else "batch" if ragged in lhs_batch else "rows"


@dataclass(frozen=True)
class CanonicalForm:
    """A ragged product in one of the forms: orders of dimensions, and how many of each kind.

    lhs and rhs, transposed so, are [batch.., shared.., rows.., columns..] (rhs of ragged rows without
    `shared`, and with the group before its rows).
    """

    layout: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    batch: int
    shared: int
    inner: int
    """Dimensions that follow the ragged one and are grouped with it."""
    columns: int
    """Dimensions of the result that come from rhs alone."""
    rhs_rows: int
    """Dimensions of rhs's matrices that make their rows."""

    @property
    def rhs_lead(self) -> int:
        """Dimensions of rhs in front of its matrices."""
        return self.batch + (self.shared if self.layout == "tn" else 1)

    def matrix_spec(self, spec: PartitionSpec | None, rank: int) -> PartitionSpec | None:
        """Of a result's spec, what the op's own dimensions get: m n, or g m n."""
        if spec is None:
            return None
        each = [*spec, *(None,) * (rank - len(spec)), None]
        columns = each[rank - self.columns]  # the entry behind the last one, None, if there are none
        if self.layout == "tn":
            rows = each[1 + self.batch] if 1 + self.batch < rank - self.columns else None
            return PartitionSpec(each[0], rows, columns)
        return PartitionSpec(each[self.batch + self.shared], columns)


def plan_rows(numbers: RaggedDotDimensionNumbers, lhs: int, rhs: int) -> CanonicalForm:
    """Of ragged rows, for operands of these ranks.

    >>> plan_rows(RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,)), 2, 3).layout
    'nt'
    """
    (lhs_k, rhs_k), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,), (group,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    pairs = sorted(zip(lhs_k, rhs_k, strict=True))
    k_lhs, k_rhs = [p[0] for p in pairs], [p[1] for p in pairs]
    rows = _others(lhs, lhs_k, lhs_batch)
    shared = rows.index(ragged)
    columns = _others(rhs, rhs_k, rhs_batch, (group,))
    k_last = bool(columns and k_rhs) and max(columns) < min(k_rhs)
    matrix = [*columns, *k_rhs] if k_last else [*k_rhs, *columns]
    return CanonicalForm(
        layout="nt" if k_last else "nn",
        lhs=(*lhs_batch, *rows, *k_lhs),
        rhs=(*rhs_batch, group, *matrix),
        batch=len(lhs_batch),
        shared=shared,
        inner=len(rows) - shared - 1,
        columns=len(columns),
        rhs_rows=len(columns) if k_last else len(k_rhs),
    )


def plan_contraction(numbers: RaggedDotDimensionNumbers, lhs: int, rhs: int, sizes: int) -> CanonicalForm:
    """Of a ragged contraction, for operands and group sizes of these ranks."""
    (lhs_k, rhs_k), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    shared = lhs_k.index(ragged)
    order = list(range(len(lhs_k)))
    if sizes == 1:  # the same sizes for all: the order of a sum is free, so all others follow the ragged one
        order.insert(0, order.pop(shared))
        shared = 0
    columns = _others(rhs, rhs_k, rhs_batch)
    return CanonicalForm(
        layout="tn",
        lhs=(*lhs_batch, *(lhs_k[i] for i in order), *_others(lhs, lhs_k, lhs_batch)),
        rhs=(*rhs_batch, *(rhs_k[i] for i in order), *columns),
        batch=len(lhs_batch),
        shared=shared,
        inner=len(order) - shared - 1,
        columns=len(columns),
        rhs_rows=len(order) - shared,
    )


def _others(rank: int, *taken: Dims) -> list[int]:
    return [d for d in range(rank) if all(d not in dims for dims in taken)]
