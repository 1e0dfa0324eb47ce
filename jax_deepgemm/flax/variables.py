"""Frozen FP8 and FP4 weights as Flax variables, and shardings of variables."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, QuantizedArray, prepare_fp4, quantize
from jax_deepgemm.ops.quantize.array import as_dtype

FROZEN = QuantizedArray | PreparedFp4
RECIPES = ("fp8", "bf16")
_FORMS = (("float8_e4m3fn", (128, 128)), ("float4_e2m1fn", (1, 32)), ("float4_e2m1fn", (1, 16)))
DTYPES = ("bfloat16", "float32")
Module = TypeVar("Module", bound=nnx.Module)


class QuantizedParam(nnx.Variable):
    """A frozen weight: its value is a `QuantizedArray`, or a `PreparedFp4`.

    It is no `nnx.Param`, so `nnx.grad` (whose default is `wrt=nnx.Param`) and optimizers made with
    `wrt=nnx.Param` leave it as it is. It goes through `nnx.jit`, `nnx.split` and checkpoints as a pair of
    arrays, values and scales (FP4: as one). Raises nothing itself: the values check their parts.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import quantize
    >>> from jax_deepgemm.flax import QuantizedParam
    >>> QuantizedParam(quantize(jnp.ones((256, 128)), (128, 128))).get_value()
    QuantizedArray(float8_e4m3fn[256,128], scales float32[2,1], block=(128, 128))
    """

    def __getitem__(self, index: Any) -> Any:
        return self.get_value() if index is Ellipsis else super().__getitem__(index)


def quantize_module(
    module: Module, dtype: DTypeLike = jnp.float8_e4m3fn, block: tuple[int, int] = (128, 128)
) -> Module:
    """A copy for inference: the weights of every `Linear` and `MoE` in FP8 or FP4, as `QuantizedParam`.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import Linear, quantize_module
    >>> frozen = quantize_module(Linear(256, 128, rngs=nnx.Rngs(0)))
    >>> frozen.weight.get_value()
    QuantizedArray(float8_e4m3fn[128,256], scales float32[1,2], block=(128, 128))
    >>> frozen(jnp.ones((4, 256), jnp.bfloat16)).shape
    (4, 128)
    >>> quantize_module(Linear(256, 128, rngs=nnx.Rngs(0)), jnp.float4_e2m1fn, (1, 16)).weight.get_value()
    PreparedFp4(float4_e2m1fn[128,256] for bfloat16)

    Args:
      module: any module that holds such layers, at any depth, or is one. It is not changed, and what is not
        quantised (norms, embeddings, routers) is shared with it.
      dtype, block: float8_e4m3fn and (128, 128); or float4_e2m1fn and (1, 32), MXFP4, or (1, 16), NVFP4, for
        weights whose rows are multiples of 64 (`jax_deepgemm.prepare_fp4`).

    Returns:
      A module of the same class. Inputs still have gradients; the quantised weights have none. For an
      abstract one, to restore a checkpoint into: `nnx.eval_shape(lambda: quantize_module(...))`.

    Raises:
      ValueError: nothing to quantise: no `Linear` or `MoE` with `nnx.Param` weights inside; a dtype or block
        that layers do not take; sizes or a layout of weights that FP4 does not have.
    """
    fp4 = _is_fp4(dtype, tuple(block))
    copy = nnx.merge(*nnx.split(module))
    quantized = 0
    for _, part in nnx.iter_graph(copy):
        for name in getattr(type(part), "quantized_weights", ()):
            weight = getattr(part, name)
            if isinstance(weight, nnx.Param):
                _check_layout(part, fp4)
                setattr(part, name, _frozen(weight, dtype, block))
                quantized += 1
    if not quantized:
        raise ValueError(
            f"quantize_module: {type(module).__name__} holds no Linear or MoE of jax_deepgemm.flax with "
            "weights to quantise."
        )
    return copy


def _is_fp4(dtype: Any, block: tuple[int, ...]) -> bool:
    given = as_dtype("quantize_module", "dtype", dtype, "float8_e4m3fn or float4_e2m1fn").name
    if (given, block) not in _FORMS:
        forms = ", or ".join(f"{name} and {shape}" for name, shape in _FORMS)
        raise ValueError(f"quantize_module: dtype is {given} and block {block}, need {forms}.")
    return given != "float8_e4m3fn"


def _check_layout(layer: nnx.Module, fp4: bool) -> None:
    if fp4 and getattr(getattr(layer, "form", None), "weight_layout", "nk") != "nk":
        raise ValueError(
            "quantize_module: a MoE has weight_layout 'kn' and dtype is float4_e2m1fn, whose scales lie "
            "along k; need weight_layout 'nk', or float8_e4m3fn."
        )


def _frozen(weight: nnx.Param, dtype: Any, block: tuple[int, int]) -> QuantizedParam:
    value: Any = quantize(weight.get_value(), block, dtype)
    value = prepare_fp4(value) if isinstance(value, Fp4Array) else value
    return QuantizedParam(value, **sharding_metadata(weight.get_metadata().get("out_sharding")))


def sharding_metadata(spec: P | None) -> dict[str, Any]:
    """What a variable is made with to carry a spec that `named_shardings` and Flax read; places nothing."""
    return {} if spec is None else {"out_sharding": spec, "eager_sharding": False}


def partition_spec(variable: nnx.Variable) -> P | None:
    """Its `out_sharding` in axes of the mesh: Flax's rules of logical axes apply."""
    if not variable.get_metadata().get("out_sharding"):
        return None
    return nnx.get_partition_spec(variable).get_value()


def named_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedShardings for a state of variables: by their `out_sharding` metadata, else replicated.

    >>> import jax
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import MoE, named_shardings
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> layer = MoE(128, 128, num_experts=4, top_k=2, expert_axis="expert", rngs=nnx.Rngs(0))
    >>> named_shardings(nnx.state(layer), mesh)["w13"].get_value().spec[0]
    'expert'

    Args:
      state: an `nnx.State` or another pytree of variables, of arrays or their shapes.
      mesh: the mesh that the metadata's axes are of.

    Returns:
      The same pytree with shardings in place of arrays, for `out_shardings`, `jax.device_put`, checkpoints.
      Scales of a `QuantizedParam` are cut along with its values where every cut is at the edge of a block.

    Raises:
      ValueError: metadata that names axes which the mesh has not.
    """

    def of(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, P())
        sharding = NamedSharding(mesh, partition_spec(variable) or P())
        value = variable.get_value()
        return variable.replace(value.shardings(sharding) if isinstance(value, FROZEN) else sharding)

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def check_recipe(where: str, recipe: str) -> str:
    if recipe not in RECIPES:
        raise ValueError(f"{where}: recipe is {recipe!r}, need 'fp8' or 'bf16'.")
    return recipe


def check_dtype(where: str, name: str, dtype: Any) -> np.dtype[Any]:
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"{where}: {name} is {dtype.name}, need bfloat16 or float32.")
    return dtype


def as_input(where: str, x: Any, dtype: np.dtype[Any] | None) -> jax.Array:
    """x in the dtype of a layer, if it has one; bfloat16 or float32 in any case."""
    x = jnp.asarray(x, dtype)
    if x.dtype.name not in DTYPES:
        raise TypeError(
            f"{where}: x is {x.dtype.name}, need bfloat16 or float32. Convert it, or make the layer with a "
            "dtype, which it converts x to: dtype=jnp.bfloat16."
        )
    return x


def as_bf16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)
