"""QuantizedArray: a pytree, its refusals, its sharding, its way to disk and to other libraries."""

from __future__ import annotations

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm.ops.quantize import interop
from jax_deepgemm.quantization import (
    QuantizedArray,
    concatenate,
    dequantize,
    from_qwix,
    from_tuple,
    quantize,
    scales_spec,
    to_qwix,
    to_tuple,
)
from tests.shared import op_checks
from tests.shared.arrays import normal


def make(*shape, block=(1, 128)):
    return quantize(normal(0, *shape, dtype=jnp.float32), block)


def assert_equal(one, other):
    assert (one.block, one.shape, one.dtype) == (other.block, other.shape, other.dtype)
    np.testing.assert_array_equal(
        np.asarray(one.values).view(np.uint8), np.asarray(other.values).view(np.uint8)
    )
    np.testing.assert_array_equal(one.scales, other.scales)


# A pytree ------------------------------------------------------------


def test_flattens_to_values_and_scales_with_a_static_block():
    q = make(4, 256)
    leaves, treedef = jax.tree.flatten(q)
    assert [leaf.shape for leaf in leaves] == [(4, 256), (4, 2)]
    assert_equal(jax.tree.unflatten(treedef, leaves), q)
    assert jax.tree.structure(make(4, 256, block=(128, 128))) != treedef
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".values", ".scales"]


@pytest.mark.parametrize("leaf", [None, P("x"), 3, "name", jax.ShapeDtypeStruct((2,), jnp.float32)])
def test_holds_leaves_that_are_no_arrays(leaf):
    other = jax.tree.map(lambda _: leaf, make(4, 256))
    assert isinstance(other, QuantizedArray)
    assert other.values is leaf
    assert len(repr(other)) < 160


def test_a_list_as_block_becomes_a_tuple():
    q = make(4, 256)
    assert hash(jax.tree.structure(QuantizedArray(q.values, q.scales, [1, 128])))


@pytest.mark.parametrize("in_axes", [0, (QuantizedArray(0, 0, (1, 128)),)])
def test_vmap(in_axes):
    q = make(3, 4, 256)
    np.testing.assert_array_equal(jax.vmap(dequantize, in_axes)(q), dequantize(q))


def test_vmap_of_a_shared_scale():
    q = make(3, 4, 256)
    shared = QuantizedArray(q.values, q.scales[0], q.block)
    got = jax.vmap(dequantize, (QuantizedArray(0, None, (1, 128)),))(shared)
    np.testing.assert_array_equal(got[1], dequantize(QuantizedArray(q.values[1], q.scales[0], q.block)))


def test_passes_jit_scan_and_shapes():
    q = make(3, 4, 256)
    assert_equal(jax.jit(lambda q: q)(q), q)
    _, rows = jax.lax.scan(lambda carry, one: (carry, dequantize(one)), 0, q)
    np.testing.assert_array_equal(rows, dequantize(q))
    assert jax.eval_shape(lambda: q).scales.shape == (3, 4, 2)


def test_is_no_obstacle_to_gradients_with_respect_to_others():
    q = make(4, 256)
    got = jax.grad(lambda x, q: jnp.sum(x * dequantize(q)))(jnp.ones((4, 256)), q)
    np.testing.assert_array_equal(got, dequantize(q))


def test_repr_is_short():
    assert repr(make(4, 256)) == "QuantizedArray(float8_e4m3fn[4,256], scales float32[4,2], block=(1, 128))"
    assert len(repr(jax.tree.map(np.asarray, make(512, 512)))) < 100


def test_properties():
    q = make(3, 4, 256)
    assert (q.shape, q.ndim, q.size, q.dtype) == ((3, 4, 256), 3, 3072, jnp.float8_e4m3fn)


def test_leading_dimensions_can_be_indexed():
    q = make(3, 2, 4, 256)
    assert_equal(q[1], QuantizedArray(q.values[1], q.scales[1], q.block))
    assert q[1, 0].shape == (4, 256)
    assert q[:, None, 1].scales.shape == (3, 1, 4, 2)
    assert q[jnp.array([2, 0])].shape == (2, 2, 4, 256)
    picked = jax.jit(lambda q, i: q[i])(q, 2)
    assert_equal(picked, q[2])


