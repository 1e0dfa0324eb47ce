"""Names of tensors in Hugging Face checkpoints, as trees that `load_quantized` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Names = dict[str, Any]


@dataclass(frozen=True, init=False)
class Weight:
    """A weight that a checkpoint has in several tensors.

    Args:
      names: of tensors that are joined along their rows, as gate and up; with "{}" where the expert stands.
      experts: number of experts, or which ones, that are stacked in front; None: names are as they are.

    Raises:
      ValueError: no name; experts and a name without "{}"; no expert.

    >>> Weight("mlp.{}.gate.weight", "mlp.{}.up.weight", experts=2).tensors()
    [['mlp.0.gate.weight', 'mlp.0.up.weight'], ['mlp.1.gate.weight', 'mlp.1.up.weight']]
    """

    names: tuple[str, ...]
    experts: tuple[int, ...] | None

    def __init__(self, *names: str, experts: int | Iterable[int] | None = None) -> None:
        which = range(experts) if isinstance(experts, int) else experts
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "experts", None if which is None else tuple(which))
        if not names or self.experts == ():
            raise ValueError(f"{self!r}: need a name, and an expert.")
        if self.experts is not None and not all("{}" in name for name in names):
            raise ValueError(f"{self!r}: need '{{}}' in each name, where the number of the expert stands.")

    def tensors(self) -> list[list[str]]:
        """Names of tensors: for each expert those that are joined."""
        if self.experts is None:
            return [list(self.names)]
        return [[name.replace("{}", str(e)) for name in self.names] for e in self.experts]


def hugging_face_names(
    config: Mapping[str, Any], layers: Iterable[int] | None = None, *, mtp: bool = False
) -> Names:
    """The tensors of a model of Hugging Face by what they are, for `load_quantized`.

    >>> config = dict(model_type="qwen3_moe", num_hidden_layers=1, num_experts=128)
    >>> names = hugging_face_names(config)
    >>> sorted(names), sorted(names["layers"][0]["mlp"])
    (['embed', 'head', 'layers', 'norm'], ['router', 'w13', 'w2'])
    >>> names["layers"][0]["mlp"]["w2"].names
    ('model.layers.0.mlp.experts.{}.down_proj.weight',)

    Args:
      config: the checkpoint's config.json, as a map. Of model_type "deepseek_v3" (V3, V3.1, R1),
        "deepseek_v32", "qwen3_moe" or "gpt_oss".
      layers: numbers of the layers that are wanted; None for all.
      mtp: DeepSeek's layers that predict a further token each (multi-token prediction) too, which some
        quantised checkpoints leave out.

    Returns:
      {"embed", "norm", "head" (not where it is tied to embed), "layers": [{"attention": {..}, "mlp": {..},
      "attention_norm", "mlp_norm"}, ..]}. In "mlp": "w13" (gate and up, joined) and "w2"; where they are
      those of experts, stacked in front, and with "router", of DeepSeek also "router_bias" and "shared".
      With mtp a list "mtp" of such layers, with "embed_norm", "hidden_norm", "project" ([d, 2 d], of the
      normed embedding and the normed hidden state), "norm", and "embed" and "head", which are copies of the
      model's.
      gpt-oss has gate and up in alternate rows (activation.GPT_OSS), and biases "b13", "b2".

    Raises:
      ValueError: another model_type; layers that the model has not, mtp of one that has none.
      KeyError: a config without an entry that its model needs.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise ValueError(
            f"hugging_face_names: model_type is {kind!r}, known are {', '.join(MODELS)}. Write the tree of "
            "names yourself, with Weight where tensors are joined or stacked."
        )
    count = int(config["num_hidden_layers"])
    wanted = list(range(count) if layers is None else layers)
    if not all(0 <= layer < count for layer in wanted):
        raise ValueError(f"hugging_face_names: layers are {wanted}, the model has 0 to {count - 1}.")
    names: Names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if not config.get("tie_word_embeddings", False):
        names["head"] = "lm_head.weight"
    names["layers"] = [_layer(config, layer, MODELS[kind]) for layer in wanted]
    if mtp:
        names["mtp"] = [_mtp(config, count + i, MODELS[kind]) for i in range(_further(config))]
    return names


def _further(config: Mapping[str, Any]) -> int:
    count = int(config.get("num_nextn_predict_layers") or 0)
    if not count:
        raise ValueError(
            "hugging_face_names: mtp, and the config has no num_nextn_predict_layers: leave mtp out."
        )
    return count


