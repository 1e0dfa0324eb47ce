"""How a family names its calls for people: sizes and types of a call, without any array.

A family's `shapes.py` has subclasses of `Shape`, one for ops with the same fields; tools read them from
shapes files and flags (tools/shape_files.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax

LARGEST = 2**31 - 1
MOST_GROUPS = 1 << 20
DTYPES = ("bfloat16", "float32")
WEIGHTS = (*DTYPES, "fp8")
RECIPES = ("fp8", "bf16")
BLOCKS = {"128x128": (128, 128), "1x128": (1, 128), "32x32": (32, 32), "1x32": (1, 32)}
_FLAGS = {"0": False, "1": True, "false": False, "true": True}
_SHOWN = 80  # characters of something wrong


class Call(NamedTuple):
    """One function of a shape, to trace or to lower.

    Attributes:
      title: what it is, for people.
      function: of the operands.
      operands: arrays and `jax.ShapeDtypeStruct`s.
      carry: the operand that the result takes the place of, if there is one.
    """

    title: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    carry: int | None = None


@dataclass(frozen=True)
class CallShape:
    """Sizes and types of a call; a subclass has the fields of its family, by `size`, `choice`, `flag`."""

    OPS: ClassVar[tuple[str, ...]] = ()
    LAYER: ClassVar[bool] = False
    """Whether it runs several ops of this package."""
    op: str

    def calls(self) -> list[Call]:
        """Returns the functions that such a call needs: itself, and with its gradients if it is a layer."""
        raise NotImplementedError

    def __str__(self) -> str:
        given = [(one.name, getattr(self, one.name)) for one in dataclasses.fields(self)[1:]]
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        return " ".join([self.op, *(f"{name}={value}" for name, value in given if value != defaults[name])])


def layer_calls(
    forward: Callable[..., Any], operands: tuple[Any, ...], trained: tuple[int, ...], gradients: bool
) -> list[Call]:
    """The functions of a layer: forward, and forward and backward.

    Args:
      forward: of the operands, one result.
      operands: of `forward`.
      trained: which of them have a gradient.
      gradients: whether the backward pass is wanted.
    """
    result = jax.eval_shape(forward, *operands)

    def both(*given: Any) -> Any:
        *inputs, dy = given

        def of_trained(*values: Any) -> Any:
            replaced = dict(zip(trained, values, strict=True))
            return forward(*(replaced.get(i, one) for i, one in enumerate(inputs)))

        y, pull = jax.vjp(of_trained, *(inputs[i] for i in trained))
        return y, pull(dy)

    calls = [Call("forward", forward, operands)]
    if gradients:
        calls.append(Call("forward and backward", both, (*operands, result)))
    return calls


def clipped(given: Any) -> str:
    """What was given, as a message shows it.

    >>> clipped("9" * 5000)[:4], len(clipped("9" * 5000))
    ("'999", 83)
    """
    text = repr(given)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def size(about: str, default: Any = MISSING, most: int = LARGEST) -> Any:
    """A field that is a whole number, at least 1."""
    read = functools.partial(_whole, most)
    return field(default=default, metadata={"about": about, "read": read})


def choice(about: str, *allowed: str, default: Any = MISSING) -> Any:
    """A field that is one of some words."""
    read = functools.partial(_one_of, allowed)
    return field(default=default, metadata={"about": f"{about}: {' or '.join(allowed)}", "read": read})


def flag(about: str, default: bool = False) -> Any:
    """A field that is true or false."""
    return field(default=default, metadata={"about": f"{about}: true or false", "read": _flag})


def _whole(most: int, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= most):
        raise ValueError(f"is {clipped(text)}, need a whole number from 1 to {most}")
    return int(text)


def _one_of(allowed: tuple[str, ...], text: str) -> str:
    if text.lower() not in allowed:
        raise ValueError(f"is {clipped(text)}, need {' or '.join(allowed)}")
    return text.lower()


def _flag(text: str) -> bool:
    return _FLAGS[_one_of(tuple(_FLAGS), text)]
