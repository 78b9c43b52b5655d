"""What models are asked in tests that compare their tokens with those of a run alone."""

from __future__ import annotations

from pathlib import Path

from support.server import Server

CONFIG = """
slo: {ttft: 1x, tpot: 1x, yield_ms: 1}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
"""Little time, and checkpoints every few tokens."""
LAYERS = 4
TOKENS = 64
PROMPTS = [
    f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + 3 * i % 5) for i in range(10)
]


def generate(server: Server, at_once: int, headers: dict[str, str] | None = None) -> list[str]:
    """The answers to PROMPTS, of which so many are asked at a time."""
    sampling = {"max_new_tokens": TOKENS}
    return server.generate_all(PROMPTS, at_once, sampling_params=sampling, headers=headers)


def assert_tokens_are_those_of_transformers(server: Server, folder: Path) -> None:
    """Each token that the server gives is the likeliest to `transformers`, too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in PROMPTS[:3]:
        answer = server.generate(prompt, sampling_params={"max_new_tokens": TOKENS})
        reply = answer["output_ids"]
        asked = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([asked + reply])).logits[0, len(asked) - 1 : -1]
        assert len(reply) == TOKENS
        assert logits.argmax(-1).tolist() == reply
