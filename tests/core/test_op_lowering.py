"""What an op becomes: its cuda lowering, donated buffers, names, messages, caches, export."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm.core import _private, kernel_rule
from jax_deepgemm.core.op import Op
from tests.shared import op_checks, toy_ops
from tests.shared.arrays import normal, normals
from tests.shared.toy_ops import BF16, BLOCK, F32

M, N, K = 16, 72, 88


def operands(add: Any = None, batch: tuple[int, ...] = ()) -> list[jax.Array]:
    x, w, c = normals(0, (*batch, M, K), (N, K), (*batch, M, N))
    quantize = functools.partial(toy_ops.quantize, block=(1, BLOCK))
    for _ in batch:
        quantize = jax.vmap(quantize)
    arrays = [*quantize(x), *toy_ops.quantize(w, (BLOCK, BLOCK))]
    return arrays if add is None else [*arrays, c.astype(add)]


def lower_for_cuda(fn: Any, *args: Any, platforms: tuple[str, ...] = ("cuda",), **jit_options: Any) -> str:
    pytest.importorskip("jax_deepgemm._ffi")
    toy_ops.kernel_calls.clear()
    fresh = functools.wraps(fn)(lambda *operands: fn(*operands))  # jax caches what it lowered before
    return jax.jit(fresh, **jit_options).trace(*args).lower(lowering_platforms=platforms).as_text()


# cuda ------------------------------------------------------------------------------------------------------


def test_lowers_for_cuda_in_a_process_without_gpu() -> None:
    text = lower_for_cuda(toy_ops.block_gemm, *operands())
    assert text.count("@jax_deepgemm_launch") == 1
    (call,) = toy_ops.kernel_calls
    assert call["chip"].num_sms == 132
    assert call["batch"] is None
    assert call["out_dtype"] == F32
    assert "fallback" not in call


def test_lowers_for_cpu_and_cuda_together() -> None:
    text = lower_for_cuda(toy_ops.block_gemm, *operands(), platforms=("cpu", "cuda"))
    assert text.count("@jax_deepgemm_launch") == 1
    assert "stablehlo.case" in text
    assert "stablehlo.dot_general" in text


def test_kernel_gets_prepared_operands() -> None:
    lower_for_cuda(toy_ops.block_gemm, *operands())
    (call,) = toy_ops.kernel_calls
    assert call["shapes"] == [(M, 96), (M, 6), (N, 96), (5, 6)]
    assert call["results"] == [(M, N)]


def test_vmap_levels_become_one_batch_dimension() -> None:
    arrays = operands(batch=(2, 3))
    inner = jax.vmap(toy_ops.block_gemm, (0, 0, None, None))
    lower_for_cuda(jax.vmap(inner, (0, 0, None, None)), *arrays)
    (call,) = toy_ops.kernel_calls
    assert call["batch"] == (True, True, False, False)
    assert call["shapes"] == [(6, M, 96), (6, M, 6), (N, 96), (5, 6)]
    assert call["results"] == [(6, M, N)]


def test_operand_of_some_levels_is_repeated() -> None:
    a, sa, b, sb = operands(batch=(3,))
    many = [jnp.stack([x, x]) for x in (b, sb)]
    inner = jax.vmap(toy_ops.block_gemm, (0, 0, None, None))
    lower_for_cuda(jax.vmap(inner, (None, None, 0, 0)), a, sa, *many)
    (call,) = toy_ops.kernel_calls
    assert call["batch"] == (True, True, True, True)
    assert call["shapes"] == [(6, M, 96), (6, M, 6), (6, N, 96), (6, 5, 6)]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_fold_keeps_values(batch: tuple[int, ...]) -> None:
    x, w = jnp.arange(24.0).reshape(*batch, -1, 3), jnp.arange(6.0).reshape(2, 3)
    levels = ((True, False),) * len(batch)
    (folded, same), carried = kernel_rule.fold([x, w], levels)
    assert carried == ((True, False) if batch else None)
    np.testing.assert_array_equal(folded.reshape(x.shape), x)
    np.testing.assert_array_equal(same, w)


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_kernel_sees_local_shapes(mode: str) -> None:
    shard = op_checks.Shard((P("x"), P("x"), P("y"), P()), P("x", "y"))
    mesh = op_checks.make_mesh(mode)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands(), shard.specs, strict=True)]
    fn = functools.partial(toy_ops.block_gemm, **({"out_sharding": shard.out} if mode == "explicit" else {}))
    if mode == "shard_map":
        placed[3] = jax.device_put(jnp.repeat(placed[3], BLOCK, 0)[:N], NamedSharding(mesh, P("y")))
        fn = jax.shard_map(fn, mesh=mesh, in_specs=(P("x"), P("x"), P("y"), P("y")), out_specs=shard.out)
    text = lower_for_cuda(fn, *placed)
    if mode == "auto":  # XLA asks for the body when it partitions
        assert "@CustomSPMDPartitioning" in text
    else:
        assert toy_ops.kernel_calls[-1]["shapes"] == [(M // 2, 96), (M // 2, 6), (N // 4, 96), (N // 4, 6)]


@pytest.mark.parametrize(("add", "out"), [(F32, F32), (BF16, BF16)])
def test_addend_aliases_the_result(add: Any, out: Any) -> None:
    text = lower_for_cuda(functools.partial(toy_ops.block_gemm, out_dtype=out), *operands(add=add))
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 4" in text


def test_shared_addend_of_a_batch_does_not_alias() -> None:
    arrays = [*operands(batch=(2,)), jnp.zeros((M, N))]
    text = lower_for_cuda(jax.vmap(toy_ops.block_gemm, (0, 0, None, None, None)), *arrays)
    assert "output_operand_alias" not in text


def _context(capability: str) -> Any:
    device = SimpleNamespace(compute_capability=capability, device_kind="NVIDIA A100", core_count=108)
    backend = SimpleNamespace(devices=lambda: [device])
    return SimpleNamespace(module_context=SimpleNamespace(backend=backend))


def test_gpu_without_kernel_is_an_error() -> None:
    rule = kernel_rule.make(toy_ops.block_gemm_op)
    with pytest.raises(
        ValueError,
        match=r"A100 has compute capability 8\.0.*for compute capability 9\.0.*fallback='reference'",
    ):
        rule(_context("8.0"), batch=(), out_dtype=F32)


def test_gpu_without_kernel_runs_the_reference_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _context("8.0").module_context.backend.devices()[0]
    monkeypatch.setattr(kernel_rule, "device_of", lambda ctx: device)
    with pytest.raises(ValueError, match="compute capability"):
        lower_for_cuda(lambda *a: toy_ops.block_gemm(*a), *operands())
    with jax_deepgemm.config.use(fallback="reference"):
        text = lower_for_cuda(lambda *a: toy_ops.block_gemm(*a), *operands())
    assert "@jax_deepgemm_launch" not in text
    assert "stablehlo.dot_general" in text


# Buffers, names, dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["jit", "auto", "explicit", "shard_map"])
def test_donated_addend_gives_its_buffer(mode: str) -> None:
    case = op_checks.OpCase("add", toy_ops.block_gemm, lambda seed: operands(add=F32))
    if mode == "jit":
        arrays = operands(add=F32)
        compiled = jax.jit(toy_ops.block_gemm, donate_argnums=4).lower(*arrays).compile()
    else:
        shard = op_checks.Shard((P("x"), P("x"), P(), P(), P("x")), P("x"))
        compiled, arrays = op_checks.compile_sharded(case, shard, mode, donate_argnums=4)
    assert "input_output_alias={ {}: (4, {}, may-alias) }" in compiled.as_text()
    expected = toy_ops.block_gemm(*operands(add=F32))
    op_checks.assert_same(compiled(*arrays), expected, 1e-6)
    assert arrays[4].is_deleted()


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_op_name_stands_in_the_program(mode: str) -> None:
    case = op_checks.OpCase("gemm", toy_ops.block_gemm, lambda seed: operands())
    shard = op_checks.Shard((P("x"), P("x"), P(), P()), P("x"))
    compiled, _ = op_checks.compile_sharded(case, shard, mode)
    names = re.findall(r'op_name="([^"]*)"', compiled.as_text())
    assert any("toy_block_gemm" in name for name in names), names


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize(("reduce_dtype", "exchanged"), [(None, "f32"), ("bfloat16", "bf16")])
def test_reduce_dtype(mode: str, scatter: bool, reduce_dtype: Any, exchanged: str) -> None:
    fn = functools.partial(toy_ops.block_gemm, out_dtype=BF16, reduce_dtype=reduce_dtype)
    case = op_checks.OpCase("gemm", fn, lambda seed: operands())
    shard = op_checks.Shard((P(None, "y"), P(), P(None, "y"), P()), P("y") if scatter else P())
    with exchanged_dtypes() as seen:
        compiled, placed = op_checks.compile_sharded(case, shard, mode)
    op_checks.assert_same(compiled(*placed), fn(*operands()), 2**-6)
    sums = {"all-reduce": "all_reduce", "reduce-scatter": "reduce_scatter"}
    lowered = jax.jit(fn).lower(*operands()).as_text()
    assert not any(name in lowered for name in sums.values())
    # XLA:CPU computes bf16 collectives in f32, so the exchanged dtype is read where the program still has it
    assert seen == {exchanged}


@contextlib.contextmanager
def exchanged_dtypes() -> Iterator[set[str]]:
    """The dtypes of sums over devices that are traced inside."""
    seen: set[str] = set()
    import jax_deepgemm.core.op as op_module

    real = op_module.lax

    class Spy:
        def __getattr__(self, name: str) -> Any:
            function = getattr(real, name)
            if name not in ("psum", "psum_scatter"):
                return function

            def record(x: Any, *args: Any, **kwargs: Any) -> Any:
                seen.add({"float32": "f32", "bfloat16": "bf16"}[str(x.dtype)])
                return function(x, *args, **kwargs)

            return record

    op_module.lax = Spy()  # type: ignore[assignment]
    try:
        jax.clear_caches()
        yield seen
    finally:
        op_module.lax = real


def test_equal_calls_have_equal_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partition callback is named by content, so two lowerings of one program are one cache entry.

    What a tuning file says is part of the content.
    """
    shard = op_checks.Shard((P("x"), P("x"), P(), P()), P("x"))
    mesh = op_checks.make_mesh("auto")
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands(), shard.specs, strict=True)]

    def text(out_dtype: Any) -> str:
        jax.clear_caches()
        return jax.jit(functools.partial(toy_ops.block_gemm, out_dtype=out_dtype)).lower(*placed).as_text()

    assert text(F32) == text(F32)
    names = [re.findall(r'backend_config = "([^"]*)"', text(dtype)) for dtype in (F32, BF16)]
    assert names[0] != names[1]
    assert names[0][0].startswith("toy_block_gemm:")
    before = text(F32)
    (tmp_path / "tuning.json").write_text("{}")
    monkeypatch.setenv("JAX_DEEPGEMM_TUNING_FILE", str(tmp_path / "tuning.json"))
    assert text(F32) != before


