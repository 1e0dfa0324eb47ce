"""FP8 scales follow the data: the relative error is the same from 1e-30 to 1e30."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jax_deepgemm.quantization import per_block_cast_to_fp8, per_channel_cast_to_fp8, per_token_cast_to_fp8
from tests.shared import magnitudes

LAYERS = tuple(magnitudes.layers())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_keep_their_relative_error(name):
    magnitudes.check_relative_errors(name)


@pytest.mark.parametrize("name", LAYERS)
def test_loss_scaling_by_powers_of_two_keeps_the_bits(name):
    magnitudes.check_loss_scaling(name)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (1, 32)], ids=str)
def test_values_keep_their_relative_error(block, dtype, scale_format):
    magnitudes.check_quantize(block, dtype, scale_format)


def test_products_keep_their_bits():
    magnitudes.check_products()


@pytest.mark.parametrize("cast", [per_token_cast_to_fp8, per_channel_cast_to_fp8, per_block_cast_to_fp8])
def test_only_the_casts_of_deepgemm_clamp(cast):
    """Their bits must equal the peer's, whose amax is at least 1e-4."""
    values, scales = cast(jnp.full((128, 128), 1e-8))
    assert (np.asarray(scales) == np.float32(1e-4) / np.float32(448)).all()
    assert float(values.astype(jnp.float32).max()) == pytest.approx(448e-4, rel=0.07)


@pytest.mark.parametrize("name", magnitudes.NEIGHBOURING)
def test_an_expert_beside_one_whose_tokens_are_a_million_times_larger(name):
    magnitudes.check_neighbours(name)
