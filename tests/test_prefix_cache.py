"""Turns reuse their past: the same answers, fewer tokens read, within bytes and scopes."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from sequences import appended, read
from torch_models import watched_forwards

from s2t_agents import ChatS2T, Engine
from s2t_agents.backends.completions.backend import CompletionCache
from s2t_agents.backends.torch.kv_cache import KVCache
from s2t_agents.scheduling import prefix_cache
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.prefix_cache import PrefixCache, common_prefix
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model
from s2t_agents.types import Sampling

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def filled(model: LanguageModel, ids: list[int]) -> KVCache:
    prefix = read(model, ids)
    assert isinstance(prefix.cache, KVCache)
    return prefix.cache


def answer(model: LanguageModel, prompt: list[int], scope: str | None = None, count: int = 12) -> list[int]:
    return [s.token_id for s in Engine(model).steps(prompt, Sampling(max_tokens=count), cache_scope=scope)]


@cache
def shared_model() -> LanguageModel:
    """For tests that use nothing but its forwards."""
    return tiny_model("qwen3")


@pytest.fixture
def model() -> LanguageModel:
    model = tiny_model("qwen3")
    model.prefix_cache.clear()
    return model


@given(tokens, tokens)
def test_the_common_prefix_is_the_longest_there_is(one: list[int], other: list[int]) -> None:
    length = common_prefix(np.asarray(one), np.asarray(other))
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_forks_and_early_closes_answer_as_without_a_past(name: str) -> None:
    model, rng = tiny_model(name), random.Random(4)
    model.prefix_cache.clear()
    conversations = [[rng.randrange(250) for _ in range(20)] for _ in range(3)]
    for turn in range(9):
        prompt = conversations[rng.randrange(3)]
        stream = Engine(model).steps(prompt, Sampling(max_tokens=8))
        said = [step.token_id for step, _ in zip(stream, range(rng.randint(1, 8)), strict=False)]
        stream.close()
        if turn % 3 == 2:  # a fork: back to the middle, then elsewhere
            prompt = prompt[: len(prompt) // 2]
        conversations[rng.randrange(3)] = [*prompt, *said, *(rng.randrange(250) for _ in range(10))]
    for prompt in conversations:
        with_past = answer(model, prompt)
        model.prefix_cache.clear()
        assert with_past == answer(model, prompt)


def test_only_what_is_new_is_read(model: LanguageModel) -> None:
    prompt = list(range(10, 60))
    first = next(Engine(model).steps(prompt))
    assert first.reused_tokens == 0
    gc.collect()
    again = [*prompt, first.token_id, *range(70, 80)]
    rows: list[int] = []
    watched_forwards(model, lambda batch: rows.extend(len(item.ids) for item in batch))
    second = next(Engine(model).steps(again))
    assert (second.reused_tokens, rows) == (50, [11])


def test_scopes_never_mix(model: LanguageModel) -> None:
    prompt = list(range(10, 60))
    answer(model, prompt, "tenant a")
    for scope, reused in ((None, 0), ("tenant b", 0), ("tenant a", 49)):
        stream = Engine(model).steps(prompt, cache_scope=scope)
        assert next(stream).reused_tokens == reused


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(tokens.filter(lambda ids: len(ids) > 8), st.sampled_from("ab")), max_size=8))
def test_bytes_never_pass_the_limit_and_what_is_found_is_right(kept: list[tuple[list[int], str]]) -> None:
    model = shared_model()
    size = filled(model, [1, 2, 3]).nbytes
    past = PrefixCache(limit_bytes=3 * size)
    for ids, scope in kept:
        past.insert(ids, filled(model, ids), scope)
        assert past.nbytes <= 3 * size
        cache, length = past.match([*ids, 9], scope)
        assert length == len(ids)  # the newest is there
        assert cache is not None
        assert cache.get_seq_length() == length


few = st.lists(st.integers(0, 2), min_size=8, max_size=14)
"""Tokens of which many sequences share a beginning."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(few, st.sampled_from("ab")), max_size=16), st.lists(few, min_size=1, max_size=6))
def test_the_longest_common_prefix_of_a_scope_is_found(
    kept: list[tuple[list[int], str]], asked: list[list[int]]
) -> None:
    past = PrefixCache()
    for ids, scope in kept:
        past.insert(ids, CompletionCache(ids), scope)
    for scope in "ab":
        mine = [ids for ids, owner in kept if owner == scope]
        for prompt in asked:
            shared = max((common_prefix(ids, prompt[:-1]) for ids in mine), default=0)
            assert past.longest(prompt, scope) == (shared if shared >= 8 else 0)
            assert past.match(prompt, scope)[1] == past.longest(prompt, scope)
    heads = {(tuple(ids), scope) for ids, scope in kept}
    longest = {one for one in heads if not any(one != two and _begins(two, one) for two in heads)}
    assert {(tuple(entry.ids), entry.scope) for entry in past.entries} == longest
    assert past.nbytes == sum(entry.cache.nbytes for entry in past.entries)


