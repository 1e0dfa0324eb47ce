"""Experts spread over devices: every device has some experts and some tokens.

In FP8, tokens are quantised before they travel (1 byte per element, and a float32 scale per 128), and so are
the gradients of the results in the backward pass. Results, and the gradients of the tokens, travel in the
dtype of x.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.first_order import ReverseOnly
from jax_deepgemm.core.sharding import as_spec, entries
from jax_deepgemm.moe import exchange as way
from jax_deepgemm.moe.bias import check_biases
from jax_deepgemm.moe.checks import check_weights, one_weight
from jax_deepgemm.moe.exchange import Axis, Exchange
from jax_deepgemm.moe.experts import (
    HIGHER_ORDER,
    Experts,
    Kept,
    Weight,
    apply,
    apply_and_keep,
    backward,
    expert_mlp,
    gemm_options,
    is_frozen,
)
from jax_deepgemm.moe.form import PLAIN, ExpertForm
from jax_deepgemm.moe.layer import check_tokens, expected_rows
from jax_deepgemm.moe.placement import cuts
from jax_deepgemm.moe.shared import Shared, SharedExperts, checked_shared, with_shared
from jax_deepgemm.moe.tensor import Cutter, TensorAxis, check_inner
from jax_deepgemm.ops.gemm.checks import PER_ROW
from jax_deepgemm.ops.grouped import recipe as fp8
from jax_deepgemm.ops.quantize import QuantizedArray, dequantize, quantize
from jax_deepgemm.ops.rows.reference import as_words, from_words


def expert_parallel_moe(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    shared: SharedExperts | None = None,
    axis: Axis,
    tensor_axis: Axis | None = None,
    method: str = "all_to_all",
    capacity_factor: float | None = None,
    recipe: str = "fp8",
    form: ExpertForm = PLAIN,
    expected_m: int | None = None,
    num_sms: int | None = None,
    emulate_ragged: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`moe_mlp` inside `jax.shard_map`, with the experts cut over a mesh axis.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> from jax_deepgemm.moe import expert_parallel_moe, route
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("expert",))
    >>> x = jax.random.normal(jax.random.key(0), (6, 256), jnp.bfloat16)
    >>> ids, weights = route(jax.random.normal(jax.random.key(1), (6, 4)), 2)
    >>> w13 = jax.random.normal(jax.random.key(2), (4, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(3), (4, 256, 128)) / 16
    >>> def layer(*args):
    ...     y, dropped = expert_parallel_moe(*args, axis="expert")
    ...     return y, dropped[None]
    >>> cut = P("expert")
    >>> y, dropped = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=cut, out_specs=cut))(
    ...     x, ids, weights, w13, w2)
    >>> y.shape, dropped.tolist()
    ((6, 256), [0])

    Args:
      x: [t, h] bfloat16 or float32: this device's tokens. As many on every device.
      ids: integer [t, top_k], experts of each token among all devices' (device d has [d * e, (d + 1) * e)), a
        token's distinct. Copies with other ids, as -1, are dropped.
      weights: float32 [t, top_k].
      w13: [e, 2 * i, h], gate and up projections of this device's experts, as in `moe_mlp`, prepared and
        frozen ones too.
      w2: [e, h, i], their down projections, likewise.
      b13, b2: biases of this device's experts, as in `moe_mlp`.
      shared: `SharedExperts`, the same on every device of `axis`, through which each device sends its own
        tokens.
      axis: the mesh axis of the experts, or several.
      tensor_axis: a mesh axis, or several, that cuts the inner size i: w13, b13 and w2, and those of shared,
        have this device's features, in w13 those of gate and up alike. b2 is whole. Tokens are equal on its
        devices (y is then summed by one all-reduce) or cut over it (they are gathered, and y is
        reduce-scattered), as the type of x says: `jax.shard_map` with check_vma=True, its default. With
        "fp8" each device has a multiple of 128 features.
      method: "all_to_all": fixed room for each pair of devices; on every platform.
        "ragged": `lax.ragged_all_to_all`, where only what is needed travels; GPUs (elsewhere emulated).
      capacity_factor: room for copies, 1 being that of a balanced load: t * top_k rows on a device, for
        "all_to_all" in equal parts for every source device. None: room for the worst case, so that nothing is
        dropped; with "all_to_all" that much travels too. What has no room is dropped, the copies of later
        tokens first ("ragged": those of later devices); weights are not scaled up for it.
      recipe, form, expected_m, num_sms: as in `moe_mlp`. With `form.weights_first`, or
        biases, tokens travel in the dtype of x also in FP8.
      emulate_ragged: "ragged" by an all-gather, for tests; default: in programs for CPUs.

    Returns:
      (y [t, h] in the dtype of x, dropped): dropped is int32 [], how many copies of this device's tokens
      (with ids in range) had no room.

    Raises:
      ValueError, TypeError: operands that do not fit; the message names both sides.

    Gradients as in `moe_mlp`, dropped copies having none. A weight that other mesh axes replicate gets the
    sum over them. In FP8 the weights' gradients see the tokens (and the gradients of the results) as they
    travelled: quantised per token, then once more along tokens. Deterministic.
    """
    where = "expert_parallel_moe"
    x, ids, weights, w2 = map(unwrapped, (x, ids, weights, w2))
    w13, form = one_weight(where, w13, form), form.checked(where)
    check_tokens(where, x, ids, weights)
    check_weights(where, x, w13, w2, recipe, form)
    b13, b2 = map(unwrapped, (b13, b2))
    check_biases(where, w13, w2, form, b13, b2)
    way.check_method(where, method, capacity_factor)
    shared = _own_weights(where, checked_shared(where, shared, x, w13.shape[0], recipe, form))
    tensor = TensorAxis.of(where, tensor_axis, axis, (x, ids, weights))
    for one in (w2, *(() if shared is None else (shared.w2,))):
        check_inner(where, one, recipe, form, tensor.devices)
    x, ids, weights = tensor.tokens(x, ids, weights)
    experts, b2 = w13.shape[0], tensor.once(b2)
    wire = way.plan_wire(axis, method, x.shape[0], ids.shape[1], experts, capacity_factor, emulate_ragged)
    exchange = way.plan_exchange(ids, experts, wire)
    expected_m = expected_rows(ids.size, experts) if expected_m is None else expected_m
    y = _routed(x, weights, w13, w2, b13, b2, exchange, recipe, form, expected_m, num_sms)
    if shared is not None:
        shared = dataclasses.replace(shared, b2=tensor.once(shared.b2))
    y = with_shared(y, x, shared, recipe, form, num_sms)
    return tensor.sum(y), jnp.sum(tensor.of_own_tokens(exchange.dropped), dtype=jnp.int32)


