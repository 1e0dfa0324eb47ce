"""The names that DeepSpeed's FastGen (inference v2) registers, as functions of its positional arguments.

Arguments that DeepSpeed writes results to are None here, or anything with the shape and dtype that the result
shall have (an array, a jax.ShapeDtypeStruct), whose numbers are not read. Results are returned. In place of
pointers to lists of blocks, `kv_ptrs`, there is the table of pages, integers [sequences, most pages], and in
place of the cache a `PagedKVCache`. Metadata are DeepSpeed's:

    batch_metadata   [tokens, sequences]: how many there are; rows behind them are padding
    seq_metadata     [sequences, 4 (or 3)]: first row, rows, tokens seen before
    tokens_to_seq    [rows]: the sequence of each row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_deepgemm.attention import PagedKVCache, paged_append, ragged_paged_attention
from jax_deepgemm.inference import checks, packing
from jax_deepgemm.inference.elementwise import bias_act
from jax_deepgemm.inference.experts import grouped_linear
from jax_deepgemm.inference.layers import linear
from jax_deepgemm.inference.names import Given, adapter
from jax_deepgemm.inference.norms import norm
from jax_deepgemm.inference.products import product
from jax_deepgemm.inference.rotary import frequencies
from jax_deepgemm.inference.tokens import embed, last_tokens
from jax_deepgemm.inference.weights import QuantizedWeight
from jax_deepgemm.moe import plan_dispatch, route

ACTIVATIONS = {0: "gelu_tanh", 1: "relu", 2: "silu", 6: "identity"}
GATES = {3: "gelu_tanh", 4: "relu", 5: "silu"}


class Atoms(NamedTuple):
    """The work of an attention call: what `build_atoms` returns and `flash_attn_by_atoms` takes.

    Attributes:
      block_tables: int32 [sequences, most pages].
      cu_q_lens: int32 [sequences + 1].
      kv_lens: int32 [sequences].
    """

    block_tables: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array


class Batch(NamedTuple):
    """Sequences of a ragged batch: rows that each has, and tokens it had before; none of what is padding."""

    tokens: jax.Array
    starts: jax.Array
    rows: jax.Array
    seen: jax.Array

    @classmethod
    def of(cls, given: Given) -> Batch:
        """The metadata of a call."""
        counts = checks.integers(given.name, "batch_metadata", given.batch_metadata, "[2]")
        each = checks.integers(given.name, "seq_metadata", given.seq_metadata, "[sequences, 4]")
        if counts.shape != (2,) or each.ndim != 2 or each.shape[1] < 3:
            raise ValueError(
                f"{given.name}: batch_metadata is {list(counts.shape)} and seq_metadata is "
                f"{list(each.shape)}, need [2] (tokens, sequences) and [sequences, 4] (first row, rows, "
                "tokens seen before)."
            )
        there = jnp.arange(each.shape[0], dtype=jnp.int32) < counts[1]
        rows, seen = (jnp.where(there, each[:, i], 0) for i in (1, 2))
        return cls(counts[0], each[:, 0], rows, seen)

    @property
    def cu_q_lens(self) -> jax.Array:
        """Where the rows of each sequence begin and end: sequences stand one behind the other."""
        ends = jnp.cumsum(self.rows, dtype=jnp.int32)
        return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])

    def positions(self, given: Given) -> tuple[jax.Array, jax.Array]:
        """The position of each row in its sequence, -1 of padding, and its sequence."""
        owner = checks.integers(given.name, "tokens_to_seq", given.tokens_to_seq, "[rows]")
        if owner.ndim != 1:
            raise ValueError(f"{given.name}: tokens_to_seq is {list(owner.shape)}, need [rows].")
        row = jnp.arange(owner.shape[0], dtype=jnp.int32)
        owner = jnp.clip(owner, 0, self.rows.shape[0] - 1)
        inside = row - jnp.take(self.starts, owner)
        real = (row < self.tokens) & (inside >= 0) & (inside < jnp.take(self.rows, owner))
        return jnp.where(real, jnp.take(self.seen, owner) + inside, -1), owner


def _result(given: Given, out: str, value: jax.Array) -> jax.Array:
    """The value in the type that an argument of DeepSpeed's asks for."""
    wanted = checks.unwrapped(given[out])
    if wanted is None:
        return value
    if tuple(getattr(wanted, "shape", ())) != value.shape or not hasattr(wanted, "dtype"):
        raise ValueError(
            f"{given.name}: {out} is {checks.described(wanted)}, need None or {list(value.shape)}: the "
            "result is returned, and only its dtype is taken from there."
        )
    return value.astype(wanted.dtype)


