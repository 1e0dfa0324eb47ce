"""The kernels keep the relative error of values and gradients from 1e-30 to 1e30, as the reference does.

Run: pytest -m gpu tests/gpu/test_magnitudes_gpu.py        (about 30 s)
"""

from __future__ import annotations

import pytest

from tests.shared import magnitudes
from tests.shared.magnitudes import layers


@pytest.mark.parametrize("name", tuple(layers()))
def test_layers(name):
    magnitudes.check_relative_errors(name)
    magnitudes.check_loss_scaling(name)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1)], ids=str)
def test_quantize(block, dtype, scale_format):
    magnitudes.check_quantize(block, dtype, scale_format)


@pytest.mark.smoke
def test_products():
    magnitudes.check_products()
