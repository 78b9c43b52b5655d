"""Tiny random models, made in a second: no download, and every greedy reply is different.

Tokens are bytes, so an ASCII prompt of n characters is n tokens (no bos is added).
Rows of the output head for special tokens and for bytes that are not printable ASCII are zero,
so that a reply is readable text and runs to its length limit: it never meets eos by chance.
A prompt of one repeated character gives attention nothing to tell apart: use varied prompts.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MellumConfig,
    MellumForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

__all__ = ["CONTEXT_TOKENS", "Arch", "make_tiny_adapter", "make_tiny_model"]

Arch = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "gemma3_causal",
    "mellum",
    "gpt_oss",
    "qwen3_next",
]
CONTEXT_TOKENS = 4096

_ARCHS: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "gemma3_causal": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mellum": (MellumConfig, MellumForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_VOCAB = {token: index for index, token in enumerate([*_SPECIAL, *_BYTES])}
_BOS, _EOS, _PAD = (_VOCAB[t] for t in ("<|endoftext|>", "<|im_end|>", "<|pad|>"))
# ByteLevel writes a space as this letter; the other printable ASCII bytes stand for themselves.
_SPOKEN = [_VOCAB[c] for c in ("Ġ", *string.ascii_letters, *string.digits, *string.punctuation)]
_HEAD_DIM = 64 if torch.cuda.is_available() else 16
_HEADS = 4
# Wide enough that attention is sharp and a reply depends on its whole prompt; narrower weights
# repeat themselves, wider ones amplify rounding.
_WEIGHT_STD = 0.25 * (16 / _HEAD_DIM) ** 0.5
_BIAS_STD = 0.05
_EXPERTS = 8
_EXPERTS_PER_TOKEN = 2
_WINDOW = 24
_DETAILS: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": _EXPERTS, "num_experts_per_tok": _EXPERTS_PER_TOKEN},
    "qwen3_moe": {
        "num_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "n_routed_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "softmax",
        "num_key_value_heads": _HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": 2 * _HEAD_DIM,
        "qk_nope_head_dim": _HEAD_DIM,
        "qk_rope_head_dim": _HEAD_DIM,
        "v_head_dim": _HEAD_DIM,
        "rope_parameters": {  # SGLang on a CPU has no other for it
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT_TOKENS // 4,
        },
    },
    "gemma3_causal": {
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": _HEAD_DIM,
        "tie_word_embeddings": True,  # SGLang asks the embeddings for logits whatever this says
    },
    "mellum": {
        "sliding_window": _WINDOW,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 64,
    },
    "gpt_oss": {
        "sliding_window": _WINDOW,
        "num_local_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "intermediate_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "qwen3_next": {
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": _HEADS,
        "linear_key_head_dim": _HEAD_DIM,
        "linear_value_head_dim": _HEAD_DIM,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
    },
}
_LOG_DECAY = -4.0
"""A state remembers some hundred tokens."""
_QK_NORM = 2.0
_FEED_FORWARD_NORM = 8.0  # with the embeddings as output head a smaller one repeats the last token
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER_STD = 0.25
"""An adapter's product of two is of about half a layer's weights."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    arch: Arch,
    layers: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> Path:
    """Write a random model that transformers and SGLang load, and return its folder.

    4 query and 2 KV heads (TP 1 or 2) of 16, or of the 64 that GPU kernels need; CONTEXT_TOKENS of
    context; about 0.18M parameters on a CPU, with experts up to 0.9M. The same arguments give the
    same weights.

    Args:
        folder: made if absent; files of an earlier model in it are replaced.
        arch: qwen2 has biases in attention, qwen3 norms on queries and keys, llama neither. mixtral
            and qwen3_moe have eight experts in every layer, of which two see a token; deepseek_v2
            has them in all but the first, a shared one beside them, and latent attention.
            gemma3_causal, mellum and gpt_oss have a window of 24 tokens in every other layer;
            mellum has eight experts in half of its layers, gpt_oss in all, and attention sinks.
            qwen3_next has a state in every other layer, and experts as deepseek_v2 has them.
        layers: decoder layers.
        dtype: of the weights on disk; bfloat16 weights are the float32 ones, rounded.
        seed: of the weights.
    """
    _tokenizer().save_pretrained(folder)
    _model(arch, layers, seed).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_tiny_adapter(folder: Path, *, model: Path, seed: int, rank: int = 4) -> Path:
    """Write a random adapter (LoRA) for a model of this module, and return its folder.

    For the projections of attention and of the MLP, in the format of PEFT, which is not needed.

    Args:
        folder: made if absent.
        model: the folder of a dense model.
        seed: of the weights.
        rank: of the adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [*_ADAPTED]}
    config |= {"base_model_name_or_path": str(model), "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(_ADAPTED):
            out_size, in_size = weight.shape
            for which, shape in (("A", (rank, in_size)), ("B", (out_size, rank))):
                values = torch.empty(shape).normal_(std=_ADAPTER_STD, generator=generator)
                weights[f"base_model.model.{module}.lora_{which}.weight"] = values
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def _model(arch: Arch, layers: int, seed: int) -> PreTrainedModel:
    config_class, model_class = _ARCHS[arch]
    details = _DETAILS.get(arch, {})
    if "sliding_window" in details:
        details = details | {
            "layer_types": _alternating("sliding_attention", "full_attention", layers)
        }
    if arch == "qwen3_next":
        details = details | {
            "layer_types": _alternating("linear_attention", "full_attention", layers)
        }
    if arch == "mellum":
        details = details | {"mlp_layer_types": _alternating("dense", "sparse", layers)}
    model = model_class(config_class(**_geometry(layers) | details))
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def _alternating(even: str, odd: str, layers: int) -> list[str]:
    return [odd if layer % 2 else even for layer in range(layers)]


def _geometry(layers: int) -> dict[str, object]:
    return {
        "vocab_size": len(_VOCAB),
        "hidden_size": _HEADS * _HEAD_DIM,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "pad_token_id": _PAD,
    }


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    for name, weight in sorted(model.named_parameters()):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(_QK_NORM)
        elif name.endswith("post_feedforward_layernorm.weight"):
            weight.fill_(_FEED_FORWARD_NORM)
        elif name.endswith("A_log"):
            weight.fill_(_LOG_DECAY)
        elif "norm" not in name:
            weight.normal_(std=_WEIGHT_STD if weight.ndim > 1 else _BIAS_STD, generator=generator)
        if name.endswith("sinks"):
            weight.copy_(weight.bfloat16())  # what SGLang keeps of them
    _mute_unspoken(model.get_output_embeddings().weight)


def _mute_unspoken(head: torch.Tensor) -> None:
    spoken = torch.zeros(len(head), 1)
    spoken[_SPOKEN] = 1
    head.mul_(spoken)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=_VOCAB, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
