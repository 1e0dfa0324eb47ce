"""What the documents say runs, and what they claim is in a committed result file."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm import config
from jax_deepgemm.jit import toolchain
from jax_deepgemm.tools.bench import report
from tests.shared.heartbeat import Heartbeat

ROOT = Path(__file__).parents[2]
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


@pytest.mark.any_version
@pytest.mark.parametrize(("document", "line", "code"), BLOCKS)
def test_python_block_runs_alone(document: Path, line: int, code: str) -> None:
    for module in OPTIONAL:
        if re.search(rf"\b(import|from) {module}\b", code):
            pytest.importorskip(module)
    lines = "\n" * (line - 1)  # so that a traceback names the line of the document
    exec(compile(lines + code, str(document), "exec"), {"__name__": "__main__"})


def anchors(document: Path) -> set[str]:
    """What `#..` may name in a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        if not name.startswith("http"):
            target = document.parent / name if name else document
            assert target.exists(), name
            assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in text, page.name


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_generated_sections_are_up_to_date() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path, content in report.documents(results).items():
        assert path.read_text() == content, f"{path.name} is out of date: run {report.COMMAND}"


def test_table_of_fp8_errors_is_of_the_committed_measurement() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "fp8_error.py"))
    content = json.loads(script["DATA"].read_text())
    page = script["PAGE"].read_text()
    assert script["with_table"](page, content) == page
    errors = {(row["what"], row["recipe"]): row["errors"] for row in content["rows"]}
    assert all(0.05 < errors["MoE, 1 layer", "fp8"][part] < 0.07 for part in ("drouter", "dw13", "dw2"))
    assert all(0.07 < errors["MoE, 3 layers", "fp8"][part] < 0.10 for part in ("drouter", "dw13", "dw2"))


def test_table_of_weight_gradients_is_of_the_committed_measurement() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "weight_gradient_error.py"))
    content = json.loads(script["DATA"].read_text())
    page = script["PAGE"].read_text()
    assert script["with_table"](page, content) == page
    assert content["rows"][0]["spread"] == "normal"
    assert all(0.03 < error < 0.04 for error in content["rows"][0]["errors"].values())


def test_fp8_errors_of_a_linear_layer_are_those_of_the_page() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "fp8_error.py"))
    (committed,) = (
        row["errors"]
        for row in json.loads(script["DATA"].read_text())["rows"]
        if (row["what"], row["recipe"]) == ("linear", "fp8")
    )
    found = script["compare_linear"]("fp8", 0)
    assert found == pytest.approx(committed, rel=0.05)


@pytest.mark.parametrize(("name", "missing"), [("train_moe_lm", "optax"), ("decode_moe", "flax")])
def test_example_without_what_it_needs_says_how_to_install_it(
    name: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install '\.\[flax\]'") as stopped:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert isinstance(stopped.value.code, str)  # printed, with exit code 1
    extra = re.search(r"^flax = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    assert missing in extra[1]


def test_a_line_names_tests_that_run_for_long() -> None:
    heart = Heartbeat(quiet=20)
    heart.pytest_runtest_logstart("a")
    begin = heart.running["a"]
    assert heart.beat(begin + 19) is None
    assert heart.beat(begin + 21) == "a runs for 21 s"
    assert heart.beat(begin + 22) is None
    heart.pytest_runtest_logfinish("a")
    assert heart.beat(begin + 60) is None


def test_every_setting_and_variable_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name in config.Settings.__dataclass_fields__:
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
