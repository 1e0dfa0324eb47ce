"""Kernels between scores and choice; include/jax_deepgemm/indexer_topk/rows.cuh says what they do."""

from __future__ import annotations

from collections.abc import Sequence

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.launch import Launch, Operand, Param, Result, Scalar, Scratch
from jax_deepgemm.jit import KernelSource, compile_kernel

THREADS, SEGMENTS, GROUP = 256, 8, 8

_TEXT = """\
#include <jax_deepgemm/indexer_topk/rows.cuh>

extern "C" __global__ void __launch_bounds__(256) {name}(
    {parameters}) {{
  {body}
}}
"""
_LISTED = "int* listed, int* count"
_KERNELS = {
    "in_order": (
        "const float* bounds, float* numbers, int* keys, const int* counts, int* ends, "
        f"{_LISTED}, int pitch, int places, int num_keys, int k",
        "jdg::in_order({bounds, numbers, keys, counts, pitch, places}, num_keys, k, ends, {listed, count});",
    ),
    "keys_of": (
        "const int* keys, int* chosen, int most, int k",
        "jdg::keys_of(keys, most, chosen, k);",
    ),
    "gathered": (
        "const uint4* q, const uint4* w, const int* starts, const int* ends, uint4* to_q, uint4* to_w, "
        f"int* to_starts, int* to_ends, {_LISTED}, int queries, int weights, int first",
        "jdg::gathered({q, w, starts, ends}, {to_q, to_w, to_starts, to_ends}, queries, weights, "
        "{listed, count}, first);",
    ),
    "scattered": (
        f"const float* scores, const int* keys, float* to_scores, int* to_keys, {_LISTED}, int k, int first",
        "jdg::scattered(scores, keys, to_scores, to_keys, k, {listed, count}, first);",
    ),
}


def source(which: str, shared: int = 0) -> KernelSource:
    """The source of one of the four."""
    name, (parameters, body) = f"jdg_indexer_topk_{which}", _KERNELS[which]
    return KernelSource(
        name, _TEXT.format(name=name, parameters=parameters, body=body), (), shared_memory=shared
    )


def shared_bytes(places: int, keys: int) -> int:
    """Of `in_order`.

    >>> shared_bytes(512, 65536), shared_bytes(512, 1 << 20)
    (42112, 180352)
    """
    words = -(-keys // 32)
    return 4 * (2 * SEGMENTS * places + words + -(-words // GROUP) + 32)


def launch(
    which: str,
    chip: Chip,
    tokens: int,
    pointers: Sequence[Operand | Result | Scratch],
    numbers: Sequence[int],
    shared: int = 0,
) -> Launch:
    """One of the four, a block of threads for each token."""
    params: list[Param] = [*pointers, *(Scalar(value, "int32") for value in numbers)]
    return Launch(
        kernel=compile_kernel(source(which, shared), arch=chip.arch),
        grid=(tokens, 1, 1),
        block=THREADS,
        params=tuple(params),
        shared_memory=shared,
    )
