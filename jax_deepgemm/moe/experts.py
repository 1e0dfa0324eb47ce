"""The experts: two grouped GEMMs with a SwiGLU between them, on rows sorted by expert.

    h   = rows @ w13[e].T              [m, 2i], bfloat16: gate | up
    act = silu(gate) * up * weight     float32; the row's routing weight is applied here
    y   = act @ w2[e].T                [m, h]

In FP8 each operand is quantised once: rows (1x128, and transposed for dw13), act from float32 (1x128, and
transposed for dw2), dy and dh likewise. Kept for the backward pass: rows and act in FP8 transposed, h in
bfloat16, the transposed FP8 weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.moe.bias import bias_gradient, check_biases, with_bias
from jax_deepgemm.moe.checks import check, one_weight
from jax_deepgemm.moe.form import PLAIN, ExpertForm
from jax_deepgemm.ops.gemm.checks import PER_ROW
from jax_deepgemm.ops.grouped import gated, linear
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.grouped.linear import GROUPED_ACT_FP8, GROUPED_WEIGHT_FP8
from jax_deepgemm.ops.quantize import PreparedWeight, QuantizedArray, quantize, quantize_rows
from jax_deepgemm.ops.quantize.prepared import (
    Bits,
    as_it_came,
    check_trained,
    cotangent,
    master_and_copies,
)
from jax_deepgemm.ops.swiglu import swiglu, swiglu_grad_quantize, swiglu_quantize

HIGHER_ORDER = f"{fp8.HIGHER_ORDER} (forward mode then over reverse mode only, as in jax.hessian)"
"""The same for layers that dispatch."""
MOE_HIDDEN = "jdg_moe_hidden"
"""checkpoint_name of the first GEMM's result, bfloat16 [rows, 2 * intermediate]."""

Weight: TypeAlias = jax.Array | PreparedWeight | fp8.Frozen
_Pair: TypeAlias = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Experts:
    """What of one call is static."""

    gemms: fp8.LayerOptions
    num_groups: int
    rows: np.dtype[Any]
    """dtype of the rows, their gradient, and the result."""
    w13: np.dtype[Any]
    w2: np.dtype[Any]
    specs: tuple[PartitionSpec | None, PartitionSpec | None]
    """PartitionSpecs of w13 and w2 on Explicit axes, for their gradients."""
    prepared: tuple[bool, bool]
    """Whether w13 and w2 are PreparedWeights."""
    form: ExpertForm
    with_weights: bool = False
    """Whether the layer returns (y, masters)."""
    b13: np.dtype[Any] | None = None
    """dtype of the first bias, if there is one."""

    @classmethod
    def of(
        cls,
        rows: np.dtype[Any],
        w13: Weight,
        w2: Weight,
        gemms: fp8.LayerOptions,
        form: ExpertForm,
        with_weights: bool = False,
        b13: jax.Array | None = None,
    ) -> Experts:
        (first, spec13), (second, spec2) = (linear.like(jax.tree.leaves(w)[0]) for w in (w13, w2))
        bias = None if b13 is None else np.dtype(b13.dtype)
        prepared = isinstance(w13, PreparedWeight), isinstance(w2, PreparedWeight)
        return cls(
            gemms,
            w13.shape[0],
            np.dtype(rows),
            first,
            second,
            (spec13, spec2),
            prepared,
            form,
            with_weights,
            bias,
        )

    def results(self, y: jax.Array, *weights: Weight) -> Any:
        """y, or with_weights (y, masters): what the differentiated function of a layer returns."""
        return (y, [master_and_copies(w)[0] for w in weights]) if self.with_weights else y

    def cotangents(self, given: Any) -> tuple[jax.Array, Any]:
        """Those of y, and of the masters that were handed on."""
        return given if self.with_weights else (given, (None, None))

    def public(self, results: Any, *weights: Weight) -> tuple[jax.Array, Any]:
        """y, and with_weights (w13, w2), from what the differentiated function returned."""
        if not self.with_weights:
            return results, None
        y, masters = results
        return y, tuple(map(as_it_came, weights, masters))


class Kept(NamedTuple):
    """What waits for the backward pass. FP8 as (bytes, scales); None for rows and act of frozen weights.

    Weights are the transposed copies, or as they are where they are frozen.
    """

    rows: _Pair | None
    hidden: jax.Array
    act: _Pair | None
    w13: Bits | fp8.Kept
    w2: Bits | fp8.Kept
    row_weights: jax.Array
    groups: fp8.Groups


