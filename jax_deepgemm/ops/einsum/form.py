"""Which einsums are one matrix product, and how its operands lie in memory: letters only, no arrays.

Letters of a class (batch, rows, columns, summed) that stand side by side, in one order, in all terms that
have them are one dimension, as a reshape that copies nothing makes it. What is left is a product of

h   batch: in all three terms; or in one operand and the result, where the other operand serves all of it
m   rows: in a and the result                n   columns: in b and the result, whose last dimension they are
k   summed                                   r   summed too, but apart from k: runs of k, one after the other

with at most one of h and r, each a stride of a tensor map. Tensor maps and tensor cores read along m, n or k,
so neither may be the last dimension.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Term = tuple[str, ...]
"""Names of an operand's dimensions, in order."""
BATCH = "*"
"""The dimension of vmap's levels, which stands in front."""
LETTERS = "hrmnk"


class NotAProduct(ValueError):
    """Why an einsum is not one matrix product."""


@dataclass(frozen=True)
class Form:
    """An einsum of two operands: the names of their dimensions and of the result's.

    >>> form = Form(("b", "h", "r"), ("h", "d", "r"), ("b", "h", "d"))
    >>> form.rule, form.stored
    ('b h r, h d r -> b h d', 'mhk,hnk->mhn')
    """

    a: Term
    b: Term
    d: Term

    @property
    def rule(self) -> str:
        """As core/sharding.py writes it."""
        return f"{' '.join(self.a)}, {' '.join(self.b)} -> {' '.join(self.d)}"

    @property
    def summed(self) -> Term:
        """The names that are summed over."""
        return tuple(name for name in self.a if name not in self.d)

    @property
    def turned(self) -> Form:
        """The same product with a and b exchanged."""
        return Form(self.b, self.a, self.d)

    @functools.cached_property
    def classes(self) -> Mapping[str, str]:
        """Name -> letter, of LETTERS, of the dimension that it is a part of.

        Raises:
          NotAProduct: it is none; the message goes on after the einsum's string.
        """
        return _classes(self)

    @functools.cached_property
    def orders(self) -> tuple[str, str, str]:
        """The letters of a, b and the result in the order of storage."""
        a, b, d = (_order(term, self.classes) for term in (self.a, self.b, self.d))
        return a, b, d

    @property
    def stored(self) -> str:
        """The orders as `GemmProblem.stored` has them, but always."""
        a, b, d = self.orders
        return f"{a},{b}->{d}"

    @property
    def layout(self) -> str:
        """The two letters of the dense GEMM's layout."""
        a, b, _ = self.orders
        return f"{'n' if a[-1] == 'k' else 't'}{'t' if b[-1] == 'k' else 'n'}"

    @property
    def leads(self) -> bool:
        """Whether the kernels' own format fits: a batch, if there is one, in front of all that have it."""
        return "r" not in self.stored and all(order.find("h") <= 0 for order in self.orders)

    def size(self, letter: str, term: Term, shape: Sequence[int]) -> int:
        """The size of a dimension of the product, from the shape of a term."""
        return math.prod(size for name, size in zip(term, shape, strict=True) if self.classes[name] == letter)

    def collapsed(self, term: Term, order: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a term with one dimension for each letter."""
        return tuple(self.size(letter, term, shape) for letter in order)

    def mapped(self, carried: Sequence[bool]) -> Form:
        """With a dimension in front of the operands that carry it, and of the result."""
        lead = [(BATCH,) if on else () for on in carried]
        return Form(lead[0] + self.a, lead[1] + self.b, (BATCH, *self.d))


def parse(expr: str) -> Form:
    """The form of an einsum's string, with a and b as they stand.

    Raises:
      NotAProduct: the string, or what it says, is not one matrix product.
    """
    text = expr.replace(" ", "")
    if "." in text:
        raise NotAProduct("has an ellipsis, and each dimension needs a letter")
    operands, arrow, result = text.partition("->")
    terms = (*operands.split(","), result)
    if not arrow or len(terms) != 3:
        raise NotAProduct("does not name two operands and a result")
    for term in terms:
        strange = next((one for one in term if not (one.isascii() and one.isalpha())), None)
        if strange is not None:
            raise NotAProduct(f"has {strange!r} where a letter is needed")
        twice = next((one for one in term if term.count(one) > 1), None)
        if twice is not None:
            raise NotAProduct(f"has {twice!r} twice in {term!r}, which is a diagonal")
    return Form(*map(tuple, terms))


def oriented(form: Form) -> tuple[Form, bool]:
    """The form whose columns are b's, and whether a and b are exchanged in it.

    >>> oriented(parse("hdr,bhr->bhd"))[0].stored
    'mhk,hnk->mhn'

    Raises:
      NotAProduct: see `Form.classes`.
    """
    exchanged = bool(form.d) and form.d[-1] not in form.b
    form = form.turned if exchanged else form
    form.classes  # noqa: B018 - raises
    return form, exchanged


def canonical(form: Form) -> Form:
    """The same form with dimensions named after their letters: m, m1, m2, ..

    >>> canonical(parse("bhr,hdr->bhd")).rule
    'm h k, h n k -> m h n'
    """
    names: dict[str, str] = {}
    for name in (*form.a, *form.b):
        letter = form.classes[name]
        count = sum(form.classes[other] == letter for other in names)
        names.setdefault(name, f"{letter}{count or ''}")
    return Form(*(tuple(names[name] for name in term) for term in (form.a, form.b, form.d)))


def _classes(form: Form) -> dict[str, str]:
    a, b, d = map(set, (form.a, form.b, form.d))
    _check_letters(form, a, b, d)
    shared, rows, columns, summed = a & b & d, (a & d) - b, (b & d) - a, (a & b) - d
    plain: dict[str, str] = {}
    for names, letter in ((shared, "h"), (rows, "m"), (columns, "n"), (summed, "k")):
        plain |= dict.fromkeys(names, letter)
    first = ""
    for moved, letter in _choices(bool(shared), rows, columns, summed):
        classes = plain | dict.fromkeys(moved, letter)
        problem = _problem(form, classes)
        if not problem:
            return classes
        first = first or problem
    raise NotAProduct(first)


def _check_letters(form: Form, a: set[str], b: set[str], d: set[str]) -> None:
    for term, others in ((form.a, b | d), (form.b, a | d), (form.d, a | b)):
        alone = next((name for name in term if name not in others), None)
        if alone is not None:
            raise NotAProduct(f"has {alone!r} in one term only")
    if not (a & b) - d:
        raise NotAProduct("sums over nothing")
    for term, own in ((form.a, (a & d) - b), (form.b, (b & d) - a)):
        if not own:
            raise NotAProduct(f"has no letter of {''.join(term)!r} alone in the result, so that is a vector")


def _choices(
    batched: bool, rows: set[str], columns: set[str], summed: set[str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What may be taken out of rows, columns or the sum: nothing first, then few names before many."""
    yield (), ""
    if batched:
        return
    for count in range(1, max(map(len, (rows, columns, summed))) + 1):
        for names, letter in ((rows, "h"), (columns, "h"), (summed, "r")):
            if count < len(names):
                yield from ((moved, letter) for moved in itertools.combinations(sorted(names), count))


def _problem(form: Form, classes: Mapping[str, str]) -> str:
    """Why these classes are not those of one product; "" if they are."""
    found: dict[str, Term] = {}
    for what, term in (("the first operand", form.a), ("the second operand", form.b), ("the result", form.d)):
        order = _order(term, classes)
        for letter in order:
            names = tuple(name for name in term if classes[name] == letter)
            if order.count(letter) > 1 or found.setdefault(letter, names) != names:
                return (
                    f"does not keep {' and '.join(map(repr, sorted(names)))}, which belong together, side by "
                    "side and in one order"
                )
        if order[-1] in "hr":
            return f"has {term[-1]!r}, which is no dimension of the matrices, last in {what}"
    return ""


def _order(term: Term, classes: Mapping[str, str]) -> str:
    return "".join(letter for letter, _ in itertools.groupby(classes[name] for name in term))
