"""Launch plans: the rules they obey, their bytes, and a decoder that no bytes can break."""

from __future__ import annotations

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_deepgemm.core import launch
from jax_deepgemm.core.launch import (
    Copy,
    Launch,
    LaunchPlan,
    Memset,
    Operand,
    Result,
    Scalar,
    Scratch,
    TensorMap,
    decode,
    encode,
)
from jax_deepgemm.core.plan import FILLS, L2_PROMOTIONS, SCALAR_TYPES, SWIZZLES, TENSOR_TYPES, VERSION
from tests.shared.launch_plans import FakeKernel, fake_launch, matrix_map, plans, sample_plan


def expected_buffer(buffer):
    return {
        "kind": type(buffer).__name__.lower(),
        "index": buffer.index,
        "byte_offset": buffer.byte_offset,
    }


def expected_param(param):
    if isinstance(param, Scalar):
        code, letter = SCALAR_TYPES[param.dtype]
        bits = int.from_bytes(struct.pack("<" + letter, param.value), "little")
        return {"scalar": code, "bits": bits}
    if isinstance(param, TensorMap):
        return {
            "buffer": expected_buffer(param.buffer),
            "type": TENSOR_TYPES[param.dtype][0],
            "dims": param.dims,
            "strides": param.strides,
            "box": param.box,
            "swizzle": SWIZZLES[param.swizzle],
            "l2_promotion": L2_PROMOTIONS[param.l2_promotion],
            "fill": FILLS[param.fill],
        }
    return expected_buffer(param)


def expected_step(step, kernels):
    if isinstance(step, Memset):
        return {"buffer": expected_buffer(step.buffer), "num_bytes": step.num_bytes, "value": step.value}
    if isinstance(step, Copy):
        source, target = expected_buffer(step.source), expected_buffer(step.target)
        return {"source": source, "target": target, "num_bytes": step.num_bytes}
    names = [(kernel.digest, kernel.name) for kernel in kernels]
    return {
        "kernel": names.index((step.kernel.digest, step.kernel.name)),
        "grid": step.grid,
        "block": step.block,
        "cluster": step.cluster,
        "shared_memory": step.shared_memory,
        "pdl": step.pdl,
        "params": [expected_param(param) for param in step.params],
    }


def expected(plan):
    """What the decoder must say of a plan, from the dataclasses alone."""
    return {
        "version": VERSION,
        "label": plan.label,
        "kernels": [{"name": k.name, "arch": k.arch, "digest": k.digest} for k in plan.kernels],
        "scratch_bytes": plan.scratch_bytes,
        "steps": [expected_step(step, plan.kernels) for step in plan.steps],
    }


def test_sample_plan_survives_the_round_trip():
    assert decode(encode(sample_plan())) == expected(sample_plan())


@given(plans)
def test_every_plan_survives_the_round_trip(plan):
    assert decode(encode(plan)) == expected(plan)


def test_equal_plans_have_equal_bytes():
    np.testing.assert_array_equal(encode(sample_plan()), encode(sample_plan()))
    assert len(sample_plan().kernels) == 2  # one of them used twice


# Anything but the plan is a ValueError.


def decode_or_message(data):
    try:
        return decode(data)
    except ValueError as error:
        return str(error)


def test_every_truncation_is_an_error():
    data = encode(sample_plan()).tobytes()
    for size in range(len(data)):
        with pytest.raises(ValueError, match="malformed launch plan"):
            decode(data[:size])
        cut = data[:8] + struct.pack("<I", size) + data[12:size]  # with a header that agrees
        with pytest.raises(ValueError, match="malformed launch plan"):
            decode(cut)


def test_trailing_bytes_are_an_error():
    data = encode(sample_plan()).tobytes()
    longer = data[:8] + struct.pack("<I", len(data) + 3) + data[12:] + b"abc"
    with pytest.raises(ValueError, match="3 bytes follow the last step"):
        decode(longer)


@pytest.mark.parametrize("version", [0, VERSION + 1, 0xFFFF])
def test_other_versions_are_an_error(version):
    data = bytearray(encode(sample_plan()).tobytes())
    data[4:6] = struct.pack("<H", version)
    with pytest.raises(ValueError, match=rf"version is {version}, need"):
        decode(bytes(data))


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_never_crash(data):
    with pytest.raises(ValueError, match="malformed launch plan"):
        decode(data)


