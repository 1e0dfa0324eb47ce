"""What the documents say runs, and what they claim is in a committed result file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm import config
from jax_deepgemm.bench import report
from jax_deepgemm.jit import toolchain

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONAL = ("flax", "haiku", "equinox", "optax", "orbax", "qwix", "cuda.core")


def python_blocks(document: Path) -> Iterator[Any]:
    """The ```python blocks of a document, each with the number of its first line."""
    text = document.read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1)) + 1
        yield pytest.param(document, line, block[1], id=f"{document.name}:{line}")


BLOCKS = [block for document in DOCUMENTS for block in python_blocks(document)]


@pytest.mark.parametrize(("document", "line", "code"), BLOCKS)
def test_python_block_runs_alone(document: Path, line: int, code: str) -> None:
    for module in OPTIONAL:
        if re.search(rf"\b(import|from) {module}\b", code):
            pytest.importorskip(module)
    lines = "\n" * (line - 1)  # so that a traceback names the line of the document
    exec(compile(lines + code, str(document), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_generated_sections_are_up_to_date() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path, content in report.documents(results).items():
        assert path.read_text() == content, f"{path.name} is out of date: run {report.COMMAND}"


def test_every_setting_and_variable_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name in config.Config.__dataclass_fields__:
        assert f"| `{name}` |" in page
    for name in re.findall(r"JAX_DEEPGEMM_[A-Z_]+", toolchain.__doc__ or ""):
        assert f"| `{name}` |" in page
    for name in re.findall(r"JAX_DEEPGEMM_[A-Z_]+", page):
        assert name in (toolchain.__doc__ or "")


def test_every_public_function_is_in_the_readme() -> None:
    import jax_deepgemm

    text = (ROOT / "README.md").read_text()
    for name in jax_deepgemm.__all__:
        if not name.startswith("_"):
            family = name.rsplit("_", 1)
            assert name in text or (family[0] in text and f"`_{family[1]}`" in text), name
