"""The example of sparse attention: it learns, and with all keys chosen it is dense attention."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")


@pytest.fixture(scope="module")
def example() -> Any:
    return importlib.import_module("sparse_attention")


@pytest.fixture(scope="module")
def block(example: Any) -> Any:
    """Sizes, weights of the indexer and of the attention, and one sequence."""
    config = example.Config(hidden=64, heads=2, index_heads=4, tokens=40, top_k=8)
    indexer, attention = example.draw_weights(jax.random.key(0), config)
    return config, indexer, attention, example.draw_batch(jax.random.key(1), 1, config)[0]


@pytest.mark.any_version
@pytest.mark.slow
def test_the_indexer_learns(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--tokens", "64", "--top-k", "8", "--warm-up", "20", "--steps", "10"]) == 0
    said = capsys.readouterr().out
    assert "KL over all keys" in said
    assert "KL over 8 chosen keys" in said
    assert said.splitlines()[-1].startswith("PASS: of the 8 keys")


@pytest.mark.parametrize("top_k", [40, 64])
def test_with_all_keys_it_is_dense_attention(example: Any, block: Any, top_k: int) -> None:
    config, indexer, attention, x = block
    indices = example.choose(indexer, x, dataclasses.replace(config, top_k=top_k))
    got, given = example.sparse_attention(attention, x, indices, config)
    want, _ = example.dense_attention(attention, x, config)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.sum(indices >= 0, axis=1), np.arange(1, 41))
    assert not np.any(np.where(indices[:, None] < 0, given, 0))


def test_it_attends_to_nothing_but_what_was_chosen(example: Any, block: Any) -> None:
    config, indexer, attention, x = block
    indices = example.choose(indexer, x, config)
    assert indices.shape == (40, 8)
    assert np.all(np.asarray(indices) <= np.arange(40)[:, None])
    _, dense = example.dense_attention(attention, x, config)
    _, given = example.sparse_attention(attention, x, indices, config)
    there = (indices >= 0)[:, None]
    of_chosen = jnp.where(there, jnp.take_along_axis(dense, indices[:, None], axis=2), 0)
    want = of_chosen / jnp.sum(of_chosen, axis=2, keepdims=True)
    np.testing.assert_allclose(given, want, rtol=1e-4, atol=1e-6)


@pytest.mark.any_version
def test_nothing_is_left_to_learn_where_scores_are_the_attention_s(example: Any, block: Any) -> None:
    """The divergence is zero, and so is its gradient, where every key has the same of both."""
    config, indexer, attention, x = block
    flat = {**indexer, "weights": 0 * indexer["weights"]}, {**attention, "q": 0 * attention["q"]}
    kl, gradients = jax.value_and_grad(lambda p: example.divergence(p, flat[1], x, config))(flat[0])
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    for gradient in gradients.values():
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    kl, gradients = jax.value_and_grad(lambda p: example.divergence(p, attention, x, config))(indexer)
    assert kl > 0.1
    assert all(float(jnp.linalg.norm(gradient)) > 1e-3 for gradient in gradients.values())
