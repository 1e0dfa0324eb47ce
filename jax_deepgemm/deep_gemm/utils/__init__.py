"""DeepGEMM's `utils`: numbers and casts, layouts of scales, several processes."""

from __future__ import annotations

from jax_deepgemm.deep_gemm.utils import dist, layout, math
from jax_deepgemm.deep_gemm.utils.dist import *  # noqa: F403
from jax_deepgemm.deep_gemm.utils.layout import *  # noqa: F403
from jax_deepgemm.deep_gemm.utils.math import *  # noqa: F403

__all__ = [*math.__all__, *layout.__all__, *dist.__all__]