def _mtp(config: Mapping[str, Any], layer: int, model: Callable[..., tuple[Names, Names]]) -> Names:
    parts = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "embed": "embed_tokens"}
    parts |= {"norm": "shared_head.norm", "head": "shared_head.head"}
    own = {part: f"model.layers.{layer}.{name}.weight" for part, name in parts.items()}
    return _layer(config, layer, model) | own


def _layer(config: Mapping[str, Any], layer: int, model: Callable[..., tuple[Names, Names]]) -> Names:
    at = f"model.layers.{layer}"
    attention, mlp = model(config, layer, f"{at}.self_attn", f"{at}.mlp")
    return {
        "attention_norm": f"{at}.input_layernorm.weight",
        "attention": attention,
        "mlp_norm": f"{at}.post_attention_layernorm.weight",
        "mlp": mlp,
    }


def _gated(at: str, experts: int | None = None) -> Names:
    """Gate and up as one, and down."""
    return {
        "w13": Weight(f"{at}.gate_proj.weight", f"{at}.up_proj.weight", experts=experts),
        "w2": Weight(f"{at}.down_proj.weight", experts=experts),
    }


def _deepseek_v3(config: Mapping[str, Any], layer: int, attn: str, mlp: str) -> tuple[Names, Names]:
    attention: Names = {
        "kv_a": f"{attn}.kv_a_proj_with_mqa.weight",
        "kv_a_norm": f"{attn}.kv_a_layernorm.weight",
        "kv_b": f"{attn}.kv_b_proj.weight",
        "o": f"{attn}.o_proj.weight",
    }
    if config.get("q_lora_rank") is None:
        attention["q"] = f"{attn}.q_proj.weight"
    else:
        attention |= {"q_a": f"{attn}.q_a_proj.weight", "q_a_norm": f"{attn}.q_a_layernorm.weight"}
        attention["q_b"] = f"{attn}.q_b_proj.weight"
    if config["model_type"] == "deepseek_v32":
        parts = {"q_b": "wq_b.weight", "k": "wk.weight", "weights": "weights_proj.weight"}
        parts |= {"k_norm": "k_norm.weight", "k_norm_bias": "k_norm.bias"}
        attention["indexer"] = {part: f"{attn}.indexer.{name}" for part, name in parts.items()}
    dense = layer < config["first_k_dense_replace"] or layer % config.get("moe_layer_freq", 1)
    if dense:
        return attention, _gated(mlp)
    routed = _gated(f"{mlp}.experts.{{}}", config["n_routed_experts"])
    routed |= {"router": f"{mlp}.gate.weight", "router_bias": f"{mlp}.gate.e_score_correction_bias"}
    if config.get("n_shared_experts"):
        routed["shared"] = _gated(f"{mlp}.shared_experts")
    return attention, routed


def _heads(attn: str, bias: bool) -> Names:
    parts = ("weight", "bias") if bias else ("weight",)
    return {
        name if part == "weight" else f"{name}_bias": f"{attn}.{name}_proj.{part}"
        for name in "qkvo"
        for part in parts
    }


def _qwen3_moe(config: Mapping[str, Any], layer: int, attn: str, mlp: str) -> tuple[Names, Names]:
    attention = _heads(attn, config.get("attention_bias", False))
    attention |= {f"{name}_norm": f"{attn}.{name}_norm.weight" for name in "qk"}
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    if layer in config.get("mlp_only_layers", ()) or not sparse:
        return attention, _gated(mlp)
    routed = _gated(f"{mlp}.experts.{{}}", config["num_experts"])
    return attention, routed | {"router": f"{mlp}.gate.weight"}


def _gpt_oss(config: Mapping[str, Any], layer: int, attn: str, mlp: str) -> tuple[Names, Names]:
    attention = _heads(attn, config.get("attention_bias", True)) | {"sinks": f"{attn}.sinks"}
    experts = f"{mlp}.experts"
    return attention, {
        "router": f"{mlp}.router.weight",
        "router_bias": f"{mlp}.router.bias",
        "w13": f"{experts}.gate_up_proj",
        "b13": f"{experts}.gate_up_proj_bias",
        "w2": f"{experts}.down_proj",
        "b2": f"{experts}.down_proj_bias",
    }


MODELS: dict[str, Callable[..., tuple[Names, Names]]] = {
    "deepseek_v3": _deepseek_v3,
    "deepseek_v32": _deepseek_v3,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
}
