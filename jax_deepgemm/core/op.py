"""One way to make an op: JAX primitives with types, vmap, sharding, derivatives and a kernel, from one
declaration.

    Op.__call__
      outer primitive    result types (sharding, varying manual axes); vmap records a level; jvp and transpose
        Auto axes          custom_partitioning: XLA asks for a ShardingPlan and gets the body of one device
        Explicit axes      shard_map over the same plan's specs
      inner primitive    one device's shapes: the reference on every platform, the kernel on cuda
      (kernel_rule.py)

Blocks, edges of shards and collectives are the plan's matter (sharding.py); what is private in JAX is in
_private.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jax_deepgemm import config
from jax_deepgemm.core import _private, derivatives, kernel_rule
from jax_deepgemm.core.declaration import MACHINERY, Arrays, Declaration, Dims, Params, own
from jax_deepgemm.core.dtypes import wider
from jax_deepgemm.core.export import export_checks
from jax_deepgemm.core.sharding import (
    Axes,
    Batch,
    ShardingPlan,
    as_spec,
    entries,
    plan_sharding,
)
from jax_deepgemm.core.version import fingerprint

__all__ = ["Op", "export_checks", "mesh_of"]


_made: dict[Primitive, Op] = {}


def known_ops() -> dict[Primitive, Op]:
    """Every op made so far, by the primitive that appears in jaxprs."""
    return dict(_made)


class Op(Declaration):
    """An operation on arrays that works under every transformation of JAX.

    >>> import jax.numpy as jnp, numpy as np
    >>> scale = Op("scale_rows", "m k, m -> m k",
    ...            result=lambda x, s, *, out_dtype: [(x, out_dtype)],
    ...            reference=lambda x, s, *, out_dtype: [(x * s[:, None]).astype(out_dtype)])
    >>> scale(jnp.ones((2, 3)), jnp.array([1.0, 2.0]), out_dtype=jnp.float32)[0]
    Array([[1., 1., 1.],
           [2., 2., 2.]], dtype=float32)

    Args:
      name: the op's name in programs, profiles and messages.
      rule: names of the dimensions, as in an einsum: "m k, n k -> m n".
      result: (*shapes, **params) -> [(shape, dtype), ...].
      reference: (*arrays, **params) -> [array, ...], the op in jnp, without vmap's dimensions.
      reduces: dimensions that are summed over. The op then has one result and a static `out_dtype`, and
        float32 or `out_dtype` can be asked for partial sums.
      blocks: dimension of a grid of blocks -> (dimension of the data, elements per block).
      edges: grids at whose edges alone their data is cut over devices.
      leads: grids whose cut their data takes, where no result asks for one.
      spmd: (plan, local, *arrays) -> (arrays, None) or (None, results), on one device's pieces, before
        `local` runs: recuts operands whose blocks straddle devices, or computes the results itself.
        `local(*arrays)` is the op on one device.
      recut: (plan, *arrays, **params) -> (arrays, params that change), as spmd, for ops whose static
        parameters depend on the cut too (how many groups a device has, say).
      kernel: for cuda, see core/family.py. None: the reference.
      kernel_prepare: (*arrays, **params) -> arrays, traced before the kernel on one device's shapes: padding,
        layouts. Arrays may have one leading dimension of vmap, so it addresses dimensions from the end.
      without_kernel: (avals_in, **params) -> why cuda runs the reference, and what would avoid it, of an op
        without a kernel whose reference is slow there: logged once per message, and shown by `explain`.
      aliases: operand -> result that may use its buffer.
      addend: index of an operand that is added to the result, in the result's dtype.
      base: the op without the addend (the addend is its last operand); runs where partial results are summed,
        so that the addend is added once, in float32.
      jvp: (primals, tangents, **params) -> [tangent, ...]; a tangent is None where it is zero.
      transpose: (index, cotangents, operands, **params) -> cotangent of operands[index], in which the op is
        linear; operands[index] is a `derivatives.Wanted`.
      transposes: (cotangents, operands, **params) -> cotangents of the last operands, in which the op is
        linear, instead, where one computation gives them all; those that are wanted are `derivatives.Wanted`.
      grad_hint: what to use instead, for the error of an op without derivative.
    """

    def __call__(self, *arrays: jax.typing.ArrayLike, **params: Any) -> Arrays:
        """Binds the op.

        Args:
          *arrays: the operands.
          **params: static and hashable. Besides the op's own: `out_sharding`, the PartitionSpec of the result
            (a tuple of them for several results), needed on Explicit axes where a summed dimension is cut;
            `reduce_dtype`, float32 (default) or `out_dtype`, the dtype in which devices exchange partial
            sums.

        Returns:
          A list of results.
        """
        if len(arrays) != len(self.rule.operands):
            raise ValueError(f"{self.name}: got {len(arrays)} operands, need {len(self.rule.operands)}.")
        static = self._canonical(params)
        return self.outer.bind(*derivatives.same_varying_axes(arrays), batch=(), **static)

    # Declaration -------------------------------------------------------------------------------------------

    def _declared(self) -> None:
        self.outer, self.inner = Primitive(self.name), Primitive(f"{self.name}_local")
        _made[self.outer] = self
        for primitive, types in ((self.outer, self._outer_types), (self.inner, self._inner_types)):
            primitive.multiple_results = True
            primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
            primitive.def_abstract_eval(types)
        _private.require_devices(self.outer)
        mlir.register_lowering(self.outer, self._lower)
        mlir.register_lowering(self.inner, kernel_rule.make_reference(self))
        if self.kernel is not None:
            mlir.register_lowering(self.inner, kernel_rule.make(self), platform="cuda")
        batching.primitive_batchers[self.outer] = self._vmap
        ad.primitive_jvps[self.outer] = functools.partial(derivatives.jvp_rule, self, self.outer.bind)
        if self.linear:
            ad.primitive_transposes[self.outer] = functools.partial(derivatives.transpose_rule, self)

    def _canonical(self, params: Params) -> Params:
        """Static parameters in one form, as they key caches: np.dtypes, tuples of specs, no defaults."""
        static = {name: value for name, value in params.items() if value is not None or name not in MACHINERY}
        for name in ("out_dtype", "reduce_dtype"):
            if static.get(name) is not None:
                static[name] = np.dtype(static[name])
        if "out_sharding" in static:
            static["out_sharding"] = self._result_specs(static["out_sharding"])
        if "reduce_dtype" in static:
            self._check_reduce_dtype(static)
        static.setdefault("fallback", config.get().fallback)
        if static["fallback"] == "error":
            del static["fallback"]
        knobs = config.get().of_kernels
        if knobs:
            static["knobs"] = knobs
        for name, value in static.items():
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"{self.name}: {name}={value!r} is not hashable; parameters are static."
                ) from None
        return static

    def _result_specs(self, out_sharding: Any) -> tuple[PartitionSpec, ...]:
        several = isinstance(out_sharding, tuple | list) and not isinstance(out_sharding, PartitionSpec)
        specs = tuple(getattr(one, "spec", one) for one in (out_sharding if several else (out_sharding,)))
        if len(specs) != len(self.rule.results) or not all(isinstance(one, PartitionSpec) for one in specs):
            raise ValueError(
                f"{self.name}: out_sharding is {out_sharding!r}, need a PartitionSpec or NamedSharding for "
                f"each of the {len(self.rule.results)} results."
            )
        return specs

    def _check_reduce_dtype(self, static: Params) -> None:
        allowed = (np.dtype("float32"), static.get("out_dtype"))
        if not self.rule.reduces or static["reduce_dtype"] not in allowed:
            raise ValueError(
                f"{self.name}: reduce_dtype is {static['reduce_dtype']}, need float32 or the op's out_dtype "
                f"({static.get('out_dtype')})."
            )
        if static["reduce_dtype"] == np.dtype("float32"):
            del static["reduce_dtype"]

    # Types -------------------------------------------------------------------------------------------------

    def _inner_types(self, *avals: Any, batch: Batch, **params: Any) -> list[Any]:
        return [
            jax.core.ShapedArray(shape, dtype) for shape, dtype in self.result_types(avals, batch, params)
        ]

    def _outer_types(self, *avals: Any, batch: Batch, **params: Any) -> list[Any]:
        for i, aval in enumerate(avals):
            if getattr(aval.sharding.spec, "unreduced", None):
                raise ValueError(f"{self.name}: operand {i} is {aval}, unreduced; reshard it first.")
        types = self.result_types(avals, batch, params)
        mesh = mesh_of(avals)
        if mesh.explicit_axes:
            specs = list(self._explicit_plan(mesh, avals, batch, params).out_specs)
        else:
            specs = [PartitionSpec(*(None,) * len(shape)) for shape, _ in types]
        varying = frozenset().union(*(aval.manual_axis_type.varying for aval in avals))
        return [
            jax.core.ShapedArray(
                shape,
                dtype,
                sharding=NamedSharding(mesh, spec),
                manual_axis_type=jax.sharding.ManualAxisType(varying=varying),
            )
            for (shape, dtype), spec in zip(types, specs, strict=True)
        ]

    def _explicit_plan(
        self, mesh: AbstractMesh, avals: Sequence[Any], batch: Batch, params: Params
    ) -> ShardingPlan:
        """The plan that the operands' types (and out_sharding) ask for."""
        rule = self.rule.batched(batch)
        specs = [entries(aval.sharding.spec, aval.ndim) for aval in avals]
        given: dict[str, Axes] = {}
        for factors, spec in zip(rule.operands, specs, strict=True):
            for factor, axes in zip(factors, spec, strict=True):
                name = rule.data_of.get(factor, factor)
                if axes and name not in rule.blocks:
                    given.setdefault(name, axes)
        wanted = params.get("out_sharding")
        summed = {name: given[name] for name in rule.reduces if name in given}
        if summed and wanted is None:
            cuts = ", ".join(f"{name} over {axes}" for name, axes in summed.items())
            raise ValueError(
                f"{self.name}: a summed dimension is cut ({cuts}), so the result's sharding is ambiguous; "
                f"say out_sharding=jax.P(...)."
            )
        asked = []
        for i, factors in enumerate(rule.results):
            follow: list[Axes] = [given.get(name, ()) for name in factors]
            if wanted is not None:
                follow[len(batch) :] = entries(wanted[i], len(factors) - len(batch))
            asked.append(follow)
        shapes = [shape for shape, _ in self.result_types(avals, batch, params)]
        plan = plan_sharding(rule, [aval.shape for aval in avals], specs, shapes, asked, dict(mesh.shape))
        if wanted is not None:
            self._check_out_sharding(plan, asked, shapes)
        return plan

    def _check_out_sharding(self, plan: ShardingPlan, asked: list[list[Axes]], shapes: list[Dims]) -> None:
        for spec, want, shape in zip(plan.out_specs, asked, shapes, strict=True):
            if spec != as_spec(want):
                raise ValueError(
                    f"{self.name}: out_sharding asks for {as_spec(want)} (vmap's dimensions included) of a "
                    f"result {list(shape)} on the mesh {dict(plan.mesh)}; the op can give {spec}: cuts must "
                    f"divide their dimension and use an axis once. Ask for that, and reshard the result."
                )

    # vmap --------------------------------------------------------------------------------------------------

    def _vmap(self, args: Sequence[Any], dims: Sequence[int | None], *, batch: Batch, **params: Any) -> Any:
        """Records a level. Merging it with another dimension here would gather one that is cut."""
        moved = [
            arg if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True)
        ]
        level = tuple(dim is not None for dim in dims)
        results = self.outer.bind(*moved, batch=(level, *batch), **params)
        return results, [0] * len(results)

    # Lowering ----------------------------------------------------------------------------------------------

    def _lower(self, ctx: Any, *args: Any, batch: Batch, **params: Any) -> Any:
        mesh = ctx.avals_out[0].sharding.mesh
        if mesh.explicit_axes:
            body = functools.partial(self._explicit_body, mesh, batch, params)
            return self._lower_named(body)(ctx, *args)
        params.pop("out_sharding", None)
        static = tuple(sorted({"batch": batch, **params}.items()))
        made_of = repr((self.name, fingerprint(self.modules), config.tuning_state(), static))
        content = hashlib.sha256(made_of.encode()).hexdigest()
        salt = np.uint32(
            int(content[:8], 16)
        )  # distinguishes programs whose callback names are left out of cache keys
        results = self._lower_named(functools.partial(self._partitioned(static), salt))(ctx, *args)
        call = _private.partitioning_call(results)
        if call is not None:
            if _private.is_for_export(ctx):
                raise NotImplementedError(
                    f"{self.name}: jax.export cannot store a program that cuts this op over Auto mesh axes "
                    "of several devices. Use Explicit axes, jax.make_mesh(..., "
                    "axis_types=(AxisType.Explicit,) * n), or jax.shard_map over all mesh axes; both export."
                )
            _private.name_callback_by_content(call, f"{self.name}:{content}")
        return results

    def _lower_named(self, function: Callable[..., Arrays]) -> Callable[..., Any]:
        """A lowering of a jnp function under the op's name, which profiles and HLO then show."""

        def named(*arrays: jax.Array) -> Arrays:
            with jax.named_scope(self.name):
                return function(*arrays)

        return mlir.lower_fun(named, multiple_results=True)

    def _explicit_body(self, mesh: AbstractMesh, batch: Batch, params: Params, *arrays: jax.Array) -> Arrays:
        def bind(op: Op, *args: jax.Array, **static: Any) -> Arrays:
            return op.outer.bind(*derivatives.same_varying_axes(args), **static)

        with jax.sharding.use_abstract_mesh(mesh):
            plan = self._explicit_plan(mesh, [jax.typeof(x) for x in arrays], batch, params)
            local = {name: value for name, value in params.items() if name != "out_sharding"}
            whole = [jax.sharding.reshard(x, spec) for x, spec in zip(arrays, plan.in_specs, strict=True)]
            run = functools.partial(self._one_device, plan, bind, {"batch": batch, **local})
            return jax.shard_map(
                run,
                in_specs=plan.in_specs,
                out_specs=list(plan.out_specs),
                axis_names=set(mesh.explicit_axes),
            )(*whole)

    def _partitioned(self, static: tuple[tuple[str, Any], ...]) -> Callable[..., Arrays]:
        """The op of these parameters, for XLA to partition. Bound here: JAX keeps the arguments of a function
        with static_argnums, which `jax.checking_leaks` reports."""
        whole = functools.partial(self._whole, static)
        if not _private.can_partition():
            return whole
        partitioned = custom_partitioning(whole)
        partitioned.def_partition(
            functools.partial(self._partition, static),
            sharding_rule=functools.partial(self._shardy_rule, static),
        )
        return partitioned

    def _whole(self, static: tuple[tuple[str, Any], ...], salt: jax.Array, *arrays: jax.Array) -> Arrays:
        """What custom_partitioning wraps; runs as it is where nothing is cut."""
        del salt
        return _bind_inner(self, *arrays, **_for_inner(dict(static)))

    def _shardy_rule(self, static: tuple[tuple[str, Any], ...], mesh: Any, ins: Any, outs: Any) -> Any:
        rule = self.rule.batched(dict(static)["batch"])
        text, sizes = rule.shardy()
        return f", {text}", {"reduction_factors": rule.reduces_in_order(), **sizes}

    def _partition(self, static: tuple[tuple[str, Any], ...], mesh: Any, args: Any, results: Any) -> Any:
        """XLA's question, with the shardings it propagated: what runs on one device, and on which pieces?"""
        params, args = dict(static), args[1:]
        if mesh.empty:
            _private.log_once(
                f"{self.name}: runs inside a shard_map that leaves some mesh axes Auto, or on a mesh that "
                "mixes Auto and Explicit axes; operands are gathered over the Auto ones. Use Explicit axes, "
                "or map all axes."
            )

        def specs(values: Any) -> list[list[Axes]]:
            return [
                entries(None if mesh.empty else value.sharding.spec, len(value.shape)) for value in values
            ]

        plan = plan_sharding(
            self.rule.batched(params["batch"]),
            [arg.shape for arg in args],
            specs(args),
            [result.shape for result in results],
            specs(results),
            dict(mesh.shape),
        )

        def body(salt: jax.Array, *arrays: jax.Array) -> Arrays:
            del salt
            with jax.sharding.use_abstract_mesh(
                AbstractMesh((), ())
            ):  # a set_mesh with Explicit axes must not leak in
                run = functools.partial(self._one_device, plan, _bind_inner, params)
                return _body_p.bind(*arrays, jaxpr=jax.make_jaxpr(run)(*arrays))

        def place(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(mesh, spec)

        whole = place(PartitionSpec())
        return mesh, body, [*map(place, plan.out_specs)], (whole, *map(place, plan.in_specs))

    def _one_device(
        self, plan: ShardingPlan, bind: Callable[..., Arrays], params: Params, *arrays: jax.Array
    ) -> Arrays:
        """The op on one device's pieces, with the collectives of the plan."""
        pieces: Sequence[jax.Array] = arrays
        if self.recut is not None:
            pieces, changed = self.recut(plan, *pieces, **own(params))
            params = {**params, **changed}
        inner = _for_inner(params)
        if self.spmd is not None:
            recut, results = self.spmd(plan, functools.partial(bind, self, **inner), *pieces)
            if results is not None:
                return list(results)
            assert recut is not None
            pieces = recut
        if not plan.reduce_axes:
            return bind(self, *pieces, **inner)
        return [self._summed(plan, bind, params, pieces)]

    def _summed(
        self, plan: ShardingPlan, bind: Callable[..., Arrays], params: Params, arrays: Sequence[jax.Array]
    ) -> jax.Array:
        """Partial sums, exchanged; the addend joins after that, so that it counts once and rounds once."""
        out_dtype = np.dtype(params["out_dtype"])
        exchanged = params.get("reduce_dtype", wider(out_dtype))
        op: Declaration = self
        batch, addend = params["batch"], None
        if self.rule.addend is not None:
            assert self.base is not None
            op, addend, arrays = self.base, arrays[-1], arrays[:-1]
        carried = tuple(any(level[: len(arrays)]) for level in batch)
        kept = tuple(level[: len(arrays)] for level, on in zip(batch, carried, strict=True) if on)
        inner = {**_for_inner(params), "batch": kept, "out_dtype": np.dtype(exchanged)}
        (partial,) = bind(op, *arrays, **inner)
        partial = _with_levels(partial, carried)
        if plan.scatter_dim is None:
            total = lax.psum(partial, plan.reduce_axes)
        else:
            total = lax.psum_scatter(
                partial, plan.reduce_axes, scatter_dimension=plan.scatter_dim, tiled=True
            )
        if addend is not None:
            once = _with_levels(addend, tuple(level[-1] for level in batch))
            total = total.astype(wider(out_dtype)) + once.astype(wider(out_dtype))
        return total.astype(out_dtype)


def _for_inner(params: Params) -> Params:
    return {name: value for name, value in params.items() if name not in ("out_sharding", "reduce_dtype")}


def _bind_inner(op: Op, *arrays: jax.Array, **params: Any) -> Arrays:
    return op.inner.bind(*arrays, **params)


_body_p = Primitive("jax_deepgemm_partition")
"""One device's program inside custom_partitioning, as one operation, so that its lowering is in our hands."""
_body_p.multiple_results = True
_body_p.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)


def _lower_body(ctx: Any, *args: Any, jaxpr: Any) -> Any:
    run = mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)
    return run(_private.without_frames(ctx), *args)


mlir.register_lowering(_body_p, _lower_body, cacheable=False)


def _with_levels(x: jax.Array, carried: tuple[bool, ...]) -> jax.Array:
    """Gives x a dimension of one for each vmap level it does not carry."""
    return jnp.expand_dims(x, [level for level, on in enumerate(carried) if not on])


def mesh_of(avals: Sequence[Any]) -> AbstractMesh:
    """The mesh of the context, else of the operands' types (Explicit arrays without jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    for aval in avals:
        if mesh.empty:
            mesh = aval.sharding.mesh
    return mesh
