"""What a chain of launches can compute of a layer of experts."""

from __future__ import annotations

from jax_deepgemm.ops.experts.family import ExpertsProblem

MOST_COPIES = 2048
"""Tokens times top_k: those that one block of threads sorts by expert, without a meeting of blocks."""
MOST_EXPERTS, MOST_EXPECTED = 1024, 64
"""Rows of an expert, of which the products have tiles of 64."""
HIDDEN_STEP, INNER_STEP = 512, 128
"""Scales of a row of x are whole 16 bytes, which TMA asks for; those of the activation are whole blocks."""
TYPES = ("bfloat16", "float32")


def refusal(p: ExpertsProblem) -> str:
    """Why no chain computes p; "" if one does.

    >>> refusal(ExpertsProblem(1, 8, 7168, 2048, 256, 1))
    ''
    >>> refusal(ExpertsProblem(1, 8, 7100, 2048, 256, 1))
    'hidden is 7100, need a multiple of 512'
    """
    rules = (
        (p.hidden % HIDDEN_STEP == 0, f"hidden is {p.hidden}, need a multiple of {HIDDEN_STEP}"),
        (p.inner % INNER_STEP == 0, f"inner is {p.inner}, need a multiple of {INNER_STEP}"),
        (p.copies <= MOST_COPIES, f"there are {p.copies} copies of tokens, at most {MOST_COPIES}"),
        (p.experts <= MOST_EXPERTS, f"there are {p.experts} experts, at most {MOST_EXPERTS}"),
        (
            p.expected <= MOST_EXPECTED,
            f"{p.expected} rows of an expert are expected, at most {MOST_EXPECTED}",
        ),
        (p.x in TYPES, f"x is {p.x}, need {' or '.join(TYPES)}"),
    )
    return "; ".join(why for holds, why in rules if not holds)
