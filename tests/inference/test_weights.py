"""Weights in few bits, and layers with them, against formulas in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import inference
from jax_deepgemm.inference import QuantizedWeight, packing
from tests.shared import inference_oracle as oracle
from tests.shared.inference_oracle import close, drawn, wide

BF16, FP6 = ml_dtypes.bfloat16, ml_dtypes.float6_e3m2fn


def test_all_codes_of_fp6() -> None:
    """As ml_dtypes knows them; every number is the nearest to itself, and halves go to the even code."""
    codes = np.arange(64, dtype=np.uint8)
    numbers = codes.view(FP6).astype(np.float32)

    @jax.jit
    def both(codes: Any, halves: Any) -> Any:
        packed = packing.pack_fp6(codes)
        return packing.decode_fp6(codes), packed, packing.unpack_fp6(packed), packing.encode_fp6(halves)

    positive = numbers[:32]
    halves = np.concatenate([numbers, (positive[:-1] + positive[1:]) / 2]).astype(np.float32)
    decoded, packed, unpacked, encoded = both(codes.astype(np.int32), halves)
    np.testing.assert_array_equal(decoded, numbers)
    np.testing.assert_array_equal(unpacked, codes)
    np.testing.assert_array_equal(encoded[:64], codes)
    np.testing.assert_array_equal(encoded[64:], [i + i % 2 for i in range(31)])
    bits = "".join(f"{byte:08b}"[::-1] for byte in np.asarray(packed[:3]))
    assert [int(bits[6 * i : 6 * i + 6][::-1], 2) for i in range(4)] == [0, 1, 2, 3]


def nearest(numbers: np.ndarray, format: str) -> np.ndarray:
    """Of the numbers that a format has; of two the even one, which rint and the cast of ml_dtypes take."""
    if format == "fp6_e3m2":
        return numbers.astype(np.float32).astype(FP6).astype(np.float64)
    most = 127 if format == "int8" else 7
    return np.clip(np.rint(numbers), -most - 1, most)


@functools.cache
def quantised() -> dict[str, Any]:
    """Of every format and grouping: the weight, and what it stands for."""

    @jax.jit
    def run(w: Any) -> Any:
        forms = {
            f"{kind} {size}": (kind, size) for kind in ("int8", "int4", "fp6_e3m2") for size in (None, 8)
        }
        made = {name: inference.quantize(w, kind, group_size=size) for name, (kind, size) in forms.items()}
        return {name: (one, inference.dequantize(one)) for name, one in made.items()}

    return run(weight())


def weight() -> np.ndarray:
    """With a group of zeros, and numbers in the middle of two."""
    w = drawn(0, 2, 24, 8)
    w[0, 8:16, 3] = w[1, :, 5] = 0
    w[0, :4, 0] = [128, 0.5, 1.5, -128]
    return w


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp6_e3m2"])
def test_quantize(kind: str, size: int | None) -> None:
    w, dequantised = quantised()[f"{kind} {size}"]
    grouped = wide(weight()).reshape(2, -1, size or 24, 8)
    step = {"int8": 128, "int4": 8, "fp6_e3m2": 28}[kind]
    scales = np.asarray(w.scales)
    np.testing.assert_allclose(scales, np.abs(grouped).max(2) / step, rtol=2e-7)  # XLA multiplies by 1 / step
    safe = np.where(scales == 0, 1, scales)[:, :, None]
    values = nearest((grouped.astype(np.float32) / safe).astype(np.float64), kind)
    np.testing.assert_allclose(dequantised, (values * scales[:, :, None]).reshape(2, 24, 8), rtol=1e-7)
    assert w.shape == (2, 24, 8)
    assert w.values.nbytes == 2 * 24 * 8 * w.bits // 8


def test_the_first_of_two_int4_is_in_the_low_half() -> None:
    w, _ = quantised()["int4 None"]
    pairs = nearest(wide(weight())[0] / np.asarray(w.scales[0]).astype(np.float64), "int4").astype(int)
    np.testing.assert_array_equal(w.values[0], (pairs[:, ::2] & 15) | (pairs[:, 1::2] & 15) << 4)


def test_a_weight_is_a_pytree() -> None:
    w, _ = quantised()["int4 8"]
    leaves, tree = jax.tree.flatten(w)
    assert [leaf.dtype.name for leaf in leaves] == ["uint8", "float32"]
    assert jax.tree.unflatten(tree, leaves) == QuantizedWeight(*leaves, "int4")


def weights(w: np.ndarray) -> dict[str, Any]:
    """Of every kind that `linear` takes, [k, n] but FP8."""
    frozen: dict[str, Any] = {
        f"{kind} {size}": inference.quantize(w, kind, group_size=size)
        for kind, size in (("int8", None), ("int4", 8), ("fp6_e3m2", None))
    }
    frozen["e4m3 a channel"] = jdg.quantize_per_channel(w, jnp.float8_e4m3fn)
    frozen["fp8"] = jdg.quantize(w.T, (128, 128))
    return frozen | {"array": w, "array nk": w.T}


def meant(w: Any) -> jax.Array:
    """[k, n]."""
    if isinstance(w, QuantizedWeight):
        return inference.dequantize(w)
    if isinstance(w, jdg.PerChannelArray):
        return jdg.dequantize_per_channel(w)
    return jdg.dequantize(w).T if isinstance(w, jdg.QuantizedArray) else jnp.asarray(w, jnp.float32)


WEIGHTS = ("int8 None", "int4 8", "fp6_e3m2 None", "e4m3 a channel", "fp8", "array", "array nk")
X = drawn(1, 2, 3, 48, dtype=BF16)
W = (drawn(2, 48, 32) / 7).astype(BF16)
BIAS = drawn(3, 32)


@functools.cache
def products() -> dict[str, Any]:
    @jax.jit
    def run(x: Any, w: Any, bias: Any) -> Any:
        found = {}
        for name, one in weights(w).items():
            layout = "nk" if name in ("fp8", "array nk") else "kn"
            plain = meant(one.T if name == "array nk" else one)
            found[name] = plain, inference.linear(x, one, bias, "silu", w_layout=layout)
        return found

    return run(X, W, BIAS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_linear(name: str) -> None:
    plain, got = products()[name]
    assert got.dtype == BF16
    want = oracle.silu(wide(X) @ wide(plain) + wide(BIAS))
    close(
        got,
        want,
        8 if name == "fp8" else 1.5 if "None" in name or "channel" in name or "array" in name else 4,
    )
    close(plain, wide(W), 2**21)  # to within the digits that a format has


def test_all_kinds_are_there() -> None:
    assert set(products()) == set(WEIGHTS)


def test_bytes_are_read_as_they_are_stored() -> None:
    """int8 with a scale a channel goes to an op of this package as it is, which knows no float16."""
    w = inference.quantize(W)
    direct = str(jax.make_jaxpr(inference.linear)(X, w))
    assert "m_grouped_per_channel_gemm" in direct
    other = str(jax.make_jaxpr(inference.linear)(X.astype(np.float16), w))
    assert "m_grouped_per_channel_gemm" not in other


def _groups(x: Any, w: Any, sizes: Any, bias: Any) -> Any:
    frozen = {"array": w, "int8": inference.quantize(w)}
    found = {
        name: (meant(one), inference.grouped_linear(x, one, sizes, bias, "relu"))
        for name, one in frozen.items()
    }
    fp8 = jdg.quantize(jnp.swapaxes(w, 1, 2), (128, 128))
    plain = jnp.swapaxes(jdg.dequantize(fp8), 1, 2)
    found["fp8"] = plain, inference.grouped_linear(x, fp8, sizes, bias, "relu", w_layout="nk")
    return found


@functools.cache
def groups() -> dict[str, Any]:
    x, w = drawn(4, 7, 48, dtype=BF16), (drawn(5, 3, 48, 32) / 7).astype(BF16)
    x[5:] = np.nan  # of no group
    sizes, bias = np.array([2, 0, 3], np.int32), drawn(6, 3, 32)
    return {"operands": (x, sizes, bias), **jax.jit(_groups)(x, w, sizes, bias)}


@pytest.mark.parametrize("name", ["array", "int8", "fp8"])
def test_grouped_linear(name: str) -> None:
    (x, sizes, bias), (plain, got) = groups()["operands"], groups()[name]
    want, row = np.zeros((7, 32)), 0
    for group, size in enumerate(sizes):
        rows = wide(x[row : row + size])
        want[row : row + size] = np.maximum(rows @ wide(plain[group]) + wide(bias[group]), 0)
        row += size
    close(got, want, 8 if name == "fp8" else 2)


def layers() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Of x, residual [2, 3, 48], gamma, beta [48], w1 [48, 32], b1 [32], w2 [16, 48], b2 [48]."""

    def gated(x: Any, residual: Any, gamma: Any, beta: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        form: dict[str, Any] = {"gated": "split", "gate_first": True, "norm": "rms", "gamma": gamma}
        form |= {"residual": residual, "returns": "sum"}
        return inference.mlp(x, w1, w2, b1, b2, "silu", **form)

    def gated_want(x: Any, residual: Any, gamma: Any, beta: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        inner = oracle.rms_norm(x + residual, gamma) @ w1 + b1
        return (oracle.silu(inner[..., :16]) * inner[..., 16:]) @ w2 + b2, x + residual

    def normed(x: Any, residual: Any, gamma: Any, beta: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        form = {"gamma": gamma, "beta": beta, "residual": residual, "residual_bias": b2}
        return inference.norm_linear(x, w1, b1, "gelu_erf", **form)

    def normed_want(x: Any, residual: Any, gamma: Any, beta: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        z = oracle.layer_norm(x + residual + b2, gamma, beta)
        return oracle.gelu_erf(z @ w1 + b1), z

    yield "mlp", gated, gated_want
    yield "norm_linear", normed, normed_want


@pytest.mark.parametrize(("name", "function", "want"), [*layers()])
def test_layers(name: str, function: Callable[..., Any], want: Callable[..., Any]) -> None:
    shapes = ((2, 3, 48), (2, 3, 48), (48,), (48,), (48, 32), (32,), (16, 48), (48,))
    arrays = [drawn(seed, *shape) for seed, shape in enumerate(shapes, 10)]
    for got, expected in zip(jax.jit(function)(*arrays), want(*map(wide, arrays)), strict=True):
        close(got, expected, 32)


def test_rows_are_cut_over_devices() -> None:
    """Weights that every device holds, in shard_map; and by XLA, of a mesh with Auto axes."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x, w, b = drawn(22, 4, 8), drawn(23, 8, 4), drawn(24, 4)
    rows, whole = jax.P("x"), jax.P()

    def layer(x: Any, w: Any, b: Any) -> Any:
        y, _ = inference.norm_linear(x, w, b, "relu", gamma=w[:, 0])
        return y

    cut = jax.shard_map(layer, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, rows))
    want = np.maximum(oracle.layer_norm(wide(x), wide(w[:, 0])) @ wide(w) + wide(b), 0)
    for got in jax.jit(lambda *arrays: (cut(*arrays), layer(*arrays)))(placed, w, b):
        close(got, want)


def test_arrays_have_gradients() -> None:
    x, w = jnp.asarray(drawn(20, 3, 8)), jnp.asarray(drawn(21, 8, 4))
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(inference.linear(x, w, act="relu")), (0, 1)))(x, w)
    alive = (wide(x) @ wide(w) > 0).astype(np.float64)
    close(dx, alive @ wide(w).T)
    close(dw, wide(x).T @ alive)


ONES = np.ones((4, 8), np.float32)
FP8 = jdg.QuantizedArray(jnp.zeros((4, 8), jnp.float8_e4m3fn), jnp.ones((1, 1)), (128, 128))
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "quantize word": (
        lambda: inference.quantize(ONES, "int2"),
        ValueError,
        "format is 'int2', need one of 'int8'",
    ),
    "quantize odd": (
        lambda: inference.quantize(ONES[:, :7], "int4"),
        ValueError,
        "n a multiple of 2 for int4",
    ),
    "quantize group": (
        lambda: inference.quantize(ONES, group_size=3),
        ValueError,
        "group_size is 3 and k is 4",
    ),
    "dequantize": (lambda: inference.dequantize(ONES), TypeError, "float32.*need a QuantizedWeight"),
    "dequantize scales": (
        lambda: inference.dequantize(QuantizedWeight(jnp.ones((4, 8), jnp.int8), jnp.ones((3, 8)), "int8")),
        ValueError,
        r"scales \[3, 8\], need \[.., k, n \* 8 / 8\]",
    ),
    "linear": (
        lambda: inference.linear(ONES, ONES),
        ValueError,
        r"x is \[4, 8\] and w is \[4, 8\].*w_layout='nk'",
    ),
    "linear type": (
        lambda: inference.linear(ONES, ONES.astype(BF16)),
        TypeError,
        "w is bfloat16.*need float32",
    ),
    "linear out_dtype": (
        lambda: inference.linear(ONES, ONES.T, out_dtype=jnp.int32),
        TypeError,
        "out_dtype is int32, need bfloat16",
    ),
    "linear frozen": (
        lambda: inference.linear(ONES, QuantizedWeight(ONES.T, ONES[:1], "int8"), w_layout="nk"),
        ValueError,
        "w is a QuantizedWeight and w_layout is 'nk', need 'kn'",
    ),
    "linear fp8": (
        lambda: inference.linear(ONES.astype(np.float16), FP8, w_layout="nk"),
        TypeError,
        "x is float16 and w is FP8, need bfloat16",
    ),
    "mlp": (
        lambda: inference.mlp(ONES, ONES.T, ONES, gamma=ONES[0]),
        ValueError,
        "norm is None, need norm='layer'",
    ),
    "grouped_linear": (
        lambda: inference.grouped_linear(ONES, np.ones((2, 8, 4), np.float32), np.ones(3, np.int32)),
        ValueError,
        r"group_sizes is \[3\], need \[2\]",
    ),
}


FOLLOWED: dict[str, Callable[[], Any]] = {
    "quantize word": lambda: inference.quantize(ONES, "int8"),
    "quantize odd": lambda: inference.quantize(np.pad(ONES[:, :7], ((0, 0), (0, 1))), "int4"),
    "quantize group": lambda: inference.quantize(ONES, group_size=2),
    "dequantize": lambda: inference.dequantize(inference.quantize(ONES)),
    "dequantize scales": lambda: inference.dequantize(
        QuantizedWeight(jnp.ones((4, 8), jnp.int8), jnp.ones((2, 8)), "int8")
    ),
    "linear": lambda: inference.linear(ONES, ONES, w_layout="nk"),
    "linear type": lambda: inference.linear(ONES, ONES.astype(BF16).astype(np.float32).T),
    "linear out_dtype": lambda: inference.linear(ONES, ONES.T, out_dtype=BF16),
    "linear frozen": lambda: inference.linear(ONES, inference.quantize(ONES.T), w_layout="kn"),
    "linear fp8": lambda: inference.linear(ONES.astype(BF16), FP8, w_layout="nk"),
    "mlp": lambda: inference.mlp(ONES, ONES.T, ONES, gamma=ONES[0], norm="layer"),
    "grouped_linear": lambda: inference.grouped_linear(ONES, np.ones((2, 8, 4), np.float32), np.ones(2, int)),
}


@pytest.mark.any_version
@pytest.mark.parametrize("case", REFUSED)
def test_the_way_out_is_one(case: str) -> None:
    jax.eval_shape(FOLLOWED[case])


@pytest.mark.any_version
@pytest.mark.parametrize("case", REFUSED)
def test_errors_say_what_to_do(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^{case.split()[0]}: .*{message}"):
        call()
