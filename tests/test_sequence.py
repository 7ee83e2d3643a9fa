"""A prefix that is extended, rolled back and moved says the same as one read in full."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import moved, read
from torch_models import watched_forwards

from s2t_agents.backends.base import Append, Work
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.idle_sequences import IdleSequences
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

tokens = st.lists(st.integers(0, 250), min_size=1, max_size=30)


def full(name: str, ids: list[int]) -> torch.Tensor:
    return tiny_model(name).model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_moving_to_another_branch_equals_reading_it_in_full(name: str) -> None:
    prefix = TokenSequence(tiny_model(name))
    prefix.append(list(range(30)))
    branch = [*range(20), 99, 98, 97]
    computed = moved(prefix, branch)
    assert torch.allclose(prefix.logits, full(name, branch), atol=1e-4)
    assert computed == (3 if name in ARCHITECTURES else len(branch))


@settings(max_examples=40, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=5))
def test_any_walk_over_branches_ends_where_a_fresh_read_ends(branches: list[list[int]]) -> None:
    prefix = TokenSequence(tiny_model("qwen3"))
    for branch in branches:
        moved(prefix, branch)
    assert prefix.ids == branches[-1]
    assert torch.allclose(prefix.logits, full("qwen3", branches[-1]), atol=1e-4)


def test_an_adapter_that_the_backend_cannot_put_on_is_refused_before_anything_is_read() -> None:
    model = tiny_model("qwen3")
    lora = Lora.fresh(model.model, targets=["q_proj"], rank=2, alpha=4)
    assert TokenSequence(model, lora=lora).lora is lora
    model.backend.capabilities = replace(model.capabilities, candidate_lora=False)
    with pytest.raises(ConfigError, match="takes no adapter"):
        TokenSequence(model, lora=lora)
    assert len(read(model, [1, 2])) == 2


def test_moving_to_where_it_is_computes_nothing() -> None:
    prefix = TokenSequence(tiny_model("qwen3"))
    prefix.append([1, 2, 3])
    assert moved(prefix, [1, 2, 3]) == 0


@pytest.mark.parametrize("name", ["gemma3", "bamba"])
def test_a_long_prefix_is_read_in_chunks_to_the_same_end(name: str) -> None:
    model = tiny_model(name)
    model.backend.limits = replace(model.backend.limits, prefill_alone=7)
    prefix = read(model, list(range(50)))
    assert torch.allclose(prefix.logits, full(name, list(range(50))), atol=1e-4)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_state_survives_chunks_and_long_prompts(name: str) -> None:
    ids = torch.randint(0, 250, (1100,), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny_model(name, max_position_embeddings=2048)
    for parts in ([1100], [30, 10], [30, 1, 9]):
        prefix = TokenSequence(model)
        for end, part in zip(accumulate(parts), parts, strict=True):
            prefix.append(ids[end - part : end])
        whole = model.model(torch.tensor([prefix.ids])).logits[0, -1]
        assert torch.allclose(prefix.logits, whole, atol=1e-4), parts


def in_chunks(name: str) -> LanguageModel:
    """A model that reads a prompt seven tokens at a time."""
    model = tiny_model(name)
    model.backend.limits = replace(model.backend.limits, prefill_alone=7)
    return model


def fail_at_the_third_forward(model: LanguageModel) -> None:
    forwards: list[int] = []

    def watch(batch: list[Work]) -> None:
        forwards.append(len(batch))
        if len(forwards) == 3:
            raise ValueError("out of luck")

    watched_forwards(model, watch)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_a_forward_that_fails_in_mid_prompt_raises_its_own_error(name: str) -> None:
    model = in_chunks(name)
    fail_at_the_third_forward(model)
    with pytest.raises(ValueError, match="out of luck"):
        read(model, list(range(50)))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_sequence_holds_what_it_held_after_a_forward_that_fails_in_mid_prompt(name: str) -> None:
    model = in_chunks(name)
    prefix = TokenSequence(model)
    fail_at_the_third_forward(model)
    prefix.append(list(range(5)))
    with pytest.raises(ValueError, match="out of luck"):
        prefix.append(list(range(5, 50)))
    assert (len(prefix), prefix.cache.length) == (5, 5)
    prefix.append(list(range(5, 50)))
    assert torch.allclose(prefix.logits, full(name, list(range(50))), atol=1e-4)


@pytest.mark.parametrize("by", ["number", "bytes"])
def test_the_oldest_idle_sequence_makes_way_and_gives_its_kv_back(by: str) -> None:
    model = tiny_model("qwen3")
    sequences = [read(model, list(range(start, start + 20))) for start in range(3)]
    room = sum(each.cache.nbytes for each in sequences[1:])
    idle = IdleSequences(2) if by == "number" else IdleSequences(9, room)
    for each in sequences:
        idle.put(each)
    assert len(idle) == 2
    assert [each.cache.nbytes > 0 for each in sequences] == [False, True, True]


def test_an_idle_sequence_that_shares_too_little_is_left_where_it_is() -> None:
    idle = IdleSequences(2)
    kept = read(tiny_model("qwen3"), list(range(20)))
    idle.put(kept)
    other = [*range(9), 99]
    assert idle.take(other, None, sharing=10) is None
    assert len(idle) == 1
    assert idle.take(other, None, sharing=9) is kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_a_prompt_only_the_last_hidden_state_is_kept(name: str) -> None:
    model = tiny_model(name)
    one, other = model.new_cache(), model.new_cache()
    _, hidden = model.backend.forward([Append(torch.arange(50), one, 0)])[0]
    (_, packed), (_, beside) = model.backend.forward(
        [Append(torch.arange(50), other, 0), Append(torch.arange(9), model.new_cache(), 0)]
    )
    for each in (hidden, packed, beside):
        assert each.untyped_storage().nbytes() == model.torch_backend.config.hidden_size * each.element_size()
    assert torch.allclose(hidden, packed, atol=1e-4)
