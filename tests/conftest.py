"""Where tests run: 8 host CPU devices by default; `pytest -m gpu` runs tests/gpu on a CUDA device."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import pytest

from tests.shared.heartbeat import Heartbeat

TESTS = Path(__file__).parent
GPU_TESTS = TESTS / "gpu"
LONG = (
    "public/test_readme.py",
    "moe/test_moe_tensor.py",
    "public/test_every_call.py",
    "public/test_train_example.py",
    "moe/test_moe_shared.py",
    "grouped/test_grouped_epilogue.py",
    "grouped/test_grouped_transforms.py",
    "moe/test_moe_meshes.py",
    "moe/test_moe_forms.py",
    "grouped/test_gated.py",
    "moe/test_moe_parallel.py",
)
"""Files that take more than a minute, the longest first: run before all others, as none may be the last."""
CPU_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
"""LLVM does not optimise: most of the tests' time is XLA compiling programs that run once."""

FEWEST_CASES = 3
"""What `--few` leaves at least of the cases of a parametrised test."""

hypothesis.settings.register_profile("ci", max_examples=25, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", action="store_true", help="of each parametrised test a quarter of its cases")


def _asks_for_gpu(config: pytest.Config) -> bool:
    expression = config.option.markexpr or ""
    return "gpu" in expression and "not gpu" not in expression


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("JAX_DEEPGEMM_TUNING_FILE", "off")  # a developer's own would change what is chosen
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, and only when asked for by -m gpu")
    config.addinivalue_line("markers", "smoke: of the few GPU tests that show what is broken within a minute")
    config.addinivalue_line("markers", "alone: a GPU test that measures time or needs most of the memory")
    if not hasattr(config, "workerinput"):  # the process that reports
        config.pluginmanager.register(Heartbeat())
    if _asks_for_gpu(config):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [flag for flag in CPU_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *wanted]).strip()


def pytest_collection_finish() -> None:
    """Garbage is looked for after 50000 new objects, not 700, and not among what was imported: a tenth of the
    tests' time went there, as tracing a program makes very many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    rank = dict.fromkeys(slow, -1) | {TESTS / name: i - len(LONG) - 1 for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, 0))
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if config.option.few:
        left = few(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = [item for item in items if item in left]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    if not _asks_for_gpu(config):
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
        return
    reason = _why_no_gpu()
    if reason:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def few(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """A quarter of the cases of each parametrised test, three at least, from the first to the last at equal
    distances; all of tests marked `each_version` or `skipif`."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for cases in tests.values():
        whole = any(case.get_closest_marker(name) for case in cases for name in ("each_version", "skipif"))
        count = len(cases) if whole else min(len(cases), max(FEWEST_CASES, -(-len(cases) // 4)))
        left |= {cases[i * (len(cases) - 1) // max(count - 1, 1)] for i in range(count)}
    return left


def _why_no_gpu() -> str:
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    return ""