# Remat -----------------------------------------------------------------------------------------------------


def test_named_policy_saves_results() -> None:
    """`checkpoint_name` on an op's result, outside custom_vjp, with a policy on names: no op runs twice."""
    x, w = jnp.ones((M, K)), jnp.ones((N, K))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(checkpoint_name(toy_ops.linear(x, w), "linear_out")))

    def gemms(policy: Any) -> int:
        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(w, x))
        return len(re.findall(r"toy_(?:block|row)_gemm\[", text))

    policies = jax.checkpoint_policies
    saved = gemms(policies.save_only_these_names("linear_out"))
    assert saved == gemms(policies.everything_saveable)
    assert saved < gemms(policies.nothing_saveable)


# Limits, with their messages -------------------------------------------------------------------------------


def test_no_derivative_names_the_way_out() -> None:
    a, sa, b, sb = operands()

    def loss(sa: jax.Array) -> jax.Array:
        return toy_ops.block_gemm(a, sa, b, sb).sum()

    with pytest.raises(NotImplementedError, match=r"toy_block_gemm has no derivative\. Use linear\(x, w\)\."):
        jax.grad(loss)(sa)


def test_no_derivative_is_silent_for_constants() -> None:
    arrays = operands()
    gradient = jax.grad(lambda x: (toy_ops.block_gemm(*arrays) * x).sum())(1.0)
    np.testing.assert_allclose(gradient, toy_ops.block_gemm(*arrays).sum(), rtol=1e-5)


