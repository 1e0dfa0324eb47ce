"""How a function under a name of DeepSpeed takes its positional arguments, of each release that has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.inference import checks

KINDS: Mapping[str, np.dtype[Any]] = {
    "fp32": np.dtype(jnp.float32),
    "fp16": np.dtype(jnp.float16),
    "bf16": np.dtype(jnp.bfloat16),
}
"""What a name's end says of its activations."""


class Given(dict[str, Any]):
    """Arguments by their names in DeepSpeed's source, and the name that was called."""

    def __init__(self, name: str, kind: np.dtype[Any] | None, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.name, self.kind = name, kind

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def adapter(
    name: str, orders: tuple[str, ...], compute: Callable[..., Any], kind: np.dtype[Any] | None = None
) -> Callable[..., Any]:
    """A function of positional arguments in any of these orders, told apart by their number.

    kind: what the first argument must be; None: what `compute` takes.
    """
    known = {len(order.split()): order.split() for order in orders}

    def call(*arguments: Any, **caches: Any) -> Any:
        order = known.get(len(arguments))
        if order is None:
            wanted = " or ".join(f"{count} ({', '.join(order)})" for count, order in known.items())
            raise TypeError(f"{name}: {len(arguments)} positional arguments, need {wanted}.")
        given = Given(name, kind, dict(zip(order, arguments, strict=True)))
        if kind is not None and order:
            _check_kind(name, order[0], arguments[0], kind)
        return compute(given, **caches)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"DeepSpeed's {name}({orders[0].replace(' ', ', ')}): see docs/from_deepspeed.md."
    call.orders = orders  # type: ignore[attr-defined]
    return call


def _check_kind(name: str, first: str, x: Any, kind: np.dtype[Any]) -> None:
    x = unwrapped(x)
    if getattr(x, "dtype", None) == kind:
        return
    family, others = name.rpartition("_")[0], {other: end for end, other in KINDS.items()}
    other = others.get(np.dtype(getattr(x, "dtype", np.void)))
    also = f", or call {family}_{other}" if other else ""
    raise TypeError(
        f"{name}: {first} is {checks.described(x)}, need {kind.name}, as the name says: "
        f"{first}.astype(jnp.{kind.name}){also}."
    )


def there(x: Any) -> bool:
    """Whether an operand is one: for masks and ALiBi that are not, DeepSpeed passes one dimension."""
    return x is not None and getattr(unwrapped(x), "ndim", 0) > 1
