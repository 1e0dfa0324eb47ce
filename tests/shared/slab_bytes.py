"""Slabs of FP4 weights byte by byte, as the layout's text says, one number after the other."""

from __future__ import annotations

import numpy as np

ROWS, COLUMNS, BYTES = 64, 128, 4368


def slab(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """One slab of bytes [64, 64] and codes [64, 4]."""
    words = [0] * 1024
    for row in range(ROWS):
        w, h, g = row // 16, row % 16 // 8, row % 8
        for k in range(COLUMNS):
            number = int(values[row, k // 2]) >> 4 * (k % 2) & 15
            j, upper, q, i = k // 32, k % 32 // 16, k % 16 // 4, k % 4
            t = 32 * w + 4 * g + q
            word = (number & 7) << 16 * upper + 4 * i
            word |= (number >> 3) << 8 * i + (3 if upper else 7)
            words[(h * 128 + (t ^ g // 2)) * 4 + j] |= word
    counts = np.array(
        [[any(b & 0x77 for b in row[16 * j : 16 * j + 16]) for j in range(4)] for row in values]
    )
    largest = max(codes[counts].tolist(), default=None)
    exponents = [0] * 256
    for row in range(ROWS):
        w, h, g = row // 16, row % 16 // 8, row % 8
        for j in range(4):
            e = int(codes[row, j]) - largest + 12 if counts[row, j] and largest is not None else 1
            exponents[((w * 8 + g) * 2 + h) * 4 + j] = e
    base = 1.0 if largest is None else np.ldexp(1.0, largest - 127 - 6)
    if (codes == 255).any() or min(exponents) < 1:
        base = np.nan
    parts = (np.array(words, "<u4"), np.array(exponents, np.int16), np.array([base], "<f4"))
    body = [parts[0].view(np.uint8), np.clip(parts[1], 1, 12).astype(np.uint8), parts[2].view(np.uint8)]
    return np.concatenate([*body, np.zeros(12, np.uint8)])


def slabs(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """uint8 [n / 64, ceil(k / 128), 4368] of bytes [n, k / 2] and codes [n, k / 32]."""
    n, blocks = values.shape[0], -(-codes.shape[1] // 4)
    values = np.pad(values, ((0, 0), (0, 64 * blocks - values.shape[1])))
    codes = np.pad(codes, ((0, 0), (0, 4 * blocks - codes.shape[1])))
    found = [
        [
            slab(values[r : r + ROWS, 64 * b : 64 * b + 64], codes[r : r + ROWS, 4 * b : 4 * b + 4])
            for b in range(blocks)
        ]
        for r in range(0, n, ROWS)
    ]
    return np.array(found)
