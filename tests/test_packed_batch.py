"""Several sequences in one forward: each says what it says alone, on every architecture, and keeps its own KV."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from sequences import appended, read
from torch import nn

from s2t_agents.backends.base import Append, ScoreCandidates
from s2t_agents.backends.torch.attention import branching, causal
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ARCHITECTURES, tiny_model


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def full(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return model.model(torch.tensor([ids])).logits[0, -1].float()


def test_packed_rounds_equal_reading_every_sequence_in_full(model: LanguageModel) -> None:
    rounds = [(20, 1, 33), (1, 1, 1), (1, 7, 1), (1, 1, 1)]  # prompts beside single tokens, past the sliding windows
    caches = [model.new_cache() for _ in range(3)]
    so_far: list[list[int]] = [[], [], []]
    for number, widths in enumerate(rounds):
        new = [tokens(10 * number + at, width) for at, width in enumerate(widths)]
        segments = [
            Append(torch.tensor(ids), cache, len(before))
            for ids, cache, before in zip(new, caches, so_far, strict=True)
        ]
        said = model.backend.forward(segments)
        assert len(said) == 3
        for at, (logits, hidden) in enumerate(said):
            so_far[at] += new[at]
            assert hidden.shape == (model.torch_backend.config.hidden_size,)
            assert torch.allclose(logits, full(model, so_far[at]), atol=1e-4)
            assert torch.allclose(model.model.get_output_embeddings()(hidden).float(), logits, atol=1e-4) or (
                getattr(model.torch_backend.config, "final_logit_softcapping", None)
            )
            assert caches[at].get_seq_length() == len(so_far[at])


def test_packed_and_single_steps_mix(model: LanguageModel) -> None:
    one, other = model.new_cache(), model.new_cache()
    first, second = tokens(1, 25), tokens(2, 9)
    appended(model, torch.tensor(first), one)
    appended(model, torch.tensor(second), other)
    model.backend.forward([Append(torch.tensor([7]), one, 25), Append(torch.tensor([8]), other, 9)])
    logits, _ = appended(model, torch.tensor([9]), one)
    assert torch.allclose(logits, full(model, [*first, 7, 9]), atol=1e-4)


def test_the_models_own_attention_is_back_afterwards_even_after_a_failure(model: LanguageModel) -> None:
    own = model.torch_backend.config._attn_implementation
    with pytest.raises(IndexError):
        model.backend.forward([Append(torch.tensor([10**6]), model.new_cache(), 0)])
    assert model.torch_backend.config._attn_implementation == own


def test_the_mask_of_a_window_hides_what_is_too_far() -> None:
    seen = causal(2, 6, 3, like=torch.zeros(1)) == 0
    assert seen[0, 0].tolist() == [[False, False, True, True, True, False], [False, False, False, True, True, True]]


def adapter(model: LanguageModel, seed: int) -> Lora:
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.torch_backend.decoder.named_modules()
        if type(module) is nn.Linear
    }
    torch.manual_seed(seed)
    lora = Lora.fresh(model.model, targets=sorted(names), rank=4, alpha=8)
    for layer in lora.layers:
        nn.init.normal_(layer.b, std=0.3)
    return lora.requires_grad_(False)


def read_drawn(model: LanguageModel, seed: int, count: int) -> TokenSequence:
    return read(model, tokens(seed, count))


def alone(model: LanguageModel, scoring: ScoreCandidates) -> torch.Tensor:
    """The candidates one by one over a copy of the KV, by the model's own modules, the adapter hooked on."""
    rows = []
    with torch.inference_mode(), scoring.lora.on(model.model) if scoring.lora else nullcontext():
        for candidate in scoring.ids:
            cache = scoring.cache.fork(scoring.length)  # type: ignore[attr-defined]
            rows.append(
                model.torch_backend.decoder(input_ids=candidate.view(1, 1), past_key_values=cache).last_hidden_state[
                    0, 0
                ]
            )
    return torch.stack(rows)


