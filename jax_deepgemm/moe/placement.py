"""MoE functions of one device on arrays whose types say how a mesh cuts them (Explicit axes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jax_deepgemm.core.op import mesh_of
from jax_deepgemm.core.sharding import Axes, as_spec, entries


def cuts(x: Any) -> list[Axes]:
    """The Explicit mesh axes that cut each dimension."""
    aval = jax.typeof(x)
    return entries(aval.sharding.spec if aval.sharding.mesh.explicit_axes else None, aval.ndim)


def on_each_device(where: str, layer: Callable[..., jax.Array], operands: Sequence[Any]) -> jax.Array:
    """layer(x, ids, weights, w13, w2, ..) -> y of one device, on the tokens that each device has.

    On Explicit axes tokens stay where they are, and so does y; weights are gathered where anything but their
    experts is cut. Elsewhere the layer as it is.
    """
    leaves = jax.tree.leaves(tuple(operands))
    mesh = mesh_of([jax.typeof(leaf) for leaf in leaves])
    if not mesh.explicit_axes:
        return layer(*operands)
    for name, w in zip(("w13", "w2", "b13", "b2"), operands[3:], strict=False):
        _check_experts(where, name, w)
    spec = as_spec(cuts(operands[0]))
    tokens = as_spec(cuts(operands[0])[:1])
    specs = (tokens, tokens, tokens, *(P() for _ in operands[3:]))
    run = jax.shard_map(layer, in_specs=specs, out_specs=tokens, axis_names=set(mesh.explicit_axes))

    def placed(*operands: Any) -> jax.Array:
        whole = [
            jax.tree.map(lambda leaf, to=to: jax.sharding.reshard(leaf, to), operand)
            for operand, to in zip(operands, specs, strict=True)
        ]
        return jax.sharding.reshard(run(*whole), spec)

    if not jax.sharding.get_abstract_mesh().empty:
        return placed(*operands)
    with _context(mesh, leaves):  # arrays that are on a mesh which was not set
        return jax.jit(placed)(*operands)


def _context(mesh: Any, leaves: Sequence[Any]) -> Any:
    """The mesh of the devices themselves where they are known, which partitioning over Auto axes asks for."""
    for leaf in leaves:
        devices = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf.sharding, "mesh", None)
        if devices is not None and getattr(devices, "abstract_mesh", None) == mesh:
            return jax.set_mesh(devices)
    return jax.sharding.use_abstract_mesh(mesh)


def _check_experts(where: str, name: str, w: Any) -> None:
    axes = next((cuts(leaf)[0] for leaf in jax.tree.leaves(w) if cuts(leaf)[0]), ())
    if axes:
        axis = repr(axes[0] if len(axes) == 1 else axes)
        raise ValueError(
            f"{where}: {name} is {list(w.shape)}, its experts cut over {axis} of the mesh, need all experts "
            f"on each device. Use moe_layer(x, ids, weights, w13, w2, expert_axis={axis}), which sends tokens"
            f" to the devices of their experts, or gather them: jax.sharding.reshard({name}, jax.P())."
        )


def check_no_explicit_axes(where: str, x: Any) -> None:
    """Refuses with_weights where weights are copied to devices that each have some tokens."""
    axes = jax.typeof(x).sharding.mesh.explicit_axes
    if axes:
        raise ValueError(
            f"{where}: with_weights on the Explicit axes {axes} of the mesh, need the tokens of one device. "
            "Call it inside jax.shard_map over these axes, or leave out with_weights: XLA then adds."
        )


def check_uncut(where: str, **arrays: Any) -> None:
    """Refuses rows that Explicit axes cut, where their order over all devices would count."""
    for name, x in arrays.items():
        axes = cuts(x)[0] if x.ndim else ()
        if axes:
            raise ValueError(
                f"{where}: {name} is {list(x.shape)}, its rows cut over {axes} of the mesh, need the rows of "
                "one device. Call it inside jax.shard_map over these axes, or use moe_mlp or moe_layer, "
                "which do."
            )
