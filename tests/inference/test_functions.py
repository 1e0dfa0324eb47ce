"""jax_deepgemm.inference against formulas in float64: odd sizes, types, NaN in what must not be read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_deepgemm import inference
from tests.shared import inference_oracle as oracle
from tests.shared.inference_oracle import close, drawn, visible, wide

BF16 = ml_dtypes.bfloat16
TYPES = (np.float32, np.float16, BF16)


@dataclass(frozen=True)
class Case:
    """A call, what it should give, in units of the last place of the largest number, and what else holds."""

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: dict[str, Any]
    want: np.ndarray
    units: float = 4

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return self.function(*arrays, **self.options)


def activations() -> Iterator[tuple[str, Case]]:
    x, bias = 3 * drawn(0, 3, 7), drawn(1, 7)
    for act, function in oracle.ACTIVATIONS.items():
        yield act, Case(inference.bias_act, (x, bias), {"act": act}, function(wide(x) + wide(bias)))


def gates() -> Iterator[tuple[str, Case]]:
    x, bias = drawn(2, 3, 10, dtype=BF16), drawn(3, 10, dtype=BF16)
    numbers = wide(x) + wide(bias)
    for gated, halves in (
        ("split", np.split(numbers, 2, -1)),
        ("interleaved", [numbers[:, ::2], numbers[:, 1::2]]),
    ):
        for gate_first in (False, True):
            gate, value = halves if gate_first else halves[::-1]
            options = {"act": "silu", "gated": gated, "gate_first": gate_first}
            yield (
                f"{gated} {gate_first}",
                Case(inference.bias_act, (x, bias), options, value * oracle.silu(gate), 1),
            )


def norms() -> Iterator[tuple[str, Case]]:
    """A mean of a thousand times the deviations, of which float32 has so many digits less."""
    for dtype in TYPES:
        far = dtype == np.float32
        for kind in ("layer", "rms"):
            x = (drawn(4, 2, 37) + (1000 if far and kind == "layer" else 0)).astype(dtype)
            gamma, beta = drawn(5, 37, dtype=dtype), drawn(6, 37)
            function = oracle.layer_norm if kind == "layer" else oracle.rms_norm
            want = function(wide(x), wide(gamma), eps=1e-3) + wide(beta)
            options = {"kind": kind, "eps": 1e-3}
            units = 400 if far and kind == "layer" else 4
            yield f"{kind} {np.dtype(dtype)}", Case(inference.norm, (x, gamma, beta), options, want, units)
    yield "one number", Case(inference.norm, (np.ones((2, 1), np.float32),), {"eps": 1.0}, np.zeros((2, 1)))


def residuals() -> Iterator[tuple[str, Case]]:
    m, r, a = (drawn(seed, 2, 3, 5) for seed in (10, 11, 12))
    for mode in ("pre", "post", "parallel"):
        for biases in (False, True):
            b_a, b_f = (drawn(seed, 5) if biases else None for seed in (13, 14))
            of_a = (a, b_a) if mode != "post" else (None, None)
            n_a, n_f = (0 if b is None else wide(b) for b in (of_a[1], b_f))
            parts = 1 if mode == "post" else 4
            shared = wide(r) + n_a + n_f
            want = (
                wide(m)
                + {
                    "pre": (shared + wide(a)) / parts,
                    "post": shared,
                    "parallel": wide(a) + shared / parts,
                }[mode]
            )
            options = {"mode": mode, "mp_size": parts}
            yield f"{mode} {biases}", Case(inference.residual_add, (m, r, *of_a, b_f), options, want)


def rotations() -> Iterator[tuple[str, Case]]:
    """More tokens than heads, part of a head, positions of left-padded sequences, angles up to 1000."""
    x = drawn(15, 2, 5, 3, 32)
    positions = np.array([[0, 0, 0, 1, 2], [7, 8, 9, 10, 1000]], np.int32)
    for style, dim in (("half", 24), ("interleaved", 24), ("half", 32), ("interleaved", 6)):
        want = oracle.rotary(wide(x), positions, oracle.rates(dim, 1e6), style == "interleaved")
        options = {"dim": dim, "theta": 1e6, "style": style}
        yield f"{style} {dim}", Case(inference.rotary, (x, positions), options, want, 2**10)
    x, rates = drawn(16, 4, 2, 16, dtype=BF16), np.array([0.3, 0.02, 1e-4], np.float32)
    want = oracle.rotary(wide(x), np.arange(4), wide(rates))
    yield "given frequencies", Case(_by_frequencies, (x, rates), {}, want, 1)


def _by_frequencies(x: Any, rates: Any) -> Any:
    return inference.rotary(x, jnp.arange(4), inv_freq=rates)


VIEWS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "q_offset": 6},
    {"causal": True, "q_offset": 6, "window": 3},
    {"causal": True, "window": 1},
    {"causal": True, "q_offset": -2},
]


def seen_by(view: dict[str, Any], queries: int, keys: int, end: int | None = None) -> np.ndarray:
    names = {"causal": "causal", "q_offset": "offset", "window": "window"}
    return visible(queries, keys, end=end, **{names[name]: value for name, value in view.items()})


def softmaxes() -> Iterator[tuple[str, Case]]:
    """What is not seen is NaN."""
    slopes = np.array([0.5, 0.25, 2.0], np.float32)
    for view in VIEWS:
        scores, bias = drawn(17, 2, 3, 5, 11), drawn(18, 2, 1, 1, 11)
        bias[0, ..., 4] = -np.inf
        ramp = np.arange(11)[None] - (view.get("q_offset", 0) + np.arange(5))[:, None]
        added = wide(scores) * 0.3 + wide(bias) + wide(slopes)[:, None, None] * ramp
        seen = seen_by(view, 5, 11)
        scores[np.broadcast_to(~seen, scores.shape)] = np.nan
        want = oracle.softmax(np.where(seen, added, 0), seen & (bias > -np.inf))
        yield f"{view}", Case(_softmax_of, (scores, bias, slopes), view, want)


def _softmax_of(scores: Any, bias: Any, slopes: Any, **view: Any) -> Any:
    return inference.masked_softmax(scores, scale=0.3, bias=bias, alibi_slopes=slopes, **view)


def attentions() -> Iterator[tuple[str, Case]]:
    """Heads 6 over 2, values of another width, a length for each sequence; what is behind it is NaN."""
    lens, slopes = np.array([11, 7, 0], np.int32), np.array([1, 0.5, 0.25, 2, 3, 4], np.float32)
    for view in VIEWS:
        q, k, v = drawn(19, 3, 5, 6, 24), drawn(20, 3, 11, 2, 24), drawn(21, 3, 11, 2, 17)
        for i, end in enumerate(lens):
            k[i, end:] = v[i, end:] = np.nan
        seen = np.stack([seen_by(view, 5, 11, end) for end in lens])[:, None]
        ramp = np.arange(11)[None] - (view.get("q_offset", 0) + np.arange(5))[:, None]
        added = wide(slopes)[:, None, None] * ramp
        want = oracle.attention(wide(q), wide(k), wide(v), seen, added)
        yield f"{view}", Case(_with_slopes, (q, k, v, slopes, lens), view, want, 16)
    q, k, v = (drawn(seed, 2, n, 2, 16, dtype=BF16) for seed, n in ((22, 3), (23, 9), (24, 9)))
    bias, offsets = drawn(25, 2, 9), np.array([6, 2], np.int32)
    k[1, 5:] = v[1, 5:] = np.nan  # behind the last query of the second sequence
    seen = np.stack([visible(3, 9, causal=True, offset=int(at)) for at in offsets])[:, None]
    want = oracle.attention(*map(wide, (q, k, v)), seen, wide(bias)[:, None, None], 0.7)
    yield "offsets", Case(_with_bias, (q, k, v, bias, offsets), {}, want, 2)


def _with_slopes(q: Any, k: Any, v: Any, slopes: Any, lens: Any, **view: Any) -> Any:
    return inference.attention(q, k, v, alibi_slopes=slopes, kv_lens=lens, **view)


def _with_bias(q: Any, k: Any, v: Any, bias: Any, offsets: Any) -> Any:
    form: dict[str, Any] = {"causal": True, "scale": 0.7}
    return inference.attention(q, k, v, q_offset=offsets, bias=bias[:, None, None], **form)


def embeddings() -> Iterator[tuple[str, Case]]:
    table, places = drawn(34, 5, 3, dtype=BF16), drawn(35, 4, 3, dtype=BF16)
    ids = np.array([[4, 0, -1], [5, 2, 2]], np.int32)
    positions = np.array([[0, 1, 0], [0, 9, -7]], np.int32)
    want = np.zeros((2, 3, 3))
    for at in np.ndindex(ids.shape):
        if 0 <= ids[at] < 5:
            want[at] = wide(table)[ids[at]] + wide(places)[min(max(positions[at] + 2, 0), 3)]
    yield "positions", Case(inference.embed, (ids, table, places, positions), {"offset": 2}, want, 0.5)
    x = drawn(36, 6, 2)
    x[5:] = np.nan
    ends = np.array([0, 2, 2, 5, 5], np.int32)
    want = np.array([x[1], [0, 0], x[4], [0, 0]], np.float64)
    yield "last_tokens", Case(inference.last_tokens, (x, ends), {}, want, 0)


CASES = {
    f"{group.__name__} {name}": case
    for group in (activations, gates, norms, residuals, rotations, softmaxes, attentions, embeddings)
    for name, case in group()
}


@functools.cache
def results() -> dict[str, Any]:
    """Of all cases, as one program, which compiles faster than many."""
    run = jax.jit(lambda arrays: {name: case(arrays[name]) for name, case in CASES.items()})
    return run({name: case.arrays for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    case, got = CASES[name], results()[name]
    assert got.dtype == (case.arrays[1] if "positions" in name else case.arrays[0]).dtype
    close(got, case.want, case.units)


def test_both_gelus_are_told_apart() -> None:
    """They differ by 4.7e-4 at 2.7, a thousand times the error that test_values allows."""
    x = np.array(2.7)
    assert abs(oracle.gelu_tanh(x) - oracle.gelu_erf(x)) > 3e-4


def test_norm_of_a_sum_is_that_of_the_rounded_sum() -> None:
    x, residual, bias = (
        drawn(seed, *shape, dtype=BF16) for seed, shape in ((7, (3, 16)), (8, (3, 16)), (9, (16,)))
    )

    @jax.jit
    def both(x: Any, residual: Any, bias: Any) -> Any:
        alone = inference.norm(x, residual=residual, bias=bias)
        return *inference.norm(x, residual=residual, bias=bias, return_sum=True), alone

    y, total, alone = both(x, residual, bias)
    want = (wide(x) + wide(residual) + wide(bias)).astype(np.float32).astype(BF16)
    np.testing.assert_array_equal(wide(total), wide(want))
    close(y, oracle.layer_norm(wide(want)), 1)
    np.testing.assert_array_equal(wide(alone), wide(y))


def test_attention_has_gradients() -> None:
    """Also where a row sees nothing."""
    q, k, v = (jnp.asarray(drawn(seed, 1, 2, 1, 8)) for seed in (29, 30, 31))

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(inference.attention(*operands, causal=True, q_offset=-1) ** 2)

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert jnp.isfinite(gradient).all()


class _Gpu:
    """cuDNN's call, as a program for a GPU has it; there is none here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(jax.nn, "dot_product_attention", self)
        patch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))

    def __call__(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        self.calls.append(options)
        return jnp.full_like(q, jnp.nan) if options["key_value_seq_lengths"] is not None else q


CUDNN: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "causal": ({"causal": True}, ""),
    "window": ({"causal": True, "window": 3}, ""),
    "lens": ({"kv_lens": np.array([4, 0])}, ""),
    "offset": ({"causal": True, "q_offset": 2}, "begins at position 0"),
    "bias": ({"bias": np.zeros(6, np.float32)}, "a bias or alibi_slopes"),
    "window and lens": (
        {"causal": True, "window": 3, "kv_lens": np.array([4, 0])},
        "window is behind kv_lens",
    ),
}


