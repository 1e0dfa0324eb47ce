"""How GPU tests share a machine: parts for several processes, kernels compiled before the tests.

    pytest -m gpu tests/gpu                              all, in one process
    pytest -m "gpu and smoke" tests/gpu                  some of every family, about a minute
    pytest -m "gpu and not alone" tests/gpu --shard 1/8  one of eight parts; run all of them side by side
    pytest -m "gpu and alone" tests/gpu                  what wants the GPU for itself, after them

`benchmarks/h200.sh test` does the last two, and compiles the kernels before (kernels.py).
"""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from tests.gpu.kernels import compile_all, sources
from tests.shared import shards

FEW = 20
"""So many tests of a file compile their own kernels; more have those of the whole file compiled ahead."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=_part, metavar="I/N", help="the I-th of N parts of the tests, from 1/N")


@pytest.hookimpl(trylast=True)  # what -m and -k leave is dealt out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--shard", None)
    if part is None:
        return
    index, count = part
    mine = set(shards.deal([item.nodeid for item in items], shards.recorded(), count)[index - 1])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
    items[:] = [item for item in items if item.nodeid in mine]


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ArgumentTypeError(f"got {text!r}, need I/N with I from 1 to N, such as 2/8")
    return int(index), int(count)


@pytest.fixture(scope="module", autouse=True)
def _kernels_of_the_file(request: pytest.FixtureRequest) -> None:
    here = [item for item in request.session.items if item.path == request.path]
    if (
        request.config.getoption("--shard", None) is None and len(here) > FEW
    ):  # else they are compiled already
        compile_all(sources([request.module]))
