"""A picture of what a layer runs: the kernels of one call as bars in time, coloured by what they do.

A row that asks for it keeps the events of one call in the result file; the picture, an SVG of some ten
kilobytes, is drawn from such files. Rows of several files stand below each other on one scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from jax_deepgemm.tools.bench.catalog import Result, name, tables
from jax_deepgemm.tools.bench.timing import Timing

KINDS = {
    "GEMM": "#4878cf",
    "K-grouped GEMM": "#1b3a7a",
    "quantise": "#d65f5f",
    "activation": "#b47cc7",
    "move rows": "#e8a33d",
    "dispatch": "#6acc65",
    "other": "#9a9a9a",
}
"""What kernels do, and their colours."""
OTHER = "other"
WIDTH, LEFT, LANE, BAR, HEAD = 1000, 8, 62, 26, 34
SHORTEST = 0.35  # a bar's width in pixels, however short the kernel
TICKS = 10  # at most


def kept(timing: Timing | None) -> dict[str, Any]:
    """What a result file keeps of one call: names, and for each event (name, start, microseconds).

    >>> from jax_deepgemm.tools.bench.trace import Event, Measured
    >>> call = Event("b", 5000.0, 2000.0), Event("a", 8000.0, 500.0), Event("b", 9000.0, 1000.0)
    >>> kept(Timing(Measured((3.5,), ("b", "a"), {}, (), (call,)), {}, "profiler"))
    {'timeline': {'names': ['b', 'a'], 'events': [[0, 0.0, 2.0], [1, 3.0, 0.5], [0, 4.0, 1.0]]}}
    """
    call = timing.measured.typical() if timing and timing.measured else ()
    if not call:
        return {}
    begin = min(event.start for event in call)
    names = list(dict.fromkeys(_short(event.name) for event in call))
    events = [
        [names.index(_short(e.name)), round((e.start - begin) / 1e3, 2), round(e.duration / 1e3, 2)]
        for e in call
    ]
    return {"timeline": {"names": names, "events": events}}


def _short(kernel: str) -> str:
    """A kernel's name without arguments of templates and types of parameters."""
    return re.split("[<(]", kernel, maxsplit=1)[0]


def kind_of(kernel: str, us: float, kinds: Sequence[tuple[str, float, str]]) -> str:
    """What a kernel of so many microseconds does.

    >>> kinds = ("^jdg_gemm", 0, "GEMM"), ("fusion", 20, "move rows"), ("fusion", 0, "dispatch")
    >>> [kind_of("loop_fusion_1", us, kinds) for us in (1.5, 300)], kind_of("memset", 1, kinds)
    (['dispatch', 'move rows'], 'other')
    """
    return next((kind for name, least, kind in kinds if us >= least and re.search(name, kernel)), OTHER)


def rows_of(results: Sequence[tuple[str, Result]]) -> list[tuple[str, Result]]:
    """Headings and rows of all that was kept, of results under a name each: by row, then by result."""
    found = [
        (f"{title}: {name(row)}", row)
        for title, result in results
        for row in result["rows"]
        if row.get("timeline")
    ]
    order = list(dict.fromkeys(name(row) for _, row in found))
    return sorted(found, key=lambda pair: order.index(name(pair[1])))


def draw(rows: Sequence[tuple[str, Result]]) -> str:
    """Returns an SVG: a lane for each row.

    Raises:
      ValueError: no row.
    """
    if not rows:
        raise ValueError("no row keeps when its kernels ran; measure rows of the table moe on a GPU")
    longest = max(start + us for _, row in rows for _, start, us in row["timeline"]["events"])
    scale = (WIDTH - 2 * LEFT) / longest
    height = HEAD + LANE * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(),
        *_axis(longest, scale, height),
    ]
    for lane, (title, row) in enumerate(rows):
        parts += _lane(title, row, HEAD + LANE * lane, scale)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = LEFT
    for kind, colour in KINDS.items():
        yield f'<rect x="{x}" y="8" width="11" height="11" fill="{colour}"/>'
        yield f'<text x="{x + 15}" y="18">{kind}</text>'
        x += 34 + 7 * len(kind)


def _axis(longest: float, scale: float, height: int) -> Iterator[str]:
    step = next(
        step for power in range(9) for one in (1, 2, 5) if longest / (step := one * 10**power) <= TICKS
    )
    for number in range(int(longest // step) + 1):
        x = LEFT + number * step * scale
        yield f'<path d="M{x:.1f} {HEAD}V{height - 18}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number * step}</text>'
    yield f'<text x="{WIDTH - LEFT}" y="{height - 6}" text-anchor="end">us</text>'


def _lane(title: str, row: Result, top: int, scale: float) -> Iterator[str]:
    kinds, kept = tables()[row["table"]].kinds, row["timeline"]
    span = max(start + us for _, start, us in kept["events"])
    head = f"{title}: {span:,.0f} us from first start to last end, {len(kept['events'])} launches"
    yield f'<text x="{LEFT}" y="{top + 16}">{escape(head)}</text>'
    for index, start, us in kept["events"]:
        kernel = kept["names"][index]
        x, width = LEFT + start * scale, max(us * scale, SHORTEST)
        yield (
            f'<rect x="{x:.2f}" y="{top + 22}" width="{width:.2f}" height="{BAR}"'
            f' fill="{KINDS[kind_of(kernel, us, kinds)]}"><title>{escape(kernel)} {us} us</title></rect>'
        )