@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_runs_what_it_can(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, why = CUDNN[case]
    gpu = _Gpu(monkeypatch)
    q = jnp.asarray(drawn(32, 2, 6, 2, 8, dtype=BF16))
    if why:
        jax.eval_shape(lambda: inference.attention(q, q, q, **options))
        assert not gpu.calls
        with pytest.raises(ValueError, match=f"impl is 'cudnn', and .*{why}.*Use impl='auto' or 'xla'"):
            inference.attention(q, q, q, impl="cudnn", **options)
        return
    out = inference.attention(q, q, q, **options)
    (call,) = gpu.calls
    assert call["implementation"] == "cudnn"
    assert call["is_causal"] == options.get("causal", False)
    assert call["local_window_size"] == ((2, 0) if "window" in options else None)
    if "kv_lens" in options:
        assert not np.asarray(out[1], np.float32).any()  # whatever cuDNN gives for a row that sees nothing


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        (np.float32, (1, 2, 1, 8), "q is float32"),
        (BF16, (1, 2, 1, 12), "heads are 12 and 12 wide"),
        (BF16, (1, 0, 1, 8), "no queries or no keys"),
    ],
)
def test_cudnn_takes_neither(dtype: Any, shape: tuple[int, ...], why: str) -> None:
    q = drawn(33, *shape, dtype=dtype)
    with pytest.raises(ValueError, match=why):
        inference.attention(q, q, q, impl="cudnn")
    assert jax.eval_shape(inference.attention, q, q, q).shape == shape


