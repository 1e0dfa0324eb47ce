"""What logits accept: every rule about types, shapes and windows, checked while tracing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.options import config_option, num_sms_option, sharding_option
from jax_deepgemm.ops.indexer import fp4
from jax_deepgemm.ops.indexer.family import DEPTHS, LARGEST, MOST_HEADS, IndexerConfig
from jax_deepgemm.ops.quantize import QuantizedArray
from jax_deepgemm.ops.quantize.array import as_dtype

E4M3, BFLOAT16, FLOAT32 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16), np.dtype(np.float32)
OUT_DTYPES = (FLOAT32, BFLOAT16)


@dataclass(frozen=True)
class Form:
    """The checked keyword arguments.

    Attributes:
      columns: of the compressed form; None: a column for each key.
      out_dtype, out_sharding, config, num_sms: as the caller gave them.
    """

    columns: int | None
    out_dtype: np.dtype
    out_sharding: PartitionSpec | None
    config: IndexerConfig | None
    num_sms: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Of the op that computes logits."""
        given = {"config": self.config, "num_sms": self.num_sms, "out_sharding": self.out_sharding}
        columns = {} if self.columns is None else {"columns": self.columns}
        return {"out_dtype": self.out_dtype, **columns, **{k: v for k, v in given.items() if v is not None}}


def form(
    op: str,
    keys: int,
    *,
    compressed: Any,
    max_len: Any,
    out_dtype: Any,
    out_sharding: Any,
    config: Any,
    num_sms: Any,
) -> Form:
    """The options of a call whose result may have a column for each of so many keys."""
    dtype = _out_dtype(op, out_dtype)
    if not isinstance(compressed, bool):
        raise TypeError(f"{op}: compressed is {compressed!r}, need True or False.")
    if max_len is not None and not compressed:
        raise ValueError(
            f"{op}: max_len is {max_len!r} and compressed is False, need max_len=None: the result then has a "
            "column for each key. For rows that begin with their window: compressed=True."
        )
    if max_len is not None and (
        isinstance(max_len, bool) or not isinstance(max_len, (int, np.integer)) or not 1 <= max_len <= LARGEST
    ):
        raise ValueError(
            f"{op}: max_len is {max_len!r}, need a positive int: the columns of the result, of which no "
            "window has more. None: as many as there are keys."
        )
    columns = None if not compressed else keys if max_len is None else int(max_len)
    return Form(
        columns,
        dtype,
        sharding_option(op, out_sharding),
        config_option(op, config, IndexerConfig),
        num_sms_option(op, num_sms),
    )


def paged_form(
    op: str, columns: Any, out_dtype: Any, out_sharding: Any, config: Any, num_sms: Any
) -> dict[str, Any]:
    """The options of the op on pages."""
    if isinstance(columns, bool) or not isinstance(columns, (int, np.integer)) or not 0 <= columns <= LARGEST:
        raise ValueError(
            f"{op}: max_context_len is {columns!r}, need a positive int: the columns of the result. None: as "
            "many as block_tables have keys."
        )
    return Form(
        int(columns),
        _out_dtype(op, out_dtype),
        sharding_option(op, out_sharding),
        config_option(op, config, IndexerConfig),
        num_sms_option(op, num_sms),
    ).options


def _out_dtype(op: str, given: Any) -> np.dtype:
    dtype = as_dtype(op, "out_dtype", given, "float32 or bfloat16")
    if dtype not in OUT_DTYPES:
        raise TypeError(f"{op}: out_dtype is {dtype.name}, need float32 or bfloat16. Convert the result.")
    return dtype


def describe(x: Any) -> str:
    if isinstance(x, QuantizedArray):
        return f"a QuantizedArray of {describe(x.values)}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name} {list(x.shape)}"
    return f"a {type(x).__name__}"


def _wrong_type(op: str, name: str, x: Any, rule: str, way_out: str) -> NoReturn:
    raise TypeError(f"{op}: {name} is {describe(x)}, need {rule}. {way_out}")


def array(op: str, name: str, x: Any, dtype: np.dtype, rank: str, way_out: str) -> jax.Array:
    x = unwrapped(x)
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype != dtype:
        _wrong_type(op, name, x, f"{dtype.name} {rank}", way_out)
    return _ranked(op, name, x, rank)


def _ranked(op: str, name: str, x: Any, rank: str) -> jax.Array:
    if x.ndim != rank.count(",") + 1:
        raise ValueError(
            f"{op}: {name} is {describe(x)}, need {rank}. Use jax.vmap for leading batch dimensions."
        )
    return jnp.asarray(x)


def _scales(op: str, name: str, x: Any, shape: tuple[int, ...]) -> jax.Array:
    """One float32 for each of `shape`, which may have a dimension of one behind it."""
    x = unwrapped(x)
    rule = f"float32 {list(shape)}, one for each of {name}'s rows of d"
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype != FLOAT32:
        _wrong_type(op, f"scales of {name}", x, rule, f"Quantise it: jax_deepgemm.quantize({name}).")
    if x.shape not in (shape, (*shape, 1)):
        raise ValueError(
            f"{op}: scales of {name} are {list(x.shape)}, need {list(shape)} or {[*shape, 1]}, one for "
            f"each of its rows of d. Quantise it so: jax_deepgemm.quantize({name}, (1, 128))."
        )
    return jnp.asarray(x).reshape(shape)


def _values_and_scales(op: str, name: str, x: Any) -> tuple[Any, Any] | None:
    if isinstance(x, QuantizedArray):
        if tuple(x.block) != (1, 128) and not (x.block[0] == 1 and x.block[1] >= x.shape[-1]):
            raise ValueError(
                f"{op}: {name} has block {tuple(x.block)}, need (1, 128): one scale for each of its rows of "
                f"d. Quantise it so: jax_deepgemm.quantize({name}, (1, 128))."
            )
        return x.values, x.scales
    return tuple(x) if isinstance(x, (tuple, list)) and len(x) == 2 else None


