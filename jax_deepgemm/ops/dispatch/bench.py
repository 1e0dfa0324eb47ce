"""Rows of the benchmark: plans of a dispatch, each beside the sort that XLA makes of the plain form."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, Beside, Row, Table
from jax_deepgemm.ops.dispatch import reference
from jax_deepgemm.ops.dispatch.api import plan_copies

COPIES = (8, 1 << 10, 1 << 15, 1 << 16, 1 << 17, 1 << 20, 1 << 24)
EXPERTS = (32, 256, 2048)
TOP_K = 8


def _draw(copies: int, experts: int) -> tuple[jax.Array]:
    """ids of a balanced router."""
    shape = (copies // TOP_K, TOP_K)
    return (jax.random.randint(jax.random.key(0), shape, 0, experts, jnp.int32),)


def _rows(small: bool) -> Iterator[Row]:
    for copies in (8, 4096) if small else COPIES:
        for experts in EXPERTS[:1] if small else EXPERTS:
            yield Row(
                name=f"dispatch copies={copies} experts={experts}",
                fields={"copies": copies, "experts": experts},
                function=functools.partial(plan_copies, num_experts=experts),
                draw=functools.partial(_draw, copies, experts),
                bytes=12 * copies + 4 * experts,  # ids are read; source, position and sizes are written
                session=copies,
                baseline=Beside("XLA's sort", functools.partial(reference.plan, experts=experts)),
            )


TABLES = {
    "dispatch": Table(
        "Plans of a dispatch: which row each copy has, beside XLA's sort",
        ("copies", "experts"),
        _rows,
        columns=("us", "GB/s", *BESIDE_BASELINE, CLOCK),
        baseline="sort",
        part=lambda fields: "",
        order=1,
    )
}
