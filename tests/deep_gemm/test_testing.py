"""DeepGEMM's `testing` and `utils.dist`."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm import deep_gemm
from jax_deepgemm.deep_gemm import testing
from jax_deepgemm.tools.bench.trace import Event

pytestmark = pytest.mark.any_version


def test_whole_numbers() -> None:
    assert [deep_gemm.ceil_div(x, 8) for x in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert [deep_gemm.align(x, 8) for x in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_difference() -> None:
    x, y = np.array([3.0, 4.0]), np.array([3.0, 5.0])
    assert testing.calc_diff(x, y) == pytest.approx(1 - 2 * 29 / (25 + 34))
    assert np.isnan(testing.calc_diff(x, np.array([3.0, np.nan])))
    assert testing.calc_diff(jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(3)) == 0
    with pytest.raises(ValueError, match=r"x is \[2\] and y is \[3\], need one shape"):
        testing.calc_diff(x, np.ones(3))


def test_bits_are_compared() -> None:
    nan = np.array([[1, np.nan], [0, 3]], np.float32)
    testing.assert_bitwise_equal(nan, jnp.asarray(nan))
    testing.assert_bitwise_equal(np.float32(2), np.float32(2))
    with pytest.raises(
        AssertionError, match=r"zeros: 1 of 4 elements differ, the first at \[1, 0\]: 0.0 and -0.0"
    ):
        testing.assert_bitwise_equal(nan, np.array([[1, np.nan], [-0.0, 3]], np.float32), "zeros")
    with pytest.raises(AssertionError, match=r"^float32 \[2, 2\] and float64 \[2, 2\] differ in kind"):
        testing.assert_bitwise_equal(nan, nan.astype(np.float64))


def test_bytes() -> None:
    assert testing.count_bytes((jnp.ones(3, jnp.float8_e4m3fn), [jnp.ones((2, 2))], None), np.ones(1)) == 27


def test_bench_calls_and_waits() -> None:
    calls = []
    assert testing.bench(lambda: calls.append(1), num_warmups=2, num_tests=3) >= 0
    assert len(calls) == 5


EVENTS = [Event("jdg_gemm_a", 0, 1000), Event("jdg_gemm_b", 0, 3000), Event("flush", 0, 9000)]


def test_kernels_are_found_by_parts_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    barriers: list[int] = []
    monkeypatch.setattr(testing.trace, "read", lambda folder: EVENTS)
    time = testing.bench_kineto(lambda: jnp.ones(1), "gemm", 3, barrier=lambda: barriers.append(1))
    assert time == pytest.approx(2e-6)
    assert len(barriers) == 3
    assert testing.bench_kineto(lambda: None, ("gemm_a", "gemm_b"), 1) == pytest.approx((1e-6, 3e-6))
    with pytest.raises(RuntimeError, match=r"no kernel has 'topk' in its name; the trace has \['flush'"):
        testing.bench_kineto(lambda: None, "topk", 1)


def test_other_profilers_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DEEPGEMM_NVIDIA_TOOLS", "1")
    monkeypatch.setattr(testing, "_traced", None)
    calls: list[int] = []
    assert testing.bench_kineto(lambda: calls.append(1), "gemm") == 1.0
    assert testing.bench_kineto(lambda: calls.append(1), ("a", "b")) == (1.0, 1.0)
    assert len(calls) == 2


def test_capability_without_a_gpu_is_hoppers() -> None:
    assert testing.get_arch_major() == 9


def test_filter_and_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = testing.test_filter(lambda: True)(lambda: "ran")
    assert ran() == "ran"
    assert testing.test_filter(lambda: False)(ran)() is None
    assert "is left out" in capsys.readouterr().out
    monkeypatch.setenv("SOME_NAME", "1")
    for condition, seen in ((True, None), (False, "1")):
        with testing.ignore_env("SOME_NAME", lambda: condition):  # noqa: B023
            assert os.environ.get("SOME_NAME") == seen
        assert os.environ["SOME_NAME"] == "1"


def test_processes_join_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append((a, k)))
    for name, value in {"MASTER_ADDR": "host", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    rank, count, mesh = deep_gemm.init_dist(3, 8)
    assert (rank, count, mesh.axis_names) == (11, 16, ("ranks",))
    assert joined == [(("host:8361", 16, 11), {"local_device_ids": [3]})]


def test_arrays_of_other_sizes_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, of which this one has [2, 3] and the other [2, 1]."""
    other = np.full((1, 2), 7)
    sizes = {(): lambda x: np.array([int(x), 1])}

    def gather(x: np.ndarray) -> np.ndarray:
        if x.shape in sizes:
            return sizes[x.shape](x)
        padded = np.zeros_like(x)
        padded[:1] = other
        return np.stack([x, padded])

    monkeypatch.setattr(deep_gemm.utils.dist.multihost_utils, "process_allgather", gather)
    own = np.arange(6).reshape(2, 3)
    got = deep_gemm.uneven_all_gather(own, dim=1)
    np.testing.assert_array_equal(got, np.concatenate([own, other.T], 1))


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    deep_gemm.dist_print("all")
    deep_gemm.dist_print("one", once_in_node=True)
    assert capsys.readouterr().out == "all\none\n"