def scaled_queries(
    op: str, q: Any, weights: jax.Array, rank: str = "[s, h, d]"
) -> tuple[jax.Array, jax.Array]:
    """Values of q in e4m3, and weights that have its scales in them."""
    if fp4.is_fp4(unwrapped(q)):
        values, scales = fp4.expand(*fp4.fp4_operand(op, "q", unwrapped(q), rank))
        return values, weights * scales
    parts = _values_and_scales(op, "q", unwrapped(q))
    way_out = "Quantise it: jax_deepgemm.quantize(q), or call bf16_mqa_logits with bfloat16 q and kv."
    values = array(op, "q", q if parts is None else parts[0], E4M3, rank, way_out)
    if parts is None:
        return values, weights
    return values, weights * _scales(op, "q", parts[1], values.shape[:-1])


def scaled_keys(op: str, kv: Any) -> tuple[jax.Array, jax.Array]:
    """Values of kv in e4m3, and scales."""
    if fp4.is_fp4(unwrapped(kv)):
        return fp4.expand(*fp4.fp4_operand(op, "kv", unwrapped(kv), "[n, d]"))
    parts = _values_and_scales(op, "kv", unwrapped(kv))
    way_out = "Quantise it: jax_deepgemm.quantize(kv), or call bf16_mqa_logits with bfloat16 q and kv."
    if parts is None:
        _wrong_type(op, "kv", kv, "a QuantizedArray, or (values [n, d], scales [n])", way_out)
    values = array(op, "values of kv", parts[0], E4M3, "[n, d]", way_out)
    return values, _scales(op, "kv", parts[1], values.shape[:1])


def keys_as_given(op: str, kv: Any) -> tuple[jax.Array, jax.Array]:
    """Values and scales of kv; of FP4 its bytes, and words of scales."""
    kv = unwrapped(kv)
    return fp4.fp4_operand(op, "kv", kv, "[n, d]") if fp4.is_fp4(kv) else scaled_keys(op, kv)


def plain_operand(op: str, name: str, x: Any, rank: str) -> jax.Array:
    """q or kv in bfloat16."""
    way_out = f"Convert it: {name}.astype(jnp.bfloat16); e4m3 goes to mqa_logits."
    return array(op, name, x, BFLOAT16, rank, way_out)


def weights_of(op: str, weights: Any) -> jax.Array:
    way_out = "Convert them: weights.astype(jnp.float32)."
    return array(op, "weights", weights, FLOAT32, "[s, h]", way_out)


def check_shapes(op: str, q: jax.Array, kv: jax.Array, weights: jax.Array) -> None:
    """Raises ValueError where operands do not fit each other or the kernels."""
    tokens, heads, depth = q.shape
    of_keys = kv.shape[1] * (2 if fp4.is_packed(kv) else 1)
    if of_keys != depth:
        raise ValueError(
            f"{op}: q is {list(q.shape)} and kv is {[kv.shape[0], of_keys]}: d differs ({depth} and "
            f"{of_keys}). Keys have one head, of the size of q's heads."
        )
    check_heads(op, heads, depth)
    if weights.shape != (tokens, heads):
        raise ValueError(
            f"{op}: weights are {list(weights.shape)} and q is {list(q.shape)}, need [s, h] = "
            f"{[tokens, heads]}: a weight for each head of each token."
        )


def check_heads(op: str, heads: int, depth: int) -> None:
    """Raises ValueError where the kernels have no such heads."""
    if depth not in DEPTHS:
        raise ValueError(
            f"{op}: d is {depth}, need one of {', '.join(map(str, DEPTHS))}. Pad q and kv with zeros, which "
            "changes no logit."
        )
    if not 1 <= heads <= MOST_HEADS:
        raise ValueError(
            f"{op}: q has {heads} heads, need 1 to {MOST_HEADS}. Of more heads, add up the logits of parts."
        )


def check_window(op: str, window: tuple[Any, Any], tokens: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Bounds as int32. Those that are known while tracing (NumPy arrays, lists) are looked at."""
    start, end = (_bound(op, name, x, tokens) for name, x in zip(("k_start", "k_end"), window, strict=True))
    if isinstance(start, np.ndarray) and isinstance(end, np.ndarray):
        _check_known(op, start, end, keys)
    return jnp.asarray(start).astype(jnp.int32), jnp.asarray(end).astype(jnp.int32)


def integers(op: str, name: str, given: Any) -> jax.Array | np.ndarray:
    """Integers, as a NumPy array where they are known while tracing."""
    x = np.asarray(given) if isinstance(given, (list, tuple)) else unwrapped(given)
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.integer):
        _wrong_type(op, name, x, "integers", "Make them: jnp.asarray(.., jnp.int32).")
    return x


def _bound(op: str, name: str, given: Any, tokens: int) -> jax.Array | np.ndarray:
    x = integers(op, name, given)
    if x.shape != (tokens,):
        raise ValueError(
            f"{op}: {name} is {describe(x)} and q has {tokens} tokens, need [{tokens}]. One bound for all: "
            f"jnp.full({tokens}, bound)."
        )
    return x


def _check_known(op: str, start: np.ndarray, end: np.ndarray, keys: int) -> None:
    wrong = np.flatnonzero((start < 0) | (start > end) | (end > keys))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"{op}: the window of token {i} is [{start[i]}, {end[i]}), need 0 <= k_start <= k_end <= n = "
            f"{keys}. Clip it: k_end = np.clip(k_end, 0, n), k_start = np.clip(k_start, 0, k_end)."
        )
