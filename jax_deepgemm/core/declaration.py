"""What a family declares of an op; `Op` (op.py) makes a JAX primitive of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_deepgemm.core import batch as levels
from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.sharding import Batch, ShardingRule

Params = dict[str, Any]
Arrays = list[jax.Array]
Dims = tuple[int, ...]

MACHINERY = ("batch", "out_sharding", "reduce_dtype", "fallback", "knobs")
"""Parameters of the primitives that are not the family's."""


def own(params: Params) -> Params:
    """The parameters the family declared."""
    return {name: value for name, value in params.items() if name not in MACHINERY}


def _module(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__


class Declaration:
    """See `Op` for the arguments."""

    def __init__(
        self,
        name: str,
        rule: str,
        result: Callable[..., list[tuple[Dims, Any]]],
        reference: Callable[..., Arrays],
        *,
        reduces: Sequence[str] = (),
        blocks: Mapping[str, tuple[str, int]] | None = None,
        edges: Sequence[str] = (),
        leads: Sequence[str] = (),
        spmd: Callable[..., tuple[Sequence[jax.Array] | None, Arrays | None]] | None = None,
        recut: Callable[..., tuple[Sequence[jax.Array], Params]] | None = None,
        kernel: LazyKernel | None = None,
        kernel_prepare: Callable[..., Sequence[jax.Array]] | None = None,
        without_kernel: Callable[..., str] | None = None,
        aliases: Mapping[int, int] | None = None,
        addend: int | None = None,
        base: Declaration | None = None,
        jvp: Callable[..., Arrays] | None = None,
        transpose: Callable[..., jax.Array] | None = None,
        transposes: Callable[..., list[jax.Array]] | None = None,
        grad_hint: str = "",
    ) -> None:
        self.name = name
        self.rule = ShardingRule.parse(
            rule, reduces=reduces, blocks=blocks, addend=addend, edges=edges, leads=leads
        )
        self.result = result
        self.reference = reference
        self.spmd = spmd
        self.recut = recut
        self.kernel = kernel
        self.kernel_prepare = kernel_prepare
        self.without_kernel = without_kernel
        self.aliases = dict(aliases or {})
        self.base = base
        self.jvp = jvp
        self.transpose = transpose
        self.transposes = transposes
        self.grad_hint = grad_hint
        if reduces and len(self.rule.results) != 1 and spmd is None:
            raise ValueError(
                f"{name}: an op that sums over {list(reduces)} has one result, not {len(self.rule.results)}."
            )
        if reduces and addend is not None and (base is None or addend != len(self.rule.operands) - 1):
            raise ValueError(
                f"{name}: an op that sums and adds needs the addend last and base=, the op without it."
            )
        self._declared()

    def _declared(self) -> None:
        """What is made of it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.rule.text()!r})"

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that say what the op does: where its functions are, and its kernel."""
        functions = (
            self.result,
            self.reference,
            self.spmd,
            self.recut,
            self.kernel_prepare,
            self.jvp,
            self.transpose,
            self.transposes,
        )
        found = {_module(one) for one in functions if one is not None}
        return tuple(sorted(found | ({self.kernel.module} if self.kernel is not None else set())))

    @property
    def local(self) -> bool:
        """Whether a piece of a dimension is computed without knowing where it lies in the whole."""
        return self.spmd is None and self.recut is None

    def result_types(self, avals: Sequence[Any], batch: Batch, params: Params) -> list[tuple[Dims, np.dtype]]:
        """Shape and dtype of each result, vmap's levels in front."""
        shapes = [tuple(aval.shape) for aval in avals]
        inside = levels.own_shapes(shapes, batch)
        for i, (shape, factors) in enumerate(zip(inside, self.rule.operands, strict=True)):
            if len(shape) != len(factors):
                raise ValueError(
                    f"{self.name}: operand {i} is {list(shape)}, need dimensions [{', '.join(factors)}]."
                )
        lead = levels.sizes(shapes, batch)
        return [
            (lead + tuple(shape), np.dtype(dtype)) for shape, dtype in self.result(*inside, **own(params))
        ]

    @property
    def linear(self) -> bool:
        """Whether the op has cotangents of its operands."""
        return self.transpose is not None or self.transposes is not None

    def cotangents(
        self, cotangents: Arrays, operands: list[Any], unknown: Sequence[int], **params: Any
    ) -> Arrays:
        """Those of the operands that are unknown, by the rule that the op has."""
        if self.transposes is not None:
            every = self.transposes(cotangents, operands, **params)
            first = len(operands) - len(every)
            return [every[i - first] for i in unknown]
        assert self.transpose is not None
        return [self.transpose(i, cotangents, operands, **params) for i in unknown]

    def run_reference(self, *arrays: jax.Array, batch: Batch, **params: Any) -> Arrays:
        """The reference, under the recorded levels."""
        return levels.over_levels(functools.partial(self.reference, **own(params)), batch)(*arrays)
