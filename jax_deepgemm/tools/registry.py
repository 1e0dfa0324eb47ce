"""The families there are, and where tools find what each says of itself (core/family.py has the names)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from jax_deepgemm.core.chip import GENERATIONS, described
from jax_deepgemm.core.family import Family
from jax_deepgemm.core.tuning import Entry, parsed

FOLDERS = (
    "jax_deepgemm.ops.quantize",
    "jax_deepgemm.ops.swiglu",
    "jax_deepgemm.ops.dispatch",
    "jax_deepgemm.ops.rows",
    "jax_deepgemm.ops.gemm",
    "jax_deepgemm.ops.einsum",
    "jax_deepgemm.ops.grouped",
    "jax_deepgemm.ops.mixed",
    "jax_deepgemm.ops.ragged_dot",
    "jax_deepgemm.ops.route",
    "jax_deepgemm.ops.experts",
    "jax_deepgemm.ops.topk",
    "jax_deepgemm.ops.indexer",
    "jax_deepgemm.ops.indexer_quantize",
    "jax_deepgemm.ops.indexer_topk",
    "jax_deepgemm.ops.paged_append",
    "jax_deepgemm.ops.attention",
    "jax_deepgemm.ops.mla",
    "jax_deepgemm.ops.norm",
    "jax_deepgemm.ops.hc_prenorm",
    "jax_deepgemm.ops.sinkhorn",
    "jax_deepgemm.moe",
    "jax_deepgemm.inference",
)
"""Packages of families of kernels, and of layers that are called, compiled and measured like them."""


def parts(name: str) -> list[ModuleType]:
    """Returns the modules of this name in the registered packages, in their order.

    >>> [module.__name__ for module in parts("shapes")][-1]
    'jax_deepgemm.moe.shapes'
    """
    wanted = [f"{folder}.{name}" for folder in FOLDERS]
    return [importlib.import_module(one) for one in wanted if importlib.util.find_spec(one) is not None]


def families() -> list[Family[Any]]:
    """Returns every family of kernels.

    >>> [family.name for family in families()][:4]
    ['quantize', 'swiglu', 'dispatch', 'rows']
    """
    return [module.FAMILY for module in parts("family")]


def family_of(problem: Any) -> Family[Any] | None:
    """Returns the family whose problem something is, None of something else."""
    return next((family for family in families() if type(problem) is family.problem), None)


def family_named(problem_key: str) -> Family[Any] | None:
    """Returns the family that an entry of a tuning file is of.

    >>> family_named("GemmProblem m=64 n=2112 k=7168").name
    'gemm'
    """
    kind = problem_key.split(" ", 1)[0]
    return next((family for family in families() if family.problem.__name__ == kind), None)


def read_entry(problem_key: str, fields: Any) -> Entry:
    """Returns an entry of a tuning file; its configurations are of any architecture of the problem's family.

    Raises:
      ValueError: no family has such problems or such configurations.
    """
    family = family_named(problem_key)
    kinds = [] if family is None else [family.kernels_of(one).config for one in family.kernels]
    problems = [f"no family has problems such as {problem_key}"] if not any(kinds) else []
    for kind in filter(None, kinds):
        try:
            return parsed(fields, kind)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


def capabilities() -> list[str]:
    """Returns the compute capabilities that families have kernels for, each with what people call it.

    >>> capabilities()
    ['9.0 (Hopper)', '8.0 (Ampere) and later']
    """
    return list(dict.fromkeys(described(one) for family in families() for one in family.kernels))


def archs() -> list[str]:
    """Returns the targets that kernels can be compiled for.

    >>> archs()
    ['80', '86', '89', '90a', '100a', '120a']
    """
    able = [one for one in GENERATIONS if any(family.runs_on(one) for family in families())]
    return [GENERATIONS[one].arch for one in able]