def test_forward_mode_through_a_custom_vjp_layer_raises() -> None:
    x, w = jnp.ones((M, K)), jnp.ones((N, K))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(toy_ops.linear, (x, w), (x, w))


def test_export_over_auto_axes_says_what_to_do() -> None:
    mesh = op_checks.make_mesh("auto")
    placed = [jax.device_put(x, NamedSharding(mesh, P())) for x in operands()]
    with pytest.raises(NotImplementedError, match=r"toy_block_gemm: jax\.export .*Explicit axes.*shard_map"):
        jax.export.export(jax.jit(toy_ops.block_gemm))(*placed)


@pytest.mark.parametrize("mode", ["partial", "mixed"])
def test_partly_manual_or_mixed_meshes_gather_and_say_so(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    _private.log_once.cache_clear()
    expected = toy_ops.block_gemm(*operands())
    types = (AxisType.Auto, AxisType.Auto) if mode == "partial" else (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=types)
    rows = P("x", None)
    specs = (rows, rows, P(), P())
    with caplog.at_level(logging.WARNING, "jax_deepgemm"), jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands(), specs, strict=True)]
        if mode == "partial":
            fn = jax.shard_map(toy_ops.block_gemm, in_specs=specs, out_specs=rows, axis_names={"x"})
        else:
            fn = functools.partial(toy_ops.block_gemm, out_sharding=rows)
        op_checks.assert_same(jax.jit(fn)(*placed), expected, 1e-5)
    assert [r.message for r in caplog.records if "leaves some mesh axes Auto" in r.message]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("with_mesh", [False, True])
