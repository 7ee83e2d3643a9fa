"""The written-out step says what the model says, and steps aside wherever it might not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sequences import appended
from torch_models import runner
from transformers import DynamicCache

from s2t_agents.backends.base import Append
from s2t_agents.backends.torch import model_runner
from s2t_agents.backends.torch.llama_decoder import llama_decoder_of
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

KNOWN = [name for name in ARCHITECTURES if runner(tiny_model(name)).llama_decoder is not None]


def full(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return model.model(torch.tensor([ids])).logits[0, -1].float()


def test_the_common_families_have_one_and_the_others_do_not() -> None:
    assert {"qwen2", "qwen3", "llama", "mistral"} <= set(KNOWN)
    assert not any(runner(tiny_model(name)).llama_decoder for name in (*RECURRENT, "gemma2", "gemma3", "phi3"))


@pytest.mark.parametrize("name", KNOWN)
def test_it_equals_the_model_for_one_and_for_several_sequences(name: str) -> None:
    model = tiny_model(name)
    assert runner(model).llama_decoder is not None
    prompts = [list(range(3, 3 + length)) for length in (2, 30, 9)]  # one of them past the sliding window
    caches = [model.new_cache() for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        appended(model, torch.tensor(prompt), cache)
    for token in (7, 8, 9):
        logits, hidden = runner(model).llama_decoder(
            torch.tensor([token] * 3), [len(prompt) for prompt in prompts], caches
        )
        for at, prompt in enumerate(prompts):
            prompt.append(token)
            assert torch.allclose(logits[at], full(model, prompt), atol=1e-4)
            assert torch.allclose(model.model.get_output_embeddings()(hidden[at]).float(), logits[at], atol=1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_a_prompt_in_chunks_is_the_prompt(name: str) -> None:
    """One of the chunks, and all of them together, reach past the sliding window."""
    model = tiny_model(name)
    assert runner(model).decoder_batch is not None
    ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(0))
    cache, own, length = model.new_cache(), DynamicCache(), 0
    for width in (2, 33, 1, 24):
        stretch = ids[length : length + width]
        ((logits, hidden),) = runner(model).decoder_batch([Append(stretch, cache, length)])
        length += width
        assert torch.allclose(logits, full(model, ids[:length].tolist()), atol=1e-4)
        assert torch.allclose(model.model.get_output_embeddings()(hidden).float(), logits, atol=1e-5)
    model.model(ids[None], past_key_values=own)
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
def test_chunks_and_tokens_of_several_sequences_go_in_one_forward(name: str) -> None:
    model = tiny_model(name)
    assert runner(model).decoder_batch is not None
    said = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14]]
    before = [[], [1, 2], [3] * 20, [4]]
    caches = [model.new_cache() for _ in said]
    for ids, cache in zip(before, caches, strict=True):
        if ids:
            model.backend.forward([Append(torch.tensor(ids), cache, 0)])[0]
    parts = [Append(torch.tensor(new), cache, len(old)) for new, cache, old in zip(said, caches, before, strict=True)]
    for new, old, cache, outcome in zip(said, before, caches, runner(model).decoder_batch(parts), strict=True):
        assert torch.allclose(outcome[0], full(model, [*old, *new]), atol=1e-4)
        assert cache.get_seq_length() == len(old) + len(new)


@pytest.mark.parametrize("name", KNOWN)
def test_a_weight_written_to_or_replaced_between_forwards_counts_in_the_next(name: str) -> None:
    model = tiny_model(name)
    layer = model.backend.decoder.layers[-1].mlp
    changes = [
        lambda: layer.down_proj.weight.mul_(3),
        lambda: setattr(layer.up_proj, "weight", torch.nn.Parameter(-2 * layer.up_proj.weight, requires_grad=False)),
        lambda: setattr(layer.gate_proj.weight, "data", layer.gate_proj.weight.data.flip(0).clone()),
    ]
    prompt, before = [3, 4, 5, 6], None
    assert runner(model).llama_decoder is not None
    for change in changes:
        with torch.no_grad():
            change()
        cache = model.new_cache()
        appended(model, torch.tensor(prompt), cache)
        logits, _ = appended(model, torch.tensor([7]), cache)
        torch.testing.assert_close(logits, full(model, [*prompt, 7]), rtol=1e-4, atol=1e-4)
        assert before is None or not torch.allclose(logits, before, rtol=1e-3, atol=1e-3)
        before = logits


def test_long_prompts_and_a_first_token_go_the_models_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("qwen2"), []
    assert runner(model).llama_decoder is not None
    monkeypatch.setattr(model_runner, "CHUNK", 8)
    own = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    for tokens, wanted in ((8, 0), (9, 1), (1, 1)):
        calls.clear()
        appended(model, torch.arange(tokens), model.new_cache())
        assert len(calls) == wanted


@pytest.mark.parametrize("name", KNOWN)
def test_with_a_hook_on_the_decoder_the_model_goes_its_own_way(name: str) -> None:
    model = tiny_model(name)
    cache = model.new_cache()
    appended(model, torch.tensor([1, 2, 3]), cache)
    assert runner(model).llama_decoder is not None  # tried before the hook is there
    seen = []
    handle = model.torch_backend.decoder.layers[0].register_forward_hook(lambda *_: seen.append("step"))  # type: ignore[index]
    try:
        model.backend.forward([Append(torch.tensor([4]), cache, 3)])[0]
    finally:
        handle.remove()
    assert seen == ["step"]


def test_hooks_at_the_first_step_cost_nothing_once_they_are_gone() -> None:
    model, seen = tiny_model("qwen3"), []
    cache = model.new_cache()

    def amplified(module: object, args: object, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.shape[1])
        return out * 1.5

    with model.torch_backend.decoder.layers[1].register_forward_hook(amplified):  # type: ignore[index,union-attr]
        appended(model, torch.arange(50), cache)
        assert seen == [50]  # no trial of ours went through it
    appended(model, torch.tensor([7]), cache)
    assert runner(model).llama_decoder is not None


def test_a_model_that_says_something_else_than_its_layers_is_left_alone() -> None:
    model = tiny_model("qwen3").model
    own = model.forward
    try:
        model.forward = lambda *args, **kwargs: _doubled(own(*args, **kwargs))
        assert llama_decoder_of(model) is None
    finally:
        del model.forward
    assert llama_decoder_of(model) is not None


def test_tokens_that_a_model_itself_computes_badly_do_not_rule_the_written_out_step_out() -> None:
    """In bf16, SmolLM2's special tokens are a third of the logits' range away from fp32; its own modules', not ours."""
    model = tiny_model("llama").model
    own = model.forward
    try:
        model.forward = lambda input_ids, **kwargs: (
            _doubled(own(input_ids, **kwargs)) if int(input_ids.min()) < 5 else own(input_ids, **kwargs)
        )
        assert llama_decoder_of(model) is not None
    finally:
        del model.forward


@pytest.mark.real
def test_a_real_checkpoint_has_one_in_half_precision(smollm2: Path) -> None:
    model = LanguageModel.load(str(smollm2), dtype=torch.bfloat16)
    assert runner(model).llama_decoder is not None


def _doubled(out: object) -> object:
    out.logits = out.logits * 2  # type: ignore[attr-defined]
    return out


def test_positions_far_behind_the_first_table_are_right_too() -> None:
    model = tiny_model("llama")
    assert runner(model).llama_decoder is not None
    ids = torch.randint(0, 250, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = model.new_cache()
    appended(model, torch.tensor(ids[:-1]), cache)
    logits, _ = runner(model).llama_decoder(torch.tensor(ids[-1:]), [1499], [cache])
    assert torch.allclose(logits[0], full(model, ids), atol=1e-4)
