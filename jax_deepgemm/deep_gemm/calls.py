"""From a call as DeepGEMM's users write it to one of this package: d, recipes, scales, knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jax_deepgemm import config
from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.deep_gemm.utils.layout import get_tma_aligned_size
from jax_deepgemm.deep_gemm.weights import prepared
from jax_deepgemm.ops.gemm.checks import FP8_DTYPES, describe, is_array
from jax_deepgemm.ops.gemm.epilogue import Epilogue
from jax_deepgemm.ops.quantize import QuantizedArray, unpack_ue8m0_from_int

Recipe: TypeAlias = tuple[int, int, int] | None
"""(gran_m, gran_n, gran_k): rows of A, rows of B and k that share a scale."""
Half: TypeAlias = tuple[int, int] | None
"""(gran_mn, gran_k) of one operand."""

KNOBS = tuple(field.name for field in dataclasses.fields(config.Settings))


_WITH_DTYPE = ", with out_dtype= for its type and c=d to add to it"


def check_not_written(op: str, d: Any, instead: str = "") -> None:
    """d is where DeepGEMM writes its result; here the result is returned."""
    if d is not None:
        raise TypeError(
            f"{op}: d is {describe(unwrapped(d))}, need None: JAX arrays are not written to, and the value "
            f"is returned. Write d = {op}(...){instead or _WITH_DTYPE}."
        )


def check_given(op: str, **operands: Any) -> None:
    """Operands that stand behind d and so have a default, but must be given."""
    for name, value in operands.items():
        if value is None:
            raise TypeError(f"{op}: {name} is missing. Give it by its name: {name}=...")


def check_dims(op: str, compiled_dims: Any) -> None:
    """Letters of dimensions; which of them a kernel knows is chosen without being told."""
    if not isinstance(compiled_dims, str) or set(compiled_dims) - set("mnk"):
        raise ValueError(
            f"{op}: compiled_dims is {compiled_dims!r}, need letters of 'mnk'. It changes nothing."
        )


def blocks_of(op: str, recipe: Recipe, recipe_a: Half = None, recipe_b: Half = None) -> tuple[Half, Half]:
    """(rows, k) under one scale of A and of B; None where the shapes tell."""
    halves = recipe_a is not None, recipe_b is not None
    wrong = recipe is not None and (len(recipe) != 3 or any(halves))
    if wrong or halves[0] != halves[1] or any(len(half) != 2 for half in (recipe_a, recipe_b) if half):
        raise ValueError(
            f"{op}: recipe is {recipe}, recipe_a {recipe_a} and recipe_b {recipe_b}; need recipe=(gran_m, "
            "gran_n, gran_k), or recipe_a=(gran_m, gran_k) and recipe_b=(gran_n, gran_k), or none of them."
        )
    if recipe is not None:
        return (recipe[0], recipe[2]), (recipe[1], recipe[2])
    return recipe_a, recipe_b


def operand(
    op: str, name: str, given: Any, block: Half = None, *, k_last: bool = True, weight: bool = False
) -> Any:
    """An FP8 operand as the package's own functions take it.

    Args:
      op, name: for errors.
      given: a QuantizedArray, or (values, scales), or what else the product takes.
      block: (rows, k) under one scale, or None.
      k_last: whether k is its last dimension.
      weight: whether it may be FP4.
    """
    x = unwrapped(given)
    stored = None if block is None else block if k_last else block[::-1]
    if isinstance(x, QuantizedArray):
        if stored is not None and tuple(x.block) != tuple(stored):
            raise ValueError(
                f"{op}: {name} has one scale per block {x.block}, and the recipe says {stored}. Leave the "
                "recipe out: a QuantizedArray knows its block."
            )
        return x
    if not isinstance(x, (tuple, list)) or len(x) != 2 or not all(map(is_array, map(unwrapped, x))):
        return x  # refused by the function that takes it, which says what it needs
    values, scales = map(unwrapped, x)
    if values.dtype in (np.dtype(np.int8), np.dtype(np.uint8)):
        if weight:
            return prepared(op, name, values, scales, None if block is None else block[1])
        raise NotImplementedError(
            f"{op}: {name} is {describe(values)}, which is packed FP4: on Hopper it is for b of nt products, "
            "times FP8. Cast it back with cast_back_from_fp4, and to FP8."
        )
    if k_last and values.dtype in FP8_DTYPES and values.ndim >= 2:
        scales = _as_stored(op, name, values, scales, block)
    return (values, scales) if stored is None else QuantizedArray(values, scales, stored)


def _as_stored(op: str, name: str, values: Any, scales: Any, block: Half) -> Any:
    """Scales [.., rows, blocks of k] in float32; packed ones are unpacked."""
    gran_mn, gran_k = block or (1, 128)
    rows, blocks = -(-values.shape[-2] // gran_mn), -(-values.shape[-1] // gran_k)
    if scales.dtype == np.int32 and scales.ndim == values.ndim:
        return unpack_ue8m0_from_int(scales)[..., :blocks]
    moved = (blocks, get_tma_aligned_size(rows, 4))
    if tuple(scales.shape[-2:]) == moved != (rows, blocks):
        raise ValueError(
            f"{op}: scales of {name} are {list(scales.shape)}, the memory that "
            "get_mn_major_tma_aligned_tensor returns; need them as the casts return them, "
            f"{[*values.shape[:-2], rows, blocks]}. Leave the transform out: kernels read scales as they are."
        )
    return scales


def with_alpha(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `alpha`, which DeepGEMM's products take, as an epilogue."""
    rest = dict(options)
    alpha = rest.pop("alpha", None)
    if alpha is None:
        return rest
    return rest | {"epilogue": dataclasses.replace(rest.get("epilogue") or Epilogue(), alpha=alpha)}


def run(function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    """The function, with those keyword arguments in force that are settings of `jax_deepgemm.config`."""
    knobs = {name: options.pop(name) for name in KNOBS if name in options}
    with config.use(**knobs):
        return function(*operands, **options)


def result_dtype(options: dict[str, Any], c: Any) -> dict[str, Any]:
    """The options with the result in C's type, where nothing else is said."""
    dtype = getattr(unwrapped(c), "dtype", None)
    if dtype in (np.dtype(jnp.bfloat16), np.dtype(np.float32)):
        return {"out_dtype": dtype} | options
    return options