def test_looks_with_several_adapters_beside_tokens_and_prompts_are_each_as_alone(model: LanguageModel) -> None:
    first, second = adapter(model, 1), adapter(model, 2)
    prefixes = [read_drawn(model, at, length) for at, length in enumerate((20, 3, 33, 9, 12))]
    ids = [torch.tensor(tokens(50 + at, width)) for at, width in enumerate((8, 1, 3, 5, 4))]
    parts = [
        ScoreCandidates(ids[0], prefixes[0].cache, 20, first),
        Append(ids[1], prefixes[1].cache, 3),
        ScoreCandidates(ids[2], prefixes[2].cache, 33, second),
        ScoreCandidates(ids[3], prefixes[3].cache, 9),
        ScoreCandidates(ids[4], prefixes[4].cache, 12, first),
    ]
    wanted = {id(part): alone(model, part) for part in parts if isinstance(part, ScoreCandidates)}
    step = full(model, [*prefixes[1].ids, *ids[1].tolist()])
    prompt = Append(torch.tensor(tokens(70, 30)), model.new_cache(), 0)
    for given in (parts, [*parts[:1], prompt, *parts[2:]], parts[2:]):
        said = model.backend.forward(given)
        for part, each in zip(given, said, strict=True):
            if isinstance(part, ScoreCandidates):
                assert torch.allclose(each, wanted[id(part)], atol=1e-5)  # type: ignore[arg-type]
        if given is parts:
            assert torch.allclose(said[1][0], step, atol=1e-4)

    assert (
        wanted[id(parts[0])] - alone(model, ScoreCandidates(ids[0], prefixes[0].cache, 20))
    ).abs().max() > 1e-2  # the adapter matters


def test_sequences_with_an_adapter_on_are_read_beside_others_as_alone(model: LanguageModel) -> None:
    first, second = adapter(model, 1), adapter(model, 2)
    loras = [first, None, second, first]
    caches = [model.new_cache() for _ in loras]
    so_far: list[list[int]] = [[] for _ in loras]
    for number, widths in enumerate([(20, 12, 9, 5), (1, 1, 1, 1), (3, 1, 1, 4)]):
        new = [tokens(10 * number + at, width) for at, width in enumerate(widths)]
        works = [
            Append(torch.tensor(ids), cache, len(before), lora)
            for ids, cache, before, lora in zip(new, caches, so_far, loras, strict=True)
        ]
        for at, (logits, _) in enumerate(model.backend.forward(works)):
            so_far[at] += new[at]
            lora = loras[at]
            with torch.inference_mode(), lora.on(model.model) if lora is not None else nullcontext():
                expected = full(model, so_far[at])
            assert torch.allclose(logits, expected, atol=1e-4)


def test_an_adapter_is_on_from_the_first_token_of_a_sequence_alone(model: LanguageModel) -> None:
    lora, ids = adapter(model, 1), tokens(3, 30)
    sequence = TokenSequence(model, lora=lora)
    for part in (ids[:20], ids[20:21], ids[21:]):
        sequence.append(part)
    with torch.inference_mode(), lora.on(model.model):
        expected = full(model, ids)
    assert torch.allclose(sequence.logits, expected, atol=1e-4)
    assert not torch.allclose(expected, full(model, ids), atol=1e-2)


def test_a_look_leaves_the_kv_and_a_token_beside_it_as_they_are(model: LanguageModel) -> None:
    lora = adapter(model, 1)
    looked, stepped = read_drawn(model, 1, 20), read_drawn(model, 2, 7)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in looked.cache.layers]
    outcomes = model.backend.forward(
        [ScoreCandidates(torch.arange(8), looked.cache, 20, lora), Append(torch.tensor([9]), stepped.cache, 7)]
    )
    for layer, (keys, values) in zip(looked.cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.allclose(outcomes[1][0], full(model, [*stepped.ids, 9]), atol=1e-4)
    assert model.model.training is False
    assert not any(module._forward_hooks for module in model.torch_backend.decoder.modules())


def test_corrections_of_another_precision_than_the_base_are_added_too() -> None:
    model = tiny_model("qwen3")
    lora = adapter(model, 1)
    prefix = read_drawn(model, 1, 20)
    scoring = ScoreCandidates(torch.arange(8), prefix.cache, 20, lora)
    narrow = ScoreCandidates(scoring.ids, scoring.cache, 20, copy.deepcopy(lora).to(torch.bfloat16))
    without = ScoreCandidates(scoring.ids, scoring.cache, 20)

    def hidden(work: ScoreCandidates) -> torch.Tensor:
        (found,) = model.backend.forward([work])
        assert isinstance(found, torch.Tensor)
        return found

    assert torch.allclose(hidden(narrow), hidden(scoring), atol=0.1)
    assert not torch.equal(hidden(narrow), hidden(without))
    lora.to(torch.bfloat16)
    assert torch.equal(hidden(narrow), hidden(scoring))


def test_the_mask_of_candidates_shows_each_the_prefix_within_a_window_and_itself() -> None:
    seen = branching(torch.eye(2, dtype=torch.bool), 6, 3, like=torch.zeros(1)) == 0
    assert seen[0, 0].tolist() == [[False, False, True, True, True, False], [False, False, True, True, False, True]]
    assert (branching(torch.eye(2, dtype=torch.bool), 6, None, like=torch.zeros(1)) == 0)[0, 0, :, :4].all()
