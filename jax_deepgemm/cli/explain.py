"""python -m jax_deepgemm explain --m M --n N --k K: the kernel chosen for a GEMM, and why."""

from __future__ import annotations

import argparse
import sys

LAYOUTS = ("nt", "nn", "tn", "tt")
OPS = tuple(f"{family}_gemm_{layout}" for family in ("fp8", "bf16") for layout in LAYOUTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", choices=OPS, default="fp8_gemm_nt", metavar="OP", help=f"one of {', '.join(OPS)}"
    )
    for name in "mnk":
        parser.add_argument(
            f"--{name}", type=int, required=True, help=f"{name} of the product [m, k] x [k, n]"
        )
    parser.add_argument("--out-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--accumulate", action="store_true", help="with C")
    parser.add_argument(
        "--b-block", choices=("128x128", "1x128"), default="128x128", help="FP8: elements of B per scale"
    )


def run(args: argparse.Namespace) -> int:
    from jax_deepgemm.introspect import explain
    from jax_deepgemm.jit.cli import Shape, traceable

    sizes = {name: getattr(args, name) for name in "mnk"}
    wrong = [f"--{name} is {size}" for name, size in sizes.items() if size < 1]
    if wrong:
        print(f"explain: {', '.join(wrong)}, need at least 1", file=sys.stderr)
        return 2
    shape = Shape(
        args.op, **sizes, out_dtype=args.out_dtype, accumulate=args.accumulate, b_block=args.b_block
    )
    explain(*traceable(shape))
    return 0
