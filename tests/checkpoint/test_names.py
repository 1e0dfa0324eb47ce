"""Names of tensors, against lists of what the checkpoints hold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_deepgemm.checkpoint import Checkpoint, Weight, hugging_face_names, load_quantized, save_safetensors
from jax_deepgemm.quantization import Fp4Array, QuantizedArray

pytestmark = pytest.mark.any_version

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "n_routed_experts": 256, "n_shared_experts": 1, "q_lora_rank": 1536, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 128, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "attention_bias": True,
    "tie_word_embeddings": False,
}  # fmt: skip


def tensors(names: Any) -> list[str]:
    found = []
    for leaf in jax.tree.leaves(names):
        found += [name for row in leaf.tensors() for name in row] if isinstance(leaf, Weight) else [leaf]
    return found


def patterns(names: Any) -> Counter[str]:
    """How often each name is there, numbers of layers and experts aside."""
    return Counter(re.sub(r"\.\d+\.", ".#.", re.sub(r"\.\d+\.", ".#.", name)) for name in tensors(names))


OUTSIDE = {"model.embed_tokens.weight": 1, "model.norm.weight": 1, "lm_head.weight": 1}


def layers(count: int, *names: str) -> dict[str, int]:
    return {f"model.layers.#.{name}": count for name in names}


NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def test_deepseek_v3() -> None:
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"]
    attention += ["kv_b_proj", "o_proj"]
    want = OUTSIDE | layers(61, *NORMS, *(f"self_attn.{part}.weight" for part in attention))
    want |= layers(3, *(f"mlp.{part}" for part in GATED))
    want |= layers(58, "mlp.gate.weight", "mlp.gate.e_score_correction_bias")
    want |= layers(58, *(f"mlp.shared_experts.{part}" for part in GATED))
    want |= layers(58 * 256, *(f"mlp.experts.#.{part}" for part in GATED))
    assert patterns(hugging_face_names(DEEPSEEK_V3)) == want
    parts = "wq_b.weight wk.weight weights_proj.weight k_norm.weight k_norm.bias"
    want |= layers(61, *(f"self_attn.indexer.{part}" for part in parts.split()))
    assert patterns(hugging_face_names(DEEPSEEK_V3 | {"model_type": "deepseek_v32"})) == want
    without = hugging_face_names(DEEPSEEK_V3 | {"q_lora_rank": None}, layers=[0])
    assert without["layers"][0]["attention"]["q"] == "model.layers.0.self_attn.q_proj.weight"


def test_deepseek_v3_s_layer_of_another_token() -> None:
    config = DEEPSEEK_V3 | {"num_nextn_predict_layers": 1}
    assert "mtp" not in hugging_face_names(config)
    (found,) = hugging_face_names(config, layers=[], mtp=True)["mtp"]
    own = ["enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head"]
    last = hugging_face_names(config | {"num_hidden_layers": 62}, layers=[61])["layers"][0]
    want = [f"model.layers.61.{name}.weight" for name in own]
    assert sorted(tensors(found)) == sorted(want + tensors(last))
    with pytest.raises(ValueError, match="leave mtp out"):
        hugging_face_names(QWEN3_30B, mtp=True)


def test_qwen3_moe() -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"]
    want = OUTSIDE | layers(
        48, *NORMS, *(f"self_attn.{part}.weight" for part in attention), "mlp.gate.weight"
    )
    want |= layers(48 * 128, *(f"mlp.experts.#.{part}" for part in GATED))
    assert patterns(hugging_face_names(QWEN3_30B)) == want
    tied = hugging_face_names(QWEN3_30B | {"tie_word_embeddings": True, "mlp_only_layers": [1]}, layers=[1])
    assert "head" not in tied
    assert tied["layers"][0]["mlp"]["w2"] == Weight("model.layers.1.mlp.down_proj.weight")


def test_gpt_oss() -> None:
    want = OUTSIDE | layers(
        24, *NORMS, "self_attn.sinks", "mlp.router.weight", "mlp.router.bias",
        *(f"self_attn.{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")),
        *(f"mlp.experts.{part}{end}" for part in ("gate_up_proj", "down_proj") for end in ("", "_bias")),
    )  # fmt: skip
    assert patterns(hugging_face_names(GPT_OSS_20B)) == want


def test_what_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"model_type is 'llama', known are deepseek_v3, .*with Weight"):
        hugging_face_names({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"layers are \[0, 48\], the model has 0 to 47"):
        hugging_face_names(QWEN3_30B, layers=[0, 48])
    with pytest.raises(KeyError, match="n_routed_experts"):
        hugging_face_names({name: DEEPSEEK_V3[name] for name in DEEPSEEK_V3 if name != "n_routed_experts"})
    for bad in (lambda: Weight(), lambda: Weight("{}", experts=0), lambda: Weight("a", experts=2)):
        with pytest.raises(ValueError, match="need"):
            bad()


@pytest.mark.parametrize(
    "config", [DEEPSEEK_V3, QWEN3_30B, GPT_OSS_20B], ids=lambda config: config["model_type"]
)
def test_a_small_model_loads(config: dict[str, Any], tmp_path: Path) -> None:
    """Layer 3, of experts, with the tensors that its quantised checkpoint has."""
    config = config | {"n_routed_experts": 2, "num_experts": 2, "num_hidden_layers": 4}
    names = hugging_face_names(config, layers=[3])
    stored: dict[str, np.ndarray] = {}
    for name in tensors(names):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored |= {f"{name}_blocks": np.ones((2, 64, 4, 16), np.uint8)}
            stored |= {f"{name}_scales": np.full((2, 64, 4), 127, np.uint8)}
        elif config["model_type"] != "gpt_oss" and "_proj" in name:
            stored[name] = np.ones((192, 256), np.uint8).view(jax.numpy.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = np.ones((2, 2), np.float32)
        else:
            stored[name] = np.ones((2, 2), jax.numpy.bfloat16)
    save_safetensors(tmp_path / "model.safetensors", stored)
    (layer,) = load_quantized(Checkpoint(tmp_path), names)["layers"]
    if config["model_type"] == "gpt_oss":
        assert isinstance(layer["mlp"]["w13"], Fp4Array)
        assert layer["mlp"]["w2"].shape == (2, 64, 128)
    else:
        assert isinstance(layer["attention"]["o"], QuantizedArray)
        assert (layer["mlp"]["w13"].shape, layer["mlp"]["w13"].block) == ((2, 384, 256), (1, 128))
        assert (layer["mlp"]["w2"].shape, layer["mlp"]["w2"].block) == ((2, 192, 256), (128, 128))
