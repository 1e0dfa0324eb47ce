"""The toy family's kernel on a GPU: every configuration, and batches that it knows nothing of."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.shared.toy_family.family import ScaleConfig
from tests.shared.toy_family.op import scale

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((5, 63, 130), np.float32), RNG.standard_normal((5, 130), np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"num_sms": 1}, *({"config": ScaleConfig(n)} for n in (128, 512, 1024))]
)
def test_every_configuration(options: dict[str, Any]) -> None:
    got = jax.jit(lambda x, w: scale(x, w, **options))(X[0], W[0])
    np.testing.assert_array_equal(got, X[0] * W[0])


@pytest.mark.smoke
@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_batches(axes: tuple[int | None, int | None]) -> None:
    x, w = (one if axis == 0 else one[0] for one, axis in zip((X, W), axes, strict=True))
    got = jax.jit(jax.vmap(scale, axes))(x, w)
    want = (x if axes[0] == 0 else x[None]) * (w[:, None] if axes[1] == 0 else w)
    np.testing.assert_array_equal(got, want)
