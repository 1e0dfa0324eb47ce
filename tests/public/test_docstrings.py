"""What `help()` says of everything public: parameters with shapes, results, errors, an example, sources."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
import types
from typing import Any

import pytest

ROOMS = (
    "", ".gemm", ".grouped", ".quantization", ".activation", ".indexer", ".attention", ".hyperconnection",
    ".inference", ".moe", ".flax", ".checkpoint", ".config", ".deep_gemm", ".deep_gemm.testing",
    ".deep_gemm.legacy",
)  # fmt: skip
FREE = {"fields", "changes", "options"}
"""What keyword arguments of any name are called."""
HEADINGS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns")
ARRAYS = re.compile(r"\bArray(Like)?\b|\bQuantized|\bWeight\b")
SHAPE = re.compile(r"\[|\bas in\b|\bas the\b|scalar|\bnumber\b|QuantizedArray")
DEEPGEMM = re.compile(r"_gemm_|_cast_to_fp8$|ue8m0|_tma_aligned|_for_contiguous_layout$|^transform_sf_")
"""Functions whose names, and what they compute, are DeepGEMM's."""


def public() -> dict[str, Any]:
    """Everything that a room lists in `__all__` and that can be called, each object once."""
    found: dict[int, tuple[str, Any]] = {}
    for room in ROOMS:
        if room == ".flax":
            pytest.importorskip("flax.nnx")
        module = importlib.import_module(f"jax_deepgemm{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


PUBLIC = public()


def sections(doc: str) -> dict[str, str]:
    """The sections of a docstring by their headings, without indentation."""
    bodies = re.findall(rf"^({'|'.join(HEADINGS)}):\n((?:(?: .*)?\n)+)", doc + "\n", re.MULTILINE)
    return {heading: textwrap.dedent(body) for heading, body in bodies}


def entries(section: str) -> dict[str, str]:
    """What a section says of each name in it."""
    found = {}
    for entry in re.split(r"\n(?=\S)", section.strip()):
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(re.findall(r"\w+", names), text)
    return found


def parameters(value: Any) -> dict[str, inspect.Parameter]:
    """What a caller passes; nothing of a class that inherits how it is made."""
    if inspect.isclass(value):
        made_by = vars(value).get("__init__", value if hasattr(value, "_fields") else None)
        if made_by is None:
            return {}
        value = made_by
    taken = inspect.signature(value).parameters
    return {name: one for name, one in taken.items() if name != "self" and one.kind != one.VAR_KEYWORD}


def test_all_rooms_are_looked_at() -> None:
    assert len(PUBLIC) > 80
    assert {name.rpartition(".")[0].removeprefix("jax_deepgemm") for name in PUBLIC} == set(ROOMS) - {".gemm"}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_says_what_a_caller_must_know(name: str) -> None:
    value = PUBLIC[name]
    doc = inspect.getdoc(value) or ""
    said = sections(doc)
    documented = entries(said.get("Args", "")) | entries(said.get("Attributes", ""))
    taken = parameters(value)
    assert not set(taken) - set(documented), "parameters that no entry names"
    assert set(entries(said.get("Args", ""))) <= set(taken) | FREE, "entries of no parameter"
    for parameter in taken.values():
        if ARRAYS.search(str(parameter.annotation)):
            assert SHAPE.search(documented[parameter.name]), f"{parameter.name} has no shape"
    if not inspect.isclass(value) and inspect.signature(value).return_annotation != "None":
        assert {"Returns", "Yields"} & set(said), "no word of the result"
    assert "Raises" in said or "Raises nothing" in doc, "no word of errors"
    assert ">>>" in doc, "no example"
    if DEEPGEMM.search(name.rsplit(".", 1)[1]):
        assert "Source:" in doc, "no word of where this comes from"


CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


@pytest.mark.parametrize("name", CLASSES)
def test_methods_say_what_they_do(name: str) -> None:
    for method, value in vars(CLASSES[name]).items():
        if not method.startswith("_") and isinstance(value, property | classmethod | types.FunctionType):
            assert inspect.getdoc(value), method


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        (
            "Adds.\n\nArgs:\n  a: [m].\n  b, c: [n],\n    or None.\n\nReturns:\n  [m].",
            {"Args": {"a", "b", "c"}},
        ),
        ("Adds.\n\nArgs:\n  first, second,\n    third: as in `add`.", {"Args": {"first", "second", "third"}}),
        ("Adds a and b: nothing else.", {}),
    ],
)
def test_sections_are_read(doc: str, expected: dict[str, set[str]]) -> None:
    said = sections(doc)
    assert {heading: set(entries(said[heading])) for heading in expected} == expected
    assert bool(expected) == bool(said)