def test_cudnn_takes_no_window_of_more_queries_than_keys() -> None:
    """Rows from keys + window - 1 on see nothing: they are zero."""
    q = drawn(34, 1, 9, 1, 8, dtype=BF16)
    k = q[:, :4]
    with pytest.raises(ValueError, match="window is behind the last key"):
        inference.attention(q, k, k, causal=True, window=3, impl="cudnn")
    out = np.asarray(inference.attention(q, k, k, causal=True, window=3), np.float32)
    assert out[0, 5].any()
    assert not out[0, 6:].any()


def test_the_choice_stands_in_the_program() -> None:
    q = jnp.ones((1, 2, 1, 8))
    text = jax.jit(inference.attention).lower(q, q, q).as_text(debug_info=True)
    assert "attention_xla" in text
    assert "attention_cudnn" not in text


def test_experts_are_moved_and_summed() -> None:
    """Route, dispatch and combine are those of jax_deepgemm.moe, tested there."""
    logits, x = drawn(37, 5, 300), drawn(38, 5, 4)

    @jax.jit
    def through(logits: Any, x: Any) -> Any:
        ids, weights = inference.moe_route(logits, 3, renormalize=False)
        return ids, weights, inference.moe_combine(*inference.moe_dispatch(x, ids, 300))

    ids, weights, back = through(logits, x)
    np.testing.assert_allclose(back, 3 * x, rtol=1e-6)
    order = np.argsort(-wide(logits), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(ids, order)
    scores = oracle.softmax(wide(logits), np.ones(logits.shape, bool))
    close(weights, np.take_along_axis(scores, order, 1))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "bias_act type": (
        lambda: inference.bias_act(np.ones(2, np.int32)),
        TypeError,
        r"x is int32 \[2\], need a bfloat16",
    ),
    "bias_act bias": (
        lambda: inference.bias_act(np.ones((2, 3), np.float32), np.ones(2, np.float32)),
        ValueError,
        r"bias is \[2\], need \[3\]",
    ),
    "bias_act word": (
        lambda: inference.bias_act(np.ones(2, np.float32), act="gelu"),
        ValueError,
        "act is 'gelu', need one of 'identity'",
    ),
    "bias_act odd": (
        lambda: inference.bias_act(np.ones(3, np.float32), gated="split"),
        ValueError,
        "3 features, an odd number",
    ),
    "norm": (
        lambda: inference.norm(np.ones((2, 3), np.float32), np.ones(4, np.float32)),
        ValueError,
        r"gamma is \[4\], need \[3\]",
    ),
    "norm residual": (
        lambda: inference.norm(np.ones((2, 3), np.float32), residual=np.ones((2, 3), np.float16)),
        TypeError,
        "residual is float16.*need float32",
    ),
    "residual_add": (
        lambda: inference.residual_add(np.ones(3, np.float32), np.ones(3, np.float32)),
        ValueError,
        "attn is None, need what attention gave, or mode='post'",
    ),
    "residual_add post": (
        lambda: inference.residual_add(*np.ones((3, 3), np.float32), mode="post"),
        ValueError,
        "leave them out, or use mode='pre'",
    ),
    "rotary dim": (
        lambda: inference.rotary(np.ones((2, 1, 4), np.float32), np.arange(2), dim=3),
        ValueError,
        "3 of 4 numbers of a head rotate, need an even number",
    ),
    "rotary positions": (
        lambda: inference.rotary(np.ones((2, 3, 1, 4), np.float32), np.arange(2)),
        ValueError,
        r"positions is \[2\].*\[2, 3\]",
    ),
    "rotary inv_freq": (
        lambda: inference.rotary(np.ones((2, 1, 4), np.float32), np.arange(2), inv_freq=np.ones(2, BF16)),
        TypeError,
        "inv_freq is bfloat16.*too few digits",
    ),
    "softmax window": (
        lambda: inference.masked_softmax(np.ones((2, 2), np.float32), window=2),
        ValueError,
        "window is 2 and causal is False, need causal=True",
    ),
    "softmax bias": (
        lambda: inference.masked_softmax(np.ones((2, 2), np.float32), bias=np.ones(3, np.float32)),
        ValueError,
        r"bias is \[3\], need what broadcasts to the scores",
    ),
    "attention": (
        lambda: inference.attention(
            *np.ones((3, 1, 2, 3, 4), np.float32)[:2], np.ones((1, 2, 2, 4), np.float32)
        ),
        ValueError,
        r"v is \[1, 2, 2, 4\], need q \[batch",
    ),
    "attention lens": (
        lambda: inference.attention(*np.ones((3, 1, 2, 3, 4), np.float32), kv_lens=np.ones(2, np.int32)),
        ValueError,
        r"kv_lens is \[2\], need a number, or one for each of 1",
    ),
    "embed": (
        lambda: inference.embed(np.ones(2, np.float32), np.ones((2, 2), np.float32)),
        TypeError,
        "ids is float32.*need integers",
    ),
    "embed positions": (
        lambda: inference.embed(np.arange(2), *np.ones((2, 2, 2), np.float32)),
        ValueError,
        "one of pos_table and positions is None",
    ),
    "last_tokens": (
        lambda: inference.last_tokens(np.ones(2, np.float32), np.arange(2)),
        ValueError,
        r"x is \[2\] .*need \[tokens, h\]",
    ),
}


