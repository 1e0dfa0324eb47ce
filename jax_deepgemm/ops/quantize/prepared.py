"""A weight and its FP8 copies, quantised once and used by every layer call of a training step.

Everything but the master is held as integers, the bits of what it means: integers have no tangents, so no
transformation makes zeros of a weight's size for them, what waits for a backward pass is the arrays
themselves, and jax.checkpoint, which rounds the floating-point arrays that it saves, leaves them alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.quantize.array import QuantizedArray, scales_spec
from jax_deepgemm.ops.quantize.fp4 import E2M1
from jax_deepgemm.ops.quantize.fused import SQUARE, quantize_weight

E4M3 = np.dtype(jnp.float8_e4m3fn)
MASTERS = (np.dtype(jnp.bfloat16), np.dtype(np.float32))


class Bits(NamedTuple):
    """FP8 values [.., r, c] as uint8, and their scales [.., ceil(r / 128), ceil(c / 128)] as uint32."""

    values: Any
    scales: Any

    @classmethod
    def of(cls, values: jax.Array, scales: jax.Array) -> Bits:
        return cls(lax.bitcast_convert_type(values, jnp.uint8), lax.bitcast_convert_type(scales, jnp.uint32))

    @property
    def meant(self) -> QuantizedArray:
        values = lax.bitcast_convert_type(self.values, E4M3)
        return QuantizedArray(values, lax.bitcast_convert_type(self.scales, jnp.float32), SQUARE)


class Copies(NamedTuple):
    """The FP8 copies of a weight: for y = x @ w.T, and transposed for dx = dy @ w."""

    plain: Bits
    transposed: Bits

    @classmethod
    def of(cls, w: jax.Array, scale_format: str = "f32") -> Copies:
        """Both in one pass over a master weight [.., n, k]. They have no derivative."""
        values, scales, values_t = quantize_weight(lax.stop_gradient(w), scale_format=scale_format)
        return cls(Bits.of(values, scales), Bits.of(values_t, scales.mT))

    @classmethod
    def named(cls, w: jax.Array, name: str, scale_format: str = "f32") -> Copies:
        """The copies of a weight that is not prepared; the transposed one, which waits for the backward pass,
        under a checkpoint_name."""
        copies = cls.of(w, scale_format)
        return cls(copies.plain, Bits(*(checkpoint_name(part, name) for part in copies.transposed)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedWeight:
    """A master weight with its FP8 copies, made by `prepare_weight`.

    Layers take it in place of the master. They read the copies only, and give their gradient to `master`.
    It is a pytree, so it goes through `jax.jit`, `jax.lax.scan`, `jax.checkpoint`, `jax.vmap` and
    `jax.shard_map`; its other leaves are integers, which have no gradient.

    The copies do not follow the master: after an update of the master they are those of the old one, and
    results are stale, without an error. Prepare inside the training step, so that the copies end with it.

    Attributes:
      master: [.., n, k] bfloat16 or float32; the gradient has its shape and dtype.
      copies: the bits of the FP8 values and scales, as they are and transposed.

    Raises nothing.

    >>> w = jax.random.normal(jax.random.key(0), (256, 384))
    >>> prepare_weight(w)
    PreparedWeight(float32[256,384], float8_e4m3fn copies)
    """

    master: Any
    copies: Copies

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the master."""
        return tuple(self.master.shape)

    @property
    def ndim(self) -> int:
        """Rank of the master."""
        return len(self.master.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the master, and of its gradient."""
        return np.dtype(self.master.dtype)

    @property
    def quantized(self) -> QuantizedArray:
        """The FP8 weight [.., n, k] as the forward products read it, block (128, 128)."""
        return self.copies.plain.meant

    @property
    def transposed(self) -> QuantizedArray:
        """The FP8 weight [.., k, n] as products of input gradients read it: the same values and scales."""
        return self.copies.transposed.meant

    def with_master(self, master: jax.Array) -> PreparedWeight:
        """The same copies, whose gradient goes to another array.

        >>> from jax_deepgemm import fp8_linear
        >>> w, x = jnp.ones((256, 128)), jnp.ones((4, 128), jnp.bfloat16)
        >>> prepared = prepare_weight(w)
        >>> loss = lambda w: fp8_linear(x, prepared.with_master(w)).astype(jnp.float32).sum()
        >>> float(jax.grad(loss)(w)[0, 0])
        4.0

        Args:
          master: bfloat16 or float32, of the same shape. Layers do not read it: its gradient's dtype is all
            that it decides.

        Raises:
          TypeError: another dtype.
          ValueError: another shape.
        """
        master = _checked("with_master", "master", master)
        if tuple(master.shape) != self.shape:
            raise ValueError(
                f"with_master: master is {list(master.shape)} and the copies are those of a weight "
                f"{list(self.shape)}, need the same shape. Prepare the new weight: prepare_weight(w)."
            )
        return PreparedWeight(master, self.copies)

    def shardings(self, master: NamedSharding) -> PreparedWeight:
        """Shardings of all leaves, a pytree of this structure for ``in_shardings`` or ``device_put``.

        The values are cut as the master; scales along with them where every cut is at the edge of a block,
        else replicated.

        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
        >>> prepared = prepare_weight(jnp.ones((256, 128)))
        >>> placed = jax.device_put(prepared, prepared.shardings(NamedSharding(mesh, P("x", None))))
        >>> placed.transposed.values.sharding.spec == P(None, "x")
        True
        """
        mesh = master.mesh
        spec = (*master.spec, *(None,) * (self.ndim - len(master.spec)))
        scales = scales_spec(P(*spec), self.shape, SQUARE, mesh)
        plain = Bits(master, NamedSharding(mesh, scales))
        transposed = Bits(*(NamedSharding(mesh, _turned(one)) for one in (spec, scales)))
        return PreparedWeight(master, Copies(plain, transposed))

    def check(self, where: str = "PreparedWeight", name: str = "w") -> PreparedWeight:
        """Returns itself if its parts fit each other, as those of `prepare_weight` do, else raises.

        Args:
          where: the function to name in the message.
          name: the argument to name in the message.

        Raises:
          TypeError, ValueError: a master of another dtype, copies of another weight's shape.
        """
        _checked(where, f"the master of {name}", self.master)
        *lead, rows, cols = self.shape
        shapes = [tuple(bits.values.shape) for bits in self.copies]
        if shapes != [(*lead, rows, cols), (*lead, cols, rows)]:
            raise ValueError(
                f"{where}: the master of {name} is {list(self.shape)} and its FP8 copies are "
                f"{list(shapes[0])} and {list(shapes[1])}, need those of the same weight, the second one "
                "transposed. Prepare the weight that the layer is to use: prepare_weight(w)."
            )
        return self

    def __repr__(self) -> str:
        shape, dtype = getattr(self.master, "shape", None), getattr(self.master, "dtype", None)
        if shape is None or dtype is None:
            return f"PreparedWeight({self.master!r}, {self.copies!r})"
        return f"PreparedWeight({np.dtype(dtype).name}[{','.join(map(str, shape))}], {E4M3.name} copies)"


def _flatten_with_keys(w: PreparedWeight) -> tuple[tuple[tuple[Any, Any], ...], None]:
    key = jax.tree_util.GetAttrKey
    return ((key("master"), w.master), (key("copies"), w.copies)), None


def _unflatten(_: None, parts: Iterable[Any]) -> PreparedWeight:
    return PreparedWeight(*parts)


jax.tree_util.register_pytree_with_keys(
    PreparedWeight, _flatten_with_keys, _unflatten, lambda w: ((w.master, w.copies), None)
)


def prepare_weight(w: ArrayLike, *, scale_format: str = "f32") -> PreparedWeight:
    """A master weight with its FP8 copies, which layers then read instead of quantising it at each call.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import fp8_linear, prepare_weight
    >>> w = jax.random.normal(jax.random.key(0), (256, 128)) / 16
    >>> batches = jax.random.normal(jax.random.key(1), (4, 32, 128), jnp.bfloat16)
    >>> def step(w):
    ...     def loss(w):
    ...         prepared = prepare_weight(w)          # once, outside the scan over microbatches
    ...         def body(total, x):
    ...             y = fp8_linear(x, prepared).astype(jnp.float32)
    ...             return total + jnp.mean(y * y), None
    ...         return jax.lax.scan(body, jnp.float32(0), batches)[0]
    ...     return w - 0.1 * jax.grad(loss)(w)        # the copies end with the step
    >>> step(w).dtype.name
    'float32'

    Results and gradients are those of layers with the master, bit for bit. Where the weight is prepared
    outside the differentiated function, hand it the master too, and use `PreparedWeight.with_master` inside.

    Args:
      w: [.., n, k] bfloat16 or float32: a weight of `fp8_linear`, or with groups in front one of
        `grouped_linear` or `jax_deepgemm.moe`. More leading dimensions (layers of a scan) may stand in front.
      scale_format: "f32", or "ue8m0" for scales that are powers of two, as `fp8_linear` has it.

    Returns:
      A `PreparedWeight`. Its copies take 2 bytes per element; on a mesh they are cut as w is.

    Raises:
      TypeError: a w that is no such array, one quantised or prepared already among them.
      ValueError: fewer than two dimensions, another format.

    The copies are those of this w. Prepare again when it was updated: inside the step, as above.
    """
    w = _checked("prepare_weight", "w", w)
    return PreparedWeight(w, Copies.of(w, scale_format))


def _checked(where: str, name: str, w: Any) -> jax.Array:
    w = unwrapped(w)
    if not isinstance(w, (jax.Array, np.ndarray)) or np.dtype(w.dtype) not in MASTERS:
        given = np.dtype(w.dtype).name if isinstance(w, (jax.Array, np.ndarray)) else f"a {type(w).__name__}"
        raise TypeError(
            f"{where}: {name} is {given}, need a bfloat16 or float32 array: the master weight. Weights that "
            "are quantised already go to the layers as they are."
        )
    return jnp.asarray(w)


def master_and_copies(w: Any) -> tuple[jax.Array, Copies | None]:
    """What the differentiated functions of layers take: a master that is not prepared has no copies yet."""
    return (w.master, w.copies) if isinstance(w, PreparedWeight) else (w, None)


def as_it_came(w: Any, master: jax.Array) -> Any:
    """The weight whose master went through a layer."""
    return PreparedWeight(master, w.copies) if isinstance(w, PreparedWeight) else master


def check_trained(where: str, **weights: Any) -> None:
    """Refuses weights that a layer cannot hand on to their gradients: frozen ones, and two for one."""
    for name, w in weights.items():
        if isinstance(w, tuple | list):
            raise ValueError(
                f"{where}: {name} is two arrays, joined at each call, need one array to hand on. "
                "Join them once before, or leave out with_weights."
            )
        if isinstance(w, QuantizedArray) or getattr(w, "dtype", None) == E2M1:
            raise ValueError(
                f"{where}: {name} is quantised, and a frozen weight has no gradient to accumulate. Leave out "
                "with_weight, or pass the master."
            )


def cotangent(dw: Any) -> PreparedWeight:
    """What a backward pass returns for a prepared weight: the gradient of its master, and nothing else."""
    nothing: Any = None
    return PreparedWeight(dw, nothing)


def _turned(spec: Iterable[Any]) -> P:
    *lead, rows, cols = spec
    return P(*lead, cols, rows)