def _begins(one: tuple[tuple[int, ...], str], two: tuple[tuple[int, ...], str]) -> bool:
    return one[1] == two[1] and one[0][: len(two[0])] == two[0]


def test_a_search_compares_few_entries_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    past, compared = PrefixCache(), []
    for first in range(500):
        past.insert([first, *range(10)], CompletionCache([first, *range(10)]))
    own = prefix_cache.common_prefix
    monkeypatch.setattr(prefix_cache, "common_prefix", lambda *two: compared.append(two) or own(*two))
    assert past.match([77, *range(12)])[1] == 11
    assert len(compared) <= 2


def test_nothing_is_kept_at_a_limit_of_nothing_and_the_oldest_goes_first(model: LanguageModel) -> None:
    none = PrefixCache(limit_bytes=0)
    none.insert(list(range(20)), filled(model, list(range(20))))
    assert len(none) == 0
    past = PrefixCache(limit_bytes=2 * filled(model, [1]).nbytes)
    for start in (0, 50, 100):
        ids = list(range(start, start + 20))
        past.insert(ids, filled(model, ids))
    assert past.match(list(range(21)))[1] == 0
    assert past.match(list(range(50, 71)))[1] == 20


@pytest.mark.parametrize("use", [PrefixCache.match, PrefixCache.take])
def test_what_was_used_last_stays_longest(model: LanguageModel, use: Any) -> None:
    past = PrefixCache(limit_bytes=2 * filled(model, [1]).nbytes)
    one, two, three = (list(range(start, start + 20)) for start in (0, 50, 100))
    past.insert(one, filled(model, one))
    past.insert(two, filled(model, two))
    assert use(past, [*one[:15], 9, 9])[1] == 15  # a part of it, which leaves it there
    past.insert(three, filled(model, three))
    assert [past.longest([*ids, 9]) for ids in (one, two, three)] == [20, 0, 20]


