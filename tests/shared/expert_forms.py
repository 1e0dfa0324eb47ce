"""Experts as models have them: a table of forms, operands, and every expert in float64."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_deepgemm.activation import GPT_OSS, Activation
from jax_deepgemm.moe import ExpertForm
from tests.shared.activations import activate, repeated
from tests.shared.moe_oracle import normal, random_ids, wide

MODELS = {
    "qwen3": ExpertForm(),
    "gpt-oss": ExpertForm(GPT_OSS, "kn"),
    "llama4": ExpertForm(weights_first=True),
    "gemma4": ExpertForm("gelu", "kn"),
    "nemotron3": ExpertForm("relu2"),
    "deepseek-v4": ExpertForm(Activation(limit=6.0), scale_format="ue8m0"),
}


def bound(recipe: str, form: ExpertForm) -> float:
    """Of the relative error of y and of each gradient. Where numbers are clipped, rounding puts some of them
    on the other side of the limit, and their gradient is there or not."""
    clipped = form.act.limit is not None
    return {"bf16": 0.05 if clipped else 0.012, "fp8": 0.12 if clipped else 0.08}[recipe]


Sizes = tuple[int, int, int, int, int]


def arrays(form: ExpertForm, sizes: Sizes = (24, 128, 128, 4, 2)) -> tuple[Any, ...]:
    """x, ids, weights, w13, w2, dy of t tokens, h, i, e experts, k for a token; some copies are dropped."""
    t, h, i, e, k = sizes
    n, scale = form.act.halves * i, 2.3 / h**0.5
    w13 = normal(1, e, n, h, dtype=jnp.float32, scale=scale)
    w2 = normal(2, e, h, i, dtype=jnp.float32, scale=scale / 2)
    if form.weight_layout == "kn":
        w13, w2 = w13.mT, w2.mT
    weights = jnp.asarray(np.random.default_rng(3).uniform(0.2, 1, (t, k)), jnp.float32)
    return normal(0, t, h), random_ids(4, t, k, e, dropped=0.1), weights, w13, w2, normal(5, t, h)


def biases(form: ExpertForm, w13: Any, w2: Any) -> tuple[Any, Any]:
    """b13, b2 of these weights."""
    (e, n, _), (_, h, _) = form.sizes(w13, w2)
    return normal(6, e, n, dtype=jnp.float32), normal(7, e, h, dtype=jnp.float32)


def float64(
    form: ExpertForm,
    x: Any,
    ids: Any,
    weights: Any,
    w13: Any,
    w2: Any,
    dy: Any,
    b13: Any = None,
    b2: Any = None,
) -> list[np.ndarray]:
    """y and the gradients of x, weights, w13, w2 and of the biases, expert by expert."""
    x, weights, w13, w2, dy = map(wide, (x, weights, w13, w2, dy))
    turned = form.weight_layout == "kn"
    first, second = (np.swapaxes(w, 1, 2) if turned else w for w in (w13, w2))
    bias13, bias2 = (np.zeros(w.shape[:2]) if b is None else wide(b) for b, w in ((b13, first), (b2, second)))
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dfirst, dsecond, dbias13, dbias2 = map(np.zeros_like, (first, second, bias13, bias2))
    for expert, slot in itertools.product(range(len(first)), range(ids.shape[1])):
        mine = np.asarray(ids)[:, slot] == expert
        weight = weights[mine, slot, None]
        rows = x[mine] * weight if form.weights_first else x[mine]
        act, partials = activate(rows @ first[expert].T + bias13[expert], form.act)
        after = np.ones_like(weight) if form.weights_first else weight
        result = act @ second[expert].T + bias2[expert]
        y[mine] += result * after
        dh = partials * repeated(dy[mine] @ second[expert], form.act) * after
        drows = dh @ first[expert]
        dx[mine] += drows * weight if form.weights_first else drows
        of_weight = drows * x[mine] if form.weights_first else dy[mine] * result
        dweights[mine, slot] += of_weight.sum(axis=1)
        dfirst[expert] += dh.T @ rows
        dsecond[expert] += dy[mine].T @ (act * after)
        dbias13[expert] += dh.sum(axis=0)
        dbias2[expert] += (dy[mine] * after).sum(axis=0)
    gradients = [np.swapaxes(d, 1, 2) if turned else d for d in (dfirst, dsecond)]
    of_biases = [d for d, b in ((dbias13, b13), (dbias2, b2)) if b is not None]
    return [y, dx, dweights, *gradients, *of_biases]
