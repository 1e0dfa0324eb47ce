"""How a family says what the benchmark measures: its tables, how they are shown, and their rows.

A family's `bench.py` has TABLES, tables by name; that is all that is needed for rows to be measured, reported
and, where a table says so, tuned and plotted. Rows that another family adds to a table are a `Table` of the
same name, made from the other's by `dataclasses.replace(TABLE, rows=...)`. Nothing here measures.

>>> import jax.numpy as jnp
>>> def rows(small):
...     for n in (8, 16) if small else (1 << 20, 1 << 24):
...         yield Row(f"halves n={n}", {"n": n}, lambda x: x / 2, lambda n=n: (jnp.ones(n),), bytes=8 * n)
>>> TABLES = {"halves": Table("Halves of float32 numbers", ("n",), rows)}
>>> first, second = TABLES["halves"].rows(True)
>>> second.name, second.bytes, first.function(*first.draw()).shape
('halves n=16', 128, (8,))
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KERNEL_PREFIX = "jdg_"
"""How the names of this package's kernels begin."""

RATES = ("us", "TFLOP/s", "GB/s")
BESIDE_BASELINE = ("{baseline} us", "vs {baseline}")
BESIDE_PEER = ("{peer} us", "vs {peer}")
BESIDE_BOTH = ("{baseline} us", "{peer} us", "vs {baseline}", "vs {peer}")
CLOCK = "SM MHz"
"""Columns of tables; all that there are stand in tools/bench/catalog.py."""

Fields = Mapping[str, Any]
"""What a result says of one row; the figures that were measured have names of their own."""


@dataclass(frozen=True, eq=False)
class Beside:
    """Another function that is measured beside a row's.

    Attributes:
      what: which one, for people.
      function: of its operands.
      operands: of what the row's `draw` returned, a tuple.
      constants: further operands, behind those.
      elsewhere: which one it is without a GPU, if not `what`.
      fields: what else the result says of it.
      ours: whether it runs kernels of this package, and only those count.
      calls: it is measured in a session of its own with so many calls; None: in the session of the row.
      options: of XLA's compiler, on a GPU.
      skipped: why it is not measured; "" if it is.
    """

    what: str
    function: Callable[..., Any]
    operands: Callable[[Any], tuple[Any, ...]] = tuple
    constants: tuple[Any, ...] = ()
    elsewhere: str = ""
    fields: Fields = field(default_factory=dict)
    ours: bool = False
    calls: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """One function that is measured, and what is known of it beforehand.

    Attributes:
      name: in words; `--rows` of the command line is matched with it.
      fields: what the result says of it: those that the table's keys name, and others.
      function: of `operands` and `constants`.
      draw: makes what operands are taken from. Rows with the same draw share what it returns.
      flops, bytes: what rates are computed from; bytes of operands and results, each once.
      operands: of what `draw` returned, a tuple. `tune` knows their types only, and draws its own.
      constants: further operands, behind those, whose values matter: sizes of groups.
      carry: which operand the result takes the place of, if there is one. It is updated in place, as an
        accumulator is, with no copy between the flush and the kernel.
      prefix: only kernels whose names begin so count; "": all that runs.
      gemms: kernels whose names begin so are told apart from the rest; "": nothing is.
      session: rows with the same are measured in one profiler session; None: rows with the same draw are.
      baseline: what stands beside it.
      read_flush: whether it is timed again after a flush that reads, which leaves no dirty lines in L2.
      timeline: whether the result keeps when each kernel of one call ran, for a picture.
      in_turns: it and its baseline run back to back in turns, by the wall clock, instead.
      whole: the program that a model would run instead of this function alone, which then must run no kernel
        but its own; that is measured too, also by the wall clock.
    """

    name: str
    fields: Fields
    function: Callable[..., Any]
    draw: Callable[[], Any]
    flops: int = 0
    bytes: int = 0
    operands: Callable[[Any], tuple[Any, ...]] = tuple
    constants: tuple[Any, ...] = ()
    carry: int | None = None
    prefix: str = KERNEL_PREFIX
    gemms: str = ""
    session: Hashable = None
    baseline: Beside | None = None
    read_flush: bool = False
    timeline: bool = False
    in_turns: bool = False
    whole: Beside | None = None

    def __str__(self) -> str:
        return self.name


def type_of(fields: Fields) -> str:
    """The types of a row's operands, where it says them, or "all"."""
    return str(fields.get("type", "all"))


def every_row(fields: Fields) -> bool:
    """For `Table.plotted`: plots show all."""
    return True


def no_row(fields: Fields) -> bool:
    """For `Table.plotted`: plots show none."""
    return False


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that are measured and shown together.

    Attributes:
      title: its heading.
      keys: the fields that name a row.
      rows: (small) -> its rows; a few small ones, to try the machinery where there is no GPU, or all.
      columns: what else is shown of a row, see `CELLS` in tools/bench/catalog.py.
      baseline: what was measured beside it.
      elsewhere: what the baseline is without a GPU, if something else.
      peer: whose figures are recorded.
      recorded: of the tables in benchmarks/data, the peer's figures by the values of the keys.
      part: (fields) -> the line of the summary that a row counts in; "" for none.
      order: tables are shown in this order, those with the same in the order of their families.
      tuned: whether every row is one call of one op, whose configurations `tune` can measure.
      plotted: (fields) -> whether plots show a row, as a multiple of its floor.
      type: of the operands, "fp8" or "bf16", which have different peaks; "": each row has a field `type`.
      reads: (fields) -> the bytes that the kernel reads and does little else, or None: it does more. A floor
        is shown for rows that were timed after a flush that reads.
      readme: values of the keys of rows that README.md shows.
      in_bf16: (fields of a row) -> what differs in the row of the same in BF16, which docs/performance.md
        compares it with: {} for its baseline, None for no row.
      kinds: what kernels do, for pictures: (regular expression of names, least microseconds, a kind of
        `KINDS` in tools/bench/timeline.py); the first that fits counts.
    """

    title: str
    keys: tuple[str, ...]
    rows: Callable[[bool], Iterable[Row]]
    columns: tuple[str, ...] = (*RATES, CLOCK)
    baseline: str = ""
    elsewhere: str = ""
    peer: str = ""
    recorded: Callable[[Mapping[str, Any]], Mapping[tuple[Any, ...], Fields]] = lambda tables: {}
    part: Callable[[Fields], str] = type_of
    order: int = 0
    tuned: bool = False
    plotted: Callable[[Fields], bool] = no_row
    type: str = ""
    reads: Callable[[Fields], int | None] | None = None
    readme: tuple[tuple[Any, ...], ...] = ()
    in_bf16: Callable[[Fields], Fields | None] = lambda fields: None
    kinds: tuple[tuple[str, float, str], ...] = ()


def recorded_rows(tables: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the rows of a table of recorded figures.

    >>> recorded_rows({"toy": {"columns": ["n", "us"], "rows": [[8, 2.5]]}}, "toy")
    [{'n': 8, 'us': 2.5}]
    """
    about = tables[name]
    return [dict(zip(about["columns"], cells, strict=True)) for cells in about["rows"]]


@dataclass(frozen=True, eq=False)
class Control:
    """A function that is not this package's, whose time says in which state a machine is. A family's bench.py
    may have CONTROL; there is one in all.

    Attributes:
      row: its baseline is what is measured.
      reference: of the tables in benchmarks/data, what it took where the peer's figures are from.
    """

    row: Row
    reference: Callable[[Mapping[str, Any]], float | None]
