"""What dense GEMMs refuse, and that each message says what was given, the rule, and the way out."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import QuantizedArray
from jax_deepgemm.core import kernel_rule
from jax_deepgemm.jit import CompilerNotFoundError

E4, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32


def array(*shape: int, dtype: Any = BF16) -> jax.Array:
    return jnp.ones(shape, dtype)


def pair(values: tuple[int, ...], scales: tuple[int, ...], dtype: Any = E4, scale_dtype: Any = F32) -> Any:
    return array(*values, dtype=dtype), array(*scales, dtype=scale_dtype)


def quantized(values: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> QuantizedArray:
    """As jax.tree.map may leave it: not checked yet."""
    return jax.tree.unflatten(jax.tree.structure(QuantizedArray(0, 0, block)), pair(values, scales))


A, B = pair((4, 256), (4, 2)), pair((300, 256), (3, 2))
X, W = array(4, 256), array(300, 256)


@dataclass(frozen=True)
class Bad:
    """A call, the exception it raises, and pieces its message has."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def fp8(
    name: str,
    *says: str,
    error: type[Exception] = ValueError,
    op: str = "nt",
    a: Any = A,
    b: Any = B,
    c: Any = None,
    **options: Any,
) -> Bad:
    function = f"fp8_gemm_{op}"
    call = lambda: getattr(jdg, function)(a, b, c, **options)  # noqa: E731
    return Bad(f"fp8-{name}", call, error, (f"{function}: ", *says))


def bf16(
    name: str,
    *says: str,
    error: type[Exception] = ValueError,
    op: str = "nt",
    a: Any = X,
    b: Any = W,
    c: Any = None,
    **options: Any,
) -> Bad:
    function = f"bf16_gemm_{op}"
    call = lambda: getattr(jdg, function)(a, b, c, **options)  # noqa: E731
    return Bad(f"bf16-{name}", call, error, (f"{function}: ", *says))


def linear(
    name: str, *says: str, error: type[Exception] = ValueError, x: Any = X, w: Any = W, **options: Any
) -> Bad:
    return Bad(f"linear-{name}", lambda: jdg.fp8_linear(x, w, **options), error, ("fp8_linear: ", *says))