@settings(max_examples=300)
@given(plans, st.data())
def test_damaged_plans_never_crash(plan, data):
    encoded = bytearray(encode(plan).tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(12, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    answer = decode_or_message(bytes(encoded))
    assert "malformed launch plan" in answer or set(answer) == set(expected(plan))


@settings(max_examples=300)
@given(st.binary(max_size=300), st.integers(0, 4))
def test_random_bodies_never_crash(body, prefix):
    """Past the header, and past as many valid records as wished."""
    head = [struct.pack("<H", 0), struct.pack("<H", 1) + bytes(32) + b"\x0390a\x01\x00k"]
    head += [struct.pack("<HQ", 1, 64), struct.pack("<H", 1)]
    body = b"".join(head[:prefix]) + body
    data = b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(body)) + body
    answer = decode_or_message(data)
    assert "malformed launch plan" in answer or answer["steps"]


@settings(max_examples=300)
@given(st.binary(max_size=8))
def test_labels_are_utf8(label):
    step = struct.pack("<HHHBBHQQB", 0, 0, 1, 2, 1, 0, 0, 1, 0)  # no kernels, no scratch, one memset
    data = struct.pack("<H", len(label)) + label + step
    answer = decode_or_message(b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(data)) + data)
    try:
        text = label.decode()
    except UnicodeDecodeError:
        assert "the label is not UTF-8" in answer
    else:
        assert answer["label"] == text


def test_plans_of_the_version_before_are_read():
    def in_version_1(plan):
        data = bytearray(encode(plan))
        data[4:6] = struct.pack("<H", 1)
        return bytes(data)

    assert decode(in_version_1(sample_plan()))["steps"] == expected(sample_plan())["steps"]
    with pytest.raises(ValueError, match="step tag is 3, need 1 to 2"):
        decode(in_version_1(LaunchPlan((Copy(Operand(0), Result(0), 16),))))


def test_a_huge_count_allocates_nothing():
    body = struct.pack("<HHHH", 0, 0, 0, 0xFFFF)
    with pytest.raises(ValueError, match="step count is 65535, need 1 to 256"):
        decode(b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(body)) + body)


# The rules of each record.

RULES = [
    (lambda: Operand(-1), r"Operand.index: got -1; need an integer from 0 to 63"),
    (lambda: Result(64), r"Result.index: got 64"),
    (lambda: Scratch(0, -16), r"Scratch.byte_offset: got -16"),
    (lambda: Operand(True), r"Operand.index: got True"),
    (lambda: Scalar(1, "int16"), r"Scalar.dtype: got 'int16'; need one of int32, uint32"),
    (lambda: Scalar(2**31, "int32"), r"Scalar.value: got 2147483648; .* for int32"),
    (lambda: Scalar(-1, "uint64"), r"Scalar.value: got -1"),
    (lambda: Scalar(1.0, "int32"), r"Scalar.value: got 1.0"),
    (lambda: Scalar("x", "float32"), r"Scalar.value: got 'x'; a float32 needs a number"),
    (lambda: Scalar(1e300, "float32"), r"does not fit in float32"),
    (lambda: matrix_map(Scalar(1, "int32")), r"TensorMap.buffer: .* need an Operand, Result or Scratch"),
    (lambda: matrix_map(dtype="float4_e2m1fn"), r"TensorMap of operand 0: dtype: got 'float4_e2m1fn'"),
    (lambda: matrix_map(swizzle=96), r"swizzle: got 96; need one of 0, 32, 64, 128"),
    (lambda: matrix_map(l2_promotion=32), r"l2_promotion: got 32"),
    (lambda: matrix_map(fill="ones"), r"fill: got 'ones'; need one of zeros, nan"),
    (lambda: matrix_map(dtype="uint16", fill="nan"), r"needs a floating type; uint16 moves as an integer"),
    (lambda: matrix_map(dims=(), strides=(), box=()), r"TMA has 1 to 5 dimensions"),
    (lambda: matrix_map(dims=(8,) * 6, strides=(16,) * 5, box=(8,) * 6), r"TMA has 1 to 5 dimensions"),
    (lambda: matrix_map(strides=(1024, 1024)), r"2 dims need 1 strides"),
    (lambda: matrix_map(box=(64,)), r"and 2 box sizes"),
    (lambda: matrix_map(dims=(512, 0)), r"dims\[1\]: got 0; need an integer from 1"),
    (lambda: matrix_map(dims=(512, 2**32 + 1)), r"dims\[1\]"),
    (lambda: matrix_map(strides=(1000,)), r"got 1000; TMA strides .* for instance to 1008 bytes"),
    (lambda: matrix_map(strides=(-16,)), r"strides\[0\]"),
    (lambda: matrix_map(box=(64, 257)), r"box\[1\]: got 257; need an integer from 1 to 256 \(split"),
    (lambda: matrix_map(box=(4, 128)), r"box\[0\]: got 4 x 2 bytes; need a multiple of 16 bytes"),
    (lambda: matrix_map(box=(128, 128)), r"got 128 x 2 = 256 bytes; swizzle 128 allows at most 128"),
    (lambda: matrix_map(Operand(0, 8)), r"operand 0 \+ 8 bytes: byte_offset: got 8"),
    (lambda: fake_launch(grid=(0, 1, 1)), r"Launch of fake_kernel: grid x: got 0; .* empty problem"),
    (lambda: fake_launch(grid=(1, 65536, 1)), r"grid y: got 65536"),
    (lambda: fake_launch(grid=(1, 1)), r"need three sizes"),
    (
        lambda: dataclasses.replace(fake_launch(), block=1025),
        r"block: got 1025; need an integer from 1 to 1024",
    ),
    (lambda: fake_launch(cluster=17), r"cluster: got 17"),
    (lambda: fake_launch(cluster=3), r"grid x: got 4; need a multiple of the cluster, 3"),
    (lambda: fake_launch(shared_memory=232_449), r"shared_memory: got 232449; .* use fewer stages"),
    (lambda: fake_launch(7), r"params\[0\]: got 7; need an Operand"),
    (lambda: fake_launch(*[Operand(0)] * 65), r"params: got 65, 0 of them tensor maps"),
    (lambda: fake_launch(*[matrix_map()] * 33), r"params: got 33, 33 of them tensor maps"),
    (lambda: fake_launch(kernel=FakeKernel("bad name")), r"CompiledKernel.name: got 'bad name'"),
    (
        lambda: fake_launch(kernel=FakeKernel(arch="sm_90a")),
        r"CompiledKernel.arch of fake_kernel: got 'sm_90a'",
    ),
    (lambda: Memset(Operand(0), 16), r"Memset.buffer: .* need a Result or Scratch"),
    (lambda: Memset(Result(0), 0), r"Memset.num_bytes: got 0"),
    (lambda: Memset(Result(0), 16, 256), r"Memset.value: got 256"),
    (lambda: Copy("a", Result(0), 16), r"Copy.source: .* need an Operand, Result or Scratch"),
    (lambda: Copy(Operand(0), Operand(1), 16), r"Copy.target: .* need a Result or Scratch"),
    (lambda: Copy(Operand(0), Result(0), 0), r"Copy.num_bytes: got 0"),
    (lambda: LaunchPlan(()), r"LaunchPlan.steps: got 0 steps; need 1 to 256"),
    (lambda: LaunchPlan((Operand(0),)), r"LaunchPlan.steps\[0\].*need a Launch, a Memset or a Copy"),
    (lambda: LaunchPlan((fake_launch(),), (0,)), r"scratch_bytes\[0\]: got 0"),
    (lambda: LaunchPlan((fake_launch(),), (1,) * 17), r"scratch_bytes: got 17 buffers"),
    (lambda: LaunchPlan((fake_launch(),), label="x" * 1025), r"label: got 1025 bytes"),
    (lambda: LaunchPlan((fake_launch(Scratch(0)),)), r"parameter 0: got scratch 0; there are 0 scratch"),
    (lambda: LaunchPlan((Memset(Scratch(0), 65),), (64,)), r"memset\): .* 65 bytes are needed, it has 64"),
]


