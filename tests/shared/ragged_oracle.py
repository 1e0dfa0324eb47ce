"""What ragged products must give, in NumPy float64, and draws of them."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

MODES = ("rows", "contraction", "batch")
BASIC = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
CONTRACTION = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def integers(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Small integers, so that products and sums are exact in every floating type."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), dtype)


@dataclass(frozen=True)
class Problem:
    """Shapes and dimension numbers of one call.

    Attributes:
      lhs, rhs: shapes.
      sizes: group sizes, as nested tuples.
      numbers: the dimension numbers.
      mode: which of lhs's dimensions are ragged.
      result: shape of the result.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    sizes: Any
    numbers: lax.RaggedDotDimensionNumbers
    mode: str
    result: tuple[int, ...]

    def operands(self, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """lhs, rhs and group sizes."""
        return integers(self.lhs, dtype), integers(self.rhs, dtype, 1), jnp.asarray(self.sizes, "int32")


def ragged(
    lhs: Any, rhs: Any, sizes: Any, numbers: Any, first: int = 0, groups: int | None = None
) -> np.ndarray:
    """The product in float64; rhs (rows) or the result (contraction) holds `groups` groups from `first` on.

    Negative sizes count as zero.
    """
    text, members = einsum(numbers, lhs.shape, rhs.shape, sizes, first, groups)
    return np.einsum(text, *(np.asarray(x).astype(np.float64) for x in (lhs, rhs)), *members, optimize=True)


def einsum(
    numbers: Any, lhs: Any, rhs: Any, sizes: Any, first: int = 0, groups: int | None = None
) -> tuple[str, list[np.ndarray]]:
    """The product of operands of these shapes as an einsum: text, and operands besides lhs and rhs."""
    (lhs_k, rhs_k), (lhs_b, rhs_b) = numbers.dot_dimension_numbers
    names = iter(string.ascii_lowercase)
    of_lhs, of_rhs = [next(names) for _ in lhs], [""] * len(rhs)
    for i, j in [*zip(lhs_k, rhs_k, strict=True), *zip(lhs_b, rhs_b, strict=True)]:
        of_rhs[j] = of_lhs[i]
    for j in numbers.rhs_group_dimensions:
        of_rhs[j] = "G"
    of_rhs = [name or next(names) for name in of_rhs]
    rows = [i for i in range(len(lhs)) if i not in (*lhs_k, *lhs_b)]
    out = [of_lhs[i] for i in (*lhs_b, *rows)]
    out += [name for j, name in enumerate(of_rhs) if j not in (*rhs_k, *rhs_b) and name != "G"]
    text = f"{''.join(of_lhs)},{''.join(of_rhs)}"
    (ragged_dim,) = numbers.lhs_ragged_dimensions
    if ragged_dim in lhs_b:
        return f"{text}->{''.join(out)}", []
    order = list(lhs_k) if ragged_dim in lhs_k else rows
    prefix = [*lhs_b, *order[: order.index(ragged_dim)]] if np.ndim(sizes) > 1 else []
    held = np.shape(sizes)[-1] if groups is None else groups
    text += f",{''.join(of_lhs[i] for i in (*prefix, ragged_dim))}G"
    out = (["G"] if ragged_dim in lhs_k else []) + out
    return f"{text}->{''.join(out)}", [_members(np.maximum(sizes, 0), lhs[ragged_dim], first, held)]


def _members(sizes: np.ndarray, rows: int, first: int, groups: int) -> np.ndarray:
    """[.., rows, groups], 1 where a row is in the group."""
    ends = np.cumsum(sizes, axis=-1)[..., None, :]
    row = np.arange(rows)[:, None]
    inside = ((row >= ends - sizes[..., None, :]) & (row < ends)).astype(np.float64)
    held = np.zeros((*inside.shape[:-1], groups))
    for local in range(groups):
        if 0 <= first + local < inside.shape[-1]:
            held[..., local] = inside[..., first + local]
    return held


def group_sizes(groups: int, rows: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any sizes whose sum is at most rows: all rows, fewer, one group alone, empty groups."""

    def cut(ends: list[int]) -> tuple[int, ...]:
        return tuple(int(d) for d in np.diff(sorted(ends), prepend=0))

    anything = st.lists(st.integers(0, rows), min_size=groups, max_size=groups).map(cut)
    alone = st.integers(0, max(groups - 1, 0)).map(lambda g: tuple(rows * (i == g) for i in range(groups)))
    return st.one_of(anything, alone)


@st.composite
def problems(draw: Any, modes: tuple[str, ...] = MODES, shared_sizes: bool = False) -> Problem:
    """Ragged products of all modes, any order of dimensions, up to two of each kind."""
    mode = draw(st.sampled_from(modes))
    least = {"rows": (0, 1, 0), "contraction": (0, 0, 1), "batch": (1, 0, 0)}[mode]
    batch, rows, contraction = (draw(st.integers(low, 2)) for low in least)
    columns = draw(st.integers(0, 2))
    kinds = ["b"] * batch + ["m"] * rows + ["k"] * contraction
    names = [f"{kind}{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]
    extent = {name: draw(st.integers(1, 4)) for name in [*names, "n0", "n1"]}
    groups = draw(st.integers(1, 4))
    extent["g"] = groups
    lhs = draw(st.permutations(names))
    ragged_name = draw(
        st.sampled_from([n for n in names if n[0] == {"rows": "m", "contraction": "k"}.get(mode, "b")])
    )
    extent[ragged_name] = draw(st.integers(1, 9))
    of_rhs = [n for n in names if n[0] != "m"] + [f"n{i}" for i in range(columns)]
    rhs = draw(st.permutations(of_rhs + (["g"] if mode == "rows" else [])))
    ks, bs = ([n for n in names if n[0] == kind] for kind in "kb")
    ks, bs = draw(st.permutations(ks)), draw(st.permutations(bs))
    numbers = lax.RaggedDotDimensionNumbers(
        (
            (tuple(map(lhs.index, ks)), tuple(map(rhs.index, ks))),
            (tuple(map(lhs.index, bs)), tuple(map(rhs.index, bs))),
        ),
        (lhs.index(ragged_name),),
        (rhs.index("g"),) if mode == "rows" else (),
    )
    of_rows = [n for n in lhs if n[0] == "m"]
    in_front = {"rows": [*bs, *of_rows], "contraction": [*bs, *ks], "batch": bs}[mode]
    prefix = tuple(extent[n] for n in in_front[: in_front.index(ragged_name)])
    one = group_sizes(groups, extent[ragged_name])
    if shared_sizes or not prefix or draw(st.booleans()):
        sizes: Any = draw(one)
    else:
        count = int(np.prod(prefix))
        drawn = draw(st.lists(one, min_size=count, max_size=count))
        sizes = np.asarray(drawn, np.int32).reshape(*prefix, groups)
    of_result = [*bs, *of_rows, *(n for n in rhs if n[0] == "n")]
    result = (groups,) * (mode == "contraction") + tuple(extent[n] for n in of_result)
    shapes = (tuple(extent[n] for n in side) for side in (lhs, rhs))
    return Problem(*shapes, sizes, numbers, mode, result)
