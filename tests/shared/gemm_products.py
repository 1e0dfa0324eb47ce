"""Dense GEMMs of a case on the GPU, what they must give, and the comparison of many of them in one program.

Oracles are computed on the GPU in float32 at the highest precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_deepgemm as jdg
from jax_deepgemm.ops.gemm import reference
from jax_deepgemm.ops.gemm.problem import GemmProblem
from tests.shared import gemm_oracle as oracle
from tests.shared.cases import ROW, Case
from tests.shared.gpu_programs import difference, program

F32 = jnp.float32

FP8_LIMIT = 1e-3  # against unquantised operands
ORACLE_LIMIT = {"float32": 1e-6, "bfloat16": 1e-5}  # against the same operands, dequantised
BF16_LIMIT = {"float32": 1e-8, "bfloat16": 1e-5}


def check(found: dict[str, Any], limits: dict[str, float]) -> None:
    """Every difference is below its limit, and none is NaN."""
    found = {name: float(value) for name, value in found.items()}
    wrong = {name: value for name, value in found.items() if not value < limits[name]}
    assert not wrong, f"{wrong} of {found}"


def problem(case: Case, fp8: bool) -> GemmProblem:
    names = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
    scales = ("vector" if case.b_block == ROW and case.n > 1 else "block") if fp8 else "none"
    return GemmProblem(
        case.m,
        case.n,
        case.k,
        names[case.a_dtype] if fp8 else "bf16",
        names[case.b_dtype] if fp8 else "bf16",
        "nt" if fp8 else case.layout,
        case.out,
        case.accumulate,
        scales,
        batched=(),
    )


def fp8_gemm(case: Case, arrays: list[Any], **options: Any) -> jax.Array:
    pairs = [(arrays[0], arrays[1]), (arrays[2], arrays[3])]
    return jdg.fp8_gemm_nt(*pairs, *arrays[4:], out_dtype=case.out, **options)


def fp8_want(arrays: list[Any]) -> jax.Array:
    return reference.fp8_gemm(*arrays, out_dtype=F32)[0]


def bf16_gemm(case: Case, arrays: list[Any], **options: Any) -> jax.Array:
    return getattr(jdg, f"bf16_gemm_{case.layout}")(*arrays, out_dtype=case.out, **options)


def bf16_want(case: Case, arrays: list[Any]) -> jax.Array:
    return reference.bf16_gemm(*arrays, layout=case.layout, out_dtype=F32)[0]


fp8_exact = program(fp8_want)
bf16_exact = program(bf16_want, static_argnums=0)
"""The same, each as a program of its own."""


def check_configs(case: Case, fp8: bool, configs: Sequence[Any], **options: Any) -> None:
    """A case with each of some configurations, in one program."""
    assert 0 < len(configs) == len(set(map(str, configs)))
    operands = (oracle.fp8_operands if fp8 else oracle.bf16_operands)(case)
    run = functools.partial(fp8_gemm if fp8 else bf16_gemm, case, **options)

    def all_of(arrays: list[Any]) -> dict[str, jax.Array]:
        want = fp8_want(arrays) if fp8 else bf16_want(case, arrays)
        return {str(config): difference(run(arrays, config=config), want) for config in configs}

    limit = (ORACLE_LIMIT if fp8 else BF16_LIMIT)[case.out]
    check(program(all_of)(operands), {str(config): limit for config in configs})


def check_fp8(case_list: list[Case], run: Callable[..., Any] = fp8_gemm, seed: int = 0) -> None:
    operands = [oracle.fp8_operands(case, seed) for case in case_list]

    def all_of(operands: list[Any]) -> dict[str, jax.Array]:
        pairs = zip(case_list, operands, strict=True)
        return {str(case): difference(run(case, arrays), fp8_want(arrays)) for case, arrays in pairs}

    check(program(all_of)(operands), {str(case): ORACLE_LIMIT[case.out] for case in case_list})


def check_bf16(case_list: list[Case], run: Callable[..., Any] = bf16_gemm) -> None:
    operands = [oracle.bf16_operands(case) for case in case_list]

    def all_of(operands: list[Any]) -> dict[str, jax.Array]:
        pairs = zip(case_list, operands, strict=True)
        return {str(case): difference(run(case, arrays), bf16_want(case, arrays)) for case, arrays in pairs}

    check(program(all_of)(operands), {str(case): BF16_LIMIT[case.out] for case in case_list})
