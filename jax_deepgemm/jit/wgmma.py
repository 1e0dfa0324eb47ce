"""The text of one wgmma wrapper, for one width: the instruction names every accumulator register."""

from __future__ import annotations

_K = {"e4m3": 32, "e5m2": 32, "bf16": 16}  # of one instruction


def wgmma_wrapper(n: int, a: str, b: str, *, a_k_major: bool = True, b_k_major: bool = True) -> str:
    """A C++ struct `Mma` with `issue(accumulator, descriptor_a, descriptor_b, accumulate)`.

    Args:
      n: width of the instruction's result, 8 to 256 in steps of 8.
      a, b: operand types, "e4m3", "e5m2" (which mix freely) or "bf16".
      a_k_major, b_k_major: how the operands lie in shared memory; 8-bit types exist K-major only
        (PTX ISA 9.7.15.5).
    """
    count = n // 2
    transposes = f", {int(not a_k_major)}, {int(not b_k_major)}" if a == "bf16" else ""
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
struct Mma {{  // m64n{n}k{_K[a]}, float32 += {a} * {b}
  __device__ __forceinline__ static void issue(float (&d)[{count}], jdg::u64 a, jdg::u64 b,
                                               bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{_K[a]}.f32.{a}.{b} "
        "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1{transposes};\\n}}\\n"
        : {operands}
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }}
}};
"""
