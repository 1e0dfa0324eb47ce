"""How a family says what runs under compute-sanitizer: each kind of its kernels once, on shapes with tails.

A family's `sanitize.py` has `cases()`, which yields a `Case` for each. tests/gpu/sanitize.py runs them on the
GPU and compares with the CPU's results.

>>> import jax.numpy as jnp
>>> def cases():
...     yield Case("halves", lambda x: x / 2, (jnp.ones(33),))
>>> [case.name for case in cases()]
['halves']
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

FEW_SMS = 3
"""So few that persistent blocks compute several tiles."""


class Case(NamedTuple):
    """One call.

    Attributes:
      name: unique among all families; a part of it chooses the case on the command line.
      function: of the operands; returns one array. It is jitted, and runs on the GPU and on the CPU.
      operands: arrays, drawn on the CPU, so that only kernels of this package run on the GPU.
    """

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]


def on_few(function: Callable[..., Any], num_sms: int | None = FEW_SMS, **options: Any) -> Callable[..., Any]:
    """Binds options of a call, and by default how many SMs it may use."""
    return functools.partial(function, num_sms=num_sms, **options)
