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
from jax_deepgemm.core.parameters import FILLS, L2_PROMOTIONS, SCALAR_TYPES, SWIZZLES, TENSOR_TYPES, Peer
from jax_deepgemm.core.plan import VERSION, _encode_step
from tests.shared.launch_plans import (
    OLD_PLANS,
    FakeKernel,
    fake_launch,
    matrix_map,
    newest_plan,
    old_bytes,
    plans,
    sample_plan,
)


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
        pattern = struct.pack("<B", step.value) if isinstance(step.value, int) else step.value.data
        return {
            "buffer": expected_buffer(step.buffer),
            "num_bytes": step.num_bytes,
            "pattern": int.from_bytes(pattern, "little"),
            "pattern_bytes": len(pattern),
        }
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
        "cooperative": step.cooperative,
        "blocks_per_sm": step.blocks_per_sm,
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


SAMPLES = pytest.mark.parametrize("plan", [sample_plan(), newest_plan()], ids=lambda plan: plan.label)


@SAMPLES
def test_sample_plans_survive_the_round_trip(plan):
    assert decode(encode(plan)) == expected(plan)


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


@SAMPLES
def test_every_truncation_is_an_error(plan):
    data = encode(plan).tobytes()
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


# Older versions.

OLD = pytest.mark.parametrize(
    ("name", "version"),
    [(name, version) for name in OLD_PLANS for version in (1, 2) if name != "copy" or version > 1],
)


@OLD
def test_plans_of_older_versions_are_read(name, version):
    assert decode(old_bytes(name, version)) == expected(OLD_PLANS[name]()) | {"version": version}


def test_version_1_has_no_copies():
    with pytest.raises(ValueError, match="step tag is 3, need 1 to 2"):
        decode(old_bytes("copy", 1))


def in_version_2(plan):
    """The bytes without what version 3 has added: 0 blocks per SM at the end of every launch."""
    indices = {(kernel.digest, kernel.name): i for i, kernel in enumerate(plan.kernels)}
    data = encode(plan).tobytes()
    at = len(data) - sum(len(_encode_step(step, indices)) for step in plan.steps)
    parts = [data[:at]]
    for step in plan.steps:
        record = _encode_step(step, indices)
        assert data[at:].startswith(record)
        at += len(record)
        new = 2 if isinstance(step, Launch) else 0
        assert record.endswith(bytes(new))
        parts.append(record[: len(record) - new])
    body = b"".join(parts)[12:]
    return b"JDGP" + struct.pack("<HHI", 2, 0, 12 + len(body)) + body


@pytest.mark.parametrize("name", OLD_PLANS)
def test_old_plans_have_the_same_bytes_but_for_new_fields(name):
    assert in_version_2(OLD_PLANS[name]()) == old_bytes(name)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LaunchPlan((Memset(Result(0), 4, Scalar(1, "int32")),)), "step tag is 4, need 1 to 3"),
        (LaunchPlan((fake_launch(cooperative=True),)), "launch flags is 2, need 0 to 1"),
        (LaunchPlan((fake_launch(matrix_map(dtype="tfloat32", box=(32, 8))),)), "unknown tensor map type 11"),
    ],
    ids=["memset of 32 bits", "cooperative", "tf32"],
)
def test_version_2_has_nothing_of_version_3(plan, message):
    with pytest.raises(ValueError, match=message):
        decode(in_version_2(plan))


@settings(max_examples=300)
@given(st.sampled_from(sorted(OLD_PLANS)), st.integers(1, 3), st.data())
def test_damaged_old_plans_never_crash(name, version, data):
    encoded = bytearray(old_bytes(name, version))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(12, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    answer = decode_or_message(bytes(encoded))
    assert "malformed launch plan" in answer or answer["version"] == version


# Records that Python refuses to write.


def step_bytes(tag, body):
    """A plan of one step, without kernels, with a scratch buffer of 64 bytes."""
    data = struct.pack("<HHHQHB", 0, 0, 1, 64, 1, tag) + body
    return b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(data)) + data