def test_explicit_arrays_with_and_without_set_mesh(eager: bool, with_mesh: bool) -> None:
    mesh = op_checks.make_mesh("explicit")
    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(operands(), (P("x", "y"), P(), P(None, "y"), P()), strict=True)
    ]
    fn = functools.partial(toy_ops.block_gemm, out_sharding=NamedSharding(mesh, P("x", "y")))
    with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
        got = (fn if eager else jax.jit(fn))(*placed)
    assert got.sharding.spec == P("x", "y")
    op_checks.assert_same(got, toy_ops.block_gemm(*operands()), 1e-5)


def test_eager_on_auto_arrays() -> None:
    mesh = op_checks.make_mesh("auto")
    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(operands(), (P("x", "y"), P(), P(None, "y"), P()), strict=True)
    ]
    op_checks.assert_same(toy_ops.block_gemm(*placed), toy_ops.block_gemm(*operands()), 1e-5)


def _explicit_call(a: P, b: P, out: Any) -> None:
    mesh = op_checks.make_mesh("explicit")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, s) for x, s in zip(operands(), (a, P(), b, P()), strict=True)]
        toy_ops.block_gemm(*placed, out_sharding=out)


def test_partial_shard_map_leaves_explicit_axes_cut() -> None:
    mesh = op_checks.make_mesh("explicit")
    specs = (P("x", None), P("x", None), P("y", None), P())
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, s) for x, s in zip(operands(), specs, strict=True)]
        fn = jax.shard_map(
            toy_ops.block_gemm, in_specs=(P("x"), P("x"), P(), P()), out_specs=P("x"), axis_names={"x"}
        )
        compiled = jax.jit(fn).lower(*placed).compile()
    got = compiled(*placed)
    assert got.sharding.spec == P("x", "y")
    op_checks.assert_same(got, toy_ops.block_gemm(*operands()), 1e-5)
    if jax.__version_info__ >= (0, 11):
        assert not op_checks.collectives(compiled.as_text())


def test_cut_that_does_not_divide_is_gathered() -> None:
    """XLA would pad 4 shards of 90 columns with undefined data, and the sum would take it in."""
    mesh = op_checks.make_mesh("auto")
    a, b = normal(0, 2, 8, 90, dtype=F32)

    def fn(a: jax.Array, b: jax.Array) -> jax.Array:
        cut = NamedSharding(mesh, P(None, "y"))
        a, b = (jnp.exp(jax.lax.with_sharding_constraint(x, cut)) for x in (a, b))
        return toy_ops.matmul(a, b)

    got = jax.jit(fn)(a, jax.device_put(b, NamedSharding(mesh, P())))
    op_checks.assert_same(got, jnp.exp(a) @ jnp.exp(b).T, 1e-5)


def test_vmap_with_spmd_axis_name() -> None:
    mesh = op_checks.make_mesh("auto")
    a, b = jnp.ones((4, 8, 24)), jnp.ones((16, 24))

    def one(a: jax.Array) -> jax.Array:
        out = toy_ops.matmul(a, b)
        return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P(None, "y")))

    compiled = jax.jit(jax.vmap(one, spmd_axis_name="x")).lower(a).compile()
    assert not op_checks.collectives(compiled.as_text())
    assert (compiled(a) == 24).all()


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_64_bit_mode(mode: str) -> None:
    case = op_checks.OpCase("gemm", toy_ops.block_gemm, lambda seed: operands())
    with jax.enable_x64(True):
        assert toy_ops.block_gemm(*operands()).dtype == F32
        for spec, out in ((P("y"), P(None, "y")), (P(None, "y"), P())):
            sums = () if len(spec) == 1 else ("all-reduce",)
            op_checks.check_sharded(case, op_checks.Shard((P(), P(), spec, P()), out, sums), mode)


