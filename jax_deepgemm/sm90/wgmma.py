"""The text of one wgmma wrapper: the instruction names every accumulator register, so it is generated for one width."""

from __future__ import annotations

_SHAPES = {  # operand kind -> (k of one instruction, PTX types of accumulator, A and B, immediates after scale-d)
    "e4m3": (32, "e4m3"),
    "e5m2": (32, "e5m2"),
    "bf16": (16, "bf16"),
}


def wgmma_wrapper(n: int, a: str, b: str, *, a_k_major: bool = True, b_k_major: bool = True) -> str:
    """A C++ struct `Mma` with `issue(accumulator, descriptor_a, descriptor_b, accumulate)`.

    Args:
      n: width of the instruction's result, 8 to 256 in steps of 8.
      a, b: operand types, "e4m3", "e5m2" (which mix freely) or "bf16".
      a_k_major, b_k_major: how the operands lie in shared memory; 8-bit types exist K-major only (PTX ISA 9.7.15.5).
    """
    k, a_type = _SHAPES[a]
    _, b_type = _SHAPES[b]
    count = n // 2
    transposes = f", {int(not a_k_major)}, {int(not b_k_major)}" if a == "bf16" else ""
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
struct Mma {{  // m64n{n}k{k}, float32 += {a} * {b}
  __device__ __forceinline__ static void issue(float (&d)[{count}], jdg::u64 a, jdg::u64 b, bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{a_type}.{b_type} "
        "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1{transposes};\\n}}\\n"
        : {operands}
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }}
}};
"""
