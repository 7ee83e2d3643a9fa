"""Architectures beyond those that the tests know best: at once, after one another and at candidates they compute what
transformers' modules compute of a whole sequence, whether or not several sequences fit into one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from sequences import read, scored_after
from transformers import AutoModelForCausalLM

from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_config, tiny_model, tiny_tokenizer
from s2t_agents.types import Sampling

WINDOW_IN_THE_MASK: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": 16},
}
"""Their attention is not told of a window."""

NOT_PACKED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    },
    "diffllama": {},
    "doge": {},
    "bloom": {},
    "falcon": {},
    "gptj": {"rotary_dim": 4},
    "mpt": {},
    "llama4_text": {"num_local_experts": 4},
}
"""They read the KV before their attention, have an attention of their own, or chunks of it."""

BETWEEN: Mapping[str, Mapping[str, Any]] = {
    "minicpm3": {"num_key_value_heads": 4},
}
"""They do something between their layers and the output layer."""

ALL = {**WINDOW_IN_THE_MASK, **NOT_PACKED, **BETWEEN}


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def written(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    """Greedy tokens after ``ids``, each from a forward over all tokens before it."""
    found = list(ids)
    for _ in range(count):
        found.append(int(model.model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.parametrize("name", ALL)
def test_conversations_at_once_are_written_as_transformers_writes_each(name: str) -> None:
    model = tiny_model(name, **ALL[name])
    engine, sampling = Engine(model), Sampling(max_tokens=8, ignore_eos=True)

    def conversation(seed: int) -> list[list[int]]:
        first = prompt(seed, 25 + seed)
        answer = [step.token_id for step in engine.steps(first, sampling)]
        second = [*first, *answer, *prompt(seed + 10, 20)]
        return [first, answer, second, [step.token_id for step in engine.steps(second, sampling)]]

    with ThreadPoolExecutor(3) as pool:
        conversations = list(pool.map(conversation, range(3)))
    for first, answer, second, another in conversations:  # once none of them reads any more
        assert answer == written(model, first, 8)
        assert another == written(model, second, 8)


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_candidates_are_those_of_whole_sequences(name: str) -> None:
    model = tiny_model(name, **ALL[name])
    ids, candidates = prompt(1, 40), torch.tensor([5, 9, 77])
    hidden = scored_after(read(model, ids), candidates)
    whole: list[torch.Tensor] = []  # what the output layer reads
    model.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: whole.append(args[0][0, -1]))
    for each in candidates.tolist():
        model.model(input_ids=torch.tensor([[*ids, each]]))
    assert (hidden - torch.stack(whole)).abs().max() < 1e-4 * torch.stack(whole).abs().max()


@pytest.mark.parametrize("name", ALL)
def test_sequences_share_a_forward_where_that_gives_the_same(name: str) -> None:
    assert tiny_model(name, **ALL[name]).capabilities.batching == (name in WINDOW_IN_THE_MASK)


@pytest.mark.parametrize("name", ["llama", "llama4_text"])
def test_the_layers_are_found_without_the_output_layer(name: str) -> None:
    model = tiny_model(name, **ALL.get(name, {}))
    head = model.model.get_output_embeddings()
    assert not any(module is head for module in model.torch_backend.decoder.modules())


@pytest.mark.parametrize(
    ("name", "problem"),
    [("recurrent_gemma", "does not go on from a KV cache|from tokens alone"), ("xmod", "from tokens alone")],
)
def test_what_cannot_be_read_so_is_refused_before_the_first_answer(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_model(name)


def test_a_decoder_that_is_written_out_needs_no_attention_of_transformers() -> None:
    config = tiny_config("llama", attn_implementation="flex_attention")
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer(), name="flex")
    assert model.capabilities.batching


class TestLongRope:
    """A model's factors do not change with what else is read."""

    @staticmethod
    def model(original: int, window: int) -> LanguageModel:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": original,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
        }
        return tiny_model(
            "phi3",
            max_position_embeddings=window,
            original_max_position_embeddings=original,
            rope_parameters=rope,
            sliding_window=None,
        )

    @pytest.mark.parametrize("window", [64, 512])
    def test_the_context_window_chooses_them(self, window: int) -> None:
        model, other = self.model(64, window), self.model(64, 512)
        reads_long = torch.equal(read(model, prompt(1, 30)).logits, read(other, prompt(1, 30)).logits)
        assert reads_long == (window > 64)

    def test_scales_by_the_longest_position_are_one_too(self) -> None:
        rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
        scales = {"short_mscale": 1.1, "long_mscale": 1.4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        settings = {"max_position_embeddings": 512, "rope_parameters": rope | scales, "sliding_window": None}
        model, ids = tiny_model("phimoe", num_local_experts=4, **settings), prompt(1, 60)
        sequence = read(model, ids[:20])
        sequence.append(ids[20:])
        with torch.inference_mode():
            whole = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(sequence.logits, whole, atol=1e-4)

    def test_an_answer_that_grows_past_the_original_length_goes_on_as_it_began(self) -> None:
        model, ids = self.model(64, 512), prompt(1, 55)
        steps = Engine(model).steps(ids, Sampling(max_tokens=30, ignore_eos=True))
        assert [step.token_id for step in steps] == written(model, ids, 30)

    def test_a_longer_neighbour_changes_nothing(self) -> None:
        model = self.model(64, 512)
        engine, sampling = Engine(model), Sampling(max_tokens=12, ignore_eos=True)
        prompts = [prompt(seed, length) for seed, length in enumerate((20, 40, 300))]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda ids: [step.token_id for step in engine.steps(ids, sampling)], prompts))
        assert answers == [written(model, ids, 12) for ids in prompts]

    def test_a_prompt_in_chunks_is_the_prompt_in_one(self) -> None:
        model, ids = self.model(600, 4096), prompt(2, 1500)
        sequence = read(model, ids[:500])
        sequence.append(ids[500:])
        with torch.inference_mode():
            whole = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(sequence.logits, whole, atol=1e-4)
