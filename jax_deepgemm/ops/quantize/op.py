"""quantize and dequantize as ops: one pair per block size, since the block is part of the sharding rule.

Blocks are global. Where a device's piece begins or ends inside a block, the scales of that dimension are
whole on every device: quantize reduces its part of the grid of amax and all-reduces that small grid (max),
dequantize takes its window of the scales. Nothing is gathered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.declaration import Dims
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan
from jax_deepgemm.ops.quantize import reference
from jax_deepgemm.ops.quantize.array import Block, scales_shape

KERNEL_BLOCKS = ((1, 128), (128, 128), (128, 1), (1, 32), (32, 32))
"""Blocks for which there is a CUDA kernel; others run as jnp."""
KERNELS = "jax_deepgemm.ops.quantize.kernel"

HINT = (
    "FP8 training goes through fp8_linear, grouped_linear or moe.moe_mlp, which quantise in their forward "
    "and backward pass and have gradients of first order, in reverse mode; the BF16 GEMMs have derivatives "
    "of any order."
)


class BlockOp(Op):
    """An Op whose block grids follow their data in XLA's propagation over Auto axes as well."""

    def _shardy_rule(self, static: tuple[tuple[str, Any], ...], mesh: Any, ins: Any, outs: Any) -> Any:
        """Writes data as (blocks, their elements) where all cuts that the mesh allows are at block edges.

        Elsewhere the grid keeps a name of its own, as Shardy would cut the elements of a block and not the
        blocks.
        """
        rule = self.rule.batched(dict(static)["batch"])
        text, sizes = rule.text(), {}
        extents = {
            name: extent
            for factors, value in zip(rule.operands + rule.results, [*ins[1:], *outs], strict=True)
            for name, extent in zip(factors, value.shape, strict=True)
        }
        for grid, (data, step) in self.rule.blocks.items():
            if not mesh.empty and extents[data] % (step * mesh.size) == 0:
                text = re.sub(rf"\b{data}\b", f"({grid} {data}_in)", text)
                sizes[f"{data}_in"] = step
        return f", {text}", sizes


@functools.cache
def quantize_op(block: Block, dtype: np.dtype, scale_format: str, min_amax: float = 0.0) -> Op:
    """x -> [values, scales]."""
    form: dict[str, Any] = {"block": block, "scale_format": scale_format, "min_amax": min_amax}
    suffix = f"_amax{min_amax:g}" if min_amax else ""

    def result(x: Dims) -> list[tuple[Dims, Any]]:
        return [(x, dtype), (scales_shape(x, block), np.dtype(np.float32))]

    return BlockOp(
        f"quantize_{block[0]}x{block[1]}_{dtype.name}_{scale_format}{suffix}",
        f"r c -> r c, {_grid(block)}",
        result,
        functools.partial(reference.quantize, dtype=dtype, **form),
        blocks=_blocks(block),
        spmd=functools.partial(_quantize_shard, block, dtype, scale_format, min_amax),
        kernel=LazyKernel(KERNELS, "quantize", batched=True, **form) if block in KERNEL_BLOCKS else None,
        without_kernel=functools.partial(_on_xla, block),
        grad_hint=HINT,
    )


def _on_xla(block: Block, avals: Sequence[Any], **_: Any) -> str:
    x = avals[0]
    return (
        f"quantize of {np.dtype(x.dtype).name} {list(x.shape)} with block {block} runs on XLA: there are "
        f"kernels for {', '.join(map(str, KERNEL_BLOCKS))}."
    )


@functools.cache
def dequantize_op(block: Block) -> Op:
    """(values, scales; block, dtype) -> [array]. The static block is that of the scales on one device."""

    def result(values: Dims, scales: Dims, *, block: Block, dtype: np.dtype) -> list[tuple[Dims, Any]]:
        return [(values, dtype)]

    return BlockOp(
        f"dequantize_{block[0]}x{block[1]}",
        f"r c, {_grid(block)} -> r c",
        result,
        reference.dequantize,
        blocks=_blocks(block),
        spmd=functools.partial(_dequantize_shard, block),
        grad_hint=HINT,
    )


def _grid(block: Block) -> str:
    """Names of the scales' dimensions: with one element per block they are the values' own."""
    return " ".join(name if step == 1 else f"{name}_blocks" for name, step in zip("rc", block, strict=True))


def _blocks(block: Block) -> dict[str, tuple[str, int]]:
    return {f"{name}_blocks": (name, step) for name, step in zip("rc", block, strict=True) if step > 1}


