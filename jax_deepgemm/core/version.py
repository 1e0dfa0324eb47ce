"""What a compiled program depends on besides its own text."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from jax_deepgemm._version import __version__

_SUFFIXES = (".py", ".cuh", ".h", ".cu")


@functools.cache
def fingerprint() -> str:
    """Package version and a hash of every source file, so that an edit never meets a stale program."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"
