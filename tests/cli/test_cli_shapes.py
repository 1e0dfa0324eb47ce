"""Shapes files, and the kernels that `compile`, `explain` and `precompile` find for the shapes in them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_deepgemm as jdg
from jax_deepgemm import config
from jax_deepgemm.cli import main
from jax_deepgemm.jit import cache, compiler, record_kernels
from jax_deepgemm.moe import moe_mlp, moe_mlp_decode
from jax_deepgemm.tools import shape_files as shapes

SMALL: dict[str, dict[str, Any]] = {
    "fp8_gemm_nt": {"m": 8, "n": 64, "k": 256},
    "bf16_gemm_tn": {"m": 8, "n": 64, "k": 256, "out_dtype": "float32", "accumulate": True},
    "m_grouped_fp8_gemm_nt_contiguous": {"groups": 3, "m": 20, "n": 64, "k": 256, "b_block": "1x128"},
    "m_grouped_fp8_gemm_nn_contiguous": {"groups": 3, "m": 20, "n": 64, "k": 256},
    "m_grouped_bf16_gemm_nn_contiguous": {"groups": 3, "m": 20, "n": 64, "k": 256, "expected_m": 4},
    "m_grouped_fp8_gemm_nt_masked": {"groups": 3, "m": 20, "n": 64, "k": 256, "zero_rows": True},
    "m_grouped_bf16_gemm_nt_masked": {"groups": 3, "m": 20, "n": 64, "k": 256, "expected_m": 4},
    "m_grouped_fp8_gemm_nt_gathered": {"groups": 3, "tokens": 7, "m": 20, "n": 64, "k": 256},
    "m_grouped_bf16_gemm_nt_gathered": {"groups": 3, "tokens": 7, "m": 20, "n": 64, "k": 256},
    "m_grouped_bf16_gemm_nn_gathered": {"groups": 3, "tokens": 7, "m": 20, "n": 64, "k": 256},
    "k_grouped_fp8_gemm_tn_gathered": {"groups": 3, "tokens": 7, "m": 8, "n": 64, "k": 256},
    "k_grouped_bf16_gemm_tn_gathered": {"groups": 3, "tokens": 7, "m": 8, "n": 64, "k": 256},
    "k_grouped_fp8_gemm_nt_contiguous": {"groups": 3, "m": 8, "n": 64, "k": 256, "accumulate": True},
    "k_grouped_fp8_gemm_tn_contiguous": {"groups": 3, "m": 8, "n": 64, "k": 256},
    "k_grouped_bf16_gemm_tn_contiguous": {"groups": 3, "m": 8, "n": 64, "k": 256},
}
LAYER = {"tokens": 12, "hidden": 256, "intermediate": 128, "experts": 4, "top_k": 2}


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that needs no time, and a cache of its own."""
    pytest.importorskip("cuda.core")
    pytest.importorskip("jax_deepgemm._ffi")
    monkeypatch.setattr(compiler, "build", lambda job, target: (job.source.text.encode(), ""))
    monkeypatch.setattr(compiler, "_memory", {})
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path / "cache"))
    cache._open.cache_clear()
    return tmp_path


def lowered(function: Any, *operands: Any) -> set[str]:
    """The kernels of a function's program for CUDA."""
    with record_kernels() as records:
        jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    return {source.name for source, _ in records}


def compiled(*rows: dict[str, Any]) -> set[str]:
    return {kernel.name for kernel in jdg.precompile(rows, jobs=1, progress=False)}


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


# --- one kernel each ---


@pytest.mark.parametrize("op", SMALL)
def test_each_op_is_one_gemm(op: str) -> None:
    """Called as it is documented, so that what `tune` and `compile` take is what a program calls."""
    [call] = shapes.shape_of({"op": op} | SMALL[op]).calls()
    result = jax.eval_shape(call.function, *call.operands)
    sizes = SMALL[op]
    wanted = {
        "m_": (sizes["m"], sizes["n"]),
        "k_": (sizes.get("groups"), sizes["m"], sizes["n"]),
    }.get(op[:2], (sizes["m"], sizes["n"]))
    if "masked" in op:
        wanted = (sizes["groups"], *wanted)
    assert result.shape == wanted
    assert (call.carry is not None) == sizes.get("accumulate", False)
    if call.carry is not None:
        assert call.operands[call.carry].shape == result.shape
        assert call.operands[call.carry].dtype == result.dtype
    from jax_deepgemm.tools.explain import problems

    [(problem, _)] = problems(call.function, *call.operands)
    assert (problem.n, problem.add_c) == (sizes["n"], sizes.get("accumulate", False))
    if "expected_m" in sizes:
        assert problem.expected == sizes["expected_m"]


