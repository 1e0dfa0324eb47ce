"""Token copies to the devices of their experts, and results back, inside shard_map.

    source device                                           device of the experts
    x [t, ..] --source--> send buffer [S, ..]  == collective ==>  received [R, ..] --target--> rows [R, ..]

    source: copies in the order of their devices (then of the tokens), each in its slot of the send buffer
    target: what was received, in the order of the experts (then of source device, then of the tokens)

The way back is the same way backwards, and each is the other's gradient. Two collectives:

    "all_to_all"   capacity slots for each pair of devices, S = R = devices * capacity; static, any platform
    "ragged"       only what is needed travels, lax.ragged_all_to_all; R is the space for what may arrive
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.moe.dispatch import DispatchPlan, plan_capacity, plan_dispatch, sum_copies, take_rows
from jax_deepgemm.ops.grouped.checks import as_int32
from jax_deepgemm.ops.rows.api import move_rows

METHODS = ("all_to_all", "ragged")
MOST_PEERS = 8  # whose memory XLA's kernel for ragged_all_to_all writes
COPIES = 512  # that fill a GPU: four blocks for an SM
Axis: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class Wire:
    """The collective, and its static numbers.

    Attributes:
      axis: mesh axis of the experts.
      method: "all_to_all" or "ragged".
      devices: devices along the axis.
      sends: slots of the send buffer, S.
      receives: slots of the receive buffer, R.
      emulate: "ragged" by all_gather and take; None: on platforms without ragged_all_to_all (CPU), which is
        decided where a program is lowered, as it may be traced for another platform than it is traced on.
    """

    axis: Axis
    method: str
    devices: int
    sends: int
    receives: int
    emulate: bool | None = None

    @property
    def pieces(self) -> int:
        """How many pieces of the rows for a device are copied at the same time. Among up to eight GPUs of a
        host XLA's kernel has one block of 128 threads for each; elsewhere each piece is a message."""
        return COPIES // self.devices if self.devices <= MOST_PEERS else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transfer:
    """Who sends how many rows where: int32 [source, destination], the same on all devices.

    Attributes:
      sizes: rows.
      read: where they begin in the source's buffer.
      write: where they begin in the destination's buffer.
    """

    sizes: jax.Array
    read: jax.Array
    write: jax.Array

    def reverse(self) -> Transfer:
        return Transfer(self.sizes.T, self.write.T, self.read.T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exchange:
    """One routing's way to the experts and back.

    Attributes:
      source: copies of this device's tokens in the send buffer; group_sizes: per destination.
      target: received rows, in the order of this device's experts; group_sizes: per expert.
      transfer: of "ragged", else None.
      dropped: int32 [t], copies of each of this device's tokens that found no place.
    """

    source: DispatchPlan
    target: DispatchPlan
    transfer: Transfer | None
    dropped: jax.Array
    wire: Wire = field(metadata={"static": True})


def plan_wire(
    axis: Axis,
    method: str,
    tokens: int,
    top_k: int,
    experts: int,
    capacity_factor: float | None,
    emulate: bool | None,
) -> Wire:
    """Static sizes of the buffers. experts: those of one device. No factor: whatever may come has room."""
    devices = lax.axis_size(axis)
    copies = tokens * top_k
    most = tokens * min(top_k, experts)  # of one source for one destination: a token's experts are distinct
    if method == "all_to_all":
        slots = most if capacity_factor is None else math.ceil(capacity_factor * copies / devices)
        slots = devices * min(max(slots, 1), max(most, 1))
        return Wire(axis, method, devices, slots, slots)
    space = devices * most
    if capacity_factor is not None:
        space = min(math.ceil(capacity_factor * copies), space)
    return Wire(axis, method, devices, copies, max(space, 1), emulate)


def plan_exchange(ids: jax.Array, experts: int, wire: Wire) -> Exchange:
    """The way of each copy. ids [t, top_k]: of all experts, device by device; others are dropped."""
    ids = as_int32("dispatch", "ids", ids, "[t, top_k]")
    exists = (ids >= 0) & (ids < experts * wire.devices)
    device = jnp.where(exists, ids // experts, -1)
    if wire.method == "all_to_all":
        source, transfer = plan_capacity(device, wire.devices, wire.sends // wire.devices), None
    else:
        source, transfer = _ragged(plan_dispatch(device, wire.devices), device, wire)
    sent = take_rows((ids % experts + 1).astype(jnp.int32).reshape(-1), source.source)  # 0: an empty slot
    received = _collective(wire, transfer, sent) - 1
    target = plan_dispatch(received[:, None], experts)
    dropped = jnp.sum(exists, axis=1, dtype=jnp.int32) - jnp.sum(source.kept, axis=1, dtype=jnp.int32)
    return Exchange(source, target, transfer, dropped, wire)


def _ragged(plan: DispatchPlan, device: jax.Array, wire: Wire) -> tuple[DispatchPlan, Transfer]:
    """Copies as they are sorted; what has no space stays behind, that of later devices first."""
    wanted = _gather(wire, plan.group_sizes)  # [source, destination]
    write = jnp.minimum(jnp.cumsum(wanted, axis=0) - wanted, wire.receives)
    sizes = jnp.minimum(wanted, wire.receives - write)
    transfer = Transfer(sizes, jnp.cumsum(wanted, axis=1) - wanted, write)
    me = lax.axis_index(wire.axis)
    rank = plan.position - transfer.read[me][device]
    kept = plan.kept & (rank < sizes[me][device])
    return DispatchPlan(plan.source, jnp.where(kept, plan.position, wire.sends), sizes[me]), transfer


def _gather(wire: Wire, x: jax.Array) -> jax.Array:
    return lax.all_gather(x, wire.axis)


def _collective(wire: Wire, transfer: Transfer | None, x: jax.Array) -> jax.Array:
    """[S, ..] -> [R, ..]; where nothing arrives, zeros ("ragged") or what the slot held ("all_to_all")."""
    if wire.method == "all_to_all":
        return lax.all_to_all(x, wire.axis, 0, 0, tiled=True)
    assert transfer is not None
    return _ragged_all_to_all(wire, transfer, x, wire.receives)


def _collective_back(wire: Wire, transfer: Transfer | None, y: jax.Array) -> jax.Array:
    """[R, ..] -> [S, ..]"""
    if wire.method == "all_to_all":
        return lax.all_to_all(y, wire.axis, 0, 0, tiled=True)
    assert transfer is not None
    return _ragged_all_to_all(wire, transfer.reverse(), y, wire.sends)


def _ragged_all_to_all(wire: Wire, transfer: Transfer, x: jax.Array, rows: int) -> jax.Array:
    ragged, emulated = (functools.partial(way, wire, rows) for way in (_ragged_collective, _by_all_gather))
    if wire.emulate is None:
        return lax.platform_dependent(transfer, x, cpu=emulated, default=ragged)
    return emulated(transfer, x) if wire.emulate else ragged(transfer, x)


def _ragged_collective(wire: Wire, rows: int, transfer: Transfer, x: jax.Array) -> jax.Array:
    me = lax.axis_index(wire.axis)
    result = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    zero = jnp.int32(jnp.any(x != 0) & False)  # with x's dimension of vmap, which JAX wants of all or of none
    sends, arrives = transfer.sizes[me], transfer.sizes[:, me]
    send_begins, send_sizes = pieces(sends, wire.pieces)
    numbers = (
        (transfer.read[me][:, None] + send_begins).reshape(-1),
        send_sizes.reshape(-1),
        (transfer.write[me][:, None] + send_begins).reshape(-1),
        pieces(arrives, wire.pieces)[1].reshape(-1),
    )
    x, result, *where = same_varying_axes([x, result, *(number + zero for number in numbers)])
    return lax.ragged_all_to_all(x, result, *where, axis_name=wire.axis)


def pieces(sizes: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Cuts each of some ranges into `count` of about equal size: where they begin in it, and their sizes.

    >>> import jax.numpy as jnp
    >>> [part.tolist() for part in pieces(jnp.array([7, 0]), 3)]
    [[[0, 3, 5], [0, 0, 0]], [[3, 2, 2], [0, 0, 0]]]
    """
    part = jnp.arange(count + 1, dtype=jnp.int32)
    edges = (sizes // count)[:, None] * part + jnp.minimum(part, (sizes % count)[:, None])
    return edges[:, :-1], jnp.diff(edges, axis=1)


def _by_all_gather(wire: Wire, rows: int, transfer: Transfer, x: jax.Array) -> jax.Array:
    me = lax.axis_index(wire.axis)
    everything = _gather(wire, x)
    begin, size = (part[:, me][None, :] for part in (transfer.write, transfer.sizes))
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    from_ = (row >= begin) & (row < begin + size)  # [rows, source]
    buffer = jnp.arange(wire.devices, dtype=jnp.int32) * x.shape[0]  # where a source's begins
    flat = jnp.sum(jnp.where(from_, (buffer + transfer.read[:, me])[None, :] + row - begin, 0), axis=1)
    index = jnp.where(jnp.any(from_, axis=1), flat, everything.shape[0] * x.shape[0])
    return take_rows(everything.reshape(-1, *x.shape[1:]), index)


def tokens_to_rows(exchange: Exchange, x: jax.Array) -> jax.Array:
    """x [t, ..] of this device's tokens -> [R, ..] rows of this device's experts, zeros in the tail."""
    sent = move_rows(x, exchange.source.token)
    return move_rows(_collective(exchange.wire, exchange.transfer, sent), exchange.target.source)


def copies_to_rows(exchange: Exchange, x: jax.Array) -> jax.Array:
    """x [t, top_k, ..], another value for each copy -> [R, ..]."""
    flat = x.reshape(-1, *x.shape[2:])
    sent = take_rows(flat, exchange.source.source)
    return take_rows(_collective(exchange.wire, exchange.transfer, sent), exchange.target.source)


def rows_to_tokens(exchange: Exchange, y: jax.Array) -> jax.Array:
    """[R, ..] -> [t, ..]: the sum of each token's rows in float32, rounded once."""
    return sum_copies(_rows_back(exchange, y), exchange.source.position)


def rows_to_copies(exchange: Exchange, y: jax.Array) -> jax.Array:
    """[R, ..] -> [t, top_k, ..]; zero for dropped copies."""
    return take_rows(_rows_back(exchange, y), exchange.source.position)


def _rows_back(exchange: Exchange, y: jax.Array) -> jax.Array:
    received = move_rows(y, exchange.target.position[:, 0])
    return _collective_back(exchange.wire, exchange.transfer, received)


def _pair(
    there: Callable[[Exchange, jax.Array], jax.Array], back: Callable[[Exchange, jax.Array], jax.Array]
) -> Callable[[Exchange, jax.Array], jax.Array]:
    """`there` with `back` as its gradient."""

    @jax.custom_vjp
    def function(exchange: Exchange, x: jax.Array) -> jax.Array:
        return there(exchange, x)

    def forward(exchange: Exchange, x: jax.Array) -> tuple[jax.Array, Exchange]:
        return there(exchange, x), exchange

    def backward(exchange: Exchange, gradient: jax.Array) -> tuple[None, jax.Array]:
        return None, back(exchange, gradient)

    function.defvjp(forward, backward)

    @functools.wraps(there)
    def varying(exchange: Exchange, x: jax.Array) -> jax.Array:
        leaves, tree = jax.tree.flatten((exchange, x))
        return function(*jax.tree.unflatten(tree, same_varying_axes(leaves)))

    return varying


send_tokens = _pair(tokens_to_rows, rows_to_tokens)
send_weights = _pair(copies_to_rows, rows_to_copies)
return_rows = _pair(rows_to_tokens, tokens_to_rows)


def axis_names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis)


def check_method(where: str, method: Any, capacity_factor: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"{where}: method is {method!r}, need 'all_to_all' or 'ragged'.")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(
            f"{where}: capacity_factor is {capacity_factor!r}, need a positive number (1: room for a "
            "balanced load), or None: room for every copy."
        )
