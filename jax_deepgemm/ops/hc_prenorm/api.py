"""hc_prenorm_gemm: checks, and the call of the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.core.options import Sharding, config_option, num_sms_option, sharding_option
from jax_deepgemm.ops.hc_prenorm.family import MOST_SPLITS, HcPrenormConfig, beyond
from jax_deepgemm.ops.hc_prenorm.op import ANYWHERE, prenorm_op

_NAME = "hc_prenorm_gemm"


def hc_prenorm_gemm(
    a: ArrayLike,
    b: ArrayLike,
    *,
    num_splits: int | None = None,
    config: HcPrenormConfig | None = None,
    out_sharding: Sharding = None,
    num_sms: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A projection of rows and the sum of their squares, of one pass over them: what RMS-norm and projection
    of hyper-connections need.

        d[i, j] = sum_k a[i, k] * b[j, k]        sqr_sum[i] = sum_k a[i, k]**2

    The norm then follows the product: rms_norm(a) @ b.T is d * rsqrt(sqr_sum / k + eps)[:, None].

    >>> import jax.numpy as jnp
    >>> a, b = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), jnp.eye(2, 3)
    >>> d, sqr_sum = hc_prenorm_gemm(a, b)
    >>> d.tolist(), sqr_sum.tolist()
    ([[0.0, 1.0], [3.0, 4.0]], [5.0, 50.0])
    >>> hc_prenorm_gemm(a, b, num_splits=4)[0].shape
    (4, 2, 2)

    Args:
      a: [m, k] bfloat16.
      b: [n, k] float32. The kernel takes n up to 256; XLA multiplies beyond. Rows of a k that 8 does not
        divide are copied.
      num_splits: None: the results are sums over all of k. S, 1 to 1024: they are [S, m, n] and [S, m], the
        sums over S parts of k, which the caller adds up, as DeepGEMM's are. Parts are whole blocks of 64, and
        the first ones have one more each where they cannot all have as many.
      config: an HcPrenormConfig to use instead of the cost model's choice.
      out_sharding: of d on a mesh with Explicit axes; sqr_sum is cut as its rows.
      num_sms: SMs that the kernel is cut for.

    Returns:
      d [m, n] and sqr_sum [m], float32.

    Raises:
      TypeError, ValueError: types, shapes or options outside the above; the message says what to do.

    On CUDA the product is TF32 with float32 sums: a's numbers are numbers of TF32, and b's are rounded to 10
    bits behind the first, a relative error of 2**-11 or less each; in jnp, elsewhere, it is float32.
    Differentiable, any number of times. Deterministic: splits are added up in their order. NaN and infinities
    of a row reach results of this row only.
    """
    x, columns = _operands(unwrapped(a), unwrapped(b))
    _check_splits(num_splits)
    (m, k), n = x.shape, columns.shape[0]
    known = all(isinstance(size, int) for size in (*x.shape, *columns.shape))
    op = prenorm_op(num_splits is not None, not known or not beyond(m, k, n))
    options: dict[str, Any] = {} if num_splits is None else {"num_splits": num_splits}
    d, squares = op(
        *same_varying_axes([x, columns]),
        config=config_option(_NAME, config, HcPrenormConfig),
        num_sms=num_sms_option(_NAME, num_sms),
        out_sharding=_shardings(sharding_option(_NAME, out_sharding), 2 if num_splits is None else 3),
        **options,
        **ANYWHERE,
    )
    return d, squares


def _shardings(spec: PartitionSpec | None, rank: int) -> tuple[PartitionSpec, PartitionSpec] | None:
    if spec is None:
        return None
    every = (*spec, *(None,) * (rank - len(spec)))
    return spec, PartitionSpec(*every[: rank - 1])


def _operands(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    for name, given, dtype, shape in (("a", a, "bfloat16", "[m, k]"), ("b", b, "float32", "[n, k]")):
        if getattr(given, "dtype", None) != jnp.dtype(dtype):
            found = given.dtype.name if hasattr(given, "dtype") else type(given).__name__
            raise TypeError(
                f"{_NAME}: {name} is {found}, need {dtype}. Convert it: {name}.astype(jnp.{dtype})."
            )
        if given.ndim != 2:
            raise ValueError(
                f"{_NAME}: {name} is {list(given.shape)}, need {shape}. Merge leading dimensions: "
                f"{name}.reshape(-1, {name}.shape[-1])."
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{_NAME}: a is {list(a.shape)} and b is {list(b.shape)}: k differs ({a.shape[1]} and "
            f"{b.shape[1]}). For b stored [k, n] give b.T."
        )
    return a, b


def _check_splits(num_splits: Any) -> None:
    whole = isinstance(num_splits, int) and not isinstance(num_splits, bool)
    if num_splits is not None and not (whole and 1 <= num_splits <= MOST_SPLITS):
        raise ValueError(
            f"{_NAME}: num_splits is {num_splits!r}, need a whole number from 1 to {MOST_SPLITS}, or None "
            "for the whole sums."
        )
