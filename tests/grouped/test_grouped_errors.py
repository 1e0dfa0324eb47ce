"""What grouped GEMMs refuse, and that each message says what was given, the rule, and the way out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import QuantizedArray
from jax_deepgemm.log import note_once

E4, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32


def array(*shape: int, dtype: Any = BF16) -> jax.Array:
    return jnp.ones(shape, dtype)


def pair(values: tuple[int, ...], scales: tuple[int, ...], dtype: Any = E4) -> Any:
    return array(*values, dtype=dtype), array(*scales, dtype=F32)


X, W, S = array(4, 256), array(3, 300, 256), jnp.array([1, 0, 2], jnp.int32)
A, B = pair((4, 256), (4, 2)), pair((3, 300, 256), (3, 3, 2))
XM, AM = array(3, 4, 256), pair((3, 4, 256), (3, 4, 2))
XK, YK, AK = array(256, 4), array(256, 8), pair((4, 256), (4, 2))


@dataclass(frozen=True)
class Bad:
    """A call, the exception it raises, and pieces its message has."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def bad(op: str, defaults: dict[str, Any]) -> Callable[..., Bad]:
    def make(
        name: str, *says: str, error: type[Exception] = ValueError, form: str = "nt", **given: Any
    ) -> Bad:
        function = op.format(form)
        call = lambda: getattr(jdg, function)(**{**defaults, **given})  # noqa: E731
        return Bad(f"{function}-{name}", call, error, (f"{function}: ", *says))

    return make


m_bf16 = bad("m_grouped_bf16_gemm_{}_contiguous", {"a": X, "b": W, "group_sizes": S})
m_fp8 = bad("m_grouped_fp8_gemm_{}_contiguous", {"a": A, "b": B, "group_sizes": S})
masked = bad("m_grouped_bf16_gemm_nt_masked", {"a": XM, "b": W, "masked_m": S})
masked_fp8 = bad("m_grouped_fp8_gemm_nt_masked", {"a": AM, "b": B, "masked_m": S})
k_bf16 = bad("k_grouped_bf16_gemm_tn_contiguous", {"a": XK, "b": YK, "group_sizes": S})
k_fp8 = bad("k_grouped_fp8_gemm_{}_contiguous", {"a": AK, "b": AK, "group_sizes": S})
INDEX = jnp.zeros(4, jnp.int32)

