"""The graph of imports: which room (module or package) uses which, and whether that runs one way.

    python tests/shared/import_graph.py        prints rooms by floor, circles, and arrows that run up

Imports are read from the text, wherever they stand in a file: one inside a function counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "jax_deepgemm"
ROOT = Path(__file__).parents[2] / PACKAGE

FLOORS = (
    ("_version", "log", "_ffi"),
    ("jit",),
    ("config",),
    ("core",),
    ("ops",),
    ("quantization", "activation", "gemm", "grouped", "indexer", "hyperconnection", "attention"),
    ("moe", "checkpoint"),
    ("flax", "inference"),
    ("tools",),
    ("deep_gemm",),
    ("",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up; a room uses those on lower floors, and itself. "" is the package as users see it:
its public names, which the command line uses as they do. "ops" stands for all families, each a room, which
may use each other in one direction (`circles` of rooms)."""


def modules() -> dict[str, Path]:
    """Full names without the package's, "" for the package itself -> files."""
    found = {"_ffi": ROOT.parent / "ffi" / "module.cc"}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    python = {name: path for name, path in known.items() if path.suffix == ".py"}
    return {"_ffi": set()} | {
        name: set(_imported(name, path, known)) - {name} for name, path in python.items()
    }


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = (
                ".".join([PACKAGE, *filter(None, above), *filter(None, [node.module])]) if node.level else ""
            )
            base = base or str(node.module)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            head, _, rest = target.partition(".")
            if head != PACKAGE:
                continue
            while rest and rest not in known:
                rest = rest.rpartition(".")[0]
            yield rest


def room_of(module: str) -> str:
    """The room of a module: a folder, of a family its own, or a module at the top."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "ops" else parts[:1])


def arrows(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """(room, room that it uses) -> the imports."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, used in graph.items():
        for one in used:
            if room_of(module) != room_of(one):
                found.setdefault((room_of(module), room_of(one)), []).append(f"{module} -> {one}")
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room on the same floor or a higher one."""
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}

    def runs_up(room: str, used: str) -> bool:
        room, used = (one.partition(".")[0] for one in (room, used))
        return floor[room] <= floor[used] and not room == used == "ops"

    return sorted(each for pair, lines in arrows(graph).items() if runs_up(*pair) for each in lines)


def rooms_used(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> rooms that it uses, for `circles`."""
    found: dict[str, set[str]] = {room_of(module): set() for module in graph}
    for room, used in arrows(graph):
        found[room].add(used)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others. A package whose `__init__` only
    gathers the names of its modules is no part of one."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for one in graph[module]:
            if one not in index:
                visit(one)
                low[module] = min(low[module], low[one])
            elif one in stack:
                low[module] = min(low[module], index[one])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def main() -> int:
    graph = imports(modules())
    between = arrows(graph)
    for rooms in reversed(FLOORS):
        named = sorted(one for one in rooms_used(graph) if one.partition(".")[0] in rooms)
        for room in named:
            uses = sorted(used or PACKAGE for one, used in between if one == room)
            print(f"{room or PACKAGE:<16} uses {', '.join(uses) or 'nothing'}")
    up, round_ = upward(graph), circles(graph) + circles(rooms_used(graph))
    print(f"\n{len(graph)} modules, {len(rooms_used(graph))} rooms, {len(between)} arrows between rooms")
    print(f"{len(round_)} circles", *(" <-> ".join(group) for group in round_), sep="\n  ")
    print(f"{len(up)} imports that run up", *up, sep="\n  ")
    return bool(up or round_)


if __name__ == "__main__":
    sys.exit(main())
