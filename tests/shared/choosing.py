"""What is chosen for a problem of any family."""

from __future__ import annotations

from typing import Any

from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.tools.registry import family_of


def choose(problem: Any, chip: Chip = H200) -> Any:
    """The configuration that a call of it runs with."""
    return family_of(problem).choose(problem, chip).config


def cheapest(problem: Any, chip: Chip = H200) -> Any:
    """The cost model's choice."""
    return family_of(problem).cheapest(problem, chip)


def ranked(problem: Any, chip: Chip = H200) -> list[tuple[Any, Any]]:
    """All candidates with their cost, the cheapest first."""
    return family_of(problem).ranked(problem, chip)