BAD = (
    # Whose rows are whose
    m_bf16(
        "nothing",
        "no description of the groups",
        "exactly one of group_sizes",
        "m_indices (group of each row, [4])",
        error=TypeError,
        group_sizes=None,
    ),
    m_bf16("two", "got group_sizes and m_indices", "exactly one", error=TypeError, m_indices=INDEX),
    m_bf16("ends too", "got group_sizes and ends", error=TypeError, ends=S),
    m_bf16(
        "float sizes",
        "group_sizes is float32 [3], need an int32 array [3]",
        "group_sizes.astype(jnp.int32)",
        group_sizes=jnp.ones(3),
    ),
    m_bf16("bool sizes", "group_sizes is bool [3]", group_sizes=jnp.ones(3, bool)),
    m_bf16(
        "list",
        "group_sizes is a list of 3",
        "jnp.array(group_sizes, jnp.int32)",
        error=TypeError,
        group_sizes=[1, 0, 2],
    ),
    m_bf16("length", "group_sizes is int32 [2], need int32 [3]", "one number per group", group_sizes=S[:2]),
    m_bf16("longer without offset", "group_sizes is int32 [6], need int32 [3]", group_sizes=jnp.tile(S, 2)),
    m_bf16(
        "shorter with offset",
        "group_sizes is int32 [2], need int32 [3] or more",
        "also for groups that b does not have",
        group_sizes=S[:2],
        group_offset=1,
    ),
    m_bf16("rank", "group_sizes is int32 [1, 3]", group_sizes=S[None]),
    m_bf16(
        "index length",
        "m_indices is int32 [3], need int32 [4]",
        "the group of each row of the product",
        group_sizes=None,
        m_indices=S,
    ),
    m_bf16("ends length", "ends is int32 [2], need int32 [3]", group_sizes=None, ends=S[:2]),
    m_bf16("alignment", "alignment is 0, need a positive int", group_sizes=None, ends=S, alignment=0),
    m_bf16("offset rank", "group_offset is int32 [3]", "one number, [] or [1]", group_offset=S),
    m_bf16(
        "offset dtype",
        "group_offset is float32 []",
        "group_offset.astype(jnp.int32)",
        group_offset=jnp.float32(1),
    ),
    m_bf16("expected_m", "expected_m is 0, need a positive int", expected_m=0),
    m_bf16("expected_m dtype", "expected_m is 2.0", expected_m=2.0),
    masked("length", "masked_m is int32 [2], need int32 [3]", masked_m=S[:2]),
    masked("dtype", "masked_m is float32 [3]", masked_m=jnp.ones(3)),
    masked("zero_rows", "zero_rows is 1, need True or False", error=TypeError, zero_rows=1),
    masked("expected_m", "expected_m is -1", expected_m=-1),
    k_bf16("empty sizes", "group_sizes is int32 [0]", "at least one group", group_sizes=S[:0]),
    k_bf16("dtype", "group_sizes is float32 [3]", group_sizes=jnp.ones(3)),
    k_bf16("num_groups", "num_groups is 2 and group_sizes is int32 [3]", "group_offset too", num_groups=2),
    k_bf16("too many", "num_groups is 4 and group_sizes is int32 [3]", num_groups=4, group_offset=0),
    k_bf16("num_groups alone", "group_offset is given without num_groups", "num_groups=...", group_offset=1),
    k_bf16("num_groups dtype", "num_groups is True", num_groups=True),
    # Matrices
    m_bf16("no groups", "b is [0, 300, 256] [g, n, k]: there are no groups", b=W[:0], group_sizes=S[:0]),
    m_bf16("b rank", "b is bfloat16 [300, 256], need 3 dimensions [g, n, k]", "jnp.expand_dims", b=W[0]),
    m_bf16("a rank", "a is bfloat16 [3, 4, 256], need 2 dimensions [m, k]", "jax.vmap", a=XM),
    m_bf16(
        "k",
        "a is [4, 256] [m, k] and b is [3, 256, 300] [g, n, k]: k differs (256 and 300)",
        "For b stored [g, k, n] use m_grouped_bf16_gemm_nn_contiguous",
        b=jnp.swapaxes(W, 1, 2),
    ),
    m_bf16(
        "k of nn", "k differs (256 and 300)", "For b stored [g, n, k] use m_grouped_bf16_gemm_nt", form="nn"
    ),
    m_bf16("k elsewhere", "k differs (255 and 256)", "Make both operands cover the same k", a=X[:, :255]),
    m_bf16("dtype", "a is float32 [4, 256], need bfloat16", "a.astype(jnp.bfloat16)", a=X.astype(F32)),
    m_bf16("quantised", "a is a tuple of 2", "m_grouped_fp8_gemm_nt_contiguous", error=TypeError, a=A),
    m_bf16(
        "fp8 values", "b is float8_e4m3fn", "m_grouped_fp8_gemm_nt_contiguous with a QuantizedArray", b=B[0]
    ),
    m_bf16("out_dtype", "out_dtype is float16, need bfloat16 or float32", out_dtype=jnp.float16),
    m_bf16("config", "config is 3, need a GemmConfig", error=TypeError, config=3),
    m_bf16("num_sms", "num_sms is 0", num_sms=0),
    m_fp8("unquantised", "a is bfloat16 [4, 256]", "m_grouped_bf16_gemm_nt_contiguous", error=TypeError, a=X),
    m_fp8(
        "scales of b",
        "scales of b are [3, 2, 2], need [3, 3, 2] (block (128, 128)) or [3, 300, 2] (block (1, 128))",
        "jax_deepgemm.quantize(b, (128, 128))",
        b=pair((3, 300, 256), (3, 2, 2)),
    ),
    m_fp8("scales of another group", "scales of b are [2, 3, 2]", b=pair((3, 300, 256), (2, 3, 2))),
    m_fp8(
        "block of a",
        "a has one scale per block (128, 1)",
        a=QuantizedArray(*pair((4, 256), (1, 256)), (128, 1)),
    ),
    m_fp8(
        "scales of nn",
        "scales of b are [3, 3, 2], need [3, 2, 3] (block (128, 128)) or [3, 2, 300] (block (128, 1))",
        form="nn",
        b=pair((3, 256, 300), (3, 3, 2)),
    ),
    m_fp8("k", "k differs (256 and 300)", "use m_grouped_fp8_gemm_nn", b=pair((3, 256, 300), (3, 2, 3))),
    m_fp8("values", "values of a are int8", a=pair((4, 256), (4, 2), jnp.int8)),
    masked("groups", "the number of groups differs (2 and 3)", "Every group", a=XM[:2]),
    masked("rank", "a is bfloat16 [4, 256], need 3 dimensions [g, m, k]", a=X),
    masked(
        "k",
        "b is [3, 256, 300] [g, n, k]: k differs (256 and 300)",
        "jnp.swapaxes(b, -1, -2)",
        b=jnp.swapaxes(W, 1, 2),
    ),
    masked_fp8("groups", "the number of groups differs (3 and 2)", b=pair((2, 300, 256), (2, 3, 2))),
    masked_fp8("scales of a", "scales of a are [3, 4, 3], need [3, 4, 2]", a=pair((3, 4, 256), (3, 4, 3))),
    k_bf16("k", "a is [255, 4] [k, m] and b is [256, 8] [k, n]: k differs (255 and 256)", a=XK[:255]),
    k_bf16("c shape", "c is float32 [4, 8], need float32 [3, 4, 8]", "[g, m, n]", c=array(4, 8, dtype=F32)),
    k_bf16("c dtype", "c is bfloat16 [3, 4, 8], need float32", "out_dtype=jnp.bfloat16", c=array(3, 4, 8)),
    k_bf16("c list", "c is a float", error=TypeError, c=1.0),
    k_fp8("block", "need [4, 2] (block (1, 128))", a=pair((4, 256), (1, 2))),
    k_fp8(
        "blocks of tn",
        "need [2, 4] (block (128, 1))",
        form="tn",
        a=pair((256, 4), (4, 2)),
        b=pair((256, 4), (2, 4)),
    ),
)


