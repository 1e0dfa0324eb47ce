"""Dense layers in FP8 or BF16: a linear one, and a gated MLP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.sharding import entries
from jax_deepgemm.flax.prepared import hands_on, put_back, weight
from jax_deepgemm.flax.variables import as_bf16, as_input, check_dtype, check_recipe
from jax_deepgemm.flax.weights import GateUp, Initializer, draw, lecun_normal, zeros
from jax_deepgemm.ops.gemm.api import bf16_gemm_nt
from jax_deepgemm.ops.gemm.checks import check_weight_gradient
from jax_deepgemm.ops.gemm.linear import fp8_linear
from jax_deepgemm.ops.gemm.tokens import Tokens
from jax_deepgemm.ops.grouped.linear import in_bf16
from jax_deepgemm.ops.quantize import PreparedFp4, QuantizedArray
from jax_deepgemm.ops.quantize.activation import SILU, Activation, as_activation
from jax_deepgemm.ops.swiglu import swiglu


class Linear(nnx.Module):
    """y = x @ weight.T + bias, with FP8 or BF16 tensor cores in the forward and the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import Linear
    >>> layer = Linear(256, 512, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((2, 8, 256), jnp.bfloat16))
    >>> y.shape, y.dtype.name
    ((2, 8, 512), 'bfloat16')

    Arguments that `nnx.Linear` has too mean the same, and equal seeds give equal initial weights. What
    differs: the weight is stored [out, in], as the kernels read it; y has the dtype of x where `nnx.Linear`
    promotes x with its kernel (bfloat16 x and a float32 weight: bfloat16 here, float32 there); products are
    in FP8 or bfloat16, whatever the dtypes, with float32 sums; float16 is none of the dtypes.

    Attributes:
      weight: nnx.Param [out_features, in_features], the master weight; after `quantize_module` a
        QuantizedParam.
      bias: nnx.Param [out_features], or None.

    Args:
      in_features, out_features: sizes of the last dimension of x and y.
      use_bias: whether there is a bias.
      dtype: of y, bfloat16 or float32; x of any other dtype is converted to it first. None: the dtype of x.
      param_dtype: of the weight and the bias, float32 or bfloat16. Gradients have the same.
      kernel_init: initialiser of the weight, called with (key, (in_features, out_features), param_dtype) as
        `nnx.Linear` does, so that its fan-in is in_features; the result is stored transposed.
      bias_init: initialiser of the bias, called with (key, (out_features,), param_dtype).
      recipe: "fp8" (`fp8_linear`) or "bf16" (`bf16_gemm_nt`); a weight in FP8 is used in FP8 either way, one
        in NVFP4 with x in bfloat16.
      weight_gradient: with "fp8", "1x128" or the faster "128x128": see `fp8_linear`.
      sharding: PartitionSpec of the weight [out, in]; the bias is cut as its first dimension. Under
        `jax.set_mesh` each device makes its part only (`kernel_init` is traced for that). It is kept as
        metadata, for `named_shardings` and Flax.
      rngs: source of the stream `params`.

    Raises:
      ValueError: another recipe, weight_gradient or dtype, a sharding that does not fit the mesh or the
        sizes; and as `fp8_linear` or `bf16_gemm_nt` when called.
      TypeError: when called with x in neither bfloat16 nor float32 and without `dtype`.
    """

    quantized_weights = ("weight",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        recipe: str = "fp8",
        weight_gradient: str = "1x128",
        sharding: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.recipe = check_recipe("Linear", recipe)
        check_weight_gradient("Linear", weight_gradient)
        self.weight_gradient = weight_gradient
        self.dtype = None if dtype is None else check_dtype("Linear", "dtype", dtype)
        self.param_dtype = check_dtype("Linear", "param_dtype", param_dtype)
        shape = (in_features, out_features)
        self.weight = draw("Linear", kernel_init, rngs.params(), shape, self.param_dtype, spec=sharding)
        self.bias = nnx.data(None)
        if use_bias:
            rows = None if sharding is None else PartitionSpec(*sharding[:1])
            self.bias = draw("Linear", bias_init, rngs.params(), shape[1:], self.param_dtype, spec=rows)

    def __call__(self, x: ArrayLike, out_sharding: PartitionSpec | NamedSharding | None = None) -> jax.Array:
        """x [.., in_features] -> [.., out_features].

        Args:
          x: bfloat16 or float32; any dtype if the layer has one.
          out_sharding: y's sharding on a mesh with Explicit axes; needed there if in_features is cut.
        """
        x = as_input("Linear", x, self.dtype)
        w = weight(self, "weight")
        options: dict[str, Any] = {"out_sharding": out_sharding, "weight_gradient": self.weight_gradient}
        if hands_on(self):
            y, w = fp8_linear(x, w, out_dtype=x.dtype, with_weight=True, **options)
            put_back(self, weight=w)
        else:
            y = linear(self.recipe, x, w, **options)
        return y if self.bias is None else _add(y, self.bias.get_value())

    @classmethod
    def from_nnx(cls, linear: nnx.Linear, *, recipe: str = "fp8") -> Linear:
        """The layer with the weights, dtypes and metadata (shardings among them) of an `nnx.Linear`.

        >>> dense = nnx.Linear(256, 128, rngs=nnx.Rngs(0))
        >>> layer = Linear.from_nnx(dense)
        >>> layer.weight.shape, bool((layer.to_nnx().kernel[...] == dense.kernel[...]).all())
        ((128, 256), True)

        Its precision, dot_general, promote_dtype and preferred_element_type say how it multiplies, and are
        left behind.

        Raises:
          TypeError: another class, also one derived from `nnx.Linear`, or a kernel that is no variable.
          ValueError: a recipe or dtype that this layer has not.
        """
        if type(linear) is not nnx.Linear or not isinstance(linear.kernel, nnx.Variable):
            kernel = type(getattr(linear, "kernel", None)).__name__
            raise TypeError(
                f"Linear.from_nnx: linear is a {type(linear).__name__} whose kernel is a {kernel}, need an "
                "nnx.Linear with an nnx.Param. Others compute something else: set the weight of a Linear of "
                "your own, layer.weight.set_value(kernel.T)."
            )
        layer = nnx.eval_shape(
            lambda: cls(
                linear.in_features,
                linear.out_features,
                use_bias=linear.bias is not None,
                dtype=linear.dtype,
                param_dtype=linear.param_dtype,
                recipe=recipe,
                rngs=nnx.Rngs(0),
            )
        )
        layer.weight = _transposed(linear.kernel)
        if linear.bias is not None:
            layer.bias = linear.bias.copy()
        return layer

    def to_nnx(self) -> nnx.Linear:
        """An `nnx.Linear` with the same weights, dtypes and metadata: what `from_nnx` takes, exactly.

        Raises:
          ValueError: the weight is quantised.
        """
        if isinstance(self.weight.get_value(), QuantizedArray | PreparedFp4):
            fp4 = isinstance(self.weight.get_value(), PreparedFp4)
            numbers = "quantization.dequantize_fp4" if fp4 else "dequantize"
            value = f"layer.weight.get_value(){f'.fp4({self.in_features})' if fp4 else ''}"
            raise ValueError(
                "Linear.to_nnx: the weight is quantised, need a master weight. Make one first: "
                f"layer.weight = nnx.Param(jax_deepgemm.{numbers}({value}, jnp.float32))."
            )
        linear = nnx.eval_shape(
            lambda: nnx.Linear(
                self.in_features,
                self.out_features,
                use_bias=self.bias is not None,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        linear.kernel = _transposed(self.weight)
        if self.bias is not None:
            linear.bias = self.bias.copy()
        return linear


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [.., n] + bias [n], rounded once, without implicit promotion of dtypes or ranks."""
    wide = jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return (y.astype(jnp.float32) + wide).astype(y.dtype)


