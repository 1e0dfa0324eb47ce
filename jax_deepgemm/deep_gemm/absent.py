"""Names of DeepGEMM that cannot exist here: each says what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_PEERS = (
    "it reads and writes the memory of other GPUs inside a kernel, which XLA does not give to a custom call",
    "jax_deepgemm.moe.expert_parallel_moe, or moe_layer on a mesh; on one GPU moe_mlp, and moe_mlp_decode",
)
_WEIGHTS = (_PEERS[0], "jax_deepgemm.moe.prepare_weights, or weights as they are")
_FP4 = (
    "tensor cores multiply FP4 by FP4 from compute capability 10 on",
    "FP8 activations with FP4 weights: fp8_fp4_gemm_nt and its grouped forms, and jax_deepgemm.prepare_fp4 "
    "for the weights",
)
_SPARSE = (
    "its kernels are for compute capability 10",
    "jax_deepgemm.indexer.indexer_topk, which scores and chooses in one kernel, or fp8_fp4_mqa_logits and a "
    "mask",
)

ABSENT: dict[str, tuple[str, str]] = {
    "SymmBuffer": _PEERS,
    "get_symm_buffer_for_mega_moe": _PEERS,
    "get_symm_buffer_for_sm90_mega_moe": _PEERS,
    "transform_weights_for_mega_moe": _WEIGHTS,
    "transform_weights_for_mega_moe_sm90": _WEIGHTS,
    "fp8_fp4_mega_moe": _PEERS,
    "bf16_mega_moe": _PEERS,
    "fp8_mega_moe": _PEERS,
    "fp4_fp4_mega_moe": _PEERS,
    "bf16_mega_gate": (
        "its kernel is for compute capability 10",
        "jax_deepgemm.moe.route(bf16_gemm_nt(x, weight, out_dtype=jnp.float32), top_k, "
        "score='sqrt_softplus', bias=bias, scale=scale)",
    ),
    "mega_mhc": (
        "its kernel is for compute capability 10",
        "jax_deepgemm.hyperconnection.pre and jax_deepgemm.hyperconnection.post around a layer",
    ),
    "fp4_gemm_nt": _FP4,
    "m_grouped_fp4_gemm_nt_contiguous": _FP4,
    "m_grouped_fp4_gemm_nt_masked": _FP4,
    "k_grouped_fp4_gemm_nt_contiguous": _FP4,
    "cublaslt_nvfp4_gemm_nt": _FP4,
    "get_mqa_logits_metadata": (
        "it divides the work of a kernel for compute capability 10",
        "fp8_fp4_mqa_logits without it: the kernel divides the work itself",
    ),
    "get_sparse_mqa_logits_metadata": _SPARSE,
    "get_paged_sparse_mqa_logits_metadata": _SPARSE,
    "fp8_fp4_sparse_mqa_logits": _SPARSE,
    "fp8_fp4_paged_sparse_mqa_logits": (_SPARSE[0], "jax_deepgemm.indexer.paged_indexer_topk"),
    "jit_hooks": (
        "kernels are compiled while a program is lowered, not when it is called",
        "jax_deepgemm.jit.record_kernels, jax_deepgemm.explain and jax_deepgemm.precompile",
    ),
    "locality_domain": ("Hopper's L2 cache is one", "the functions without it"),
}
"""Name -> why not, and what to use."""


def _absent(name: str, why: str, use: str) -> Callable[..., NoReturn]:
    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not there on Hopper in JAX: {why}. Use {use}.")

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"""Is not there: {why}. Use {use}.

    Args:
      args: are not looked at; a number of any kind.

    Returns:
      Nothing.

    Raises:
      NotImplementedError: always.

    Source: DeepGEMM's name.

    >>> from jax_deepgemm import deep_gemm
    >>> try:
    ...     deep_gemm.{name}()
    ... except NotImplementedError:
    ...     print("not there")
    not there
    """
    return function


globals().update({name: _absent(name, *said) for name, said in ABSENT.items()})
__all__ = sorted(ABSENT)