def memset_bytes(kind=1, index=0, offset=0, size=64):
    return step_bytes(4, struct.pack("<BHQQI", kind, index, offset, size, 0xFF800000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (memset_bytes(kind=0), "memset of an operand"),
        (memset_bytes(kind=3), "buffer kind 3, memory of another GPU, is reserved"),
        (memset_bytes(kind=4), "buffer kind is 4, need 0 to 3"),
        (memset_bytes(offset=2), "memset of 64 bytes, 2 bytes in, with a pattern of 4"),
        (memset_bytes(size=66), "memset of 66 bytes, 0 bytes in, with a pattern of 4"),
        (memset_bytes(kind=2, index=1), "scratch 1 of 1"),
        (memset_bytes(size=0), "memset size is 0"),
        (step_bytes(5, bytes(64)), "step tag is 5, need 1 to 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_steps_that_break_a_rule_are_errors(data, message):
    with pytest.raises(ValueError, match=f"malformed launch plan .*{message}"):
        decode(data)
    assert decode(memset_bytes())["steps"][0]["pattern"] == 0xFF800000


def launch_bytes(params=b"", count=0, flags=0, blocks_per_sm=0):
    kernels = struct.pack("<HH", 0, 1) + bytes(32) + b"\x0390a\x01\x00k" + struct.pack("<H", 0)
    step = struct.pack("<HBH6IBH", 1, 1, 0, 4, 1, 1, 128, 1, 0, flags, count) + params
    data = kernels + step + struct.pack("<H", blocks_per_sm)
    return b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(data)) + data


def map_bytes(type_, *, offset=0, dims=(256, 8), stride=128, box=(128, 8), swizzle=0, fill=0):
    """A launch with a tensor map."""
    head = struct.pack("<BBHQ5B", 3, 0, 0, offset, type_, 2, swizzle, 0, fill)
    return launch_bytes(head + struct.pack("<3Q2I", *dims, stride, *box), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (launch_bytes(flags=4), "launch flags is 4, need 0 to 3"),
        (launch_bytes(blocks_per_sm=1025), "blocks per SM is 1025, need 0 to 1024"),
        (map_bytes(15), "unknown tensor map type 15"),
        (map_bytes(13, dims=(255, 8)), "tensor map dim 255 is not a multiple of 2"),
        (map_bytes(13, box=(16, 8)), "tensor map box row of 8 bytes is not a multiple of 16"),
        (map_bytes(13, box=(256, 8), swizzle=2), "box row is wider than its swizzle"),
        (map_bytes(13, fill=1), "NaN fill of an integer tensor map"),
        (map_bytes(14, dims=(192, 8)), "tensor map dim 192 is not a multiple of 128"),
        (map_bytes(14, stride=144), "tensor map stride 144 is not a multiple of 32"),
        (map_bytes(14, offset=16), "tensor map offset 16 is not a multiple of 32"),
        (map_bytes(14, box=(64, 8)), "needs a box row of 128"),
        (map_bytes(14, swizzle=2), "swizzle 0 or 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_launches_that_break_a_rule_are_errors(data, message):
    with pytest.raises(ValueError, match=f"malformed launch plan .*{message}"):
        decode(data)


@pytest.mark.parametrize("type_", range(15))
def test_all_element_types_are_read(type_):
    (param,) = decode(map_bytes(type_))["steps"][0]["params"]
    assert (param["type"], param["dims"]) == (type_, (256, 8))


def test_a_huge_count_allocates_nothing():
    body = struct.pack("<HHHH", 0, 0, 0, 0xFFFF)
    with pytest.raises(ValueError, match="step count is 65535, need 1 to 256"):
        decode(b"JDGP" + struct.pack("<HHI", VERSION, 0, 12 + len(body)) + body)


# The rules of each record.


def four_bits(layout="", buffer=None, **changes):
    fields = {"dims": (512, 8), "strides": (256,), "box": (128, 8)} | changes
    return TensorMap(buffer or Operand(0), f"uint4{layout}", **fields)


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
    (lambda: Peer(0, 16), r"Peer.index: got 0; memory of another GPU is reserved .* by a collective"),
    (lambda: matrix_map(dtype="float6_e2m3fn"), r"TensorMap of operand 0: dtype: got 'float6_e2m3fn'"),
    (lambda: four_bits(dims=(511, 8)), r"dims\[0\]: got 511; need a multiple of 2 elements of uint4"),
    (lambda: four_bits(box=(16, 8)), r"box\[0\]: got 16 x 4 bits; need a multiple of 16 bytes"),
    (lambda: four_bits(box=(256, 8), swizzle=64), r"got 256 x 4 bits = 128 bytes; swizzle 64 allows"),
    (lambda: four_bits(fill="nan"), r"fill: got 'nan'; needs a floating type; uint4 moves"),
    (lambda: four_bits("_spaced", dims=(576, 8)), r"got 576; need a multiple of 128 elements"),
    (lambda: four_bits("_spaced", strides=(272,)), r"got 272; TMA strides .* of 32.* to 288 bytes"),
    (lambda: four_bits("_spaced", buffer=Operand(0, 16)), r"byte_offset: got 16; .* multiples of 32"),
    (lambda: four_bits("_spaced", box=(64, 8)), r"got 64 and 0; uint4_spaced needs a row of 128"),
    (lambda: four_bits("_spaced", swizzle=64), r"got 128 and 64; .* swizzle 0 or 128"),
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
    (lambda: matrix_map(box=(128, 128)), r"got 128 x 2 bytes = 256 bytes; swizzle 128 allows at most 128"),
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
    (lambda: fake_launch(shared_memory=232_449), r"shared_memory: got 232449; .* sm_90a; use fewer stages"),
    (
        lambda: fake_launch(kernel=FakeKernel(arch="89"), shared_memory=101_377),
        r"got 101377; need an integer from 0 to 101376 on sm_89",
    ),
    (lambda: fake_launch(blocks_per_sm=1025), r"blocks_per_sm: got 1025; need an integer from 0 to 1024"),
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
    (lambda: Memset(Result(0), 16, -1.0), r"Memset.value: got -1.0; .* or a Scalar"),
    (lambda: Memset(Result(0), 16, Scalar(1, "int64")), r"need a byte, or a Scalar of 4 bytes"),
    (lambda: Memset(Result(0), 15, Scalar(1, "int32")), r"Memset of result 0: got 15 bytes; a pattern of 4"),
    (lambda: Memset(Result(0, 2), 16, Scalar(1, "int32")), r"Memset of result 0 \+ 2 bytes: got 16 bytes"),
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


@pytest.mark.parametrize(
    ("arch", "limit"), [("80", 166_912), ("86", 101_376), ("90", 232_448), ("103a", 232_448)]
)
def test_shared_memory_is_limited_by_the_kernels_arch(arch, limit):
    assert fake_launch(kernel=FakeKernel(arch=arch), shared_memory=limit).shared_memory == limit
    with pytest.raises(ValueError, match=f"from 0 to {limit} on sm_{arch}"):
        fake_launch(kernel=FakeKernel(arch=arch), shared_memory=limit + 1)


def test_extent_counts_the_last_row_only_to_its_end():
    assert matrix_map().extent_bytes == 100 * 1024
    assert matrix_map(dims=(500, 100)).extent_bytes == 99 * 1024 + 1000
    assert TensorMap(Operand(0), "float32", (5,), (), (4,)).extent_bytes == 20
    assert four_bits(dims=(6, 8), strides=(16,)).extent_bytes == 7 * 16 + 3


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
