"""A selection reads the next step of the likeliest candidates too: bitwise the step of its own, never a stale one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sequences import moved, read, scored_after
from torch import Tensor
from torch_models import runner

from s2t_agents.backends.torch.decoder_batch import PREFETCHED, DecoderBatch
from s2t_agents.backends.torch.kv_cache import KVCache
from s2t_agents.backends.torch.llama_decoder import LlamaDecoder
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors.activated import ActivatedSelector
from s2t_agents.testing import tiny_config, tiny_tokenizer
from s2t_agents.triggers import when
from s2t_agents.types import Sampling

IDS = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
CANDIDATES = torch.tensor([5, 9, 200, 33, 90, 91, 7, 128])
NAMES = ["qwen2", "llama", "mistral", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16]


def wide(name: str, dtype: torch.dtype) -> LanguageModel:
    """Wide enough that its weights are laid out beforehand, where the processor multiplies such ones."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2560, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(tiny_config(name, **sizes, head_dim=64)).to(dtype)
    return LanguageModel(raw.eval().requires_grad_(False), tiny_tokenizer(), name=name)


def adapter(model: LanguageModel) -> Lora:
    lora = Lora.fresh(model.model, targets=["q_proj", "v_proj", "o_proj", "down_proj"], rank=4, alpha=8)
    for layer in lora.layers:
        torch.nn.init.normal_(layer.b, std=0.2)  # type: ignore[arg-type]
    return lora.requires_grad_(False)


@pytest.fixture(params=[(name, dtype) for name in NAMES for dtype in DTYPES], ids=str)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    found = wide(*request.param)
    assert runner(found).llama_decoder is not None
    if not runner(found).llama_decoder.linear.rows_alike:
        pytest.skip("here a row among others is not bitwise the row alone, and nothing is read ahead")
    return found


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every lean forward."""
    rows: list[int] = []
    original = LlamaDecoder.rows

    def counted(self: LlamaDecoder, ids: Tensor, *args: object) -> Tensor:
        rows.append(len(ids))
        return original(self, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaDecoder, "rows", counted)
    return rows


def kv(prefix: TokenSequence) -> Iterator[Tensor]:
    for layer in prefix.cache.layers:
        yield layer.keys
        yield layer.values


def same(one: TokenSequence, other: TokenSequence) -> bool:
    """Bitwise: what is said, and the KV."""
    said = torch.equal(one.logits, other.logits) and torch.equal(one.hidden, other.hidden)
    return said and one.ids == other.ids and all(map(torch.equal, kv(one), kv(other)))


def with_pick(model: LanguageModel, at: int, forwards: list[int]) -> tuple[TokenSequence, TokenSequence]:
    """A candidate appended by a step, and after a selection; ``forwards`` holds those of the latter alone."""
    token = [int(CANDIDATES[at])]
    plain, ours = read(model, IDS), read(model, IDS)
    plain.append(token)
    scored_after(ours, CANDIDATES, adapter(model))
    forwards.clear()
    ours.append(token)
    assert same(ours, plain)
    return plain, ours


@pytest.mark.parametrize("at", range(PREFETCHED))
def test_the_step_after_a_selection_is_bitwise_the_step_of_its_own(
    model: LanguageModel, at: int, forwards: list[int]
) -> None:
    plain, ours = with_pick(model, at, forwards)
    assert forwards == []  # the layers were not gone through again
    for prefix in (plain, ours):
        prefix.append([11])
    assert same(ours, plain)


def test_candidates_are_scored_as_without_it(model: LanguageModel) -> None:
    lora, prefix = adapter(model), read(model, IDS)
    assert runner(model).decoder_batch is not None
    from s2t_agents.backends.base import ScoreCandidates

    (without,) = runner(model).decoder_batch([ScoreCandidates(CANDIDATES, prefix.cache, len(IDS), lora)])
    assert isinstance(without, Tensor)
    assert torch.equal(scored_after(prefix, CANDIDATES, lora), without)


def test_a_pick_that_was_not_read_costs_its_step(model: LanguageModel, forwards: list[int]) -> None:
    with_pick(model, PREFETCHED, forwards)
    assert forwards == [1]


def test_it_never_outlives_the_end_that_it_was_read_after(model: LanguageModel) -> None:
    token = int(CANDIDATES[0])
    other = [*IDS[:-1], IDS[-1] ^ 1]
    plain, ours = read(model, IDS), read(model, IDS)
    scored_after(ours, CANDIDATES, adapter(model))
    for prefix in (plain, ours):
        moved(prefix, other)  # as long as before, and another sequence
        prefix.append([token])
    assert same(ours, plain)


@pytest.mark.parametrize("changed", [1, 2, 7])  # one is read as a step, several as a chunk
def test_a_cut_forgets_it_on_every_processor(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, token = wide("qwen3", torch.float32), int(CANDIDATES[0])
    assert runner(model).llama_decoder is not None
    monkeypatch.setattr(runner(model).llama_decoder.linear, "rows_alike", True)
    other = [*IDS[:-changed], *(each ^ 1 for each in IDS[-changed:])]
    plain, ours = read(model, other), read(model, IDS)
    scored_after(ours, CANDIDATES, adapter(model))
    assert ours.cache.prefetched is not None
    moved(ours, other)  # as long as before, and another sequence
    for prefix in (plain, ours):
        prefix.append([token])
    torch.testing.assert_close(ours.logits, plain.logits, atol=1e-4, rtol=1e-4)


def test_several_tokens_after_a_selection_are_read_as_ever(model: LanguageModel) -> None:
    tokens = CANDIDATES[:2].tolist()
    plain, ours = read(model, IDS), read(model, IDS)
    scored_after(ours, CANDIDATES, adapter(model))
    for prefix in (plain, ours):
        prefix.append(tokens)
    assert same(ours, plain)


def test_a_kept_conversation_holds_nothing_of_it() -> None:
    cache = KVCache()
    cache.prefetched = object()  # type: ignore[assignment]
    cache.park()
    assert cache.prefetched is None
    assert cache.fork(0).prefetched is None


def test_whole_answers_are_the_same_with_and_without(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    selector = ActivatedSelector(model, adapter(model)).eval().requires_grad_(False)
    torch.nn.init.normal_(selector.head.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    engine = Engine(model, selector=selector, trigger=when(lambda proposal: len(proposal.prefix) % 3 > 0))

    def answer() -> list[tuple[int, int]]:
        model.prefix_cache.clear()
        return [(step.token_id, step.wanted_id) for step in engine.steps(IDS, Sampling(max_tokens=40))]

    calls: list[int] = []
    original = DecoderBatch.with_prefetch
    monkeypatch.setattr(DecoderBatch, "with_prefetch", lambda self, scoring: calls.append(1) or original(self, scoring))
    with_it = answer()
    assert calls
    assert any(token != wanted for token, wanted in with_it)  # some picks are not the SLM's own
    monkeypatch.setattr(DecoderBatch, "with_prefetch", lambda self, scoring: self([scoring])[0])
    assert answer() == with_it


def test_where_rows_differ_by_company_nothing_is_read_ahead(forwards: list[int]) -> None:
    """Where weights are not laid out beforehand, as those of small models are not, a selection stays what it was."""
    from s2t_agents.testing import tiny_model

    model = tiny_model("qwen2")
    prefix = read(model, IDS)
    assert runner(model).llama_decoder is not None
    forwards.clear()
    scored_after(prefix, CANDIDATES, adapter(model))
    assert not runner(model).llama_decoder.linear.rows_alike
    assert forwards == [len(CANDIDATES)]
