"""What a compiled program depends on besides its own text."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from jax_deepgemm._version import __version__

_PACKAGE = "jax_deepgemm"
_IMPORT = re.compile(
    rf"^[ \t]*(?:from|import) ({_PACKAGE}[\w.]*)(?: import (\([^)]*\)|[^\n#]*))?", re.MULTILINE
)
_NAMED = re.compile(rf"""["']({_PACKAGE}\.[\w.]+)["']""")  # modules that are imported when they are needed


@functools.cache
def fingerprint(modules: tuple[str, ...]) -> str:
    """Package version and a hash of what an op is made of, so that an edit never meets a stale program.

    These are its own modules and those of the package that they import, wherever the import stands, with
    the device code of the families among them. An edit of a benchmark, of the command line or of another
    family leaves the fingerprint, and with it every program that was compiled, as it is.

    Args:
      modules: full names.
    """
    root = Path(__file__).parent.parent
    sources = _sources(root, modules)
    digest = hashlib.sha256()
    for path in sorted({*sources, *_device_code(root, sources)}):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"


def _sources(root: Path, modules: tuple[str, ...]) -> set[Path]:
    """The files of modules and of all that they import from this package."""
    found: set[Path] = set()
    pending = [path for module in modules if (path := _file_of(root, module)) is not None]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        pending += _imported(root, path)
    return found


def _imported(root: Path, path: Path) -> Iterator[Path]:
    text = path.read_text(encoding="utf-8")
    for module, names in [*_IMPORT.findall(text), *((named, "") for named in _NAMED.findall(text))]:
        listed = [name.split(" as ")[0].strip() for name in names.strip("()").split(",")]
        for one in (module, *(f"{module}.{name}" for name in listed if name)):
            imported = _file_of(root, one) if one != _PACKAGE else None
            if imported is not None:
                yield imported


def _file_of(root: Path, module: str) -> Path | None:
    """The file of a module of this package; of another one (a test's) there is none."""
    package, _, rest = module.partition(".")
    if package != _PACKAGE:
        return None
    path = root.joinpath(*rest.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


def _device_code(root: Path, sources: set[Path]) -> Iterator[Path]:
    """What all kernels share, and the folders of the families among the sources."""
    shared = root / "include" / _PACKAGE
    families = {path.relative_to(root).parts[1] for path in sources if path.is_relative_to(root / "ops")}
    for path in shared.rglob("*.cuh"):
        folder = path.relative_to(shared).parts[0]
        if folder in families or folder == path.name or not (root / "ops" / folder).is_dir():
            yield path