# Refusals ------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.T, AttributeError, r"fp8_gemm_nn.*values\.mT, q\.scales\.mT, q\.block\[::-1\]"),
        (lambda q: q.mT, AttributeError, r"is a copy"),
        (lambda q: q.astype(jnp.bfloat16), TypeError, r"astype\(bfloat16\).*dequantize\(q, dtype\)"),
        (lambda q: q[0, 0], IndexError, r"float8_e4m3fn\[3,4,256\] with block \(1, 128\).* 1 leading"),
        (lambda q: q[..., 0], IndexError, r"no Ellipsis"),
        (lambda q: q[jnp.ones(3, bool)], IndexError, r"no masks"),
        (lambda q: list(q), TypeError, r"not iterable: use to_tuple"),
        (lambda q: jnp.sum(q), TypeError, r"not an array: use dequantize"),
        (lambda q: np.asarray(q), TypeError, r"not an array: use dequantize"),
        (lambda q: q.with_scales(q.scales[0]), ValueError, r"with_scales: scales of operand are \[4, 2\]"),
        (
            lambda q: q.with_scales(q.scales.astype(jnp.bfloat16)),
            TypeError,
            r"bfloat16, need float32.*astype",
        ),
        (lambda q: q.with_scales(q.scales.astype(jnp.int32)), TypeError, r"int32.*unpack_ue8m0_from_int"),
        (
            lambda q: q.with_scales([1.0]),
            TypeError,
            r"scales of operand are a list, need a JAX or NumPy array",
        ),
        (
            lambda q: q.with_values(q.values[:2]),
            ValueError,
            r"with_values: scales of operand are \[3, 4, 2\]",
        ),
        (lambda q: q.with_values(q.values.astype(jnp.int8)), TypeError, r"int8, need float8_e4m3fn or"),
        (lambda q: QuantizedArray(q.values[0, 0], q.scales[0, 0], q.block).check(), ValueError, r"rank >= 2"),
        (
            lambda q: QuantizedArray(q.values, q.scales, (1, -1)).check("f"),
            ValueError,
            r"block is \(1, -1\), need two positive integers",
        ),
    ],
)
def test_refusals_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(make(3, 4, 256))


def test_probing_for_a_transpose_does_not_raise():
    assert not hasattr(make(4, 256), "T")


def test_checked_replacements():
    q = make(4, 256)
    assert q.with_scales(q.scales * 2).scales[0, 0] == 2 * q.scales[0, 0]
    assert q.with_values(-q.values).values[0, 0] == -q.values[0, 0]


# Sharding ------------------------------------------------------------

MESH = {"x": 2, "y": 4}


@pytest.mark.parametrize(
    ("spec", "shape", "block", "expected"),
    [
        (P(), (576, 704), (1, 128), P(None, None)),
        (P("x", "y"), (576, 704), (1, 128), P("x", None)),
        (P("x", "y"), (576, 1024), (128, 128), P(None, "y")),
        (P(("x", "y"), None), (1024, 64), (128, 128), P(("x", "y"), None)),
        (P("y", None), (512, 64), (128, 128), P("y", None)),
        (P("y", None), (500, 64), (128, 1), P(None, None)),
        (P("x", "y", None), (4, 576, 704), (128, 128), P("x", None, None)),
        (P("x"), (4, 576, 704), (1, 32), P("x", None, None)),
    ],
)
def test_spec_of_scales(spec, shape, block, expected):
    assert scales_spec(spec, shape, block, MESH) == expected


def test_shardings_place_values_and_scales_together():
    mesh = op_checks.make_mesh("auto")
    q = make(512, 1024, block=(128, 128))
    shardings = q.shardings(NamedSharding(mesh, P("x", "y")))
    placed = jax.device_put(q, shardings)
    assert placed.scales.sharding.spec == P("x", "y")
    assert_equal(jax.jit(lambda q: q, in_shardings=(shardings,), out_shardings=shardings)(q), q)


def test_shard_map_takes_specs_in_its_structure():
    mesh = op_checks.make_mesh("auto")
    q = make(4, 8, 256)
    specs = jax.tree.map(lambda _: P("y"), q)
    got = jax.shard_map(dequantize, mesh=mesh, in_specs=(specs,), out_specs=P("y"))(q)
    np.testing.assert_array_equal(got, dequantize(q))


# To disk ------------------------------------------------------------