def _own_weights(where: str, shared: Shared) -> SharedExperts | None:
    if isinstance(shared, int):
        raise ValueError(
            f"{where}: shared is {shared} of the last experts, and the experts are cut over devices, which "
            "every token would have to visit. Give the shared experts weights of their own, on each device: "
            f"w13[:-{shared}], w2[:-{shared}], shared=SharedExperts(w13[-{shared}:], w2[-{shared}:])."
        )
    return shared


def _routed(
    x: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    b13: jax.Array | None,
    b2: jax.Array | None,
    exchange: Exchange,
    recipe: str,
    form: ExpertForm,
    expected_m: int | None,
    num_sms: int | None,
) -> jax.Array:
    """y of the tokens x through the experts, wherever these are."""
    if recipe == "bf16" or form.weights_first or b13 is not None or b2 is not None:
        rows, row_weights = way.send_tokens(exchange, x), way.send_weights(exchange, weights)
        y = expert_mlp(
            rows,
            w13,
            w2,
            exchange.target.group_sizes,
            row_weights,
            b13=b13,
            b2=b2,
            recipe=recipe,
            form=form,
            expected_m=expected_m,
            num_sms=num_sms,
        )
        return way.return_rows(exchange, y)
    static = Experts.of(x.dtype, w13, w2, gemm_options(form, expected_m, num_sms), form)
    leaves, tree = jax.tree.flatten((x, weights, w13, w2, exchange))
    return _fp8(static, *jax.tree.unflatten(tree, same_varying_axes(leaves)))


