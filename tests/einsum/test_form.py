"""Which einsums are one matrix product, and what becomes of their operands' dimensions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_deepgemm.ops.einsum.collapse import one_launch
from jax_deepgemm.ops.einsum.form import BATCH, Form, NotAProduct, canonical, oriented, parse
from tests.shared.einsum_cases import PRODUCTS

pytestmark = pytest.mark.any_version


def form_of(expr: str) -> Form:
    return oriented(parse(expr))[0]


@pytest.mark.parametrize("expr", PRODUCTS)
def test_products(expr: str) -> None:
    form = form_of(expr)
    assert (form.stored, form.layout) == PRODUCTS[expr]
    assert canonical(form).stored == form.stored
    assert canonical(canonical(form)) == canonical(form)


OTHERS = {
    "...i,ij->...j": "has an ellipsis",
    "ij,jk": "does not name two operands and a result",
    "ij->ji": "does not name two operands and a result",
    "ij,jk,kl->il": "does not name two operands and a result",
    "i1,1j->ij": "has '1' where a letter is needed",
    "ii,ij->j": "has 'i' twice in 'ii', which is a diagonal",
    "ij,jk->ikl": "has 'l' in one term only",
    "ija,jk->ik": "has 'a' in one term only",
    "i,j->ij": "sums over nothing",
    "bi,bj->bij": "sums over nothing",
    "k,nk->n": "has no letter of 'k' alone in the result, so that is a vector",
    "bk,bk->b": "has no letter of 'bk' alone in the result, so that is a vector",
    "bij,bkj->ikb": "has 'b', which is no dimension of the matrices, last in the result",
    "ijb,bkj->bik": "has 'b', which is no dimension of the matrices, last in the first operand",
    "bqhd,bkhd->bhqk": "does not keep 'b' and 'h', which belong together, side by side and in one order",
    "hbmk,hbnk->hmn": "does not keep 'b' and 'k', which belong together",
    "abck,nk->cban": "does not keep 'a' and 'b' and 'c', which belong together",
}


@pytest.mark.parametrize("expr", OTHERS)
def test_others_say_why(expr: str) -> None:
    with pytest.raises(NotAProduct) as caught:
        form_of(expr)
    assert OTHERS[expr] in str(caught.value)


@pytest.mark.parametrize("expr", PRODUCTS)
def test_gradients_are_products_too(expr: str) -> None:
    """Of any order: each operand's cotangent is an einsum of the result and the other operand."""
    form = form_of(expr)
    for terms in ((form.d, form.b, form.a), (form.d, form.a, form.b)):
        once = oriented(Form(*terms))[0]
        oriented(Form(once.d, once.b, once.a))
        oriented(Form(once.d, once.a, once.b))


letters = st.permutations("abcde").flatmap(
    lambda order: st.tuples(*[st.sampled_from(("h", "m", "n", "k")) for _ in order]).map(
        lambda roles: dict(zip(order, roles, strict=True))
    )
)


@given(letters, st.randoms(use_true_random=False))
def test_what_is_a_product_is_one(roles: dict[str, str], random) -> None:
    """Drawn strings: whatever is accepted has terms that are made of whole dimensions, in some order."""
    terms = []
    for kept in ("hmk", "hnk", "hmn"):
        term = [letter for letter, role in roles.items() if role in kept]
        random.shuffle(term)
        terms.append("".join(term))
    expr = f"{terms[0]},{terms[1]}->{terms[2]}"
    try:
        form = form_of(expr)
    except NotAProduct:
        return
    assert all(len(set(order)) == len(order) for order in form.orders)
    assert all(order[-1] not in "hr" for order in form.orders)
    sizes = dict(zip("abcde", (2, 3, 5, 7, 11), strict=True))
    for term, order in zip((form.a, form.b, form.d), form.orders, strict=True):
        shape = [sizes[name] for name in term]
        collapsed = form.collapsed(term, order, shape)
        assert (
            list(itertools.accumulate(collapsed, int.__mul__))[-1]
            == list(itertools.accumulate(shape, int.__mul__))[-1]
        )


@pytest.mark.parametrize(
    ("expr", "carried", "expected"),
    [
        ("bhr,hdr->bhd", (True, False), "mhk,hnk->mhn"),  # more rows
        ("hmk,hnk->hmn", (True, True), "hmk,hnk->hmn"),  # more heads
        ("mk,nk->mn", (True, True), "hmk,hnk->hmn"),
        ("mk,nk->mn", (True, False), "mk,nk->mn"),
        ("mk,nk->mn", (False, True), "mk,hnk->hmn"),
        ("bhr,hdr->bhd", (True, True), None),  # heads apart from the batch
        ("bmk,bnk->mn", (True, True), None),
    ],
)
def test_a_mapped_product_is_one_launch_where_it_can(expr, carried, expected) -> None:
    form = canonical(form_of(expr))
    assert one_launch(form, (0, 1), carried) == (expected is not None)
    if expected is not None:
        mapped = form.mapped(carried)
        assert mapped.d[0] == BATCH
        assert mapped.stored == expected
        assert not one_launch(form, (0, 1), (*carried, False)), "C without the batch"
        values_alone = (carried[0], not carried[0], carried[1], carried[1])
        assert not one_launch(form, (0, 2), values_alone)