@pytest.mark.parametrize(
    ("op", "fields", "words"),
    [
        ("bf16_gemm_nt", {"activation": "gelu", "bias": True}, ("bias", "gelu")),
        (
            "m_grouped_fp8_gemm_nt_contiguous",
            {"activation": "swiglu", "quantised": 1},
            ("gated_silu", "quantized"),
        ),
        ("m_grouped_bf16_gemm_nt_masked", {"activation": "swiglu_pairs"}, ("gated_interleaved",)),
    ],
)
def test_products_with_an_epilogue(op: str, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    from jax_deepgemm.tools.explain import problems

    sizes = {"m": 20, "n": 256, "k": 256} | ({"groups": 3} if "grouped" in op else {})
    [call] = shapes.shape_of({"op": op} | sizes | fields).calls()
    [(problem, _)] = problems(call.function, *call.operands)
    assert problem.finish.words == words
    with pytest.raises(ValueError, match="have no epilogue"):
        shapes.shape_of({"op": "fp8_gemm_nt", "weights": "fp4", "m": 20, "n": 256, "k": 256} | fields)


def test_sizes_of_groups_are_not_what_is_compiled_for(quick: Path) -> None:
    """The kernel of a shape is that of a program with any group sizes."""
    row = {"op": "m_grouped_bf16_gemm_nt_contiguous", "groups": 6, "m": 256, "n": 384, "k": 512}
    program = jdg.m_grouped_bf16_gemm_nt_contiguous
    operands = (shape(256, 512), shape(6, 384, 512), shape(6, dtype=jnp.int32))
    assert compiled(row) == lowered(program, *operands)


# --- a layer of experts ---


def layer_operands(dtype: Any, weights: Any) -> tuple[Any, ...]:
    x, ids = shape(12, 256, dtype=dtype), shape(12, 2, dtype=jnp.int32)
    w13, w2 = shape(4, 256, 256, dtype=weights), shape(4, 256, 128, dtype=weights)
    return x, ids, shape(12, 2, dtype=jnp.float32), w13, w2


def loss(x: Any, ids: Any, router: Any, w13: Any, w2: Any, recipe: str) -> jax.Array:
    return (moe_mlp(x, ids, router, w13, w2, recipe=recipe).astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(("recipe", "dtype"), [("fp8", "bfloat16"), ("fp8", "float32"), ("bf16", "bfloat16")])
def test_a_layer_is_all_kernels_of_its_program(recipe: str, dtype: str, quick: Path) -> None:
    row = {"op": "moe_mlp", "recipe": recipe, "dtype": dtype, "weights": dtype} | LAYER
    given = layer_operands(dtype, dtype)
    forward = lowered(lambda *a: moe_mlp(*a, recipe=recipe), *given)
    both = forward | lowered(jax.grad(lambda *a: loss(*a, recipe=recipe), argnums=(0, 2, 3, 4)), *given)
    assert compiled(row | {"gradients": False}) == forward
    assert compiled(row) == both
    assert len(both) > len(forward) > 1
    for part in ("m_grouped", "k_grouped", *(("swiglu", "quantize") if recipe == "fp8" else ())):
        assert any(part in name for name in both), (part, both)


def test_a_layer_of_frozen_weights(quick: Path) -> None:
    x, ids, router, *weights = layer_operands(jnp.bfloat16, jnp.bfloat16)
    frozen = [jax.eval_shape(lambda w: jdg.quantize(w, (128, 128)), w) for w in weights]
    gradient = jax.grad(lambda *a: loss(*a, recipe="fp8"), argnums=(0, 2))
    wanted = lowered(moe_mlp, x, ids, router, *frozen) | lowered(gradient, x, ids, router, *frozen)
    assert compiled({"op": "moe_mlp", "weights": "fp8"} | LAYER) == wanted


LINEAR: dict[str, tuple[dict[str, Any], Any, tuple[int, ...]]] = {
    "fp8_linear": ({"m": 20, "n": 64, "k": 256}, jdg.fp8_linear, (64, 256)),
    "grouped_linear": ({"groups": 3, "m": 20, "n": 64, "k": 256}, jdg.grouped_linear, (3, 64, 256)),
    "ragged_dot": ({"groups": 3, "m": 20, "n": 64, "k": 256}, jdg.ragged_dot, (3, 256, 64)),
}


@pytest.mark.parametrize("op", LINEAR)
def test_linear_layers_are_all_kernels_of_their_programs(op: str, quick: Path) -> None:
    sizes, layer, w = LINEAR[op]
    given = (shape(20, 256), shape(*w), *([shape(3, dtype=jnp.int32)] if "groups" in sizes else []))
    gradient = jax.grad(lambda *a: (layer(*a).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))
    forward = lowered(lambda *a: layer(*a), *given)
    assert compiled({"op": op, "gradients": False} | sizes) == forward
    assert compiled({"op": op} | sizes) == forward | lowered(gradient, *given)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_a_decoding_layer(recipe: str, quick: Path) -> None:
    x, ids, router, *weights = layer_operands(jnp.bfloat16, jnp.bfloat16)
    if recipe == "fp8":
        weights = [jax.eval_shape(lambda w: jdg.quantize(w, (128, 128)), w) for w in weights]
    decode = lambda *a: moe_mlp_decode(*a, recipe=recipe)  # noqa: E731
    row = {"op": "moe_mlp_decode", "recipe": recipe} | LAYER
    assert compiled(row) == lowered(decode, x, ids, router, *weights)


# --- files ---


def test_examples_of_the_help_compile(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of JSON and of CSV, of every kind that there is."""
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    blocks = re.findall(r"\n\n((?:    .*\n)+)", capsys.readouterr().out)
    files = [block for block in blocks if "gemm_nt" in block and "moe_mlp" in block]
    assert len(files) == 2
    kinds = set()
    for number, text in enumerate(files):
        path = quick / f"shapes{number}"
        path.write_text(text)
        kinds |= {type(one) for one in shapes.parse_shapes(text)}
        assert main(["compile", "--shapes", str(path), "--json", "--jobs", "1"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert len({row["name"] for row in rows}) > 4
    assert kinds == set(shapes.kinds().values())


def test_every_field_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    shown = capsys.readouterr().out
    for op, kind in shapes.kinds().items():
        assert f"\n  {op}\n" in shown
        for one in dataclasses.fields(kind):
            assert one.name == "op" or f"\n    {one.name} " in shown


@pytest.mark.parametrize(
    "text",
    [
        '{"op": "bf16_gemm_nt", "m": 8, "n": 64, "k": 256, "accumulate": true}',
        ' [\n {"op": "bf16_gemm_nt",\n "m": 8, "n": "64", "k": 256, "accumulate": 1}\n]\n',
        "\ufeffbf16_gemm_nt, 8, 64, 256, , TRUE",
        "# a comment\r\nk,accumulate,op,m,n\r\n256,true,bf16_gemm_nt,8,64\r\n",
        "op,groups,m\nop,m,n,k,accumulate\nbf16_gemm_nt,8,64,256,1",
    ],
    ids=("object", "array", "cells", "header", "headers"),
)
def test_forms_of_a_file(text: str, tmp_path: Path) -> None:
    from jax_deepgemm.cli.compile import read_shapes

    path = tmp_path / "shapes"
    path.write_text(text, encoding="utf-8")
    [found] = read_shapes(path)
    assert str(found) == "bf16_gemm_nt m=8 n=64 k=256 accumulate=True"


def test_precompile_says_which_shape_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"op is 'fp9', need one of fp8_gemm_nt"):
        jdg.precompile([{"op": "fp9"}])
    with pytest.raises(
        ValueError, match=r"m_grouped_bf16_gemm_nt_masked has no field tokens; its fields are"
    ):
        jdg.precompile([{"op": "m_grouped_bf16_gemm_nt_masked", "tokens": 3}])
    with pytest.raises(TypeError, match=r"got 3, need a shape \(a dict with op and its sizes\)"):
        jdg.precompile([3])  # type: ignore[list-item]


# --- explain ---


def test_explain_as_json_is_typed(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--m", "256", "--n", "576", "--k", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["device"]) == (1, {"name": "NVIDIA H200", "sms": 132})
    [one] = found["shapes"]
    assert one["shape"] == {
        "op": "fp8_gemm_nt",
        "m": 256,
        "n": 576,
        "k": 512,
        "out_dtype": "bfloat16",
        "accumulate": False,
        "b_block": "128x128",
        "weights": "fp8",
        "activation": "none",
        "bias": False,
        "quantised": False,
    }
    [function] = one["functions"]
    [call] = function["calls"]
    assert call["op"] == "fp8_gemm_block"
    assert call["origin"] == "cost model"
    assert call["note"] is None
    assert call["config"] == call["candidates"][0]["config"]
    assert type(call["config"]["block_m"]) is int
    assert call["config"]["swap_ab"] in (True, False)
    costs = [each["microseconds"] for each in call["candidates"]]
    assert costs == sorted(costs)
    assert all(type(cost) is float for cost in costs)
    [kernel] = call["kernels"]
    types = {"name": str, "grid": list, "block": int, "registers": int, "from_cache": bool}
    assert {name: type(kernel[name]) for name in types} == types


def test_explain_of_a_layer(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in LAYER.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["explain", "--op", "moe_mlp", *flags]) == 0
    shown = capsys.readouterr().out
    for title in ("forward", "forward and backward"):
        sizes = "tokens=12 hidden=256 intermediate=128 experts=4 top_k=2"
        assert f"=== moe_mlp {sizes}: {title}\n" in shown
    for word in ("m_grouped", "k_grouped", "swiglu", "quantize"):
        assert word in shown


def test_explain_reads_the_file_that_compile_reads(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quick / "shapes.csv"
    path.write_text("bf16_gemm_nt,8,64,256\nop,groups,m,n,k\nm_grouped_bf16_gemm_nt_masked,3,20,64,256\n")
    assert main(["explain", "--shapes", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "=== bf16_gemm_nt m=8 n=64 k=256\n" in shown
    assert "=== m_grouped_bf16_gemm_nt_masked groups=3 m=20 n=64 k=256\n" in shown
    assert "m_masked bf16xbf16 nt groups=3" in shown


# --- what is found ---


def test_info_as_json_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = tmp_path / "tuning.json"
    tuning.write_text(
        '{"schema": 1, "devices": {"NVIDIA H200, 132 SMs": {"a": {}, "b": {}}, "x": {"c": {}}}}'
    )
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("JAX_DEEPGEMM_TUNING_FILE", str(tuning))
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cache_there = {
        "folder": str(tmp_path / "none"),
        "exists": False,
        "writable": True,
        "files": 0,
        "bytes": 0,
    }
    assert found["cache"] == cache_there
    in_force = {"device": "NVIDIA H200", "path": str(tuning), "exists": True, "entries": 2, "error": None}
    assert found["tuning"] == [in_force]
    assert found["configuration"] == dataclasses.asdict(config.Settings())
    assert found["environment"]["JAX_DEEPGEMM_TUNING_FILE"] == str(tuning)
    assert found["driver"] is None or type(found["driver"]["memory_mib"]) is float
    [first, *_] = found["devices"]
    assert (first["name"], first["id"], first["kernels"]) == ("cpu", 0, False)
    assert type(found["extension"]["loaded"]) is bool


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("off", {"path": None, "exists": False, "entries": 0, "error": None}),
        ("/nowhere/x.json", {"path": "/nowhere/x.json", "exists": False, "entries": 0, "error": None}),
    ],
)
def test_info_of_other_tuning_files(
    value: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_deepgemm.cli import info

    monkeypatch.setenv("JAX_DEEPGEMM_TUNING_FILE", value)
    assert info.tuning("NVIDIA H200") == {"device": "NVIDIA H200"} | wanted


def test_info_of_a_damaged_tuning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_deepgemm.cli import info

    (tmp_path / "x.json").write_text("[]")
    monkeypatch.setenv("JAX_DEEPGEMM_TUNING_FILE", str(tmp_path / "x.json"))
    assert info.tuning("NVIDIA H200")["error"] == "not a tuning file of schema 1"


def test_toolchain_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from jax_deepgemm.cli import info

    assert info.toolchain()["compiler"] == "nvrtc"
    monkeypatch.setenv("JAX_DEEPGEMM_COMPILER", "nvcc")
    monkeypatch.setenv("JAX_DEEPGEMM_NVCC", "/nowhere/nvcc")
    found = info.toolchain()
    assert found["compiler"] is None
    assert "no nvcc was found; looked for /nowhere/nvcc" in found["error"]