def _transposed(weight: nnx.Variable) -> nnx.Variable:
    """The same variable of weight.T, its sharding turned too."""
    value, sharding = weight.get_value().T, weight.get_metadata().get("out_sharding")
    return weight.replace(value) if not sharding else weight.replace(value, out_sharding=_turned(sharding))


def _turned(sharding: Any) -> Any:
    """The two entries exchanged, of a PartitionSpec, a tuple of names or a NamedSharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, _turned(sharding.spec))
    rows, columns = (*sharding, None, None)[:2]
    return type(sharding)(columns, rows) if isinstance(sharding, PartitionSpec) else (columns, rows)


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
      dtype, param_dtype, recipe, weight_gradient, rngs: as in `Linear`; gate, up and y have one dtype.
      kernel_init: as in `Linear`; gate and up are drawn as two matrices (hidden, intermediate).
      activation: another one in the place of silu, as in `jax_deepgemm.moe.ExpertForm`; "relu2" has no gate.

    Raises:
      ValueError: another recipe, weight_gradient, dtype or activation.
      TypeError: when called with x in neither bfloat16 nor float32 and without `dtype`.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        recipe: str = "fp8",
        weight_gradient: str = "1x128",
        activation: str | Activation = SILU,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = act = as_activation("SwiGLU", activation)
        options: dict[str, Any] = {
            "use_bias": False,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "recipe": recipe,
            "weight_gradient": weight_gradient,
        }
        gate_up = GateUp(kernel_init, act.interleaved) if act.gated else kernel_init
        self.w13 = Linear(hidden, act.halves * intermediate, kernel_init=gate_up, **options, rngs=rngs)
        self.w2 = Linear(intermediate, hidden, kernel_init=kernel_init, **options, rngs=rngs)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """x [.., hidden] -> [.., hidden], dtypes as in `Linear`."""
        return self.w2(swiglu(self.w13(x), activation=self.activation))


def linear(
    recipe: str, x: jax.Array, w: Any, out_sharding: Any = None, weight_gradient: str = "1x128"
) -> jax.Array:
    """x [.., k] @ w.T in the dtype of x, for w [n, k], a master weight, prepared or quantised."""
    nvfp4 = isinstance(w, PreparedFp4) and w.is_nvfp4
    if (recipe == "fp8" and not nvfp4) or isinstance(w, QuantizedArray):
        options: dict[str, Any] = {"out_sharding": out_sharding, "weight_gradient": weight_gradient}
        return fp8_linear(x, w, out_dtype=x.dtype, **options)
    spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
    if x.ndim < 2:
        return linear(recipe, x[None], w, None if spec is None else PartitionSpec(None, *spec))[0]
    tokens = Tokens.of(x)
    flat_spec = None
    if spec is not None:
        features = entries(spec, x.ndim)[-1]
        flat_spec = tokens.flat_spec(tuple(axis for axis in features if axis not in tokens.axes))
    y = bf16_gemm_nt(as_bf16(tokens.flatten(x)), in_bf16(w), out_dtype=x.dtype, out_sharding=flat_spec)
    y = tokens.unflatten(y)
    if spec is not None and jax.typeof(y).sharding.mesh.explicit_axes:
        y = jax.sharding.reshard(y, out_sharding)
    return y
