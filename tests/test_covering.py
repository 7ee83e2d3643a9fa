"""Scores of bytes by a model with other tokens: the sum over every path of tokens, and a whole of probability 1."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from byte_models import RandomLLM, TextLLM, random_tokenizer, real_bytes, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_agents.llms.covering import Covering, Places, Scores
from s2t_agents.tokenization.byte_tokenizer import ByteTokenizer

CASES = st.tuples(
    st.sampled_from(["byte-level", "pieces"]),
    st.integers(0, 10**6),
    st.booleans(),
    st.text("ab é", max_size=5),
)
"""Kind and seed of a tokenizer, whether it splits text first, and a text so far."""


def followed(draw: random.Random, text: str, splits: bool, more: int) -> tuple[str, dict[str, float]]:
    """A text and a distribution of texts that go on after it; without runs of spaces where these are split first.

    GPT-2's rule looks ahead over such a run: what it is to a space before depends on what comes after the next one.
    """
    text = re.sub(" +", " ", text) if splits else text
    texts = {text + "".join(draw.choices("ab é", k=draw.randint(0, more))): draw.random() for _ in range(200)}
    return text, {each: weight for each, weight in texts.items() if not (splits and "  " in each)} | {text: 0.1}


def places_of(kind: str, seed: int, splits: bool, alphabet: str = "ab é") -> tuple[object, Places]:
    tokenizer = random_tokenizer(kind, seed, splits=splits, alphabet=alphabet)
    return tokenizer, Places(ByteTokenizer(tokenizer, len(tokenizer), name="tiny"))


def scored(llm: TextLLM | RandomLLM, places: Places, text: str, candidates: list[bytes]) -> tuple[Covering, Scores]:
    covering = Covering(places, text.encode(), candidates)
    return covering, covering.read(rows(llm, covering))


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_an_llm_of_texts_gives_every_candidate_the_share_of_the_texts_that_go_on_with_it(
    case: tuple[str, int, bool, str],
) -> None:
    kind, seed, splits, text = case
    tokenizer, places = places_of(kind, seed, splits)
    draw = random.Random(seed)
    text, texts = followed(draw, text, splits, 5)
    candidates = sorted({each.removeprefix(text).encode()[:length] for each in texts for length in (1, 2, 3)} - {b""})

    def share(begins: bytes) -> float:
        return sum(weight for each, weight in texts.items() if each.encode().startswith(begins))

    _, scores = scored(TextLLM(tokenizer, texts), places, text, candidates)
    for candidate, found in zip(candidates, scores.log_probs(), strict=True):
        expected = share(text.encode() + candidate) / share(text.encode())
        assert math.exp(found) == pytest.approx(expected, abs=1e-5), candidate
    ends = scores.log_prob_of_control([tokenizer.eos_token_id])
    assert math.exp(ends) == pytest.approx(texts.get(text, 0.0) / share(text.encode()), abs=1e-5)


def ends_in_texts(places: Places, data: bytes, beyond: int) -> set[int]:
    """Where a token ends in some text that begins with ``data``, by writing all of them; whole characters alone."""
    found = set()
    for length in range(beyond + 1):
        for more in itertools.product("ab ", repeat=length):
            ids = places.tokenizer.encode(data + "".join(more).encode())
            found |= set(itertools.accumulate(len(places.tokenizer.bytes_of[i]) for i in ids))
    return found


def paths(places: Places, whole: bytes, start: int, ends: set[int]) -> Iterator[list[bytes]]:
    """Every way to write ``whole`` from ``start``, its last token reaching or passing the end."""
    for token in sorted(set(filter(None, places.tokenizer.bytes_of))):
        rest = whole[start:]
        if token.startswith(rest):
            yield [token]
        elif rest.startswith(token) and start + len(token) in ends:
            yield from ([token, *more] for more in paths(places, whole, start + len(token), ends))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["byte-level", "pieces"]), st.integers(0, 10**6), st.text("ab ", max_size=5))
def test_any_llm_gives_every_candidate_the_sum_over_all_paths_of_tokens(kind: str, seed: int, text: str) -> None:
    tokenizer, places = places_of(kind, seed, splits=False, alphabet="ab ")
    llm, written = RandomLLM(seed, len(tokenizer)), text.encode()
    candidates = [b"a", b"b", b"ab", b" ba", b"aab"]
    covering, scores = scored(llm, places, text, candidates)
    start = len(places.tokenizer.decode(covering.trunk))

    def prob(before: bytes, token: bytes) -> float:
        logits = llm.logits(places.tokenizer.encode(before)).softmax(0)
        return sum(float(logits[i]) for i, data in enumerate(places.tokenizer.bytes_of) if data == token)

    def summed(whole: bytes) -> float:
        ends = {end for end in ends_in_texts(places, written, 4) if end <= len(written)} | {len(written)}
        ends |= {end for end in ends_in_texts(places, whole, 4) if end > len(written)}
        if start == len(whole):
            return 1.0
        total = 0.0
        for path in paths(places, whole, start, ends):
            befores = itertools.accumulate(path[:-1], initial=whole[:start])
            total += math.prod(prob(before, token) for before, token in zip(befores, path, strict=True))
        return total

    for candidate, found in zip(candidates, scores.log_probs(), strict=True):
        assert found == pytest.approx(math.log(summed(written + candidate) / summed(written)), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_all_next_bytes_and_the_end_add_up_to_one(case: tuple[str, int, bool, str]) -> None:
    kind, seed, splits, text = case
    tokenizer, places = places_of(kind, seed, splits)
    llm = RandomLLM(seed, len(tokenizer))
    _, scores = scored(llm, places, text, [bytes([byte]) for byte in range(256)])
    ends = math.exp(scores.log_prob_of_control([tokenizer.eos_token_id]))
    assert sum(map(math.exp, scores.log_probs())) + ends == pytest.approx(1, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(CASES, st.text("ab é", min_size=1, max_size=4))
def test_the_trunk_stays_whatever_comes(case: tuple[str, int, bool, str], more: str) -> None:
    kind, seed, splits, text = case
    tokenizer, places = places_of(kind, seed, splits)
    covering = Covering(places, text.encode(), [b"a", b" b"])
    assert tokenizer.encode(text + more)[: len(covering.trunk)] == covering.trunk


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_tokens_of_the_same_tokenizer_score_as_its_logits_say(case: tuple[str, int, bool, str]) -> None:
    kind, seed, splits, text = case
    tokenizer, places = places_of(kind, seed, splits)
    draw = random.Random(seed)
    text, texts = followed(draw, text, splits, 4)
    llm = TextLLM(tokenizer, texts)
    written = tokenizer.encode(text)
    if any(tokenizer.encode(each)[: len(written)] != written for each in texts):
        return  # the text so far ends within a token of the tokenizer's: the ordinary path is wrong there
    ordinary = llm.logits(written).softmax(0)
    likely = [i for i in range(len(tokenizer)) if ordinary[i] > 0 and i != tokenizer.eos_token_id]
    candidates = [places.tokenizer.bytes_of[i] for i in likely]
    _, scores = scored(llm, places, text, candidates)
    for i, found in zip(likely, scores.log_probs_of_tokens(places.tokenizer), strict=True):
        assert math.exp(found) == pytest.approx(float(ordinary[i]), abs=1e-5)


TEXTS = (b"The farmer gave 12 apples to his neighb", "naïve café — 你好。世😀".encode()[:-2], b"  x = [1,\n\n\t")


@pytest.mark.real
def test_all_next_bytes_add_up_to_one_on_real_tokenizers(real_tokenizer: Any) -> None:
    places = Places(real_bytes(real_tokenizer))
    for seed, text in enumerate(TEXTS):
        covering = Covering(places, text, [bytes([byte]) for byte in range(256)])
        logits = torch.randn(1 + len(covering.tree.ids), len(real_tokenizer)) * 3
        scores = covering.read(logits)
        control = [i for i, data in enumerate(places.tokenizer.bytes_of) if data is None]
        total = sum(map(math.exp, scores.log_probs())) + math.exp(scores.log_prob_of_control(control))
        assert total == pytest.approx(1, abs=1e-4), (seed, text)
