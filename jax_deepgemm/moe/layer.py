"""A mixture of experts on one device: dispatch, experts, combine."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.moe import experts
from jax_deepgemm.moe.bias import check_biases
from jax_deepgemm.moe.bias import of_tokens as bias_of_tokens
from jax_deepgemm.moe.checks import check_weights, one_weight
from jax_deepgemm.moe.dispatch import (
    DispatchPlan,
    combine,
    is_known,
    plan_dispatch,
    spread,
    spread_weights,
    sum_copies,
    take_rows,
)
from jax_deepgemm.moe.experts import Experts, Weight, expert_mlp, gemm_options
from jax_deepgemm.moe.form import PLAIN, ExpertForm
from jax_deepgemm.moe.placement import check_no_explicit_axes, on_each_device
from jax_deepgemm.moe.shared import (
    Shared,
    SharedExperts,
    checked_shared,
    split_shared,
    with_last_experts,
    with_shared,
)
from jax_deepgemm.ops.experts import api as chain
from jax_deepgemm.ops.grouped import linear
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.grouped.checks import as_int32
from jax_deepgemm.ops.quantize.prepared import check_trained

MOST_CHAINED = 16
"""Copies of tokens up to which the layer is one chain of launches (ops/experts): for one token of 8 experts
it takes 4 % less time on an H200, for 16 tokens and more up to 2 % more (docs/performance_log.md)."""


@overload
def moe_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = ...,
    b2: jax.Array | None = ...,
    shared: Shared = ...,
    recipe: str = ...,
    form: ExpertForm = ...,
    expected_m: int | None = ...,
    num_sms: int | None = ...,
    with_weights: Literal[False] = ...,
) -> jax.Array: ...


@overload
def moe_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = ...,
    b2: jax.Array | None = ...,
    shared: Shared = ...,
    recipe: str = ...,
    form: ExpertForm = ...,
    expected_m: int | None = ...,
    num_sms: int | None = ...,
    with_weights: Literal[True],
) -> tuple[jax.Array, tuple[Any, Any]]: ...


def moe_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    shared: Shared = None,
    recipe: str = "fp8",
    form: ExpertForm = PLAIN,
    expected_m: int | None = None,
    num_sms: int | None = None,
    with_weights: bool = False,
) -> Any:
    """Each token through its experts: y[t] = sum_s weights[t, s] * MLP of expert ids[t, s] of x[t].

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.moe import moe_mlp, route
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> x = jax.random.normal(keys[0], (6, 256), jnp.bfloat16)
    >>> gate = jax.random.normal(keys[1], (4, 256)) / 16
    >>> w13 = jax.random.normal(keys[2], (4, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(keys[3], (4, 256, 128)) / 16
    >>> def layer(x, gate, w13, w2):
    ...     ids, weights = route(x.astype(jnp.float32) @ gate.T, 2)
    ...     return moe_mlp(x, ids, weights, w13, w2)
    >>> layer(x, gate, w13, w2).shape
    (6, 256)
    >>> loss = lambda *args: layer(*args).astype(jnp.float32).sum()
    >>> [g.dtype.name for g in jax.grad(loss, (0, 1, 2, 3))(x, gate, w13, w2)]
    ['bfloat16', 'float32', 'float32', 'float32']

    Args:
      x: [t, h] bfloat16 or float32. Merge leading dimensions first, or use jax.vmap.
      ids: integer [t, top_k], the experts of each token (`route`). Copies with an id outside [0, e) are
        dropped: they count zero, and have zero gradients.
      weights: float32 [t, top_k].
      w13: [e, 2 * i, h] gate and up projections, gate first: bfloat16 or float32 master weights, or for
        "fp8" a PreparedWeight of them (`prepare_weights`), or a QuantizedArray of block (128, 128) or a
        `PreparedFp4` for frozen ones.
        Or two arrays, (gate, up), as in `expert_mlp`.
      w2: [e, h, i] down projections, likewise.
      b13, b2: biases [e, 2 * i] and [e, h] of the two products, bfloat16 or float32, as in `expert_mlp`.
      shared: `SharedExperts`, which every token passes beside those of its ids: a layer of their own, added
        to y. Or n, where they have the experts' size: the last n experts of w13 and w2 are shared, no id goes
        to them, and they are in the same launches. None: there are none.
      recipe: "fp8": the GEMMs and their gradients in FP8, as in `expert_mlp`. "bf16": all in bfloat16.
      form: how the model's experts are built (`ExpertForm`).
      expected_m: rows of an expert to expect, for the choice of the kernel; default t * top_k / e.
      num_sms: as in `fp8_gemm_nt`.
      with_weights: as in `expert_mlp`; on Explicit axes inside `jax.shard_map` only.

    Returns:
      [t, h] in the dtype of x; or (that, (w13, w2)). Weights multiply before the second GEMM, or as form says
      before the first; a token's copies are summed in float32, slot by slot.

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.

    Which tokens go where is data: another routing does not compile again. Deterministic. On a mesh with
    Explicit axes each device dispatches the tokens it has, through all experts: y is cut as x is, and w13 and
    w2 are gathered where other dimensions than the experts are cut. On Auto axes do that inside
    `jax.shard_map`. Experts cut over devices: `moe_layer`, or inside `jax.shard_map` `expert_parallel_moe`.
    """
    x, ids, weights, w2 = map(unwrapped, (x, ids, weights, w2))
    if with_weights:
        check_trained("moe_mlp", w13=w13, w2=w2)
    w13, form = one_weight("moe_mlp", w13, form), form.checked("moe_mlp")
    check_tokens("moe_mlp", x, ids, weights)
    check_weights("moe_mlp", x, w13, w2, recipe, form)
    if with_weights:
        check_no_explicit_axes("moe_mlp", x)
    b13, b2 = map(unwrapped, (b13, b2))
    check_biases("moe_mlp", w13, w2, form, b13, b2)
    shared = checked_shared("moe_mlp", shared, x, w13.shape[0], recipe, form)
    last, own = split_shared(shared)
    layer = functools.partial(_moe_mlp, recipe, form, expected_m, num_sms, with_weights, last)
    return on_each_device("moe_mlp", layer, (x, ids, weights, w13, w2, b13, b2, own))


def _moe_mlp(
    recipe: str,
    form: ExpertForm,
    expected_m: int | None,
    num_sms: int | None,
    with_weights: bool,
    last: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    b2: jax.Array | None,
    shared: SharedExperts | None,
) -> Any:
    expected_m = expected_rows(ids.size, w13.shape[0] - last) if expected_m is None else expected_m
    ids, weights = with_last_experts(ids, weights, w13.shape[0], last)
    plan = plan_dispatch(ids, w13.shape[0])
    leaves, tree = jax.tree.flatten((x, ids, weights, w13, w2, b13, b2, plan))
    x, ids, weights, w13, w2, b13, b2, plan = jax.tree.unflatten(tree, same_varying_axes(leaves))
    if recipe == "bf16" or form.weights_first:
        options: dict[str, Any] = {"recipe": recipe, "form": form, "with_weights": with_weights}
        results: Any = expert_mlp(
            spread(x, plan),
            w13,
            w2,
            plan.group_sizes,
            spread_weights(weights, plan),
            b13=b13,
            expected_m=expected_m,
            num_sms=num_sms,
            **options,
        )
        y, handed_on = results if with_weights else (results, None)
        y = combine(y, plan)
    else:
        gemms = gemm_options(form, expected_m, num_sms)
        static = Experts.of(x.dtype, w13, w2, gemms, form, with_weights, b13)
        y, handed_on = static.public(_fp8(static, x, ids, weights, w13, w2, b13, plan), w13, w2)
    if b2 is not None:
        bias = bias_of_tokens(ids, None if form.weights_first else weights, b2)
        y = (y.astype(jnp.float32) + bias).astype(y.dtype)
    y = with_shared(y, x, shared, recipe, form, num_sms)
    return (y, handed_on) if with_weights else y


def _groups(plan: DispatchPlan) -> fp8.Groups:
    return fp8.Groups.of(plan.group_sizes, None)


@functools.partial(ReverseOnly, "moe_mlp", experts.HIGHER_ORDER)
def _fp8(
    static: Experts,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    plan: DispatchPlan,
) -> Any:
    quantized = fp8.forward_weight(w13, static.gemms), fp8.forward_weight(w2, static.gemms)
    plain = static.form.fuses and b13 is None and is_known(ids.size) and ids.size <= MOST_CHAINED
    if plain and chain.fits(x, ids, *quantized):
        options: dict[str, Any] = {"expected_m": static.gemms.expected_m, "num_sms": static.gemms.num_sms}
        ids = as_int32("moe_mlp", "ids", ids, "[t, top_k]")
        return static.results(chain.experts_swiglu(x, ids, weights, *quantized, **options), w13, w2)
    rows, _ = experts.quantized(static, False, x, _groups(plan), plan.token, plan.inverse)
    row_weights = take_rows(weights.reshape(-1), plan.source)
    y = experts.apply(static, rows, *quantized, row_weights, _groups(plan), b13)
    return static.results(sum_copies(y, plan.position), w13, w2)


def _fp8_fwd(
    static: Experts,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    plan: DispatchPlan,
) -> tuple[Any, tuple[experts.Kept, DispatchPlan]]:
    groups, trained = _groups(plan), not experts.is_frozen(static.w13)
    rows, along_rows = experts.quantized(static, trained, x, groups, plan.token, plan.inverse)
    row_weights = take_rows(weights.reshape(-1), plan.source)
    y, kept = experts.apply_and_keep(static, rows, along_rows, w13, w2, row_weights, groups, b13)
    return static.results(sum_copies(y, plan.position), w13, w2), (kept, plan)


def _fp8_bwd(
    static: Experts, residuals: tuple[experts.Kept, DispatchPlan], cotangents: Any
) -> tuple[Any, ...]:
    kept, plan = residuals
    dy, later = static.cotangents(cotangents)
    trained = not experts.is_frozen(static.w2)
    rows, along_rows = experts.quantized(static, trained, dy, kept.groups, plan.token, plan.inverse, "dy")
    drows, dw13, dw2, drow_weights, db13 = experts.backward(static, kept, rows, along_rows, later)
    dweights = take_rows(drow_weights, plan.position)
    return sum_copies(drows, plan.position), None, dweights, dw13, dw2, db13, None


_fp8.defvjp(_fp8_fwd, _fp8_bwd)


def expected_rows(copies: int, experts: int) -> int | None:
    """Rows of an expert if all have the same load; None of a symbolic number of copies."""
    return max(-(-copies // max(experts, 1)), 1) if is_known(copies) else None


def check_tokens(where: str, x: Any, ids: Any, weights: Any) -> None:
    """x is [t, h], ids and weights are [t, top_k]."""
    linear.check_rows(where, "x", x)
    for name, given in (("ids", ids), ("weights", weights)):
        if not hasattr(given, "shape") or given.ndim != 2 or given.shape[0] != x.shape[0]:
            shape = list(given.shape) if hasattr(given, "shape") else type(given).__name__
            raise ValueError(
                f"{where}: {name} are {shape} and x is {list(x.shape)}, need [{x.shape[0]}, top_k]. "
                "jax_deepgemm.moe.route makes ids and weights."
            )
    if tuple(ids.shape) != tuple(weights.shape):
        raise ValueError(
            f"{where}: ids are {list(ids.shape)} and weights are {list(weights.shape)}, need the same shape."
        )
    if weights.dtype != jnp.float32:
        raise ValueError(
            f"{where}: weights are {weights.dtype.name}, need float32. Convert them: "
            "weights.astype(jnp.float32)."
        )