def moe_layer(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    shared: SharedExperts | None = None,
    mesh: Mesh | None = None,
    expert_axis: Axis = "expert",
    tensor_axis: Axis | None = None,
    token_axes: Axis | None = None,
    method: str = "all_to_all",
    capacity_factor: float | None = None,
    recipe: str = "fp8",
    form: ExpertForm = PLAIN,
    expected_m: int | None = None,
    num_sms: int | None = None,
    emulate_ragged: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`expert_parallel_moe` of whole arrays: tokens cut over all axes of a mesh, experts over one of them.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.moe import moe_layer, route
    >>> mesh = jax.make_mesh((1, 1), ("data", "expert"))
    >>> x = jax.random.normal(jax.random.key(0), (6, 256), jnp.bfloat16)
    >>> ids, weights = route(jax.random.normal(jax.random.key(1), (6, 4)), 2)
    >>> w13 = jax.random.normal(jax.random.key(2), (4, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(3), (4, 256, 128)) / 16
    >>> y, dropped = moe_layer(x, ids, weights, w13, w2, mesh=mesh)
    >>> y.shape, int(dropped)
    ((6, 256), 0)

    Args:
      x: [t, h] bfloat16 or float32: the tokens of all devices; t is a multiple of the devices of token_axes.
      ids: integer [t, top_k], the experts of each token (`route`).
      weights: float32 [t, top_k].
      w13: [e, 2 * i, h], gate and up projections as in `moe_mlp`; e is a multiple of the devices of
        expert_axis.
      w2: [e, h, i], down projections, likewise.
      b13, b2: biases of all experts, as in `moe_mlp`.
      shared: `SharedExperts`, which each device has.
      mesh: default: that of `jax.set_mesh`.
      expert_axis: mesh axis that cuts the experts.
      tensor_axis: mesh axis that cuts the inner size of the experts, and of the shared ones. Gate and up are
        cut alike: store w13 as [e, 2, i, h] (weight_layout "kn": [e, h, 2, i]) with i cut, or as two arrays,
        or in turns. Joined, [e, 2 * i, h], each device takes its parts of what is whole on it.
      token_axes: mesh axes that cut the tokens, expert_axis among them; default: all.
      method, capacity_factor, recipe, form, expected_m, num_sms, emulate_ragged: as in `expert_parallel_moe`.

    Returns:
      (y [t, h], dropped int32 []: copies of all tokens that had no room). On Explicit axes y is cut as x
      is, so that layers can follow each other in a `lax.scan`.

    Raises:
      ValueError, TypeError: operands that do not fit, axes that the mesh has not, tokens or experts that the
      devices do not divide; the message names both sides.
    """
    where = "moe_layer"
    x, ids, weights, w2, b13, b2 = map(unwrapped, (x, ids, weights, w2, b13, b2))
    form = form.checked(where)
    check_tokens(where, x, ids, weights)
    if tensor_axis is None:
        w13 = one_weight(where, w13, form)
        check_weights(where, x, w13, w2, recipe, form)
        check_biases(where, w13, w2, form, b13, b2)
    else:  # joined and checked on each device
        parts: Any = tuple(map(unwrapped, w13)) if isinstance(w13, tuple | list) else unwrapped(w13)
        w13 = parts
    count = jax.tree.leaves(w13)[0].shape[0]
    shared = _own_weights(where, checked_shared(where, shared, x, count, recipe, form, tensor_axis is None))
    axes = mesh or jax.sharding.get_abstract_mesh()
    experts_over, tensor_over = (
        () if axis is None else way.axis_names(axis) for axis in (expert_axis, tensor_axis)
    )
    free = [name for name in axes.axis_names if name not in axes.manual_axes]
    tokens_over = tuple(free) if token_axes is None else way.axis_names(token_axes)
    _check_mesh(dict(axes.shape), experts_over, tokens_over, tensor_over, x.shape[0], count)
    devices = math.prod(axes.shape[name] for name in tensor_over)
    for one in (w2, *(() if shared is None else (shared.w2,))):
        check_inner(where, one, recipe, form, devices, devices)
    cutter, own = Cutter(where, form, experts_over, tensor_over), P(tokens_over)
    pieces = cutter.weight("w13", w13), cutter.weight("w2", w2), cutter.bias(b13), cutter.shared(shared)

    def local(x: Any, ids: Any, weights: Any, b2: Any, *parts: Any) -> tuple[jax.Array, jax.Array]:
        w13, w2, b13, shared = (piece.argument(part) for piece, part in zip(pieces, parts, strict=True))
        y, dropped = expert_parallel_moe(
            x,
            ids,
            weights,
            w13,
            w2,
            b13=b13,
            b2=b2,
            shared=shared,
            axis=expert_axis,
            tensor_axis=tensor_axis,
            method=method,
            capacity_factor=capacity_factor,
            recipe=recipe,
            form=form,
            expected_m=expected_m,
            num_sms=num_sms,
            emulate_ragged=emulate_ragged,
        )
        return y, lax.psum(dropped, tokens_over)

    specs = (own, own, own, P(experts_over), *(piece.specs for piece in pieces))
    args = (x, ids, weights, b2, *(piece.arrays for piece in pieces))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(own, P()), axis_names=set(free))
    if not axes.explicit_axes:
        return run(*args)
    y, dropped = run(*jax.tree.map(functools.partial(_placed, axes, mesh), specs, args))
    return _placed(axes, mesh, as_spec(cuts(x)), y), dropped


def _placed(axes: Any, mesh: Mesh | None, spec: P, tree: Any) -> Any:
    """Arrays with the dimensions that a spec says cut over the Explicit axes of the mesh."""
    kept = as_spec([tuple(a for a in dim if a in axes.explicit_axes) for dim in entries(spec, len(spec))])
    to = kept if mesh is None else NamedSharding(mesh, kept)
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, to), tree)


def _check_mesh(
    mesh: dict[str, int],
    experts_over: tuple[str, ...],
    tokens_over: tuple[str, ...],
    tensor_over: tuple[str, ...],
    tokens: int,
    experts: int,
) -> None:
    unknown = [name for name in tensor_over if name not in mesh or name in experts_over]
    if unknown:
        raise ValueError(
            f"moe_layer: tensor_axis is {tensor_over}, experts are cut over {experts_over}, and the mesh is "
            f"{mesh}: need other axes of the mesh."
        )
    missing = [name for name in (*experts_over, *tokens_over) if name not in mesh]
    if missing or not set(experts_over) <= set(tokens_over):
        raise ValueError(
            f"moe_layer: experts are cut over {experts_over} and tokens over {tokens_over}, and the mesh is "
            f"{mesh}: need axes of the mesh, and tokens cut over those of the experts too. "
            "Pass mesh=, or set one: jax.set_mesh."
        )
    for name, count, over in (("tokens", tokens, tokens_over), ("experts", experts, experts_over)):
        devices = functools.reduce(lambda n, axis: n * mesh[axis], over, 1)
        if count % devices:
            raise ValueError(
                f"moe_layer: {count} {name} over {devices} devices ({over}): need a multiple. "
                f"{_PADDING[name].format(-count % devices)}"
            )


_PADDING = {
    "tokens": "Pad x and weights by {} rows of zeros, ids by rows of -1, and drop these rows of the result.",
    "experts": "Pad w13 and w2 by {} experts of zeros, to which no token goes, or cut the experts over fewer "
    "devices: expert_axis=.",
}


# FP8


class _Parcel(NamedTuple):
    """Rows as they travelled, and a float32 number for each."""

    rows: QuantizedArray
    numbers: jax.Array


def _send(exchange: Exchange, x: jax.Array, numbers: jax.Array | None, scale_format: str = "f32") -> _Parcel:
    """x [t, h], quantised per token, as rows of the experts; with numbers [t, top_k], one collective more."""
    q = quantize(x, PER_ROW, scale_format=scale_format)
    values = from_words(way.tokens_to_rows(exchange, as_words(q.values)), q.dtype)
    if numbers is None:
        scales, row_numbers = way.tokens_to_rows(exchange, q.scales), jnp.zeros(0)
    else:
        per_copy = jnp.broadcast_to(q.scales[:, None], (*numbers.shape, q.scales.shape[1]))
        both = way.copies_to_rows(exchange, jnp.concatenate([per_copy, numbers[..., None]], axis=-1))
        scales, row_numbers = both[:, :-1], both[:, -1]
    return _Parcel(QuantizedArray(values, scales, PER_ROW), row_numbers)


def _along_rows(static: Experts, rows: QuantizedArray, groups: fp8.Groups, of: str) -> fp8.AlongRows:
    """Rows that came quantised, quantised along rows."""
    return fp8.both(dequantize(rows, jnp.bfloat16), groups, static.gemms, of)[1]


def _groups(exchange: Exchange) -> fp8.Groups:
    return fp8.Groups.of(exchange.target.group_sizes, None)


@functools.partial(ReverseOnly, "expert_parallel_moe", HIGHER_ORDER)
def _fp8(
    static: Experts, x: jax.Array, weights: jax.Array, w13: Weight, w2: Weight, exchange: Exchange
) -> jax.Array:
    rows, row_weights = _send(exchange, x, weights, static.form.scale_format)
    quantized = fp8.forward_weight(w13, static.gemms), fp8.forward_weight(w2, static.gemms)
    y = apply(static, rows, *quantized, row_weights, _groups(exchange))
    return way.rows_to_tokens(exchange, y)


def _fp8_fwd(
    static: Experts, x: jax.Array, weights: jax.Array, w13: Weight, w2: Weight, exchange: Exchange
) -> tuple[jax.Array, tuple[Kept, Exchange]]:
    rows, row_weights = _send(exchange, x, weights, static.form.scale_format)
    groups = _groups(exchange)
    along_rows = None if is_frozen(static.w13) else _along_rows(static, rows, groups, "x")
    y, kept = apply_and_keep(static, rows, along_rows, w13, w2, row_weights, groups)
    return way.rows_to_tokens(exchange, y), (kept, exchange)


def _fp8_bwd(static: Experts, residuals: tuple[Kept, Exchange], dy: jax.Array) -> tuple[Any, ...]:
    kept, exchange = residuals
    rows, _ = _send(exchange, dy, None, static.form.scale_format)
    along_rows = None if is_frozen(static.w2) else _along_rows(static, rows, kept.groups, "dy")
    drows, dw13, dw2, drow_weights, _ = backward(static, kept, rows, along_rows)
    dx = way.rows_to_tokens(exchange, drows)
    return dx, way.rows_to_copies(exchange, drow_weights), dw13, dw2, None


_fp8.defvjp(_fp8_fwd, _fp8_bwd)