@pytest.mark.parametrize(("build", "message"), RULES, ids=[message[:40] for _, message in RULES])
def test_rules_say_what_was_given(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_digest_is_sha256():
    bad = dataclasses.make_dataclass("Bad", [("name", str), ("digest", str), ("arch", str)])(
        "k", "ABC", "90a"
    )
    with pytest.raises(ValueError, match="need 64 lower-case hex digits"):
        Launch(bad, (1, 1, 1), 32, ())


def test_extent_counts_the_last_row_only_to_its_end():
    assert matrix_map().extent_bytes == 100 * 1024
    assert matrix_map(dims=(500, 100)).extent_bytes == 99 * 1024 + 1000
    assert TensorMap(Operand(0), "float32", (5,), (), (4,)).extent_bytes == 20


def _types(*shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def test_check_compares_the_plan_with_the_types():
    plan = LaunchPlan((fake_launch(matrix_map(), Result(0)), Memset(Result(0), 256)), label="toy")
    a, d = ((100, 512), jnp.bfloat16), ((64,), jnp.float32)
    launch.check(plan, _types(a), _types(d))
    with pytest.raises(
        ValueError, match=r"toy: step 0 \(fake_kernel\), parameter 0: .* 102400 bytes are needed"
    ):
        launch.check(plan, _types(((99, 512), jnp.bfloat16)), _types(d))
    with pytest.raises(ValueError, match=r"toy: step 1 \(memset\): got result 0; 256 bytes are needed"):
        launch.check(plan, _types(a), _types(((63,), jnp.float32)))
    with pytest.raises(ValueError, match="got operand 0; there are 0 operand buffers"):
        launch.check(plan, [], _types(d))


def test_packed_types_count_half():
    plan = LaunchPlan((Memset(Result(0), 33),))
    launch.check(plan, [], _types(((66,), jnp.int4)))
    with pytest.raises(ValueError, match="33 bytes are needed, it has 32"):
        launch.check(plan, [], _types(((64,), jnp.int4)))


def test_attributes_carry_the_kernels_only_when_embedded():
    plan = sample_plan()
    plain = launch.attributes(plan)
    assert set(plain) == {"plan", "kernels", "label"}
    digest = FakeKernel().digest
    assert plain["kernels"].startswith(f"fake_kernel@{digest[:16]} other_kernel@")
    with launch.embed_kernels():
        embedded = launch.attributes(plan)
    assert embedded["cubin0"].tobytes() == b"not a cubin"
    assert embedded["cubin1"].tobytes() == b"other"