def test_orbax_saves_and_restores(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    mesh = op_checks.make_mesh("auto")
    q = make(512, 1024, block=(128, 128))
    shardings = q.shardings(NamedSharding(mesh, P("x", "y")))
    state = {"w": jax.device_put(q, shardings), "step": jnp.int32(3)}
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        back = checkpointer.restore(tmp_path / "one", target)
    assert isinstance(back["w"], QuantizedArray)
    assert_equal(back["w"], q)
    assert back["w"].scales.sharding.spec == P("x", "y")


# Tuples and qwix ------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (1, 32)])
def test_tuples(block):
    q = make(256, 512, block=block)
    assert_equal(from_tuple(to_tuple(q)), q)
    assert_equal(from_tuple(to_tuple(q), block), q)
    assert_equal(from_tuple(q), q)


@pytest.mark.parametrize(
    ("pair", "block", "error", "message"),
    [
        (to_tuple(make(1, 256)), None, ValueError, r"fit the blocks \(1, 128\), \(128, 128\)\. Say which"),
        (to_tuple(make(4, 8)), None, ValueError, r"fit the blocks \(1, 128\), \(1, 32\)\. Say which"),
        (to_tuple(make(4, 256, block=(1, 64))), None, ValueError, r"fit none of .* Say which: from_tuple"),
        (to_tuple(make(4, 256)), (128, 128), ValueError, r"scales of operand are \[4, 2\].*need \[1, 2\]"),
        (make(4, 256), (128, 128), ValueError, r"got a QuantizedArray with block \(1, 128\)"),
        (jnp.ones((4, 4)), None, TypeError, r"need a tuple \(values, scales\)"),
        (("a", "b"), None, TypeError, r"need arrays"),
    ],
)
def test_tuples_that_do_not_fit(pair, block, error, message):
    with pytest.raises(error, match=message):
        from_tuple(pair, block)


class QArray:
    """The fields of qwix's class of this name."""

    def __init__(self, qvalue, scale, zero_point=None, qtype=None):
        self.qvalue, self.scale, self.zero_point, self.qtype = qvalue, scale, zero_point, qtype


QArray.__module__ = "qwix._src.core.qarray"


@pytest.fixture
def qwix(monkeypatch):
    """qwix itself where it is installed, else a stand-in with its class."""
    try:
        import qwix
    except ImportError:
        qwix = types.ModuleType("qwix")
        qwix.QArray = QArray
        monkeypatch.setitem(sys.modules, "qwix", qwix)
    return qwix


@pytest.mark.parametrize(
    ("shape", "block"), [((256, 512), (128, 128)), ((4, 256), (1, 128)), ((2, 4, 64), (1, 32))]
)
def test_qwix(qwix, shape, block):
    q = make(*shape, block=block)
    array = to_qwix(q)
    assert interop.is_qwix(array)
    assert_equal(from_qwix(array), q)
    assert_equal(from_qwix(array, block), q)


def test_qwix_scale_of_a_whole_dimension(qwix):
    q = make(256, 100, block=(1, 100))
    array = qwix.QArray(qvalue=q.values, scale=q.scales)
    assert_equal(from_qwix(array), QuantizedArray(q.values, q.scales, (1, 128)))
    assert_equal(from_qwix(array, (1, 100)), q)


@pytest.mark.parametrize(
    ("grid", "block"),
    [((256, 1), (1, 128)), ((1, 300), (128, 1)), ((1, 1), (128, 128)), ((256, 3), (1, 100))],
)
def test_qwix_scales_are_repeated_to_blocks_that_multiply(qwix, grid, block):
    """Channelwise along either dimension, and per tensor; tiles of 100 stay what they are."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((256, 300)), jnp.float8_e4m3fn)
    scales = jnp.asarray(rng.uniform(1, 2, grid), jnp.float32)
    got = from_qwix(qwix.QArray(qvalue=values, scale=scales))
    assert got.block == block
    wide = np.broadcast_to(np.repeat(scales, 300 // grid[1], 1), (256, 300))
    np.testing.assert_array_equal(dequantize(got), values.astype(jnp.float32) * wide)


def test_qwix_tiles_of_many_blocks(qwix):
    q = make(4, 512, block=(1, 256))
    got = from_qwix(qwix.QArray(qvalue=q.values, scale=q.scales))
    assert got.block == (1, 128)
    np.testing.assert_array_equal(dequantize(got), dequantize(q))


def test_qwix_channelwise_weights_multiply(qwix):
    x, w = make(8, 256), make(136, 256, block=(1, 256))
    got = jax_deepgemm.fp8_gemm_nt(x, from_qwix(qwix.QArray(qvalue=w.values, scale=w.scales)))
    want = dequantize(x) @ dequantize(w).T
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e8m0fnu"])
def test_qwix_narrow_scales_become_float32(qwix, dtype):
    q = quantize(jnp.ones((4, 64)), (1, 32), scale_format="ue8m0")
    narrow = q.scales.astype(getattr(jnp, dtype))
    kind = "mxfp8" if dtype == "float8_e8m0fnu" else None
    got = from_qwix(qwix.QArray(qvalue=q.values, scale=narrow, qtype=kind or q.values.dtype))
    assert_equal(got, q)


def test_qwix_scale_shared_by_a_batch(qwix):
    q = make(3, 4, 256)
    got = from_qwix(qwix.QArray(qvalue=q.values, scale=q.scales[:1]))
    assert_equal(got, QuantizedArray(q.values, jnp.repeat(q.scales[:1], 3, 0), (1, 128)))


def test_qwix_refusals(qwix):
    q = make(256, 512, block=(128, 128))
    with pytest.raises(ValueError, match="zero point"):
        from_qwix(qwix.QArray(qvalue=q.values, scale=q.scales, zero_point=q.values[:1, :1]))
    with pytest.raises(TypeError, match=r"values of array are int8, need float8_e4m3fn"):
        from_qwix(qwix.QArray(qvalue=q.values.astype(jnp.int8), scale=q.scales))
    with pytest.raises(TypeError, match=r"scales of array are int32, need float32"):
        from_qwix(qwix.QArray(qvalue=q.values, scale=q.scales.astype(jnp.int32)))
    with pytest.raises(TypeError, match=r"qtype nvfp4 is stored as float8_e4m3fn"):
        from_qwix(qwix.QArray(qvalue=q.values, scale=q.scales, qtype="nvfp4"))
    with pytest.raises(TypeError, match=r"got builtins\.tuple, need a qwix\.QArray"):
        from_qwix(to_tuple(q))
    with pytest.raises(ValueError, match=r"ragged block in \[200, 512\]"):
        to_qwix(make(200, 512, block=(128, 128)))


def test_to_qwix_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match="pip install qwix"):
        to_qwix(make(4, 256))


def test_nothing_here_imports_qwix():
    assert not interop.is_qwix(functools)


# What does not fit, and joining ------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 192])
def test_scales_that_do_not_fit_are_refused_at_construction(rows):
    """Gate and up joined leaf by leaf: a seam inside a block gives one scale too many."""
    one = make(rows, 256, block=(128, 128))
    joined = [jnp.concatenate([leaf, leaf]) for leaf in jax.tree.leaves(one)]
    with pytest.raises(ValueError, match=rf"scales of operand are \[\d, 2\] for values \[{2 * rows}, 256\]"):
        QuantizedArray(*joined, (128, 128))
    leaf_by_leaf = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)  # JAX's own way: not checked
    with pytest.raises(ValueError, match="one scale per block"):
        dequantize(leaf_by_leaf)


@pytest.mark.parametrize(
    ("sizes", "axis", "block", "joined_block"),
    [
        ((256, 128), -2, (128, 128), (128, 128)),
        ((128, 72), -2, (128, 128), (128, 128)),
        ((200, 200), -2, (128, 128), (1, 128)),
        ((192, 192), 1, (128, 128), (1, 128)),
        ((5, 7), -2, (1, 128), (1, 128)),
        ((256, 40), -1, (1, 128), (1, 128)),
        ((3, 2), 0, (128, 128), (128, 128)),
    ],
)
def test_concatenate_is_the_dequantised_arrays_side_by_side(sizes, axis, block, joined_block):
    shapes = [[2, 144, 256] for _ in sizes]
    for shape, size in zip(shapes, sizes, strict=True):
        shape[axis] = size
    scale = iter((1.0, 30.0))
    parts = [
        quantize(normal(i, *s, dtype=jnp.float32, scale=next(scale)), block) for i, s in enumerate(shapes)
    ]
    joined = jax.jit(functools.partial(concatenate, axis=axis))(parts)
    assert joined.block == joined_block
    np.testing.assert_array_equal(
        dequantize(joined), np.concatenate([dequantize(part) for part in parts], axis)
    )


@pytest.mark.parametrize("half", [200, 192, 256])
def test_joined_gate_and_up_give_the_product_of_both(half):
    x = make(6, 256)
    gate, up = (
        quantize(normal(i, half, 256, dtype=jnp.float32, scale=1 + 20 * i), (128, 128)) for i in (0, 1)
    )
    got = jax_deepgemm.fp8_gemm_nt(x, concatenate([gate, up]), out_dtype=jnp.float32)
    want = [jax_deepgemm.fp8_gemm_nt(x, part, out_dtype=jnp.float32) for part in (gate, up)]
    np.testing.assert_allclose(got, np.concatenate(want, 1), rtol=1e-5, atol=5e-4)  # of numbers up to 400


def test_what_concatenate_refuses():
    q = make(200, 200, block=(128, 128))
    with pytest.raises(ValueError, match=r"columns \[200, 200\] with blocks of 128: a seam falls inside"):
        concatenate([q, q], axis=-1)
    with pytest.raises(ValueError, match=r"differ in block: \(128, 128\), \(1, 128\)"):
        concatenate([q, make(200, 200)])
    with pytest.raises(ValueError, match="need equal dimensions but the one they are joined along, -2"):
        concatenate([q, make(200, 256, block=(128, 128))])
    with pytest.raises(ValueError, match="axis is 2 of arrays of rank 2"):
        concatenate([q, q], axis=2)
    for given in ([], q, [q, q.values]):
        with pytest.raises(TypeError, match="need a list of QuantizedArrays"):
            concatenate(given)