F32 = np.ones((2, 3), np.float32)
HEADS = np.ones((2, 3, 1, 4), np.float32)
FOLLOWED: dict[str, Callable[[], Any]] = {
    "bias_act type": lambda: inference.bias_act(np.ones(2, np.int32).astype(BF16)),
    "bias_act bias": lambda: inference.bias_act(F32, F32[0]),
    "bias_act word": lambda: inference.bias_act(F32, act="gelu_erf"),
    "bias_act odd": lambda: inference.bias_act(F32[:, :2], gated="split"),
    "norm": lambda: inference.norm(F32, F32[0]),
    "norm residual": lambda: inference.norm(F32, residual=F32.astype(np.float16).astype(np.float32)),
    "residual_add": lambda: inference.residual_add(F32, F32, mode="post"),
    "residual_add post": lambda: inference.residual_add(F32, F32, F32, mode="pre"),
    "rotary dim": lambda: inference.rotary(HEADS, np.arange(3), dim=2),
    "rotary positions": lambda: inference.rotary(HEADS, np.zeros((2, 3), np.int32)),
    "rotary inv_freq": lambda: inference.rotary(HEADS, np.arange(3), inv_freq=np.ones(2, np.float32)),
    "softmax window": lambda: inference.masked_softmax(F32, causal=True, window=2),
    "softmax bias": lambda: inference.masked_softmax(F32, bias=F32[0]),
    "attention": lambda: inference.attention(HEADS, HEADS, HEADS),
    "attention lens": lambda: inference.attention(HEADS, HEADS, HEADS, kv_lens=np.ones(2, np.int32)),
    "embed": lambda: inference.embed(np.ones(2, np.float32).astype(np.int32), F32),
    "embed positions": lambda: inference.embed(np.arange(2), F32, F32, np.arange(2)),
    "last_tokens": lambda: inference.last_tokens(F32, np.arange(2)),
}


@pytest.mark.any_version
@pytest.mark.parametrize("case", REFUSED)
def test_the_way_out_is_one(case: str) -> None:
    jax.eval_shape(FOLLOWED[case])


@pytest.mark.any_version
@pytest.mark.parametrize("case", REFUSED)
def test_errors_say_what_to_do(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^{case.split()[0].replace('softmax', 'masked_softmax')}: .*{message}"):
        call()
