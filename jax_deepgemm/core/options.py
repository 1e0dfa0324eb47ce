"""Keyword arguments that every op with a kernel takes, checked and hashable."""

from __future__ import annotations

from typing import Any, TypeAlias

from jax.sharding import NamedSharding, PartitionSpec

from jax_deepgemm import config as settings

Sharding: TypeAlias = PartitionSpec | NamedSharding | None
"""What `out_sharding=` takes: how a result is cut on a mesh with Explicit axes. None: as its operands."""


def sharding_option(op: str, given: Any) -> PartitionSpec | None:
    """`out_sharding=` as a PartitionSpec."""
    spec = given.spec if isinstance(given, NamedSharding) else given
    if spec is not None and not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{op}: out_sharding is {given!r}, need a PartitionSpec, a NamedSharding or None. "
            "Write jax.P('x', None)."
        )
    return spec


def config_option(op: str, given: Any, kind: type[Any]) -> Any:
    """`config=` of a family, whose configurations are all of a type (or of its subclasses)."""
    if given is not None and not isinstance(given, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{op}: config is {given!r}, need {article} {kind.__name__} or None. None lets the cost model "
            "choose; jax_deepgemm.explain returns the candidates that fit."
        )
    return given


def num_sms_option(op: str, given: Any) -> int | None:
    """`num_sms=`, or what `jax_deepgemm.config` says where the call says nothing."""
    if given is None:
        return settings.get().num_sms
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{op}: num_sms is {given!r}, need a positive int, or None for all of the chip's.")
    return given