# Elementwise functions and norms ---------------------------------------------------------------------------


def _act(given: Given, name: str, known: dict[int, str]) -> str:
    return known[checks.choice(given.name, name, int(given[name]), tuple(known))]


def _bias_activation(given: Given) -> jax.Array:
    return bias_act(given.activation, given.bias, _act(given, "activation_type", ACTIVATIONS))


def _gated_activation(given: Given) -> jax.Array:
    act = _act(given, "activation_type", GATES)
    y = bias_act(given.activation, given.bias, act, gated="interleaved", gate_first=True)
    return _result(given, "output", y)


def _layer_norm(given: Given) -> jax.Array:
    y = norm(given.input, given.gamma, given.beta, eps=float(given.epsilon), residual=given.get("residual"))
    return _result(given, "output", y)


def _pre_layer_norm(given: Given) -> tuple[jax.Array, jax.Array]:
    form = {"eps": float(given.epsilon), "residual": given.residual}
    y, total = norm(given.input, given.gamma, given.beta, return_sum=True, **form)
    return _result(given, "res_output", total), _result(given, "norm_output", y)


def _rms_norm(given: Given) -> jax.Array:
    y = norm(given.norm_input, given.gamma, kind="rms", eps=float(given.epsilon))
    return _result(given, "norm_output", y)


def _rms_pre_norm(given: Given) -> tuple[jax.Array, jax.Array]:
    form: dict[str, Any] = {"kind": "rms", "eps": float(given.epsilon), "residual": given.residual_input}
    y, total = norm(given.norm_input, given.gamma, return_sum=True, **form)
    return _result(given, "norm_output", y), _result(given, "residual_output", total)


# Products --------------------------------------------------------------------------------------------------


def _blas_linear(given: Given) -> jax.Array:
    return _result(given, "output", linear(given.hidden_states, given.weights, w_layout="nk"))


def _blas_4d_matmul(given: Given) -> jax.Array:
    a = checks.floats(given.name, "A", given.A)
    b = checks.floats(given.name, "B", given.B, like=a)
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"{given.name}: A is {list(a.shape)} and B is {list(b.shape)}, need [.., n, k] and [.., k, m]."
        )
    lead = tuple(range(a.ndim - 2))
    y = product(a, b, ((a.ndim - 1,), (b.ndim - 2,)), (lead, lead))
    return _result(given, "C", y.astype(a.dtype))


def _integer_weight(given: Given) -> QuantizedWeight:
    """int8 [.., k, n], or int4 in bytes [.., k, n / 2], with a scale for each of n."""
    bits = checks.choice(given.name, "num_bits", int(given.num_bits), (4, 8))
    values = jnp.asarray(checks.unwrapped(given.weight))
    if values.dtype not in (jnp.int8, jnp.uint8) or values.ndim < 2:
        raise TypeError(
            f"{given.name}: weight is {checks.described(values)}, need int8 [.., k, n], or int4 in bytes "
            "[.., k, n / 2], two in each, the first in its low half."
        )
    scales = checks.floats(given.name, "scales", given.scales).astype(jnp.float32)[..., None, :]
    kind = "int8" if bits == 8 else "int4"
    return QuantizedWeight(values.astype(jnp.int8 if bits == 8 else jnp.uint8), scales, kind)


def _mixed_gemm(given: Given) -> jax.Array:
    act = _act(given, "activation_raw", ACTIVATIONS)
    y = linear(given.hidden_states, _integer_weight(given), given.bias, act)
    return _result(given, "output", y)


def _sizes(given: Given) -> jax.Array:
    """Rows of each expert, from the running sums of them."""
    ends = checks.integers(
        given.name, "total_rows_before_expert", given.total_rows_before_expert, "[experts]"
    )
    return ends - jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])


def _moe_gemm(given: Given) -> jax.Array:
    act = _act(given, "activation_raw", ACTIVATIONS)
    weight = _integer_weight(given) if "num_bits" in given else given.weight
    y = grouped_linear(given.hidden_states, weight, _sizes(given), given.bias, act)
    return _result(given, "output", y)