@pytest.mark.parametrize("case", BAD, ids=str)
def test_refused(case: Bad) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    message = str(caught.value)
    for piece in case.says:
        assert piece in message, message


def test_refused_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"group_sizes is float32 \[3\]"):
        jax.eval_shape(jdg.m_grouped_bf16_gemm_nt_contiguous, X, W, jnp.ones(3))


def test_transposed_bytes_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    note_once.cache_clear()
    b = pair((3, 256, 40), (3, 2, 1))
    with caplog.at_level(logging.INFO, "jax_deepgemm"):
        for _ in range(2):
            jax.eval_shape(jdg.m_grouped_fp8_gemm_nn_contiguous, A, b, S)
    (note,) = [record.getMessage() for record in caplog.records if "transposed" in record.getMessage()]
    assert "m_grouped_fp8_gemm_nn_contiguous: b [3, 256, 40]" in note
    assert "m_grouped_fp8_gemm_nt_contiguous" in note


def test_padding_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    from jax_deepgemm.ops.grouped import prepare

    note_once.cache_clear()
    with caplog.at_level(logging.INFO, "jax_deepgemm"):
        a = np.zeros((4, 130), jnp.bfloat16)
        prepare.m_grouped_bf16(
            a, np.zeros((3, 8, 130), jnp.bfloat16), S, S[:1], layout="nt", rows_format="sizes"
        )
    notes = [record.getMessage() for record in caplog.records]
    assert any("m_grouped_bf16_gemm: a bfloat16[4, 130] is copied to [4, 136]" in note for note in notes)
