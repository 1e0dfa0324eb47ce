"""Grouped GEMMs: many GEMMs with different numbers of rows in one call, as mixtures of experts need them."""

from jax_deepgemm.ops.grouped import *  # noqa: F403
from jax_deepgemm.ops.grouped import __all__ as __all__