def _preprocess_weight(given: Given) -> tuple[jax.Array, jax.Array]:
    """Planes of the high two and the low four bits of each FP6 number, uint8 [n, k / 4] and [n, k / 2]."""
    weight = checks.floats(given.name, "Weight", given.Weight)
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(f"{given.name}: Weight is {list(weight.shape)}, need [n, k] with k a multiple of 4.")
    largest = packing.LARGEST_FP6
    codes = packing.encode_fp6(jnp.clip(weight.astype(jnp.float32), -largest, largest))
    n = weight.shape[0]
    two = (codes >> 4).reshape(n, -1, 4)
    high = sum((two[..., i] << (2 * i) for i in range(1, 4)), two[..., 0])
    return high.astype(jnp.uint8), packing.pack_int4(codes & 15)


def _wf6_linear(given: Given) -> jax.Array:
    x = checks.floats(given.name, "hidden_states", given.hidden_states)
    n, k = int(given.M), int(given.K)
    planes = {"weights_2bit": k // 4, "weights_4bit": k // 2}
    high, low = (
        checks.shaped(given.name, one, jnp.asarray(given[one]), (n, size), "as preprocess_weight returns it")
        for one, size in planes.items()
    )
    shifts = jnp.arange(0, 8, 2, dtype=jnp.int32).reshape(1, 1, 4)
    top = ((high.astype(jnp.int32)[..., None] >> shifts) & 3).reshape(n, k)
    numbers = packing.decode_fp6((top << 4) | (packing.unpack_int4(low) & 15))
    scale = checks.shaped(
        given.name, "scale", checks.floats(given.name, "scale", given.scale), (n,), "of each row"
    )
    w = (numbers * scale.astype(jnp.float32)[:, None]).astype(x.dtype)
    return _result(given, "output", linear(x, w, w_layout="nk"))


# Experts ---------------------------------------------------------------------------------------------------


def _top_k_gating(given: Given) -> tuple[jax.Array, ...]:
    logits = checks.floats(given.name, "logits", given.logits)
    shape = tuple(getattr(given.scores, "shape", ()))
    if logits.ndim != 2 or len(shape) != 2 or shape[0] != logits.shape[0]:
        raise ValueError(
            f"{given.name}: logits are {list(logits.shape)} and scores {list(shape)}, need [tokens, "
            "experts] and an array or ShapeDtypeStruct [tokens, k], which says how many experts a token "
            "goes to."
        )
    counts = checks.integers(given.name, "batch_metadata", given.batch_metadata, "[2]")
    ids, scores = route(logits, shape[1], renormalize=False)
    real = (jnp.arange(shape[0], dtype=jnp.int32) < counts[0])[:, None]
    ids = jnp.where(real, ids, -1)
    plan = plan_dispatch(ids, logits.shape[1])
    starts = jnp.cumsum(plan.group_sizes, dtype=jnp.int32) - plan.group_sizes
    offsets = plan.position - jnp.take(starts, jnp.maximum(ids, 0))
    return plan.group_sizes, jnp.where(real, scores, 0.0), ids, jnp.where(real, offsets, -1)


def _moe_scatter(given: Given) -> tuple[jax.Array, ...]:
    x = checks.floats(given.name, "activations", given.activations)
    sizes = checks.integers(given.name, "expert_counts", given.expert_counts, "[experts]")
    ids = checks.integers(given.name, "assignments", given.assignments, "[tokens, k]")
    offsets = checks.integers(given.name, "offsets", given.offsets, "[tokens, k]")
    if x.ndim != 2 or ids.ndim != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"{given.name}: activations are {list(x.shape)} and assignments {list(ids.shape)}, need "
            "[tokens, h] and [tokens, k]."
        )
    checks.shaped(given.name, "offsets", offsets, ids.shape, "as assignments")
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    known = (ids >= 0) & (ids < sizes.shape[0])
    slots = jnp.where(known, jnp.take(ends - sizes, jnp.where(known, ids, 0)) + offsets, -1)
    copies = ids.shape[0] * ids.shape[1]
    source = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), ids.shape[1])
    target = jnp.where(slots >= 0, slots, copies).reshape(-1)
    rows = jnp.zeros((copies, x.shape[1]), x.dtype).at[target].set(jnp.take(x, source, axis=0), mode="drop")
    return _result(given, "moe_input", rows), ends, slots


