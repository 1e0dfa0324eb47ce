"""Block-scaled FP8: the array type, quantise and dequantise, scale layouts, conversions."""

from __future__ import annotations

from jax_deepgemm.ops.quantize.accumulate import accumulate_gradients
from jax_deepgemm.ops.quantize.api import dequantize, quantize
from jax_deepgemm.ops.quantize.array import QuantizedArray, scales_shape, scales_spec
from jax_deepgemm.ops.quantize.blocks import row_blocks
from jax_deepgemm.ops.quantize.casts import (
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp8,
)
from jax_deepgemm.ops.quantize.fp4 import Fp4Array, dequantize_fp4, quantize_fp4
from jax_deepgemm.ops.quantize.fused import quantize_both, quantize_weight
from jax_deepgemm.ops.quantize.groups import quantize_groups, quantize_rows
from jax_deepgemm.ops.quantize.interop import from_qwix, from_tuple, to_qwix, to_tuple
from jax_deepgemm.ops.quantize.join import concatenate
from jax_deepgemm.ops.quantize.per_channel import (
    PerChannelArray,
    dequantize_per_channel,
    quantize_per_channel,
)
from jax_deepgemm.ops.quantize.prepared import PreparedWeight, prepare_weight
from jax_deepgemm.ops.quantize.prepared_fp4 import PreparedFp4, expand_fp4, prepare_fp4
from jax_deepgemm.ops.quantize.scale_layout import (
    ceil_to_ue8m0,
    get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    pack_ue8m0_to_int,
    transform_sf_into_required_layout,
    unpack_ue8m0_from_int,
)
from jax_deepgemm.ops.quantize.serialization import register as _register

_register()

__all__ = [
    "Fp4Array",
    "PerChannelArray",
    "PreparedFp4",
    "PreparedWeight",
    "QuantizedArray",
    "accumulate_gradients",
    "ceil_to_ue8m0",
    "concatenate",
    "dequantize",
    "dequantize_fp4",
    "dequantize_per_channel",
    "expand_fp4",
    "from_qwix",
    "from_tuple",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_tma_aligned_size",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
    "prepare_fp4",
    "prepare_weight",
    "quantize",
    "quantize_both",
    "quantize_fp4",
    "quantize_groups",
    "quantize_per_channel",
    "quantize_rows",
    "quantize_weight",
    "row_blocks",
    "scales_shape",
    "scales_spec",
    "to_qwix",
    "to_tuple",
    "transform_sf_into_required_layout",
    "unpack_ue8m0_from_int",
]
