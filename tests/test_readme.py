"""What the documents say runs, and what they claim is in a committed result file."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from jax_deepgemm import config
from jax_deepgemm.bench import report
from jax_deepgemm.jit import toolchain

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(document.read_text()):
        if "flax" in block and importlib.util.find_spec("flax") is None:
            pytest.skip("flax is not installed; the blocks before it ran")
        exec(compile(block, str(document), "exec"), names)


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