def _moe_gather(given: Given) -> jax.Array:
    y = checks.floats(given.name, "moe_output", given.moe_output)
    slots = checks.integers(given.name, "mapped_slots", given.mapped_slots, "[tokens, k]")
    scores = checks.floats(given.name, "scores", given.scores).astype(jnp.float32)
    if y.ndim != 2 or slots.ndim != 2 or scores.shape != slots.shape:
        raise ValueError(
            f"{given.name}: moe_output is {list(y.shape)}, scores are {list(scores.shape)} and mapped_slots "
            f"{list(slots.shape)}, need [rows, h] and twice [tokens, k]."
        )
    known = (slots >= 0) & (slots < y.shape[0])
    scores = jnp.where(known, scores, 0.0)
    if given.normalize_scales:
        total = jnp.sum(scores, axis=1, keepdims=True)
        scores = scores / jnp.where(total == 0, 1.0, total)
    rows = jnp.take(y, jnp.where(known, slots, 0), axis=0).astype(jnp.float32)
    rows = jnp.where(known[..., None], rows, 0.0)
    return _result(given, "layer_output", jnp.sum(rows * scores[..., None], axis=1).astype(y.dtype))


# Ragged batches --------------------------------------------------------------------------------------------


def _ragged_embed(given: Given) -> jax.Array:
    ids = checks.integers(given.name, "input_ids", given.input_ids, "[rows]")
    positions, _ = Batch.of(given).positions(given)
    checks.shaped(given.name, "input_ids", ids, positions.shape, "as tokens_to_seq")
    ids = jnp.where(positions >= 0, ids, -1)
    table = given.position_embedding_weight
    options: dict[str, Any] = {}
    if table is not None:
        options = {"positions": positions, "offset": int(given.pos_embed_offset)}
    return _result(given, "embedded_tokens", embed(ids, given.embedding_weight, table, **options))


def _gather_for_logits(given: Given) -> jax.Array:
    rows = last_tokens(given.all_acts, Batch.of(given).cu_q_lens)
    return _result(given, "final_token_acts", rows)


def _cache(given: Given, name: str) -> PagedKVCache:
    cache = given[name]
    if not isinstance(cache, PagedKVCache):
        raise TypeError(
            f"{given.name}: {name} is {checks.described(cache)}, need a PagedKVCache: "
            "PagedKVCache.create(pages, page_size, kv_heads, head_dim)."
        )
    return cache


def _tables(given: Given) -> jax.Array:
    tables = checks.integers(given.name, "kv_ptrs", given.kv_ptrs, "[sequences, most pages]")
    if tables.ndim != 2:
        raise ValueError(
            f"{given.name}: kv_ptrs is {list(tables.shape)}, need the tables of pages [sequences, most "
            "pages] in place of pointers."
        )
    return tables


def _append(given: Given, inv_freq: jax.Array | None) -> Any:
    cache, tables = _cache(given, "kv_cache"), _tables(given)
    positions, owner = Batch.of(given).positions(given)
    page = jnp.clip(positions // cache.page_size, 0, tables.shape[1] - 1)
    inside = (positions >= 0) & (positions < tables.shape[1] * cache.page_size)
    slots = tables[owner, page] * cache.page_size + positions % cache.page_size
    slots = jnp.where(inside & (tables[owner, page] >= 0), slots, -1)
    q, k, v = (checks.floats(given.name, one, given[one]) for one in ("q", "k", "v"))
    if any(x.ndim != 2 or x.shape[0] != positions.shape[0] for x in (q, k, v)):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"{given.name}: q, k and v are {shapes}, need [rows, heads * d] for {positions.shape[0]} rows."
        )
    for name, x, d in (("q", q, cache.head_dim), ("k", k, cache.head_dim), ("v", v, cache.v_head_dim)):
        if x.shape[1] % d:
            raise ValueError(
                f"{given.name}: {name} is {list(x.shape)}, need heads of {d} numbers, as the cache's."
            )
    k, v = k.reshape(k.shape[0], -1, cache.head_dim), v.reshape(v.shape[0], -1, cache.v_head_dim)
    if inv_freq is None or inv_freq.shape[0] == 0:
        return paged_append(cache, k, v, slots), q
    turning = (jnp.maximum(positions, 0), inv_freq)
    query = q.reshape(q.shape[0], -1, cache.head_dim)
    cache, query = paged_append(cache, k, v, slots, q=query, rotary=turning)
    return cache, query.reshape(q.shape)


def _kv_rotary(given: Given) -> Any:
    size = _cache(given, "kv_cache").head_dim
    theta = float(given.theta_base)
    return _append(given, frequencies(given.name, size, int(given.rotary_dim), theta, None))


def _kv_trained_rotary(given: Given) -> Any:
    size = _cache(given, "kv_cache").head_dim
    return _append(given, frequencies(given.name, size, None, None, given.inv_freq))


def _linear_kv_copy(given: Given) -> Any:
    return _append(given, None)


