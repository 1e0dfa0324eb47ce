"""Weights of files that are written by hand, against numbers computed in float64."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import (
    Fp4Array,
    PerChannelArray,
    QuantizedArray,
    dequantize,
    prepare_fp4,
    quantize,
)
from jax_deepgemm.checkpoint import Checkpoint, Weight, load_quantized, save_safetensors
from jax_deepgemm.quantization import concatenate, expand_fp4

Stored = dict[str, tuple[str, np.ndarray]]
"""Tensor -> (dtype in the words of the format, bytes or numbers)."""
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FINITE = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])


def by_hand(path: Path, tensors: Stored) -> Path:
    said, data = {}, b""
    for name, (dtype, array) in tensors.items():
        said[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Finite numbers of e4m3, as bytes."""
    return np.random.default_rng(seed).choice(FINITE, shape)


def scales_of(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def expanded(values: np.ndarray, scales: np.ndarray, rows: int = 128, cols: int = 128) -> np.ndarray:
    """float64 numbers of bytes of e4m3 and the scales of their blocks."""
    wide = np.repeat(np.repeat(scales.astype(np.float64), rows, -2), cols, -1)
    return values.view(E4M3).astype(np.float64) * wide[..., : values.shape[-2], : values.shape[-1]]


def numbers(q: QuantizedArray) -> np.ndarray:
    return expanded(np.asarray(q.values).view(np.uint8), np.asarray(q.scales), *q.block)


def one_layer(path: Path, *, experts: int = 4, inner: int = 192, hidden: int = 320) -> tuple[Path, Stored]:
    """Gate, up and down of experts as DeepSeek-V3 stores them, with ragged blocks."""
    tensors: Stored = {"norm.weight": ("BF16", scales_of(hidden).astype(BF16))}
    for e in range(experts):
        for i, (part, n, k) in enumerate(
            (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner))
        ):
            seed = 3 * e + i
            tensors[f"experts.{e}.{part}.weight"] = ("F8_E4M3", drawn(n, k, seed=seed))
            scales = scales_of(-(-n // 128), -(-k // 128), seed=seed)
            tensors[f"experts.{e}.{part}.weight_scale_inv"] = ("F32", scales)
    return by_hand(path / "x.safetensors", tensors), tensors


def of(tensors: Stored, name: str) -> np.ndarray:
    return expanded(tensors[name][1], tensors[f"{name}_scale_inv"][1])


GATE_UP = Weight("experts.{}.gate.weight", "experts.{}.up.weight", experts=4)
DOWN = Weight("experts.{}.down.weight", experts=4)


def test_a_weight_with_ragged_blocks_and_its_neighbours(tmp_path: Path) -> None:
    path, tensors = one_layer(tmp_path)
    got = load_quantized(path, {"one": "experts.2.down.weight", "norm": ["norm.weight"]})
    assert isinstance(got["one"], QuantizedArray)
    assert (got["one"].shape, got["one"].block, got["one"].scales.shape) == ((320, 192), (128, 128), (3, 2))
    assert np.array_equal(numbers(got["one"]), of(tensors, "experts.2.down.weight"))
    assert np.asarray(got["norm"][0]).tobytes() == tensors["norm.weight"][1].tobytes()


@pytest.mark.parametrize("inner", [192, 256])
def test_experts_are_stacked_and_gate_and_up_joined(inner: int, tmp_path: Path) -> None:
    """Also where 128 does not divide the half: a scale a row then, and the same numbers."""
    path, tensors = one_layer(tmp_path, inner=inner)
    got = load_quantized(path, {"w13": GATE_UP, "w2": DOWN})
    assert got["w13"].block == ((128, 128) if inner == 256 else (1, 128))
    for e in range(4):
        parts = [of(tensors, f"experts.{e}.{part}.weight") for part in ("gate", "up")]
        assert np.array_equal(numbers(got["w13"])[e], np.concatenate(parts))
        assert np.array_equal(numbers(got["w2"])[e], of(tensors, f"experts.{e}.down.weight"))
    halves = [
        load_quantized(path, Weight(f"experts.{{}}.{part}.weight", experts=4)) for part in ("gate", "up")
    ]
    joined = concatenate(halves)
    assert joined.block == got["w13"].block
    assert (joined.scales == got["w13"].scales).all()
    some = load_quantized(path, Weight("experts.{}.gate.weight", experts=[3, 1]))
    assert np.array_equal(numbers(some)[1], of(tensors, "experts.1.gate.weight"))


class Reads(Checkpoint):
    """Counts bytes that are taken out of its arrays."""

    class Array(np.ndarray):
        taken = 0

        def __getitem__(self, index: Any) -> Any:
            found = np.asarray(self)[index]
            Reads.Array.taken += found.nbytes
            return found

    def __getitem__(self, name: str) -> np.ndarray:
        return super().__getitem__(name).view(Reads.Array)


MESH = jax.make_mesh((4, 2), ("expert", "model"))


@pytest.mark.parametrize(
    "spec",
    [
        P("expert"),
        P("expert", "model"),
        P(None, "model"),
        P(None, None, "model"),
        P(("expert", "model"), None),
    ],
)
@pytest.mark.parametrize("inner", [192, 256])
def test_each_device_reads_its_slice(spec: P, inner: int, tmp_path: Path) -> None:
    path, _ = one_layer(tmp_path, experts=8, inner=inner)
    weight = Weight(*GATE_UP.names, experts=8)
    want = load_quantized(path, weight)
    Reads.Array.taken = 0
    got = load_quantized(Reads(path), weight, NamedSharding(MESH, spec))
    assert Reads.Array.taken <= (want.values.nbytes + want.scales.nbytes * (1 if spec[0] else 2))
    assert got.values.sharding == NamedSharding(MESH, spec)
    assert got.block == want.block
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_part_of_one_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one of many hosts: the other experts' bytes are not touched."""
    path, tensors = one_layer(tmp_path)

    def first(shape: tuple[int, ...], sharding: NamedSharding, read: Any) -> Any:
        return read(sharding.addressable_devices_indices_map(shape)[MESH.devices[1, 0]])

    monkeypatch.setattr(jax, "make_array_from_callback", first)
    Reads.Array.taken = 0
    got = load_quantized(Reads(path), GATE_UP, NamedSharding(MESH, P("expert")))
    assert np.asarray(got.values).tobytes() == b"".join(
        tensors[f"experts.1.{part}.weight"][1].tobytes() for part in ("gate", "up")
    )
    assert Reads.Array.taken == got.values.nbytes + got.scales.nbytes


def test_sharding_by_a_function_of_path_and_shape(tmp_path: Path) -> None:
    path, _ = one_layer(tmp_path)
    seen = {}

    def place(name: str, shape: tuple[int, ...]) -> Any:
        seen[name] = shape
        return NamedSharding(MESH, P("expert")) if len(shape) == 3 else None

    got = load_quantized(path, {"layers": [{"w13": GATE_UP, "norm": "norm.weight"}]}, place)
    assert seen == {"layers.0.w13": (4, 384, 320), "layers.0.norm": (320,)}
    assert got["layers"][0]["w13"].values.sharding.spec == P("expert")
    second = SingleDeviceSharding(jax.devices()[1])
    assert load_quantized(path, "norm.weight", second).sharding == second


@pytest.mark.parametrize("dtype", ["BF16", "F8_E8M0", "F32"])
def test_scales_of_other_types_are_exact(dtype: str, tmp_path: Path) -> None:
    """Qwen3's are bfloat16. UE8M0 from 2^-127 to 2^127, and NaN."""
    bits = {"BF16": np.uint16, "F8_E8M0": np.uint8, "F32": np.uint32}[dtype]
    codes = np.arange(256).reshape(2, 128)
    raw = {"BF16": (codes << 7 | 5).clip(0, 0x7F7F), "F8_E8M0": codes, "F32": codes + 0x3F800000}[dtype]
    values = drawn(256, 128 * 128)
    path = by_hand(
        tmp_path / "x.safetensors",
        {"w.weight": ("F8_E4M3", values), "w.weight_scale_inv": (dtype, raw.astype(bits))},
    )
    got = np.asarray(load_quantized(path, "w.weight").scales)
    if dtype == "F8_E8M0":
        want = [2.0 ** (int(c) - 127) if c < 255 else np.nan for c in codes.ravel()]
    else:
        shift = 16 if dtype == "BF16" else 0
        want = [struct.unpack("<f", struct.pack("<I", int(c) << shift))[0] for c in raw.ravel()]
    assert np.array_equal(got.ravel(), np.array(want, np.float32), equal_nan=True)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def of_fp4(values: np.ndarray) -> np.ndarray:
    """float64 [.., 2 k] of bytes [.., k], the lower four bits first."""
    codes = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    return np.where(codes & 8, -1, 1) * E2M1[codes & 7]


def fp4_numbers(q: Fp4Array) -> np.ndarray:
    """float64 of what an Fp4Array holds."""
    scales = np.asarray(q.scales).astype(float)
    whole = 1.0 if q.global_scale is None else np.asarray(q.global_scale, float)[..., None, None]
    return of_fp4(np.asarray(q.values)) * np.repeat(scales, q.shape[-1] // scales.shape[-1], -1) * whole


def test_gpt_oss_experts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4, 64, 4, 16), np.uint8)
    scales = random.integers(118, 130, (4, 64, 4), np.uint8)
    at = "mlp.experts.gate_up_proj"
    path = by_hand(
        tmp_path / "x.safetensors",
        {
            f"{at}_blocks": ("U8", blocks),
            f"{at}_scales": ("U8", scales),
            f"{at}_bias": ("BF16", np.ones(3, BF16)),
        },
    )
    got = load_quantized(path, at)
    assert isinstance(got, Fp4Array)
    want = of_fp4(blocks).reshape(4, 64, 128) * np.repeat(2.0 ** (scales.astype(float) - 127), 32, -1)
    assert np.array_equal(fp4_numbers(got), want)
    for spec in (
        P("expert"),
        P("expert", "model"),
        P(None, None, "expert"),
        P(None, None, ("expert", "model")),
    ):
        cut = load_quantized(path, at, NamedSharding(MESH, spec))
        assert cut.values.sharding.spec == spec
        assert np.asarray(cut.values).tobytes() == blocks.tobytes()
        assert np.asarray(cut.scales).tobytes() == scales.tobytes()
    assert np.array_equal(fp4_numbers(prepare_fp4(got).fp4(128)), want)
    assert np.array_equal(numbers(expand_fp4(got)), want)


def test_mxfp4_that_fp8_of_128x128_does_not_hold(tmp_path: Path) -> None:
    """Scales more than 2^14 apart in a block: a scale a row is exact still, where its own are not."""
    scales = np.full((128, 4), 110, np.uint8)
    scales[5] = 126
    blocks = np.full((128, 4, 16), 0x11, np.uint8)
    path = by_hand(tmp_path / "x.safetensors", {"w_blocks": ("U8", blocks), "w_scales": ("U8", scales)})
    got = load_quantized(path, "w")
    want = 0.5 * np.repeat(2.0 ** (scales.astype(float) - 127), 32, -1)
    assert not np.array_equal(numbers(expand_fp4(got)), want)
    assert np.array_equal(numbers(expand_fp4(got, (1, 128))), want)


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors: Stored = {
        "a.weight_scale_2": ("F32", np.float32([0.25])[0]),
        "a.input_scale": ("F32", np.float32(1)),
    }
    for name, n in (("a", 64), ("b", 128), ("c", 64)):
        tensors[f"{name}.weight"] = ("U8", random.integers(0, 256, (n, 32), np.uint8))
        tensors[f"{name}.weight_scale"] = ("F8_E4M3", random.choice(FINITE[1:127], (n, 4)))
        tensors.setdefault(f"{name}.weight_scale_2", ("F32", np.float32(0.25 if name == "b" else 0.5)))
    path = by_hand(tmp_path / "x.safetensors", tensors)
    got = load_quantized(path, Weight("a.weight", "b.weight"))
    want = [
        of_fp4(tensors[f"{name}.weight"][1])
        * np.repeat(tensors[f"{name}.weight_scale"][1].view(E4M3).astype(float), 16, -1)
        * 0.25
        for name in "ab"
    ]
    assert got.global_scale.shape == ()
    assert np.array_equal(fp4_numbers(got), np.concatenate(want))
    with pytest.raises(ValueError, match=r"global scales \[0.25, 0.5\].*prepare_weights"):
        load_quantized(path, Weight("a.weight", "c.weight"))


def test_fp4_of_compressed_tensors(tmp_path: Path) -> None:
    """Two formats; scales of NVFP4 were divided by its global scale."""
    random = np.random.default_rng(1)
    bytes_of = {name: random.integers(0, 256, (64, 32), np.uint8) for name in "ab"}
    codes, scales = random.integers(100, 140, (64, 2), np.uint8), random.choice(FINITE[1:127], (64, 4))
    path = by_hand(
        tmp_path / "x.safetensors",
        {
            "a.weight_packed": ("U8", bytes_of["a"]),
            "a.weight_scale": ("U8", codes),
            "b.weight_packed": ("U8", bytes_of["b"]),
            "b.weight_scale": ("F8_E4M3", scales),
            "b.weight_global_scale": ("F32", np.float32([3.0])),
        },
    )
    want = of_fp4(bytes_of["a"]) * np.repeat(2.0 ** (codes.astype(int) - 127), 32, -1)
    assert np.array_equal(fp4_numbers(load_quantized(path, "a.weight")), want)
    got = load_quantized(path, "b.weight")
    want = of_fp4(bytes_of["b"]) * np.repeat(scales.view(E4M3).astype(float), 16, -1) / 3
    assert got.global_scale.shape == ()
    np.testing.assert_allclose(fp4_numbers(got), want, rtol=1e-7)


@pytest.mark.parametrize("scale", ["channel", "tensor", "scalar"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_compressed_tensors(dtype: str, scale: str, tmp_path: Path) -> None:
    """A scale a channel, also in bfloat16, or one for the matrix: [k, n] here."""
    tensors: Stored = {}
    shape = {"channel": (96, 1), "tensor": (1,), "scalar": ()}[scale]
    for e in range(2):
        for part in ("gate", "up"):
            tensors[f"{e}.{part}.weight"] = (dtype, drawn(96, 64, seed=e))
            tensors[f"{e}.{part}.weight_scale"] = ("BF16", scales_of(*shape, seed=e).astype(BF16))
    path = by_hand(tmp_path / "x.safetensors", tensors)
    weight = Weight("{}.gate.weight", "{}.up.weight", experts=2)
    got = load_quantized(path, weight)
    assert isinstance(got, PerChannelArray)
    assert (got.shape, got.scales.shape, got.scales.dtype) == ((2, 64, 192), (2, 192), jnp.float32)
    kind = np.int8 if dtype == "I8" else E4M3
    for e in range(2):
        values, scales = (tensors[f"{e}.gate.{part}"][1] for part in ("weight", "weight_scale"))
        half = values.view(kind).astype(float) * np.broadcast_to(scales.astype(float), (96, 1))
        found = np.asarray(got.values[e]).astype(float) * np.asarray(got.scales[e]).astype(float)
        assert np.array_equal(found, np.concatenate([half, half]).T)
    cut = load_quantized(path, weight, NamedSharding(MESH, P("model", None, "expert")))
    assert cut.scales.sharding.spec == P("model", "expert")
    assert np.array_equal(cut.values, got.values)
    assert np.array_equal(cut.scales, got.scales)


def test_blocks_under_the_name_of_compressed_tensors(tmp_path: Path) -> None:
    values, scales = drawn(200, 256), scales_of(2, 2)
    path = by_hand(
        tmp_path / "x.safetensors", {"w.weight": ("F8_E4M3", values), "w.weight_scale": ("F32", scales)}
    )
    assert np.array_equal(numbers(load_quantized(path, "w.weight")), expanded(values, scales))


def test_deepseeks_own_names(tmp_path: Path) -> None:
    """FP8 with `scale`, and MXFP4 of DeepSeek-V4: int8 bytes and UE8M0."""
    values, codes = drawn(128, 256), np.random.default_rng(0).integers(120, 130, (128, 8), np.uint8)
    tensors: Stored = {
        "wq.weight": ("F8_E4M3", values),
        "wq.scale": ("F8_E8M0", codes[:1, :2]),
        "w1.weight": ("I8", values[:, :128]),
        "w1.scale": ("F8_E8M0", codes),
    }
    got = load_quantized(by_hand(tmp_path / "x.safetensors", tensors), {"q": "wq.weight", "w1": "w1.weight"})
    powers = 2.0 ** (codes.astype(float) - 127)
    assert np.array_equal(numbers(got["q"]), expanded(values, powers[:1, :2]))
    assert np.array_equal(fp4_numbers(got["w1"]), of_fp4(values[:, :128]) * np.repeat(powers, 32, -1))


def test_round_trip_of_every_kind(tmp_path: Path) -> None:
    values, halves = drawn(3, 192, 320), drawn(3, 192, 160)
    kinds = jax.tree.map(
        jnp.asarray,
        {
            "fp8": QuantizedArray(values.view(E4M3), scales_of(3, 2, 3), (128, 128)),
            "e5m2": QuantizedArray(values.view(ml_dtypes.float8_e5m2), scales_of(3, 2, 3), (128, 128)),
            "int8": PerChannelArray(values.view(np.int8), scales_of(3, 320)),
            "channel": PerChannelArray(values.view(E4M3), scales_of(3, 320)),
            "mxfp4": Fp4Array(halves, drawn(3, 192, 10).view(ml_dtypes.float8_e8m0fnu)),
            "nvfp4": Fp4Array(halves, drawn(3, 192, 20).view(E4M3), scales_of(3)),
            "bf16": scales_of(3, 5).astype(BF16),
            "bytes": np.arange(3, dtype=np.uint8),
        },
    )
    save_safetensors(tmp_path / "x.safetensors", kinds)
    got = load_quantized(tmp_path / "x.safetensors", {name: name for name in kinds})
    assert jax.tree.structure(got) == jax.tree.structure(kinds)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(kinds), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    save_safetensors(tmp_path / "y.safetensors", got)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_what_is_loaded_outlives_the_file(tmp_path: Path) -> None:
    path, tensors = one_layer(tmp_path)
    got = load_quantized(path, "experts.0.up.weight")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert np.array_equal(numbers(got), of(tensors, "experts.0.up.weight"))
    assert bool(jnp.isfinite(dequantize(got)).all())


BAD: Stored = {
    "w.weight": ("F8_E4M3", drawn(192, 256)),
    "w.weight_scale_inv": ("F32", scales_of(1, 2)),
    "bare.weight": ("F8_E4M3", drawn(2, 2)),
    "c.weight": ("F8_E4M3", drawn(4, 8)),
    "c.weight_scale": ("F32", scales_of(4)),
    "z.weight": ("I8", drawn(4, 8)),
    "z.weight_scale": ("F32", scales_of(4, 1)),
    "z.weight_zero_point": ("I8", drawn(4, 1)),
    "n.weight": ("U8", drawn(4, 16)),
    "n.weight_scale": ("F8_E4M3", drawn(4, 1)),
    "n.weight_scale_2": ("F32", np.float32(1)),
    "g.weight": ("U8", drawn(4, 16)),
    "g.weight_scale": ("F8_E4M3", drawn(4, 2)),
    "g.weight_scale_2": ("F32", scales_of(2)),
    "p.weight_packed": ("I32", np.ones((4, 2), np.int32)),
    "p.weight_scale": ("BF16", np.ones((4, 1), BF16)),
    "q.weight_packed": ("U8", drawn(4, 16)),
    "q.weight_scale": ("F8_E4M3", drawn(4, 2)),
    "q.weight_global_scale": ("F32", scales_of(2)),
    "k_blocks": ("U8", drawn(4, 2, 8)),
    "k_scales": ("U8", drawn(4, 2)),
    "l_blocks": ("U8", drawn(4, 2, 16)),
    "m_blocks": ("U8", drawn(4, 2, 16)),
    "m_scales": ("U8", drawn(4, 3)),
    "v.weight": ("I8", drawn(4)),
    "v.weight_scale": ("F32", scales_of(1)),
    "a": ("F32", np.ones((2, 3), np.float32)),
    "b": ("F32", np.ones((2, 4), np.float32)),
    "h": ("BF16", np.ones((2, 3), BF16)),
    "wide": ("I64", np.ones(2, np.int64)),
}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("w.weight", r"w.weight_scale_inv is float32 \[1, 2\] beside values .*\[192, 256\]; need .*block="),
        ("bare.weight", r"no scales are beside it: looked for bare.weight_scale_inv.*Checkpoint\(path\)"),
        ("c.weight", r"c.weight_scale is float32 \[4\] .*need \[4, 1\], \[1\] or \[\]"),
        ("z.weight", "has a zero point"),
        ("v.weight", r"v.weight is a vector \[4\] with scales"),
        ("n.weight", r"n.weight_scale is float8_e4m3fn \[4, 1\].*e4m3 for 16 numbers"),
        ("m", r"m_scales is uint8 \[4, 3\].*a byte of UE8M0 for 32"),
        ("g.weight", r"g.weight_scale_2 is float32 \[2\] .*one number for each matrix"),
        ("p.weight", r"p.weight_packed is int32, need bytes of two FP4 numbers"),
        ("q.weight", r"q.weight_global_scale is float32 \[2\] .*one number for each matrix"),
        ("k", r"values uint8 \[4, 2, 8\]; need bytes \[.., n, k / 32, 16\] in k_blocks"),
        ("l", "no tensor 'l_scales'"),
        ("wide", r"a tensor is int64 \[2\], which JAX holds with .*x64"),
        (Weight("a", "b"), r"b is plain float32 \[2, 4\], a is plain float32 \[2, 3\].*Load them as two"),
        (Weight("a", "h"), "h is plain bfloat16"),
        ({"x": [3]}, "names has 3, need names of tensors and Weights"),
        ("W.weight", "no tensor 'W.weight'; similar: .*w.weight"),
    ],
)
def test_what_does_not_fit_is_refused(names: Any, words: str, tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x.safetensors", BAD)
    with pytest.raises((KeyError, TypeError, ValueError), match=words):
        load_quantized(path, names)


def test_the_advice_of_errors_works(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x.safetensors", BAD)
    assert load_quantized(path, "w.weight", block=(192, 128)).block == (192, 128)
    assert Checkpoint(path)["bare.weight"].dtype == E4M3
    with pytest.raises(ValueError, match=r"sharding is .* for numbers \[2, 3\], need a NamedSharding"):
        load_quantized(path, "a", NamedSharding(MESH, P(None, None, "model")))
    with pytest.raises(ValueError, match=r"blocks of \(1, 128\), checkpoints have \(128, 128\)"):
        save_safetensors(path, {"x": quantize(jnp.ones((4, 128)))})
