"""Times that no kernel on an H200 can beat, from bytes and operations."""

from __future__ import annotations

from typing import Any

import numpy as np

COPY_RATE = 4.3e12  # bytes a second: a large copy, read and written bytes counted, measured on an H200
PEAK = {"fp8": 1979e12, "bf16": 989.5e12}  # operations a second, dense, from the H200's data sheet

READ_MIB = (4, 8, 16, 32, 64, 128, 256)
READ_US = {
    "write": (3.2, 4.7, 7.3, 12.5, 20.2, 36.6, 68.0),
    "read": (2.4, 3.5, 5.3, 9.0, 16.2, 30.5, 59.0),
}
"""Microseconds of the best of five kernels that read so many MiB and do nothing else, measured on an H200
(CUPTI kernel time), by how the L2 cache was flushed before: by writing, which leaves dirty lines that have to
be written back while the kernel reads, or by reading another buffer, as in a decode step."""


def read_us(size: float, flush: str) -> float:
    """Returns the floor of reading `size` bytes, between measured sizes and beyond them along straight lines.

    >>> read_us(16 << 20, "write"), round(read_us(24 << 20, "read"), 2), round(read_us(2 << 20, "write"), 2)
    (7.3, 7.15, 2.45)
    """
    mib, times = size / (1 << 20), READ_US[flush]
    segment = int(np.clip(np.searchsorted(READ_MIB, mib), 1, len(READ_MIB) - 1))
    (x0, x1), (y0, y1) = READ_MIB[segment - 1 : segment + 1], times[segment - 1 : segment + 1]
    return y0 + (mib - x0) * (y1 - y0) / (x1 - x0)


def roofline_us(row: dict[str, Any], kind: str) -> float:
    """Returns the longer of a measured row's bytes at `COPY_RATE` and its operations at `PEAK`.

    >>> roofline_us({"us": 100.0, "tflops": 494.75, "gbytes_per_s": 1000.0}, "bf16")
    50.0

    Args:
      kind: of the operands; of other kinds than those of `PEAK` only the bytes count.
    """
    size, flops = row["gbytes_per_s"] * row["us"] * 1e3, row["tflops"] * row["us"] * 1e6
    return max(size / COPY_RATE, flops / PEAK[kind] if kind in PEAK else 0) * 1e6
