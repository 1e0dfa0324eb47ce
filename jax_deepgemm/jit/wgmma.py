"""The text of one wgmma wrapper, for one width: the instruction names every accumulator register."""

from __future__ import annotations

_K = {"e4m3": 32, "e5m2": 32, "bf16": 16, "tf32": 8, "f16": 16}  # of one instruction
_FP8 = ("e4m3", "e5m2")
_HALVES = ("bf16", "f16")
_FRAGMENT = 4  # registers of a thread that hold its part of A, 64 rows by one instruction's k


def wgmma_wrapper(
    n: int,
    a: str,
    b: str,
    *,
    a_k_major: bool = True,
    b_k_major: bool = True,
    a_in_registers: bool = False,
) -> str:
    """A C++ struct `Mma` with `issue(accumulator, a, b, accumulate)`, which adds in float32.

    `b` is the descriptor of an operand in shared memory, and so is `a`. With `a_in_registers`, `a` is an
    array of four registers, this thread's part of 64 rows (PTX ISA 9.7.15.5): the 4 bytes from byte 4 c on
    of rows r and r + 8, then those from byte 16 + 4 c on, where r = thread / 32 % 4 * 16 + thread % 32 / 4
    and c = thread % 4.

    Args:
      n: width of the instruction's result, 8 to 256 in steps of 8.
      a, b: operand types, "e4m3", "e5m2" (which mix freely), "bf16", "f16" or "tf32".
      a_k_major, b_k_major: how the operands lie in shared memory; other types than bf16 and f16 exist
        K-major only (PTX ISA 9.7.15.5).
      a_in_registers: whether A comes from registers, which must not change until the product is waited for.

    Raises:
      ValueError: the instruction does not exist.

    >>> text = wgmma_wrapper(64, "bf16", "bf16", b_k_major=False, a_in_registers=True)
    >>> "m64n64k16.f32.bf16.bf16" in text, "const jdg::u32 (&a)[4]" in text
    (True, True)
    """
    _check(n, a, b, a_k_major, b_k_major, a_in_registers)
    count, sources = n // 2, _FRAGMENT if a_in_registers else 1
    registers = ", ".join(f"%{i}" for i in range(count))
    first = ", ".join(f"%{count + i}" for i in range(sources))
    first = f"{{{first}}}" if a_in_registers else first
    majors = (*(() if a_in_registers else (a_k_major,)), b_k_major)
    transposes = "".join(f", {int(not k_major)}" for k_major in majors) if a in _HALVES else ""
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    given = ", ".join(f'"r"(a[{i}])' for i in range(_FRAGMENT)) if a_in_registers else '"l"(a)'
    parameter = f"const jdg::u32 (&a)[{_FRAGMENT}]" if a_in_registers else "jdg::u64 a"
    return f"""
struct Mma {{  // m64n{n}k{_K[a]}, float32 += {a} * {b}
  __device__ __forceinline__ static void issue(float (&d)[{count}], {parameter}, jdg::u64 b,
                                               bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + sources + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{_K[a]}.f32.{a}.{b} "
        "{{{registers}}}, {first}, %{count + sources}, p, 1, 1{transposes};\\n}}\\n"
        : {operands}
        : {given}, "l"(b), "r"(static_cast<int>(accumulate)));
  }}
}};
"""


def _check(n: int, a: str, b: str, a_k_major: bool, b_k_major: bool, a_in_registers: bool) -> None:
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"wgmma_wrapper: n is {n}, must be 8 to 256 in steps of 8.")
    if a not in _K or not (a == b or (a in _FP8 and b in _FP8)):
        raise ValueError(
            f"wgmma_wrapper: operands are {a!r} and {b!r}, must be equal, one of {', '.join(_K)}; only the "
            "8-bit types mix."
        )
    if a not in _HALVES and not (a_k_major and b_k_major):
        raise ValueError(f"wgmma_wrapper: {a} operands must both be K-major; transpose them in memory.")
    if a_in_registers and not a_k_major:
        raise ValueError(
            "wgmma_wrapper: A in registers is K-major; load its fragments transposed (ldmatrix)."
        )
