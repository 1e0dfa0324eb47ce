"""Dense layers in FP8 or BF16: a linear one, and a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jax_deepgemm.activation import swiglu
from jax_deepgemm.flax.variables import as_bf16, check_recipe, sharding_metadata
from jax_deepgemm.gemm.api import bf16_gemm_nt
from jax_deepgemm.gemm.linear import fp8_linear
from jax_deepgemm.gemm.tokens import Tokens
from jax_deepgemm.quantization import QuantizedArray

Initializer = Callable[..., jax.Array]
variance_scaling = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


class Linear(nnx.Module):
    """y = x @ weight.T + bias, with FP8 or BF16 tensor cores in the forward and the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import Linear
    >>> layer = Linear(256, 512, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((2, 8, 256), jnp.bfloat16))
    >>> y.shape, y.dtype.name
    ((2, 8, 512), 'bfloat16')

    Attributes:
      weight: nnx.Param [out_features, in_features], the master weight; after `quantize_module` a
        QuantizedParam.
      bias: nnx.Param [out_features] float32, or None.

    Args:
      in_features, out_features: sizes of the last dimension of x and y.
      use_bias: whether there is a bias; float32, added to y.
      recipe: "fp8" (`fp8_linear`) or "bf16" (`bf16_gemm_nt`); a quantised weight is used in FP8 either way.
      param_dtype: of the master weight, float32 or bfloat16. Gradients have the same.
      out_dtype: of y, bfloat16 or float32.
      kernel_init: initializer of the weight, called with (key, (out_features, in_features), param_dtype).
      sharding: PartitionSpec of the weight, kept as metadata for `named_shardings`; nothing is placed by it.
      rngs: source of the stream `params`.

    Raises:
      ValueError: another recipe; and as `fp8_linear` or `bf16_gemm_nt` when called.
    """

    quantized_weights = ("weight",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        recipe: str = "fp8",
        param_dtype: Any = jnp.float32,
        out_dtype: Any = jnp.bfloat16,
        kernel_init: Initializer = variance_scaling,
        sharding: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.recipe = check_recipe("Linear", recipe)
        self.out_dtype = jnp.dtype(out_dtype)
        weight = kernel_init(rngs.params(), (out_features, in_features), param_dtype)
        self.weight = nnx.Param(weight, **sharding_metadata(sharding))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [.., in_features] bfloat16 or float32 -> [.., out_features]."""
        y = linear(self.recipe, x, self.weight.get_value(), self.out_dtype)
        return y if self.bias is None else (y + self.bias.get_value()).astype(y.dtype)


class SwiGLU(nnx.Module):
    """y = (silu(gate) * up) @ w2.T with gate | up = x @ w13.T: the MLP of one expert, for all tokens.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import SwiGLU
    >>> SwiGLU(256, 128, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 256), jnp.bfloat16)).shape
    (2, 8, 256)

    Attributes:
      w13: Linear [2 * intermediate, hidden], gate and up projections, gate first.
      w2: Linear [hidden, intermediate], down projection.

    Args:
      hidden: size of the last dimension of x and y.
      intermediate: width of the MLP.
      recipe, param_dtype, kernel_init, rngs: as in `Linear`.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        recipe: str = "fp8",
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = variance_scaling,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"recipe": recipe, "param_dtype": param_dtype, "kernel_init": kernel_init}
        self.w13 = Linear(hidden, 2 * intermediate, **options, rngs=rngs)
        self.w2 = Linear(intermediate, hidden, **options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [.., hidden] bfloat16 or float32 -> [.., hidden] bfloat16."""
        return self.w2(swiglu(self.w13(x)))


def linear(recipe: str, x: jax.Array, w: Any, out_dtype: Any = jnp.bfloat16) -> jax.Array:
    """x [.., k] @ w.T for w [n, k], master weight or QuantizedArray."""
    if recipe == "fp8" or isinstance(w, QuantizedArray):
        return fp8_linear(x, w, out_dtype=out_dtype)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"Linear: x is {x.dtype.name}, need bfloat16 or float32, which the layer rounds to bfloat16. "
            "Convert it: x.astype(jnp.bfloat16)."
        )
    tokens = Tokens.of(x if x.ndim > 1 else x[None])
    flat = tokens.flatten(x if x.ndim > 1 else x[None])
    y = tokens.unflatten(bf16_gemm_nt(as_bf16(flat), as_bf16(w), out_dtype=out_dtype))
    return y if x.ndim > 1 else y[0]
