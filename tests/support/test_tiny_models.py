from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.tiny_models import CONTEXT_TOKENS, Arch, make_tiny_adapter, make_tiny_model

PROMPT = "The capital of France is"


def greedy(folder: Path, prompt: str, tokens: int) -> tuple[list[int], str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0].tolist()
    reply = output[inputs["input_ids"].shape[1] :]
    return reply, tokenizer.decode(reply)


@pytest.mark.parametrize("arch", get_args(Arch))
def test_replies_are_varied_readable_and_run_to_their_limit(tmp_path: Path, arch: Arch) -> None:
    folder = make_tiny_model(tmp_path, arch=arch)

    reply, text = greedy(folder, PROMPT, tokens=64)

    assert len(reply) == 64
    assert len(set(reply)) > 20
    assert len(set(reply[-16:])) > 4
    assert text.isascii()
    assert text.isprintable()


def test_a_reply_depends_on_the_start_of_its_prompt(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, arch="llama")

    assert greedy(folder, "a" + PROMPT, 16) != greedy(folder, "b" + PROMPT, 16)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        make_tiny_model(tmp_path / name, arch="qwen3", layers=2, seed=seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )

    weights = (first / "model.safetensors").read_bytes()
    assert weights == (again / "model.safetensors").read_bytes()
    assert weights != (other / "model.safetensors").read_bytes()


def test_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, arch="llama", dtype="bfloat16")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == CONTEXT_TOKENS


def test_a_token_is_a_byte_and_text_round_trips(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, arch="llama"))

    assert len(tokenizer.encode("Hello, world 123\n")) == 17
    assert tokenizer.decode(tokenizer.encode("naïve 你好 \t\n")) == "naïve 你好 \t\n"


def test_the_chat_template_ends_turns_with_eos(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, arch="llama"))

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )

    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer.encode(text)) == 3 + len("user\nHi\nassistant\n")


def test_an_adapter_has_two_matrices_for_each_projection_of_its_model(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", arch="llama", layers=2)
    adapter = make_tiny_adapter(tmp_path / "adapter", model=model, seed=0, rank=4)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    down_a = weights["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    down_b = weights["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    down = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert (down_b @ down_a).shape == down.shape
    assert 0.3 < (down_b @ down_a).std() / down.std() < 2