def _build_atoms(given: Given) -> Atoms:
    batch, tables = Batch.of(given), _tables(given)
    lens = jnp.where(batch.rows > 0, batch.seen + batch.rows, 0)
    return Atoms(
        checks.shaped(
            given.name, "kv_ptrs", tables, (*lens.shape, tables.shape[1]), "a row of pages for each sequence"
        ),
        batch.cu_q_lens,
        lens,
    )


def _flash_attn(given: Given) -> jax.Array:
    cache = _cache(given, "k")
    if given.v is not None and given.v is not cache:
        raise TypeError(
            f"{given.name}: v is {checks.described(given.v)}, need None: the cache holds keys and values."
        )
    if not isinstance(given.attention_atoms, Atoms):
        raise TypeError(
            f"{given.name}: attention_atoms is {checks.described(given.attention_atoms)}, need what "
            "build_atoms returns."
        )
    q = checks.floats(given.name, "q", given.q)
    if q.ndim != 2 or q.shape[1] % cache.head_dim:
        raise ValueError(f"{given.name}: q is {list(q.shape)}, need [rows, heads * {cache.head_dim}].")
    heads = q.reshape(q.shape[0], -1, cache.head_dim)
    form: dict[str, Any] = {"causal": bool(given.is_causal), "scale": float(given.softmax_scale)}
    out = ragged_paged_attention(heads, cache, *given.attention_atoms, **form)
    return _result(given, "out", out.reshape(q.shape[0], -1))


BATCH = "batch_metadata seq_metadata tokens_to_seq kv_ptrs"
_NAMES: dict[str, tuple[Callable[[Given], Any], str]] = {
    "bias_activation": (_bias_activation, "activation bias activation_type"),
    "gated_activation": (_gated_activation, "output activation bias activation_type"),
    "layer_norm": (_layer_norm, "output input gamma beta epsilon"),
    "pre_layer_norm": (_pre_layer_norm, "res_output norm_output input residual gamma beta epsilon"),
    "post_layer_norm": (_layer_norm, "output input residual gamma beta epsilon"),
    "rms_norm": (_rms_norm, "norm_output norm_input gamma epsilon"),
    "rms_pre_norm": (_rms_pre_norm, "norm_output residual_output norm_input residual_input gamma epsilon"),
    "blas_linear": (_blas_linear, "output hidden_states weights"),
    "blas_4d_matmul": (_blas_4d_matmul, "C B A"),
    "mixed_gemm": (_mixed_gemm, "output hidden_states weight scales bias num_bits activation_raw"),
    "moe_gemm": (_moe_gemm, "output hidden_states weight bias total_rows_before_expert activation_raw"),
    "mixed_moe_gemm": (
        _moe_gemm,
        "output hidden_states weight scales bias total_rows_before_expert num_bits activation_raw",
    ),
    "preprocess_weight": (_preprocess_weight, "Weight"),
    "cuda_wf6af16_linear": (
        _wf6_linear,
        "output hidden_states weights_2bit weights_4bit scale workspace M N K split_k",
    ),
    "top_k_gating": (_top_k_gating, "expert_counts scores assignments offsets logits batch_metadata"),
    "moe_scatter": (
        _moe_scatter,
        "moe_input expert_count_cumsums mapped_slots activations expert_counts assignments offsets",
    ),
    "moe_gather": (_moe_gather, "layer_output moe_output scores mapped_slots expert_counts normalize_scales"),
    "ragged_embed": (
        _ragged_embed,
        f"embedded_tokens input_ids embedding_weight position_embedding_weight pos_embed_offset {BATCH}",
    ),
    "gather_for_logits": (_gather_for_logits, "final_token_acts all_acts batch_metadata seq_metadata"),
    "build_atoms": (_build_atoms, "atoms_ten batch_metadata seq_metadata kv_ptrs q_block_size kv_block_size"),
    "flash_attn_by_atoms": (_flash_attn, "out q k v attention_atoms softmax_scale is_causal"),
    "kv_rotary_embeddings": (_kv_rotary, f"kv_cache q k v rotary_dim theta_base {BATCH}"),
    "kv_trained_rotary_embeddings": (_kv_trained_rotary, f"kv_cache q k v inv_freq {BATCH}"),
    "linear_kv_copy": (_linear_kv_copy, f"kv_cache q k v {BATCH}"),
}

fastgen_names: dict[str, Callable[..., Any]] = {
    name: adapter(name, (order,), compute) for name, (compute, order) in _NAMES.items()
}
"""Every kernel that FastGen calls."""
