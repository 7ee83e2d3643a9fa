"""Checkpoints with a vision tower, used for text alone: tiny random ones of the families that people have."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import appended, scored
from servers import CompletionServer
from transformers import AutoConfig, AutoModelForImageTextToText

from s2t_agents import Budget, ChatS2T, Engine, Escalation, LocalLLM
from s2t_agents.errors import ModelNotFound
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model, tiny_tokenizer
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

TOKENS = len(tiny_tokenizer())
TEXT: dict[str, Any] = {
    "vocab_size": TOKENS + 5,  # the last ones stand for pictures
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": tiny_tokenizer().eos_token_id,
    "pad_token_id": tiny_tokenizer().pad_token_id,
    "bos_token_id": None,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": SIGHT,
        "mm_tokens_per_image": 4,
        "image_token_index": TOKENS + 1,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_scaling": MROPE},
        "vision_config": {**QWEN_SIGHT, "fullatt_block_indexes": [0]},
        "image_token_id": TOKENS + 1,
        "video_token_id": TOKENS + 2,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**SIGHT, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": TOKENS + 1,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": TOKENS + 1,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The whole model, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(request.param, **FAMILIES[request.param])
        ).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that tokens differ
    whole.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return whole, folder


def test_it_writes_what_the_whole_model_writes(checkpoint: tuple[Any, Path]) -> None:
    whole, folder = checkpoint
    model = LanguageModel.load(str(folder), dtype=torch.float32)
    ids = list(range(3, 40))
    said = whole.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, suppress_tokens=list(range(TOKENS, TOKENS + 5))
    )[0, len(ids) :].tolist()
    assert [step.token_id for step in Engine(model).steps(ids, Sampling(max_tokens=12))] == said


def test_a_served_one_has_the_end_tokens_that_it_would_have_here(
    checkpoint: tuple[Any, Path], server: CompletionServer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint[1], tmp_path / "model"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [5, 6]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    here = LanguageModel.load(str(folder)).eos_ids
    assert here == {5, 6, tiny_tokenizer().eos_token_id}
    address = f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"
    assert LanguageModel.load(address, tokenizer=str(folder)).eos_ids == here


def test_candidates_and_chunks_are_read_exactly(checkpoint: tuple[Any, Path]) -> None:
    _, folder = checkpoint
    model = LanguageModel.load(str(folder), dtype=torch.float32)
    ids, candidates = torch.arange(3, 40), torch.tensor([50, 7, 200])
    cache = model.new_cache()
    appended(model, ids[:20], cache)
    logits, _ = appended(model, ids[20:], cache)
    assert torch.allclose(logits, appended(model, ids, model.new_cache())[0], atol=1e-4)
    seen = scored(model, candidates, cache, len(ids))
    for token, hidden in zip(candidates, seen, strict=True):
        _, alone = appended(model, torch.cat([ids, token[None]]), model.new_cache())
        assert torch.allclose(hidden, alone, atol=1e-4)


def test_it_chats_counts_asks_and_says_its_window(checkpoint: tuple[Any, Path]) -> None:
    _, folder = checkpoint
    chat = ChatS2T(
        model=str(folder), max_tokens=6, trigger=always(),
        escalation=Escalation(LocalLLM(tiny_model(seed=3)), margin=1.0), budget=Budget(escalations=9),
    )  # fmt: skip
    assert chat.profile["max_input_tokens"] == 512
    assert chat.get_num_tokens("abc") == 3
    told = chat.invoke("hello").response_metadata["s2t"]
    assert told["escalations"] > 0
    assert not told["degraded"]


@pytest.mark.parametrize("family", ["clip", "vit", "siglip"])
def test_a_model_that_writes_no_text_is_named(family: str, tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=f"(?i)no causal language model but a {family}"):
        LanguageModel.load(str(tmp_path))
