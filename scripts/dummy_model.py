"""Write the geometry of a well-known model, for SGLang's `--load-format dummy`.

    python scripts/dummy_model.py llama-3.1-8b .cache/models/llama-3.1-8b-dummy

The server makes the weights up: speed and memory are the real model's, the text is noise. There is
no tokenizer, so the server needs `--skip-tokenizer-init` and prompts are token ids. Geometries are
the config.json of meta-llama/Llama-3.1-8B and Qwen/Qwen2.5-7B on Hugging Face; `tiny` is nobody's,
for a rehearsal on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}

GEOMETRIES = {
    "llama-3.1-8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen2.5-7b": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
GEOMETRIES["tiny"] = {
    **GEOMETRIES["llama-3.1-8b"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=GEOMETRIES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(GEOMETRIES[given.name], indent=1)
    (given.folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