class _Window:
    """This device's piece of one dimension, where its edges fall inside global blocks.

    blocks:   |----|----|----|----|----|          `total` blocks of `step` elements in the whole array
    piece:           [........]                   `size` elements from element `first * step + skip`
    window:        |----|----|----|               `count` blocks from block `first`: any such piece fits
    """

    def __init__(self, plan: ShardingPlan, name: str, axis: int, step: int) -> None:
        offset = plan.offset(name)
        self.axis, self.step, self.axes = axis, step, plan.axes[name]
        self.first, self.skip = offset // step, offset % step
        self.size = plan.local_size(name)
        self.total = -(-plan.size[name] // step)
        self.count = -(-(self.size + step - 1) // step)

    def align(self, x: jax.Array) -> jax.Array:
        """The piece in its place in the window, zeros around it."""
        padded = self._pad(x, self.step, self.count * self.step)
        return lax.dynamic_slice_in_dim(padded, self.step - self.skip, self.count * self.step, self.axis)

    def place(self, grid: jax.Array) -> jax.Array:
        """The window's grid in its place in the whole grid, zeros around it."""
        shape = list(grid.shape)
        shape[self.axis] = self.total + self.count
        whole = lax.dynamic_update_slice_in_dim(
            jnp.zeros_like(grid, shape=shape), grid, self.first, self.axis
        )
        return lax.slice_in_dim(whole, 0, self.total, axis=self.axis)

    def per_element(self, grid: jax.Array) -> jax.Array:
        """The whole grid's entry of each element of the piece, along this dimension."""
        window = lax.dynamic_slice_in_dim(self._pad(grid, 0, self.count), self.first, self.count, self.axis)
        wide = jnp.repeat(window, self.step, self.axis, total_repeat_length=self.count * self.step)
        return lax.dynamic_slice_in_dim(wide, self.skip, self.size, self.axis)

    def _pad(self, x: jax.Array, before: int, after: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[self.axis] = (before, after)
        return jnp.pad(x, widths)


def shared_windows(plan: ShardingPlan, block: Block, names: str = "rc") -> list[_Window]:
    """The dimensions in which devices share blocks; `names` are those of rows and columns in the rule."""
    return [
        _Window(plan, name, axis, step)
        for axis, name, step in zip((-2, -1), names, block, strict=True)
        if step > 1 and plan.cut(name) and not plan.cut(f"{name}_blocks")
    ]


def _without(block: Block, windows: Sequence[_Window]) -> Block:
    """The block on one device after the windows are laid out per element."""
    shared = {window.axis for window in windows}
    return (1 if -2 in shared else block[0], 1 if -1 in shared else block[1])


def _quantize_shard(
    block: Block,
    dtype: np.dtype,
    scale_format: str,
    min_amax: float,
    plan: ShardingPlan,
    local: Callable[..., Any],
    x: jax.Array,
) -> tuple[Sequence[jax.Array] | None, list[jax.Array] | None]:
    windows = shared_windows(plan, block)
    if not windows:
        return (x,), None
    wide = reference.exact_float32(x)
    return None, quantize_shared(wide, windows, block, dtype, scale_format, min_amax)


def quantize_shared(
    x: jax.Array,
    windows: Sequence[_Window],
    block: Block,
    dtype: np.dtype,
    scale_format: str,
    min_amax: float = 0.0,
) -> list[jax.Array]:
    """[values, scales] of one device's piece of x, float32, whose blocks it shares along `windows`."""
    grid = reference.block_amax(functools.reduce(lambda y, window: window.align(y), windows, x), block)
    if windows:
        grid = functools.reduce(lambda g, window: window.place(g), windows, grid)
        grid = lax.pmax(grid, tuple(axis for window in windows for axis in window.axes))
    scales = reference.scales_from_amax(grid, dtype, scale_format, min_amax)
    inverse = functools.reduce(lambda g, window: window.per_element(g), windows, reference.reciprocal(scales))
    inverse = reference.expand(inverse, x.shape, _without(block, windows))
    return [reference.cast_scaled(x, inverse, dtype), scales]


def _dequantize_shard(
    block: Block, plan: ShardingPlan, local: Callable[..., Any], values: jax.Array, scales: jax.Array
) -> tuple[Sequence[jax.Array] | None, list[jax.Array] | None]:
    windows = shared_windows(plan, block)
    if not windows:
        return (values, scales), None
    mine = functools.reduce(lambda grid, window: window.per_element(grid), windows, scales)
    return None, local(values, mine, block=_without(block, windows))