def test_shapes_without_computing() -> None:
    (aval,) = jax.tree.leaves(
        jax.eval_shape(functools.partial(toy_ops.block_gemm, out_dtype=BF16), *operands())
    )
    assert (aval.shape, aval.dtype) == ((M, N), BF16)


def test_cut_sum_needs_out_sharding() -> None:
    with pytest.raises(
        ValueError, match=r"toy_block_gemm: a summed dimension is cut \(k over \('y',\)\).*out_sharding"
    ):
        _explicit_call(P(None, "y"), P(None, "y"), None)


def test_out_sharding_that_cannot_be_given() -> None:
    with pytest.raises(ValueError, match=r"toy_block_gemm: out_sharding asks for .*16, 72.*the op can give"):
        _explicit_call(P(), P(), P("x", "x"))


GEMM, QUANTIZE = toy_ops.block_gemm_op, toy_ops._quantize[1, BLOCK]
BAD_CALLS = [
    (lambda a: GEMM(*a[:3], out_dtype=F32), "got 3 operands, need 4"),
    (
        lambda a: GEMM(a[0][None], *a[1:], out_dtype=F32),
        r"operand 0 is \[1, 16, 88\], need dimensions \[m, k\]",
    ),
    (
        lambda a: GEMM(*a, out_dtype=F32, out_sharding=(P(), P())),
        "need a PartitionSpec .* each of the 1 results",
    ),
    (lambda a: GEMM(*a, out_dtype=F32, out_sharding="x"), "out_sharding is 'x'"),
    (
        lambda a: GEMM(*a, out_dtype=F32, reduce_dtype=BF16),
        r"is bfloat16, need float32 or .* out_dtype \(float32\)",
    ),
    (lambda a: QUANTIZE(a[0], reduce_dtype=F32), "reduce_dtype"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(operands())


def test_parameters_are_static() -> None:
    with pytest.raises(TypeError, match=r"config=\[1\] is not hashable"):
        GEMM(*operands(), out_dtype=F32, config=[1])


@pytest.mark.parametrize(
    "options",
    [{"reduces": ("k",), "addend": 2}, {"reduces": ("k",), "addend": 0, "base": toy_ops.block_gemm_op}],
)
def test_bad_declarations(options: Any) -> None:
    with pytest.raises(ValueError, match="addend last and base="):
        Op("bad", "m k, n k, m n -> m n", lambda *_: [], lambda *_: [], **options)
    with pytest.raises(ValueError, match="has one result"):
        Op("bad", "m k, n k -> m n, m", lambda *_: [], lambda *_: [], reduces=("k",))


# A JAX without the private names ----------------------------------------------------------------------------


def test_without_partition_callbacks_programs_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _private.log_once.cache_clear()
    jax.clear_caches()
    monkeypatch.setattr(_private, "_sharding_callbacks", None)
    mesh = op_checks.make_mesh("auto")
    a, b = jnp.ones((8, 24)), jnp.ones((16, 24))
    cut = NamedSharding(mesh, P(None, "y"))
    with caplog.at_level(logging.WARNING, "jax_deepgemm"):
        for _ in range(2):
            assert (jax.jit(toy_ops.matmul)(jax.device_put(a, cut), jax.device_put(b, cut)) == 24).all()
            jax.clear_caches()
    (record,) = caplog.records
    assert "compiled anew in each process" in record.message


def test_without_the_device_set_operands_are_gathered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _private.log_once.cache_clear()
    monkeypatch.setattr(_private, "_needs_devices", None)
    op = toy_ops.make_block_gemm("toy_gathered")
    case = op_checks.OpCase("", lambda *a: op(*a, out_dtype=F32)[0], lambda seed: operands())
    with caplog.at_level(logging.WARNING, "jax_deepgemm"):
        op_checks.assert_same(case.fn(*operands()), toy_ops.block_gemm(*operands()), 1e-6)
        shard = op_checks.Shard((P("x"), P("x"), P(), P()), P("x"))
        compiled, placed = op_checks.compile_sharded(case, shard, "auto")
    op_checks.assert_same(compiled(*placed), toy_ops.block_gemm(*operands()), 1e-5)
    (record,) = caplog.records
    assert "use Explicit axes" in record.message


def test_collective_counter_reads_hlo() -> None:
    text = '%a = (f32[2], f32[2]) all-reduce-start(%b), op_name="all-reduce"\n%c = f32[2] all-gather(%d)'
    assert op_checks.collectives(text) == Counter({"all-reduce": 1, "all-gather": 1})
