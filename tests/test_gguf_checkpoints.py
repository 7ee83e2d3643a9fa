"""Which checkpoint a GGUF file was made of, whatever the converter has changed: selectors of one fit the other."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import HEADS, INNER, KV_HEADS, WIDTH, write_gguf
from training_fixtures import saved_head

from s2t_agents.backends.fingerprint import norms_of
from s2t_agents.backends.llamacpp.gguf_header import read_header
from s2t_agents.backends.llamacpp.tokenizer import read_tokenizer
from s2t_agents.backends.llamacpp.weights import CENTRED_AT_ONE, checkpoint_norms
from s2t_agents.errors import AdapterMismatch
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import load_selector
from s2t_agents.testing import tiny_model

pytest.importorskip("llama_cpp")

HEAD = WIDTH // HEADS
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gemma(folder: Path, seed: int = 0) -> tuple[LanguageModel, Path]:
    """A small Gemma 3 with trained norms in fp32, and the file that llama.cpp's converter makes of it."""
    model = tiny_model(
        "gemma3",
        seed=seed,
        vocab_size=264,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        query_pre_attn_scalar=HEAD,
        sliding_window=256,
        layer_types=["sliding_attention"] * 2,
    ).model
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        for weight in model.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.1)
    state = model.state_dict()
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for at in range(2):
        names |= {f"blk.{at}.{new}.weight": f"model.layers.{at}.{old}.weight" for old, new in LAYER.items()}

    def converted(name: str, values: np.ndarray) -> np.ndarray:
        found = state[names[name]].numpy()
        assert found.shape == values.shape
        return found + np.float32(1) if found.ndim == 1 else found

    sizes = {"attention.key_length": HEAD, "attention.value_length": HEAD, "attention.sliding_window": 256}
    file = write_gguf(folder / f"gemma-{seed}.gguf", architecture="gemma3", metadata=sizes, weights=converted)
    return LanguageModel(model, read_tokenizer(read_header(file)), name="gemma"), file


def agreement(caplog: pytest.LogCaptureFixture) -> int:
    ours = [record for record in caplog.records if record.name.startswith("s2t_agents")]
    (said,) = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    return int(said.partition("agree at ")[2].partition("%")[0])


def test_gemma_s_norms_are_its_checkpoint_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, file = gemma(tmp_path)
    gguf = LanguageModel.load(str(file), n_ctx=512)
    assert gguf.checkpoint_fingerprint == checkpoint.checkpoint_fingerprint is not None
    load_selector(saved_head(gguf, tmp_path / "head"), checkpoint)
    assert agreement(caplog) >= 95  # so the file is read as the model that it was made of
    other, _ = gemma(tmp_path, seed=5)
    with pytest.raises(AdapterMismatch, match="was trained for"):
        load_selector(tmp_path / "head", other)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "mpt", "bloom", "gemma3", "qwen3"])
def test_a_checkpoint_s_norms_are_found_whatever_they_are_called(family: str) -> None:
    model = tiny_model(family).model
    layers = [each for each in model.modules() if "Norm" in type(each).__name__]
    assert len(norms_of(model)) == len(layers) > model.config.num_hidden_layers


@pytest.mark.parametrize("architecture", ["llama", "qwen35", "gemma3n"])
def test_the_converter_s_one_is_taken_off_where_it_has_added_one(architecture: str, tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "a.gguf",
        architecture=architecture,
        metadata={"nextn_predict_layers": 1},
        weights=lambda name, values: values + (2 if name.startswith("blk.1") else 0),
    )
    added = 1 if architecture in CENTRED_AT_ONE else 0
    norms = [norm.tolist() for norm in checkpoint_norms(read_header(file))]
    assert norms == [[1 - added] * WIDTH] * 3  # the second block predicts further tokens


@pytest.mark.real
def test_a_head_of_gemma_s_file_fits_its_checkpoint(
    gemma3_270m_gguf: Path, gemma3_270m: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_head(LanguageModel.load(str(gemma3_270m_gguf), n_ctx=512), tmp_path)
    load_selector(tmp_path, LanguageModel.load(str(gemma3_270m)))
    assert agreement(caplog) >= 75
