"""The structure of the package: imports run one way, and general modules know no family."""

from __future__ import annotations

import pytest

from jax_deepgemm.tools import registry
from tests.shared import import_graph

pytestmark = pytest.mark.any_version

GRAPH = import_graph.imports(import_graph.modules())
FAMILIES = tuple(folder.removeprefix("jax_deepgemm.") for folder in registry.FOLDERS)
GENERAL = ("_version", "log", "config", "jit", "core", "tools", "cli")
"""Rooms that name no family."""
DEMO = "cli.demo"  # a program such as users write


def test_no_import_runs_up() -> None:
    assert import_graph.upward(GRAPH) == []


def test_there_is_no_circle() -> None:
    assert import_graph.circles(GRAPH) == []
    assert import_graph.circles(import_graph.rooms_used(GRAPH)) == []


@pytest.mark.parametrize("room", GENERAL)
def test_general_modules_import_no_family(room: str) -> None:
    found = [
        f"{module} -> {used}"
        for module, imported in GRAPH.items()
        if import_graph.room_of(module) == room and module != DEMO
        for used in imported
        if import_graph.room_of(used) in (*FAMILIES, "flax", "moe")
    ]
    assert found == []


def test_the_graph_sees_imports_wherever_they_stand() -> None:
    assert "ops.gemm.sm90.config" in GRAPH["ops.gemm.sm90.kernels"]
    assert "ops.quantize.api" in GRAPH["ops.gemm.shapes"]  # inside a function
    assert import_graph.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert import_graph.upward({"jit.x": {"core.y"}, "core.y": set()}) == ["jit.x -> core.y"]
    families = {"ops.a.x": {"ops.b.y"}, "ops.b.y": set(), "ops.b.z": {"ops.a.x"}}
    assert import_graph.upward(families) == import_graph.circles(families) == []
    assert import_graph.circles(import_graph.rooms_used(families)) == [["ops.a", "ops.b"]]
