"""Several sequences in one forward: each says what it says alone, on every architecture, and keeps its own KV."""

from __future__ import annotations

import pytest
import torch

from s2t_agents.models.language_model import LanguageModel
from s2t_agents.models.packed import Segment, causal
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
            Segment(torch.tensor(ids), cache, len(before))
            for ids, cache, before in zip(new, caches, so_far, strict=True)
        ]
        logits, hidden = model.step_packed(segments)
        assert hidden.shape == (3, model.config.hidden_size)
        for at in range(3):
            so_far[at] += new[at]
            assert torch.allclose(logits[at], full(model, so_far[at]), atol=1e-4)
            assert torch.allclose(model.model.get_output_embeddings()(hidden[at]).float(), logits[at], atol=1e-4) or (
                getattr(model.config, "final_logit_softcapping", None)
            )
            assert caches[at].get_seq_length() == len(so_far[at])


def test_packed_and_single_steps_mix(model: LanguageModel) -> None:
    one, other = model.new_cache(), model.new_cache()
    first, second = tokens(1, 25), tokens(2, 9)
    model.step(torch.tensor(first), one)
    model.step(torch.tensor(second), other)
    model.step_packed([Segment(torch.tensor([7]), one, 25), Segment(torch.tensor([8]), other, 9)])
    logits, _ = model.step(torch.tensor([9]), one)
    assert torch.allclose(logits, full(model, [*first, 7, 9]), atol=1e-4)


def test_the_models_own_attention_is_back_afterwards_even_after_a_failure(model: LanguageModel) -> None:
    own = model.config._attn_implementation
    with pytest.raises(IndexError):
        model.step_packed([Segment(torch.tensor([10**6]), model.new_cache(), 0)])
    assert model.config._attn_implementation == own


def test_the_mask_of_a_window_hides_what_is_too_far() -> None:
    seen = causal(2, 6, 3, like=torch.zeros(1)) == 0
    assert seen[0, 0].tolist() == [[False, False, True, True, True, False], [False, False, False, True, True, True]]
