"""Runs every kind of kernel of every family once, on shapes with tails, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [PART OF A NAME]

Operands are drawn, and results checked, on the CPU, so that only kernels of this package run on the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import jax
import numpy as np

from jax_deepgemm.core.sanitize import Case
from jax_deepgemm.tools.registry import parts


def cases() -> Iterator[Case]:
    """Yields what each family has in its sanitize.py."""
    for module in parts("sanitize"):
        yield from module.cases()


def main() -> int:
    cpu, gpu = jax.devices("cpu")[0], jax.devices()[0]
    if gpu.platform != "gpu":
        print("sanitize: no GPU here", file=sys.stderr)
        return 2
    wanted = sys.argv[1:] or [""]
    wrong = 0
    with jax.default_device(cpu):
        prepared = [case for case in cases() if any(part in case.name for part in wanted)]
    for name, function, operands in prepared:
        got = jax.jit(function)(*jax.device_put(operands, gpu))
        with jax.default_device(cpu):
            want = jax.jit(function)(*operands)
        difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()
        close = bool(difference <= 0.02 * np.abs(np.asarray(want, np.float64)).max())
        wrong += not close
        print(
            f"{'ok   ' if close else 'WRONG'} {name}: {got.shape}, largest difference {difference:.3g}",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
