"""Weights of a module quantised once for a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jax_deepgemm.ops.quantize.prepared import Copies, PreparedWeight, master_and_copies, prepare_weight


class WeightCopies(nnx.Variable[Copies]):
    """The FP8 copies of a layer's weight, as `prepared_weights` puts them beside it; integers.

    It is no `nnx.Param`: gradients and optimizers leave it alone. Raises nothing.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm import prepare_weight
    >>> WeightCopies(prepare_weight(jnp.ones((256, 128))).copies).get_value().plain.values.shape
    (256, 128)
    """


@contextlib.contextmanager
def prepared_weights(module: nnx.Module) -> Iterator[None]:
    """Inside, every `Linear` and `MoE` of a module uses its weights quantised once, here.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_deepgemm.flax import Linear, prepared_weights
    >>> layer = Linear(256, 128, rngs=nnx.Rngs(0))
    >>> batches = jnp.ones((4, 16, 256), jnp.bfloat16)
    >>> def loss(layer, batches):                       # a scan over microbatches
    ...     body = lambda total, x: (total + jnp.mean(layer(x).astype(jnp.float32) ** 2), None)
    ...     return jax.lax.scan(body, jnp.float32(0), batches)[0]
    >>> with prepared_weights(layer):
    ...     gradients = nnx.grad(loss)(layer, batches)
    >>> gradients["weight"].shape, hasattr(layer, "weight_copies")  # what comes next, updates them
    ((128, 256), False)

    Results and gradients are the same, bit for bit. Use it around what is differentiated, in or out of
    `nnx.jit`, and leave it before the optimizer updates the weights: copies do not follow them.

    Args:
      module: any module that holds such layers, at any depth, or is one; layers in stacks (`nnx.vmap`,
        `nnx.scan`) too. Layers with recipe="bf16" and quantised weights stay as they are. While the context
        lasts each weight has a `WeightCopies` beside it, 2 bytes per element, part of the module's state.

    Yields:
      None: the module itself has the copies.

    Raises:
      ValueError: nothing to prepare: no `Linear` or `MoE` in FP8 with `nnx.Param` weights inside.
    """
    found = list(fp8_weights(module))
    if not found:
        raise ValueError(
            f"prepared_weights: {type(module).__name__} holds no Linear or MoE of jax_deepgemm.flax with "
            "recipe='fp8' and master weights. Leave the context out."
        )
    for layer, name in found:
        setattr(layer, beside(name), WeightCopies(_copies(layer, getattr(layer, name).get_value())))
    try:
        yield
    finally:
        for layer, name in found:
            if hasattr(layer, beside(name)):
                delattr(layer, beside(name))


def fp8_weights(module: nnx.Module) -> Iterator[tuple[Any, str]]:
    """The layers of a module that multiply in FP8, and the names of their master weights."""
    for _, layer in nnx.iter_graph(module):
        if getattr(layer, "recipe", None) == "fp8":
            for name in getattr(type(layer), "quantized_weights", ()):
                if isinstance(getattr(layer, name), nnx.Param):
                    yield layer, name


def _copies(layer: nnx.Module, master: Any) -> Copies:
    return prepare_weight(master, scale_format=getattr(layer, "scale_format", "f32")).copies


def weight(layer: nnx.Module, name: str) -> Any:
    """The weight that a layer uses: with its copies where it has them."""
    value, copies = getattr(layer, name).get_value(), getattr(layer, beside(name), None)
    return value if copies is None else PreparedWeight(value, copies.get_value())


def beside(name: str) -> str:
    """The name of a weight's copies."""
    return f"{name}_copies"


HANDS_ON = "hands_on"
"""The attribute of layers that put their weights back as they came through the product, so that gradients are
added to there."""


def hands_on(layer: nnx.Module) -> bool:
    return getattr(layer, HANDS_ON, False)


def put_back(layer: nnx.Module, **weights: Any) -> None:
    for name, w in weights.items():
        getattr(layer, name).set_value(master_and_copies(w)[0])
