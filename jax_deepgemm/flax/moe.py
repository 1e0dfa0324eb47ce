"""A mixture-of-experts layer: router, experts, optional shared expert."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.core.primitives import dot_general_p
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.flax.linear import SwiGLU
from jax_deepgemm.flax.prepared import hands_on, put_back, weight
from jax_deepgemm.flax.variables import as_input, check_dtype, check_recipe
from jax_deepgemm.flax.weights import GateUp, Initializer, draw, lecun_normal
from jax_deepgemm.moe import ExpertForm, expert_parallel_moe, moe_layer, moe_mlp, moe_mlp_decode, route
from jax_deepgemm.ops.gemm.tokens import Tokens
from jax_deepgemm.ops.quantize import PreparedFp4, QuantizedArray

_PLAIN = ExpertForm()


class Load(NamedTuple):
    """Where the tokens of one call went.

    Attributes:
      tokens: int32 [experts], copies of tokens that chose each expert.
      dropped: int32 [], copies that found no room (`capacity_factor`); 0 without expert parallelism.

    Raises nothing.

    >>> Load(jnp.array([3, 1]), jnp.int32(0)).tokens.tolist()
    [3, 1]
    """

    tokens: jax.Array
    dropped: jax.Array


class RouterBias(nnx.Variable):
    """A router's bias for balance: moved by `MoE.move_bias`, not by gradients, so it is no `nnx.Param`.

    Its value is float32 [experts]. Raises nothing.

    >>> layer = MoE(128, 128, num_experts=4, top_k=2, balance=True, rngs=nnx.Rngs(0))
    >>> type(layer.bias).__name__, layer.bias.shape
    ('RouterBias', (4,))
    """


class MoE(nnx.Module):
    """Every token through its top_k experts, and through the shared expert if there is one.

    y = sum over the token's experts e of weight_e * w2[e] (silu(w1[e] x) * w3[e] x), w13 = (w1, w3)

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import MoE
    >>> layer = MoE(256, 128, num_experts=8, top_k=2, shared_intermediate=128, balance=True, rngs=nnx.Rngs(0))
    >>> y, load = layer(jnp.ones((2, 16, 256), jnp.bfloat16), with_load=True)
    >>> y.shape, y.dtype.name, int(load.tokens.sum())
    ((2, 16, 256), 'bfloat16', 64)
    >>> layer.move_bias(load.tokens, 1e-3)  # after a training step

    The router is a softmax unless said otherwise. DeepSeek-V3's: `MoE(.., **jax_deepgemm.moe.DEEPSEEK_V3)`.

    Attributes:
      gate: nnx.Param [experts, hidden] float32, the router; its logits are computed in float32.
      bias: RouterBias [experts] float32, added to the scores in the choice of experts only; None without
        `balance`.
      w13: nnx.Param [experts, 2 * intermediate, hidden], gate and up projections, gate first, or as form
        says; with `tensor_axis` [experts, 2, intermediate, hidden]; after `quantize_module` a QuantizedParam,
        as w2. Behind the experts come the `shared_experts`.
      w2: nnx.Param [experts, hidden, intermediate], down projections.
      shared: `SwiGLU` that every token visits, or None.
      shared_gate: nnx.Param [hidden] float32, the gate of that, or None.

    Args:
      hidden: size of the last dimension of x and y.
      intermediate: width of one expert.
      num_experts, top_k: experts there are, and experts of a token.
      shared_intermediate: width of the shared expert; 0: there is none. On a mesh each device has it whole.
      shared_gate: whether the shared expert has a gate, sigmoid(x @ shared_gate), as Qwen2-MoE's.
      shared_experts: how many experts of w13 and w2, behind num_experts, every token visits: shared experts
        of the experts' size, in their launches. Not with `expert_axis`.
      form: how the experts are built, `jax_deepgemm.moe.ExpertForm`: activation (of the shared expert too),
        layout of w13 and w2, where routing weights multiply, format of the scales, scales of weight gradients
        (of the shared expert too).
      recipe: "fp8" or "bf16", of all products but the router's; weights in FP8 are used in FP8 either way,
        those in NVFP4 with tokens in bfloat16.
      score, num_groups, top_groups, scale: as in `jax_deepgemm.moe.route`.
      renormalize: as in `route`. None: where top_k > 1; a single weight divided by itself would leave the
        router without a gradient.
      balance: whether the router has a bias that `move_bias` moves, DeepSeek-V3's way to equal load. None:
        where the scores are sigmoids.
      expert_axis: mesh axis that cuts the experts, by `jax_deepgemm.moe.moe_layer`; all axes of the mesh cut
        the tokens. Inside a `jax.shard_map` of yours over this axis: w13 and w2 are this device's part.
        None: all experts on each device. With a mesh each device makes its own experts only, the same as
        without one; w13 and w2 carry the axis as metadata, for `named_shardings` and Flax.
      tensor_axis: with `expert_axis`, a mesh axis that cuts `intermediate`, of gate and up alike.
      mesh: the mesh; default: that of `jax.set_mesh`.
      method, capacity_factor: as in `jax_deepgemm.moe.expert_parallel_moe`: how tokens travel, and how many
        have room; by default all.
      dtype: of y, bfloat16 or float32; x of any other dtype is converted to it first. None: the dtype of x.
      param_dtype: of the master weights, float32 or bfloat16. Gradients have the same.
      kernel_init: initialiser of all weights, called as by `nnx.Linear` with (key, (in, out), dtype) for
        every matrix: for each expert its gate, its up and its down projection. Stored transposed.
      rngs: source of the stream `params`.

    Raises:
      ValueError: another recipe or dtype, experts that the mesh cannot cut; and as `route`, `moe_mlp` and
        `moe_layer` when called.
      TypeError: when called with x in neither bfloat16 nor float32 and without `dtype`.
    """

    quantized_weights = ("w13", "w2")

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        shared_intermediate: int = 0,
        shared_gate: bool = False,
        shared_experts: int = 0,
        recipe: str = "fp8",
        form: ExpertForm = _PLAIN,
        score: str | None = "softmax",
        num_groups: int | None = None,
        top_groups: int | None = None,
        renormalize: bool | None = None,
        scale: float = 1.0,
        balance: bool | None = None,
        expert_axis: str | None = None,
        tensor_axis: str | None = None,
        mesh: Mesh | None = None,
        method: str = "all_to_all",
        capacity_factor: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.recipe, self.form = check_recipe("MoE", recipe), form.checked("MoE")
        self.scale_format = self.form.scale_format
        _check_shared(shared_intermediate, shared_gate, shared_experts, expert_axis, tensor_axis)
        self.dtype = None if dtype is None else check_dtype("MoE", "dtype", dtype)
        self.score, self.num_groups, self.top_groups = score, num_groups, top_groups
        self.renormalize, self.scale = renormalize, scale
        self.expert_axis, self.tensor_axis, self.mesh = expert_axis, tensor_axis, mesh
        self.shared_experts = shared_experts
        self.method, self.capacity_factor = method, capacity_factor
        param_dtype = check_dtype("MoE", "param_dtype", param_dtype)

        act, turned = self.form.act, self.form.weight_layout == "nk"
        apart = tensor_axis is not None and act.gated and not act.interleaved

        def experts(init: Initializer, *shape: int, rows: bool, apart: bool = False) -> nnx.Param:
            spec = None if expert_axis is None else _spec(expert_axis, tensor_axis, rows == turned, apart)
            shape = (num_experts + shared_experts, *shape)
            return draw(
                "MoE",
                init,
                rngs.params(),
                shape,
                param_dtype,
                spec=spec,
                mesh=mesh,
                turned=turned,
                apart=apart,
            )

        self.gate = draw("MoE", kernel_init, rngs.params(), (hidden, num_experts), jnp.float32)
        balance = score == "sigmoid" if balance is None else balance
        self.bias = RouterBias(jnp.zeros(num_experts, jnp.float32)) if balance else nnx.data(None)
        gate_up = GateUp(kernel_init, act.interleaved) if act.gated else kernel_init
        self.w13 = experts(gate_up, hidden, act.halves * intermediate, rows=True, apart=apart)
        self.w2 = experts(kernel_init, intermediate, hidden, rows=False)
        self.shared, self.shared_gate = nnx.data(None), nnx.data(None)
        if shared_intermediate:
            self.shared = SwiGLU(
                hidden,
                shared_intermediate,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                recipe=recipe,
                weight_gradient=self.form.weight_gradient,
                activation=act,
                rngs=rngs,
            )
        if shared_gate:
            init = _as_vector(kernel_init)
            self.shared_gate = draw("MoE", init, rngs.params(), (hidden,), jnp.float32)

    @overload
    def __call__(self, x: ArrayLike, *, with_load: Literal[False] = False) -> jax.Array: ...

    @overload
    def __call__(self, x: ArrayLike, *, with_load: Literal[True]) -> tuple[jax.Array, Load]: ...

    @overload
    def __call__(self, x: ArrayLike, *, with_load: bool) -> Any: ...

    def __call__(self, x: ArrayLike, *, with_load: bool = False) -> Any:
        """Any number of tokens, for training and prefill.

        Args:
          x: [.., hidden] bfloat16 or float32; any dtype if the layer has one. With `expert_axis` on Auto
            axes, cut the first dimension.
          with_load: also return the load.

        Returns:
          [.., hidden] in the dtype of the layer or of x; or (that, `Load`). Inside `jax.shard_map` the load
          is that of this device's tokens.
        """
        return self._through(self._experts, x, with_load)

    @overload
    def decode(self, x: ArrayLike, *, with_load: Literal[False] = False) -> jax.Array: ...

    @overload
    def decode(self, x: ArrayLike, *, with_load: Literal[True]) -> tuple[jax.Array, Load]: ...

    @overload
    def decode(self, x: ArrayLike, *, with_load: bool) -> Any: ...

    def decode(self, x: ArrayLike, *, with_load: bool = False) -> Any:
        """As a call, for few tokens on one device: `jax_deepgemm.moe.moe_mlp_decode`, without gradients.

        Args:
          x: [.., hidden] bfloat16 or float32; any dtype if the layer has one.
          with_load: also return the load.

        Returns:
          [.., hidden] in the dtype of the layer or of x; or (that, `Load`).
        """
        return self._through(self._few_tokens, x, with_load)

    def move_bias(self, tokens: jax.Array, rate: float) -> None:
        """Lowers the bias of experts with more tokens than the mean by `rate`, raises that of the others.

        Args:
          tokens: [experts], `Load.tokens` of one step and all devices.
          rate: step of the bias; what it is added to are scores, between 0 and 1.

        Raises:
          ValueError: the layer has no bias.
        """
        if self.bias is None:
            raise ValueError("MoE.move_bias: the layer has no bias. Make it with balance=True.")
        tokens = tokens.astype(jnp.float32)
        self.bias.set_value(self.bias.get_value() + rate * jnp.sign(tokens.mean() - tokens))

    def _through(self, experts: Any, x: Any, with_load: bool) -> Any:
        x = as_input("MoE", x, self.dtype)
        given = x if x.ndim > 1 else x[None]
        tokens = Tokens.of(given)
        whole = _cut(given, tokens.full_spec(()))  # every device has all features of its tokens
        flat = tokens.flatten(whole)
        ids, weights = self._route(flat)
        y, dropped = experts(flat, ids, weights)
        y = tokens.unflatten(_cut(y, tokens.flat_spec(())))
        if self.shared is not None:
            y = y + self._opened(whole, self.shared(whole))
        y = _cut(y, jax.typeof(given).sharding.spec).reshape(x.shape)
        return (y, Load(_count(ids, self.num_experts), dropped)) if with_load else y

    def _opened(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """y times the gate of the shared expert."""
        if self.shared_gate is None:
            return y
        gate = jnp.broadcast_to(self.shared_gate.get_value(), x.shape)
        opened = jax.nn.sigmoid(jnp.sum(x.astype(jnp.float32) * gate, axis=-1, keepdims=True))
        return (y.astype(jnp.float32) * opened).astype(y.dtype)

    def _experts(self, *routed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y, dropped) of tokens, ids, weights."""
        operands: Any = (*routed, weight(self, "w13"), weight(self, "w2"))
        options: dict[str, Any] = {"recipe": self._recipe(), "form": self.form}
        if self.expert_axis is None:
            options["shared"] = self.shared_experts
            if not hands_on(self) or jax.typeof(routed[0]).sharding.mesh.explicit_axes:
                return moe_mlp(*operands, **options), jnp.zeros((), jnp.int32)
            y, (w13, w2) = moe_mlp(*operands, **options, with_weights=True)
            put_back(self, w13=w13, w2=w2)
            return y, jnp.zeros((), jnp.int32)
        options |= {"method": self.method, "capacity_factor": self.capacity_factor}
        options["tensor_axis"] = self.tensor_axis
        if self.expert_axis in jax.sharding.get_abstract_mesh().manual_axes:
            return expert_parallel_moe(*operands, axis=self.expert_axis, **options)
        return moe_layer(*operands, mesh=self.mesh, expert_axis=self.expert_axis, **options)

    def _few_tokens(self, *routed: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands: Any = (*routed, weight(self, "w13"), weight(self, "w2"))
        y = moe_mlp_decode(*operands, shared=self.shared_experts, recipe=self._recipe(), form=self.form)
        return y, jnp.zeros((), jnp.int32)

    def _recipe(self) -> str:
        w13 = self.w13.get_value()
        if isinstance(w13, PreparedFp4) and w13.is_nvfp4:
            return "bf16"
        return "fp8" if isinstance(w13, QuantizedArray) else self.recipe

    def _route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(tokens, self.gate.get_value())
        return route(
            logits,
            self.top_k,
            score=self.score,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            bias=None if self.bias is None else self.bias.get_value(),
            renormalize=self.renormalize,
            scale=self.scale,
        )


def _spec(expert_axis: str, tensor_axis: str | None, rows: bool, apart: bool) -> P:
    """Of a weight [experts, .., ..] whose inner size is the first of the two, or the second; with its halves
    apart in front of it."""
    inner = (None, tensor_axis) if apart else (tensor_axis,)
    return P(expert_axis, *inner, None) if rows else P(expert_axis, None, *inner)


def _as_vector(init: Initializer) -> Initializer:
    """A vector of `hidden` numbers from an initialiser of matrices."""
    return lambda key, shape, dtype: init(key, (*shape, 1), dtype)[:, 0]


def _check_shared(
    intermediate: int, gate: bool, experts: int, expert_axis: str | None, tensor_axis: str | None
) -> None:
    if gate and not intermediate:
        raise ValueError(
            "MoE: shared_gate=True and shared_intermediate is 0, need the width of the shared expert that has"
            " the gate: shared_intermediate="
        )
    if experts and expert_axis is not None:
        raise ValueError(
            f"MoE: shared_experts is {experts} and expert_axis is {expert_axis!r}: experts cut over devices "
            "cannot be those of all tokens. Let each device have the shared expert: shared_intermediate="
        )
    if tensor_axis is not None and expert_axis is None:
        raise ValueError(
            f"MoE: tensor_axis is {tensor_axis!r} and expert_axis is None, need an axis of the experts too, "
            "which may be one of a single device."
        )


def _logits(tokens: jax.Array, gate: jax.Array) -> jax.Array:
    """tokens [t, hidden] @ gate.T in float32.

    The primitive itself, because libraries that quantise models (qwix) replace `jax.numpy.einsum` and
    `jax.lax.dot_general` while a model runs.
    """
    tokens, gate = same_varying_axes([tokens.astype(jnp.float32), gate.astype(jnp.float32)])
    return dot_general_p.bind(
        tokens,
        gate,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=(lax.Precision.HIGHEST, lax.Precision.HIGHEST),
        preferred_element_type=np.dtype(np.float32),
        out_sharding=None,
    )


def _cut(x: jax.Array, spec: P) -> jax.Array:
    """x cut so, on Explicit axes."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if mesh.explicit_axes else x


def _count(ids: jax.Array, experts: int) -> jax.Array:
    """How often each expert is in ids [t, top_k]."""
    each = jnp.arange(experts, dtype=ids.dtype)[None, None]
    return jnp.sum(ids[..., None] == each, axis=(0, 1), dtype=jnp.int32)