BAD = (
    # FP8 operands
    fp8(
        "unquantised",
        "a is bfloat16 [4, 256]",
        "QuantizedArray or a (values, scales) tuple",
        "jax_deepgemm.quantize(a, (1, 128))",
        "bf16_gemm_nt",
        a=X,
        error=TypeError,
    ),
    fp8("triple", "b is a tuple of 3", "jax_deepgemm.quantize(b, (128, 128))", b=(*B, None), error=TypeError),
    fp8("scales-not-array", "scales of a is a float", "need an array", a=(A[0], 1.0), error=TypeError),
    fp8(
        "values-dtype",
        "values of a are int8",
        "float8_e4m3fn or float8_e5m2",
        "quantize(a, (1, 128))",
        a=pair((4, 256), (4, 2), jnp.int8),
    ),
    fp8(
        "values-fnuz",
        "float8_e4m3fnuz",
        "float8_e4m3fn or float8_e5m2",
        b=pair((300, 256), (3, 2), jnp.float8_e4m3fnuz),
    ),
    fp8(
        "rank",
        "values of a is float8_e4m3fn [2, 4, 256]",
        "2 dimensions [m, k]",
        "jax.vmap",
        a=pair((2, 4, 256), (2, 4, 2)),
    ),
    fp8(
        "scale-dtype",
        "scales of b are bfloat16, need float32",
        "scales.astype(jnp.float32)",
        b=pair((300, 256), (3, 2), scale_dtype=BF16),
    ),
    fp8(
        "scale-e8m0",
        "scales of b are float8_e8m0fnu",
        "astype(jnp.float32)",
        b=pair((300, 256), (3, 2), scale_dtype=jnp.float8_e8m0fnu),
    ),
    fp8(
        "scale-packed",
        "scales of a are int32",
        "unpack_ue8m0_from_int(scales)[..., :2]",
        a=pair((4, 256), (4, 1), scale_dtype=jnp.int32),
    ),
    fp8(
        "scale-shape",
        "scales of a are [4, 3], need [4, 2] (block (1, 128))",
        "values [4, 256] [m, k]",
        "quantize(a, (1, 128))",
        a=pair((4, 256), (4, 3)),
    ),
    fp8(
        "scale-shape-b",
        "scales of b are [3, 3], need [3, 2] (block (128, 128)) or [300, 2] (block (1, 128))",
        b=pair((300, 256), (3, 3)),
    ),
    fp8("scale-transposed", "scales of b are [2, 3], need [3, 2]", b=pair((300, 256), (2, 3))),
    fp8(
        "block-64",
        "a has one scale per block (1, 64), need (1, 128) or (1, 32) for a stored [m, k]",
        "quantize(a, (1, 128))",
        a=quantized((4, 256), (4, 4), (1, 64)),
    ),
    fp8(
        "block-32-by-128",
        "a has a scale for 32 elements of k and b for 128, need equally many",
        "quantize(b, (1, 32))",
        "quantize(a, (1, 128))",
        a=quantized((4, 256), (4, 8), (1, 32)),
    ),
    fp8(
        "block-a-128",
        "a has one scale per block (128, 128), need (1, 128)",
        a=quantized((4, 256), (1, 2), (128, 128)),
    ),
    fp8(
        "block-b",
        "b has one scale per block (128, 1), need (128, 128) or (1, 128) or (32, 32) or (1, 32) for b",
        b=quantized((300, 256), (3, 256), (128, 1)),
    ),
    fp8(
        "block-stored",
        "a has one scale per block (1, 128), need (128, 1) or (32, 1) for a stored [k, m]",
        op="tn",
        a=quantized((256, 4), (256, 1), (1, 128)),
        b=pair((256, 300), (2, 3)),
    ),
    fp8(
        "block-lies",
        "scales of b are [3, 2], need [300, 2] (block (1, 128))",
        b=quantized((300, 256), (3, 2), (1, 128)),
    ),
    fp8(
        "k",
        "a is [4, 256] [m, k] and b is [256, 300] [n, k]: k differs (256 and 300)",
        "These shapes fit fp8_gemm_nn (a [m, k], b [k, n])",
        b=pair((256, 300), (2, 3)),
    ),
    fp8(
        "k-hopeless",
        "k differs (256 and 128)",
        "Make both operands cover the same k",
        b=pair((300, 128), (3, 1)),
    ),
    # C, result, options
    fp8(
        "c-shape",
        "c is bfloat16 [300], need bfloat16 [4, 300]",
        "jnp.broadcast_to(c, (4, 300))",
        c=array(300),
    ),
    fp8(
        "c-dtype",
        "c is float32 [4, 300], need bfloat16 [4, 300]",
        "c.astype(jnp.bfloat16)",
        "out_dtype=jnp.float32",
        c=array(4, 300, dtype=F32),
    ),
    fp8("c-type", "c is a float", "bfloat16 [4, 300]", c=1.0, error=TypeError),
    fp8(
        "out-dtype",
        "out_dtype is float16, need bfloat16 or float32",
        ".astype(jnp.float16)",
        out_dtype=jnp.float16,
    ),
    fp8(
        "out-dtype-junk",
        "out_dtype is 'bf17'",
        "jnp.bfloat16 or jnp.float32",
        out_dtype="bf17",
        error=TypeError,
    ),
    fp8("out-dtype-none", "out_dtype is None", "Leave it out", out_dtype=None, error=TypeError),
    fp8("reduce-dtype-none", "reduce_dtype is None", "Leave it out", reduce_dtype=None, error=TypeError),
    fp8(
        "reduce-dtype",
        "reduce_dtype is bfloat16 and out_dtype is float32",
        "Leave reduce_dtype out",
        out_dtype=F32,
        reduce_dtype=BF16,
    ),
    fp8(
        "config",
        "config is {'stages': 4}",
        "GemmConfig or None",
        "explain",
        config={"stages": 4},
        error=TypeError,
    ),
    fp8("config-problem", "need a GemmConfig", config=jdg.GemmProblem(4, 300, 256), error=TypeError),
    fp8("num-sms", "num_sms is 0", "positive int", num_sms=0),
    fp8("out-sharding", "out_sharding is 'x'", "PartitionSpec", out_sharding="x", error=TypeError),
    # BF16
    bf16(
        "dtype", "a is float32 [4, 256], need bfloat16", "a.astype(jnp.bfloat16)", a=array(4, 256, dtype=F32)
    ),
    bf16("fp8", "b is float8_e4m3fn [300, 256]", "fp8_gemm_nt", b=B[0]),
    bf16(
        "quantised",
        "a is a QuantizedArray of float8_e4m3fn [4, 256]",
        "fp8_gemm_nt",
        a=QuantizedArray(*A, (1, 128)),
        error=TypeError,
    ),
    bf16("tuple", "b is a tuple of 2", "bfloat16 array [n, k]", "fp8_gemm_nt", b=B, error=TypeError),
    bf16("rank", "a is bfloat16 [256], need 2 dimensions [m, k]", "jnp.expand_dims", a=array(256)),
    bf16("k", "k differs (256 and 300)", "bf16_gemm_nn (a [m, k], b [k, n])", b=array(256, 300)),
    bf16(
        "k-tn",
        "a is [4, 256] [k, m] and b is [300, 256] [k, n]",
        "bf16_gemm_nt (a [m, k], b [n, k])",
        op="tn",
    ),
    bf16("c-shape", "c is bfloat16 [4, 1], need bfloat16 [4, 300]", c=array(4, 1)),
    bf16(
        "c-dtype",
        "c is bfloat16 [4, 300], need float32 [4, 300]",
        "out_dtype=jnp.bfloat16",
        out_dtype=F32,
        c=array(4, 300),
    ),
    bf16("out-dtype", "out_dtype is int32", out_dtype=jnp.int32),
    # The layer
    linear("k", "x is [4, 256] and w is [256, 300]", "passed as w.T", w=array(256, 300)),
    linear("rank", "w is [2, 300, 256]", "jax.vmap", w=array(2, 300, 256)),
    linear(
        "x-dtype", "x is float16", "bfloat16 or float32", x=array(4, 256, dtype=jnp.float16), error=TypeError
    ),
    linear(
        "x-quantised", "x is float8_e4m3fn", "fp8_gemm_nt", x=QuantizedArray(*A, (1, 128)), error=TypeError
    ),
    linear(
        "w-triple", "w is tuple", "QuantizedArray or (values, scales) tuple", w=(*B, None), error=TypeError
    ),
    linear("w-tuple", "scales of w are [2, 3], need [3, 2]", w=pair((300, 256), (2, 3))),
    linear(
        "w-block",
        "w has one scale per block (128, 1)",
        "quantize(w, (128, 128))",
        w=quantized((300, 256), (3, 256), (128, 1)),
    ),
    linear("grad-dtype", "grad_dtype is bfloat16", "float8_e4m3fn or float8_e5m2", grad_dtype=BF16),
    linear("grad-dtype-junk", "grad_dtype is 'fp8'", "float8_e4m3fn or", grad_dtype="fp8", error=TypeError),
    linear("out-dtype", "out_dtype is float16", out_dtype=jnp.float16),
    linear("out-dtype-none", "out_dtype is None", "Leave it out", out_dtype=None, error=TypeError),
    linear("grad-dtype-none", "grad_dtype is None", "Leave it out", grad_dtype=None, error=TypeError),
    Bad(
        "linear-frozen-rows",
        lambda: jax.grad(lambda x: jdg.fp8_linear(x, jdg.quantize(W, (1, 128))).sum().astype(F32))(X),
        ValueError,
        ("fp8_linear: the gradient of x", "block (1, 128)", "quantize(w, (128, 128))"),
    ),
)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refused(bad):
    with pytest.raises(bad.error) as info:
        bad.call()
    message = str(info.value)
    missing = [piece for piece in bad.says if piece not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("bad", [b for b in BAD if b.name in ("fp8-k", "bf16-dtype")], ids=str)
def test_refused_while_tracing(bad):
    with pytest.raises(bad.error):
        jax.jit(bad.call)()


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_raw_fp8_ops_name_the_layer_that_has_gradients(layout):
    a, b = (
        (pair((256, 256), (256, 2)), pair((256, 256), (2, 2)))
        if layout[0] == "n"
        else (pair((256, 256), (2, 256)), pair((256, 256), (2, 2)))
    )
    function = getattr(jdg, f"fp8_gemm_{layout}")
    loss = lambda scales: function((a[0], scales), b).astype(F32).sum()  # noqa: E731
    for differentiate in (
        jax.grad(loss),
        lambda s: jax.jvp(loss, (s,), (s,)),
        lambda s: jax.linearize(loss, s),
    ):
        with pytest.raises(NotImplementedError, match="fp8_linear"):
            differentiate(a[1])


def test_constants_are_not_differentiated():
    """A raw op whose operands do not depend on what is differentiated stays silent."""
    grad = jax.grad(lambda t: t * jdg.fp8_gemm_nt(A, B).astype(F32).sum())(1.0)
    assert float(grad) == 4 * 300 * 256


def test_config_that_breaks_a_rule_is_refused_while_lowering():
    pytest.importorskip("cuda.core")
    for config, rule in (
        (jdg.GemmConfig(100, 64, 4), r"64-row side is 100, must be 64, 128 or 192"),
        (jdg.GemmConfig(128, 128, 14), r"shared.memory.*fewer stages"),
    ):
        product = jax.jit(lambda a, b, c=config: jdg.bf16_gemm_nt(a, b, config=c))
        with pytest.raises(ValueError, match=rule):
            product.trace(X, W).lower(lowering_platforms=("cuda",))


def fp8_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jdg.fp8_gemm_nt(jdg.quantize(a), jdg.quantize(b, (128, 128)))


@pytest.mark.parametrize("product", [fp8_product, jdg.bf16_gemm_nt], ids=["fp8", "bf16"])
def test_gpu_without_kernels_is_refused_while_lowering(product, monkeypatch):
    other = types.SimpleNamespace(device_kind="Other GPU", compute_capability="10.0", core_count=148)
    monkeypatch.setattr(kernel_rule, "device_of", lambda ctx: other)
    with pytest.raises(ValueError, match=r"Other GPU has compute capability 10\.0.*9\.0.*'reference'"):
        jax.jit(lambda *x: product(*x)).trace(X, W).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("product", [fp8_product, jdg.bf16_gemm_nt], ids=["fp8", "bf16"])
def test_missing_compiler_is_told_while_lowering(product, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    monkeypatch.setenv("JAX_DEEPGEMM_NVCC", "/nowhere/nvcc")
    with pytest.raises(CompilerNotFoundError, match=r"/nowhere/nvcc\. Set JAX_DEEPGEMM_NVCC.*nvrtc"):
        jax.jit(lambda *x: product(*x)).trace(X, W).lower(lowering_platforms=("cuda",))


def test_nothing_is_promoted():
    x64 = np.ones((4, 256), np.float64)
    with pytest.raises(ValueError, match="need bfloat16"):
        jdg.bf16_gemm_nt(x64, W)