def gemm_options(
    form: ExpertForm, expected_m: int | None, num_sms: int | None, group_blocks: bool = True
) -> fp8.LayerOptions:
    return fp8.LayerOptions(
        expected_m,
        num_sms,
        group_blocks=group_blocks,
        weight_layout=form.weight_layout,
        scale_format=form.scale_format,
        weight_gradient=form.weight_gradient,
    )


def is_frozen(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 1


@overload
def expert_mlp(
    rows: jax.Array,
    w13: Weight,
    w2: Weight,
    group_sizes: jax.Array,
    row_weights: jax.Array | None = ...,
    *,
    b13: jax.Array | None = ...,
    b2: jax.Array | None = ...,
    recipe: str = ...,
    form: ExpertForm = ...,
    group_offset: ArrayLike | None = ...,
    expected_m: int | None = ...,
    num_sms: int | None = ...,
    with_weights: Literal[False] = ...,
) -> jax.Array: ...


@overload
def expert_mlp(
    rows: jax.Array,
    w13: Weight,
    w2: Weight,
    group_sizes: jax.Array,
    row_weights: jax.Array | None = ...,
    *,
    b13: jax.Array | None = ...,
    b2: jax.Array | None = ...,
    recipe: str = ...,
    form: ExpertForm = ...,
    group_offset: ArrayLike | None = ...,
    expected_m: int | None = ...,
    num_sms: int | None = ...,
    with_weights: Literal[True],
) -> tuple[jax.Array, tuple[Any, Any]]: ...


def expert_mlp(
    rows: jax.Array,
    w13: Weight,
    w2: Weight,
    group_sizes: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    recipe: str = "fp8",
    form: ExpertForm = PLAIN,
    group_offset: ArrayLike | None = None,
    expected_m: int | None = None,
    num_sms: int | None = None,
    with_weights: bool = False,
) -> Any:
    """y = (silu(gate) * up * row_weight) @ w2[e].T with gate | up = row @ w13[e].T, for the rows of each
    expert e.

    >>> import jax, jax.numpy as jnp
    >>> rows = jax.random.normal(jax.random.key(0), (10, 256), jnp.bfloat16)
    >>> w13 = jax.random.normal(jax.random.key(1), (3, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(2), (3, 256, 128)) / 16
    >>> expert_mlp(rows, w13, w2, jnp.array([4, 0, 5])).shape
    (10, 256)

    Args:
      rows: [m, h] bfloat16 or float32, sorted by expert (`dispatch`).
      w13: [e, 2 * i, h] gate and up projections, gate first: bfloat16 or float32 master weights, or for
        "fp8" a PreparedWeight of them (`prepare_weights`; the gradient goes to its master), or a
        QuantizedArray of block (128, 128) or a `PreparedFp4` for a frozen weight, which has no gradient. Or
        two arrays, (gate [e, i, h], up [e, i, h]), masters or frozen, which are joined at each call, a copy.
      w2: [e, h, i] down projections, likewise.
      group_sizes: integer [e_all], rows of each expert.
      row_weights: float32 [m], factors of the rows (`spread_weights`); None: ones.
      b13: [e, 2 * i] bias of the first product, in the order of w13's rows, bfloat16 or float32, or None. In
        FP8 it is one more pass over h where h is stored (training, and other activations than silu); its
        gradient is summed from dh as dw13 reads it.
      b2: [e, h] bias of the second product, times the row's weight, likewise.
      recipe: "fp8": both GEMMs and their four gradients in FP8. "bf16": all in bfloat16.
      form: how the model's experts are built (`ExpertForm`): activation, layout of the weights, where the
        routing weight multiplies, format of the scales.
      group_offset: the expert of w13[0], where only a part of the experts is here.
      expected_m: rows of an expert to expect, for the choice of the kernel.
      num_sms: as in `fp8_gemm_nt`.
      with_weights: also return w13 and w2, as they came. Where these are used in place of w13 and w2 from
        there on, the products of weight gradients add to the gradients of the later uses, in their buffers
        (with "bf16" XLA adds): see `accumulate_gradients`.

    Returns:
      [m, h] in the dtype of rows; or (that, (w13, w2)). Rows behind the last group, and those of experts
      that are not here, are zero.

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.

    Gradients of rows, row_weights and master weights, of first order and in reverse mode. For
    `jax.checkpoint` policies the kept FP8 activations are named "jdg_grouped_act_fp8", the kept FP8 weights
    "jdg_grouped_weight_fp8", and the first GEMM's result "jdg_moe_hidden".
    """
    rows, w2, group_sizes, row_weights = map(unwrapped, (rows, w2, group_sizes, row_weights))
    if with_weights:
        check_trained("expert_mlp", w13=w13, w2=w2)
    w13, form = one_weight("expert_mlp", w13, form), form.checked("expert_mlp")
    b13, b2 = map(unwrapped, (b13, b2))
    check("expert_mlp", rows, w13, w2, group_sizes, row_weights, recipe, form)
    check_biases("expert_mlp", w13, w2, form, b13, b2)
    if row_weights is None:
        row_weights = jnp.ones(rows.shape[:1], jnp.float32)
    spec = linear.like(rows)[1]
    if spec is not None:
        row_weights = jax.sharding.reshard(row_weights, PartitionSpec(*spec[:1]))
    groups = fp8.Groups.of(group_sizes, group_offset)
    if form.weights_first:
        rows, row_weights = _weighted(rows, row_weights, groups), jnp.ones_like(row_weights)
    gemms = gemm_options(form, expected_m, num_sms, fp8.rows_are_whole(rows))
    leaves, tree = jax.tree.flatten((rows, w13, w2, row_weights, groups, b13, b2))
    rows, w13, w2, row_weights, groups, b13, b2 = jax.tree.unflatten(tree, same_varying_axes(leaves))
    if recipe == "bf16":  # gradients of replicated weights are summed in their own dtype, not in bfloat16
        y, handed_on = _bf16(rows, w13, w2, groups, row_weights, b13, gemms, form), (w13, w2)
    else:
        static = Experts.of(rows.dtype, w13, w2, gemms, form, with_weights, b13)
        y, handed_on = static.public(_fp8(static, rows, w13, w2, row_weights, b13, groups), w13, w2)
    y = with_bias(y, b2, groups, row_weights)
    return (y, handed_on) if with_weights else y


def weighted(rows: jax.Array, row_weights: jax.Array) -> jax.Array:
    """Rows times their weights, rounded to the rows' dtype."""
    return (rows.astype(jnp.float32) * row_weights[:, None]).astype(rows.dtype)


def _weighted(rows: jax.Array, row_weights: jax.Array, groups: fp8.Groups) -> jax.Array:
    """The same with zeros behind the last group, so that NaN there is in no gradient."""
    counts = jnp.arange(rows.shape[0], dtype=jnp.int32) < groups.end(rows.shape[0])
    return weighted(jnp.where(counts[:, None], rows, jnp.zeros_like(rows)), row_weights)


def _bf16(
    rows: jax.Array,
    w13: Any,
    w2: Any,
    groups: fp8.Groups,
    row_weights: jax.Array,
    b13: jax.Array | None,
    gemms: fp8.LayerOptions,
    form: ExpertForm,
) -> jax.Array:
    gemm = functools.partial(
        linear.BF16_GEMMS[form.weight_layout],
        group_sizes=groups.sizes,
        group_offset=groups.offset,
        expected_m=gemms.expected_m,
        num_sms=gemms.num_sms,
    )
    hidden = with_bias(gemm(rows.astype(jnp.bfloat16), linear.in_bf16(w13)), b13, groups)
    hidden = checkpoint_name(hidden, MOE_HIDDEN)
    act = swiglu(hidden, row_weights, activation=form.act)
    return gemm(act, linear.in_bf16(w2), out_dtype=rows.dtype)


def apply(
    static: Experts,
    rows: QuantizedArray,
    w13: fp8.Frozen,
    w2: fp8.Frozen,
    row_weights: jax.Array,
    groups: fp8.Groups,
    b13: jax.Array | None = None,
    *,
    local: bool = True,
) -> jax.Array:
    """y of quantised rows and weights; nothing is kept. `local`: whether no mesh axis may cut the experts."""
    fused = local and runs_fused(static.form, w13)
    act = _act(static, rows, w13, row_weights, groups, b13, fused)
    return fp8.m_grouped(act, w2, groups, static.gemms, static.rows)


def runs_fused(form: ExpertForm, w13: fp8.Frozen) -> bool:
    """Whether SwiGLU runs inside the first GEMM."""
    return form.fuses and gated.fits(w13)


def _act(
    static: Experts,
    rows: QuantizedArray,
    w13: Any,
    row_weights: jax.Array,
    groups: fp8.Groups,
    b13: jax.Array | None,
    fused: bool,
) -> QuantizedArray:
    """The SwiGLU of the first GEMM, quantised. Fused with it where that is possible: of each row the 8 i
    bytes that h takes to be written and read again are saved, and a launch."""
    gemms, form = static.gemms, static.form
    if fused:
        return gated.of_groups(rows, w13, row_weights, groups, gemms, b13)
    hidden = with_bias(fp8.m_grouped(rows, w13, groups, gemms, jnp.bfloat16), b13, groups)
    end = groups.end(hidden.shape[0])
    quantized = functools.partial(swiglu_quantize, transposed=False, scale_format=form.scale_format)
    values, scales = quantized(hidden, row_weights, end, activation=form.act)
    return QuantizedArray(values, scales, PER_ROW)


def apply_and_keep(
    static: Experts,
    rows: QuantizedArray,
    along_rows: fp8.AlongRows | None,
    w13: Weight,
    w2: Weight,
    row_weights: jax.Array,
    groups: fp8.Groups,
    b13: jax.Array | None = None,
) -> tuple[jax.Array, Kept]:
    """`apply` of the weights, and what `backward` needs."""
    first, kept_w13 = _copies(static, w13)
    second, kept_w2 = _copies(static, w2)
    hidden = with_bias(fp8.m_grouped(rows, first, groups, static.gemms, jnp.bfloat16), b13, groups)
    hidden = checkpoint_name(hidden, MOE_HIDDEN)
    trained = not is_frozen(static.w2)
    counted = fp8.counted(groups, hidden.shape[0], static.gemms, "x", trained)
    values, scales, *act_t = swiglu_quantize(hidden, row_weights, activation=static.form.act, **counted)
    y = fp8.m_grouped(QuantizedArray(values, scales, PER_ROW), second, groups, static.gemms, static.rows)
    return y, Kept(
        rows=None if along_rows is None else fp8.keep(*along_rows, GROUPED_ACT_FP8),
        hidden=hidden,
        act=fp8.keep(act_t[0], act_t[1], GROUPED_ACT_FP8) if trained else None,
        w13=kept_w13,
        w2=kept_w2,
        row_weights=row_weights,
        groups=groups,
    )


def backward(
    static: Experts,
    kept: Kept,
    dy: QuantizedArray,
    dy_along_rows: fp8.AlongRows | None,
    later: Any = (None, None),
) -> tuple[jax.Array, Any, Any, jax.Array, jax.Array | None]:
    """(gradient of the rows, of w13, of w2, of the row weights, of b13).

    later: gradients of the later uses of w13 and w2, which theirs are added to; None where there are none.
    """
    groups, gemms = kept.groups, static.gemms
    inner, features = kept.hidden.shape[1] // static.form.act.halves, dy.shape[1]
    dact = fp8.m_grouped(dy, _for_dgrad(kept.w2, static.w2, inner), groups, gemms, jnp.bfloat16)
    along_rows = kept.rows is not None or static.b13 is not None
    counted = fp8.counted(groups, dact.shape[0], gemms, "dy", along_rows)
    gradients: Any = swiglu_grad_quantize(
        kept.hidden, kept.row_weights, dact, activation=static.form.act, **counted
    )
    dh, dh_scales, *dh_t, dweights = gradients
    dh_rows = QuantizedArray(dh, dh_scales, PER_ROW)
    drows = fp8.m_grouped(dh_rows, _for_dgrad(kept.w13, static.w13, features), groups, gemms, static.rows)
    dh_along_rows = fp8.AlongRows(*dh_t) if dh_t else None
    weight_gradient = functools.partial(_weight_gradient, static, groups, dact.shape[0])
    dw13 = weight_gradient(dh_along_rows, kept.rows, static.w13, static.specs[0], later[0])
    dw2 = weight_gradient(dy_along_rows, kept.act, static.w2, static.specs[1], later[1])
    dw13, dw2 = map(_like_the_weight, static.prepared, (dw13, dw2))
    db13 = None
    if static.b13 is not None and dh_along_rows is not None:
        count = static.num_groups
        db13 = bias_gradient(dh_along_rows, groups, dact.shape[0], count, gemms, static.b13)
    return drows, dw13, dw2, dweights, db13


def _like_the_weight(prepared: bool, dw: jax.Array | None) -> Any:
    """The gradient of a prepared weight is that of its master."""
    return cotangent(dw) if prepared else dw


def _copies(static: Experts, w: Weight) -> tuple[fp8.Frozen, Bits | fp8.Kept]:
    """The weight of the forward GEMM, and what the backward one needs: of a frozen one, itself."""
    if isinstance(w, fp8.Frozen):
        linear.require_blocked("expert_mlp", w)
        return w, fp8.keep_frozen(w, GROUPED_WEIGHT_FP8)
    return fp8.both_weights(*master_and_copies(w), static.gemms, GROUPED_WEIGHT_FP8)


def _for_dgrad(kept: Bits | fp8.Kept, dtype: np.dtype[Any], k: int) -> QuantizedArray:
    """The transposed weight, which has k rows."""
    if isinstance(kept, Bits):
        return kept.meant
    return fp8.frozen_transposed(kept, dtype, k)


def _weight_gradient(
    static: Experts,
    groups: fp8.Groups,
    rows: int,
    dy: fp8.AlongRows | None,
    kept: _Pair | None,
    dtype: np.dtype[Any],
    spec: PartitionSpec | None,
    later: jax.Array | None,
) -> jax.Array | None:
    if kept is None or dy is None:
        return None
    x = fp8.AlongRows(*fp8.kept(kept))
    return fp8.k_grouped(dy, x, groups, rows, static.num_groups, static.gemms, dtype, spec, later)


@functools.partial(ReverseOnly, "expert_mlp", fp8.HIGHER_ORDER)
def _fp8(
    static: Experts,
    rows: jax.Array,
    w13: Weight,
    w2: Weight,
    row_weights: jax.Array,
    b13: jax.Array | None,
    groups: fp8.Groups,
) -> Any:
    weights = fp8.forward_weight(w13, static.gemms), fp8.forward_weight(w2, static.gemms)
    quantized_rows, _ = quantized(static, False, rows, groups)
    y = apply(static, quantized_rows, *weights, row_weights, groups, b13, local=static.gemms.group_blocks)
    return static.results(y, w13, w2)


def quantized(
    static: Experts,
    trained: bool,
    x: jax.Array,
    groups: fp8.Groups,
    index: jax.Array | None = None,
    position: jax.Array | None = None,
    of: str = "x",
) -> tuple[QuantizedArray, fp8.AlongRows | None]:
    """x, or x[index] (position: its inverse), per row, and along rows if a weight's gradient needs that.
    of: "dy" for a gradient."""
    if trained:
        return fp8.both(x, groups, static.gemms, of, index)
    form = static.form.scale_format
    if index is None:
        return quantize(x, PER_ROW, scale_format=form), None
    return quantize_rows(x, index, position, scale_format=form), None


def _fp8_fwd(
    static: Experts,
    rows: jax.Array,
    w13: Weight,
    w2: Weight,
    row_weights: jax.Array,
    b13: jax.Array | None,
    groups: fp8.Groups,
) -> tuple[Any, Kept]:
    quantized_rows, along_rows = quantized(static, not is_frozen(static.w13), rows, groups)
    y, kept = apply_and_keep(static, quantized_rows, along_rows, w13, w2, row_weights, groups, b13)
    return static.results(y, w13, w2), kept


def _fp8_bwd(static: Experts, kept: Kept, cotangents: Any) -> tuple[Any, ...]:
    dy, later = static.cotangents(cotangents)
    quantized_dy, along_rows = quantized(static, not is_frozen(static.w2), dy, kept.groups, of="dy")
    drows, dw13, dw2, dweights, db13 = backward(static, kept, quantized_dy, along_rows, later)
    return drows, dw13, dw2, dweights, db13, None


_fp8.defvjp(_fp8_fwd, _fp8_bwd)