def test_what_a_collected_generation_keeps_in_mid_search_does_no_harm(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, other = list(range(20)), list(range(50, 70))
    past = PrefixCache(limit_bytes=filled(model, [1]).nbytes)
    past.insert(ids, filled(model, ids))
    own, collected = prefix_cache.common_prefix, [filled(model, other)]

    def collecting(one: Any, two: Any) -> int:
        if collected:
            past.insert(other, collected.pop())  # there is room for one of them only
        return own(one, two)

    monkeypatch.setattr(prefix_cache, "common_prefix", collecting)
    assert past.match([*ids, 1])[1] == 20
    assert len(past) == 1


def test_the_beginning_of_a_longer_entry_is_not_kept_twice(model: LanguageModel) -> None:
    past = PrefixCache()
    for length in (10, 20, 15):
        past.insert(list(range(length)), filled(model, list(range(length))))
    assert len(past) == 1
    assert past.match(list(range(40)))[1] == 20


def test_a_copy_is_the_takers_own(model: LanguageModel) -> None:
    past, ids = PrefixCache(), list(range(20))
    past.insert(ids, filled(model, ids))
    mine, _ = past.match([*ids, 1])
    assert mine is not None
    appended(model, torch.tensor([7, 8]), mine)
    again, length = past.match([*ids, 1])
    assert again is not None
    assert (length, again.get_seq_length()) == (20, 20)
    assert torch.equal(again.layers[0].keys, filled(model, ids).layers[0].keys)


def test_a_conversation_goes_on_in_its_own_kv_and_a_fork_leaves_the_entry(model: LanguageModel) -> None:
    past, ids = PrefixCache(), list(range(20))
    past.insert(ids, kept := filled(model, ids))
    fork, length = past.take([*ids[:12], 99, 98])  # another conversation
    assert (length, len(past), fork is kept) == (12, 1, False)
    mine, length = past.take([*ids, 1])
    assert mine is kept
    assert (length, len(past), past.nbytes) == (20, 0, 0)
    appended(model, torch.tensor([1, 2]), mine)
    past.insert([*ids, 1, 2], mine)
    assert (len(past), past.nbytes) == (1, mine.nbytes)
    assert past.match([*ids, 1, 2, 3])[1] == 22


@pytest.mark.parametrize(
    ("limit", "more", "takes"), [(1.9, 1, False), (2.2, 1, True), (2.2, 20, False), (4.2, 20, True)]
)
def test_what_may_outgrow_the_limit_is_forked_so_that_something_stays(
    model: LanguageModel, limit: float, more: int, takes: bool
) -> None:
    ids = list(range(20))
    kept = filled(model, ids)
    past = PrefixCache(limit_bytes=int(limit * kept.nbytes))
    past.insert(ids, kept)
    taken, length = past.take([*ids, *range(100, 100 + more)])
    assert (length, len(past), taken is kept) == (20, not takes, takes)


def test_a_fork_of_what_its_generation_closed_meanwhile_is_no_match(model: LanguageModel) -> None:
    past, ids = PrefixCache(), list(range(20))
    past.insert(ids, kept := filled(model, ids))
    kept.close()  # as a generation does that took it and failed within a forward
    assert past.match([*ids[:12], 99]) == (None, 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_conversation_goes_on_in_two_ways_at_once(name: str) -> None:
    model, turn = tiny_model(name), list(range(10, 50))
    first, second = [*turn, *range(60, 66)], [*turn, *range(80, 90)]
    expected = []
    for prompt in (first, second):
        model.prefix_cache.clear()
        expected.append(answer(model, prompt))
    model.prefix_cache.clear()
    list(Engine(model).steps(turn, Sampling(max_tokens=1)))  # its KV: the turn, and nothing of the answer
    running = Engine(model).steps(first, Sampling(max_tokens=12))
    begun = next(running)
    other = list(Engine(model).steps(second, Sampling(max_tokens=12)))
    assert (begun.reused_tokens, other[0].reused_tokens) == (40, 40)
    assert [begun.token_id, *(step.token_id for step in running)] == expected[0]
    assert [step.token_id for step in other] == expected[1]


def test_a_turn_that_fails_leaves_the_next_one_right(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, more = list(range(10, 50)), [*range(10, 50), *range(60, 70)]
    expected = answer(model, more)
    for fails_after in (0, 1, 3):
        model.prefix_cache.clear()
        list(Engine(model).steps(turn, Sampling(max_tokens=1)))
        stream = Engine(model).steps(more, Sampling(max_tokens=12))
        for _ in range(fails_after):
            next(stream)
        with monkeypatch.context() as patched:
            patched.setattr(type(model.backend), "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
            with pytest.raises(RuntimeError, match="broken"):
                next(stream)
        assert answer(model, more) == expected


def test_what_was_read_before_an_interrupt_is_kept(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.backend.limits = replace(model.backend.limits, prefill_alone=16)  # chunks, as of long prompts
    turn, more = list(range(10, 50)), [*range(10, 50), *range(60, 110)]
    expected = answer(model, more)
    for chunk in (1, 2, 3):
        model.prefix_cache.clear()
        list(Engine(model).steps(turn, Sampling(max_tokens=1)))
        forward, chunks = type(model.backend).forward, []

        def interrupted(self: Any, batch: Any, forward: Any = forward, chunks: Any = chunks, chunk: int = chunk) -> Any:
            chunks.append(batch)
            if len(chunks) == chunk:
                raise KeyboardInterrupt
            return forward(self, batch)

        with monkeypatch.context() as patched:
            patched.setattr(type(model.backend), "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(Engine(model).steps(more))
        steps = list(Engine(model).steps(more, Sampling(max_tokens=12)))
        assert [step.token_id for step in steps] == expected
        assert steps[0].reused_tokens == 40


def test_nothing_stays_after_clear(model: LanguageModel) -> None:
    answer(model, list(range(10, 60)))
    seen = [weakref.ref(entry.cache) for entry in model.prefix_cache.entries]
    assert seen
    model.prefix_cache.clear()
    gc.collect()
    assert not any(ref() for ref in seen)


def test_threads_that_share_a_past_answer_as_alone(model: LanguageModel) -> None:
    rng = random.Random(1)
    system = [rng.randrange(250) for _ in range(30)]
    prompts = [[*system, *(rng.randrange(250) for _ in range(rng.randint(1, 20)))] for _ in range(16)]
    alone = []
    for prompt in prompts:
        model.prefix_cache.clear()
        alone.append(answer(model, prompt))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: answer(model, prompt), prompts * 2)) == alone * 2


def test_a_tool_loop_reads_its_conversation_once_and_says_so() -> None:
    chat = ChatS2T(max_tokens=24, cache_scope="loop")
    messages: list[BaseMessage] = [HumanMessage("Look up the stock of lamps.")]
    for turn in range(4):
        reply = chat.invoke(messages)
        assert reply.usage_metadata is not None
        reused = reply.usage_metadata["input_token_details"]["cache_read"]
        assert reply.response_metadata["s2t"]["reused_tokens"] == reused
        if turn:
            assert reply.usage_metadata["input_tokens"] - reused < 40  # a call, its result, the new turn's head
        call = {"name": "get_stock", "args": {"item": "lamps"}, "id": f"c{turn}"}
        messages += [AIMessage("", tool_calls=[call]), ToolMessage("85", tool_call_id=f"c{turn}")]
    node = RunnableLambda(lambda said: chat.invoke(said))
    elsewhere = {"configurable": {"s2t_cache_scope": "by config"}}
    for told in (chat.invoke(messages, s2t_cache_scope="by call"), node.invoke(messages, elsewhere)):
        assert told.usage_metadata is not None
        assert told.usage_metadata["input_token_details"]["cache_read"] == 0


def test_without_memory_to_keep_it_a_sequence_goes_and_nobody_is_told() -> None:
    class Full(KVCache):
        def park(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    past = PrefixCache()
    past.insert(list(range(20)), Full())
    assert len(past) == 0
