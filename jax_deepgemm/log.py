"""JAX_DEEPGEMM_LOG: the package's messages on stderr, for programs that set up no logging of their own."""

from __future__ import annotations

import functools
import logging
import os

VARIABLE = "JAX_DEEPGEMM_LOG"
LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("jax_deepgemm")


def start() -> None:
    """Shows messages from the variable's level on; without it, `logging` shows warnings and errors.

    A value that is no level is left to the compiler's settings, which refuse it: an import should not fail.
    """
    level = os.environ.get(VARIABLE, "").strip().lower()
    if level not in LEVELS:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jax_deepgemm: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


@functools.cache
def note_once(message: str) -> None:
    """Logs what costs time without being wrong, the first time it is given."""
    logger.info("%s", message)
