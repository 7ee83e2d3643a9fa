"""Previews: the SLM's greedy continuation of each candidate, in one batch on copies of its KV."""

from collections import deque
from collections.abc import Sequence

import pytest
import torch
from sequences import read

from s2t_agents.backends.base import StepOutput, Work
from s2t_agents.engine.decode_loop import predetermined
from s2t_agents.llms.previews import END_MARK, continuations, previews
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

PROMPT = [10, 20, 30, 40, 50]


def prefix_of(model: LanguageModel, ids: list[int] = PROMPT) -> TokenSequence:
    return read(model, ids)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_previews_are_the_slms_own_greedy_continuations(name: str) -> None:
    model = tiny_model(name)
    prefix = prefix_of(model)
    candidates = Proposal(prefix, 5).candidates.tolist()
    before = prefix.logits.clone()
    for candidate, row in zip(candidates, continuations(prefix, candidates, 8), strict=True):
        assert row[0] == candidate
        ids = torch.tensor([[*PROMPT, candidate]])
        greedy = model.model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, len(PROMPT) :]
        assert list(row) == greedy[: len(row)].tolist()
    assert prefix.ids == PROMPT
    assert torch.equal(prefix.logits, before)
    prefix.append([7])  # the prefix goes on as if nobody had looked ahead
    assert torch.allclose(prefix.logits, prefix_of(model, [*PROMPT, 7]).logits, atol=1e-4)


def test_their_time_is_on_the_prefixs_meter() -> None:
    prefix = prefix_of(tiny_model())
    used = prefix.compute.seconds
    continuations(prefix, [1, 2, 3], 8)
    assert prefix.compute.seconds > used


class Parrot:
    """A stand-in for weights: after each token comes the next of a fixed text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def next_of(self, token: int) -> int:
        tokenizer = tiny_model().tokenizer
        at = self.text.index(tokenizer.decode([token])) + 1
        if at == len(self.text):
            return int(tokenizer.eos_token_id)
        return int(tokenizer.encode(self.text[at])[0])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ab.\tcd", "ab."),  # the sentence ends where a blank follows
        ("ab.5 cd", "ab.5 cd" + END_MARK),  # a decimal point is no end
        ("abc\ndef", "abc\n"),
        ("abc", "abc" + END_MARK),
        ("abc!", "abc!"),  # whether the answer ends there is for the next step to say
        ("abcdefghijklm", "abcdefgh"),  # the limit
    ],
)
def test_a_preview_ends_with_its_sentence_its_line_the_answer_or_the_limit(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parrot = tiny_model(), Parrot(text)
    prefix = prefix_of(model)

    def forward(batch: Sequence[Work]) -> list[StepOutput]:
        rows = [torch.zeros(model.vocab_size) for _ in batch]
        for row, item in zip(rows, batch, strict=True):
            row[parrot.next_of(int(item.ids[-1]))] = 1
        return [StepOutput(row, row) for row in rows]

    monkeypatch.setattr(model.backend, "forward", forward)
    start = model.tokenizer.encode("a")
    [preview] = previews(prefix, start, 8)
    assert preview.text == shown


def test_previews_that_read_the_same_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.llms import previews as module

    monkeypatch.setattr(module, "continuations", lambda prefix, candidates, limit, grammar: [(1, 2), (3,), (4, 5)])
    monkeypatch.setattr(module, "preview_text", lambda prefix, tokens: {1: "x", 3: "y", 4: "x"}[tokens[0]])
    found = module.previews(prefix_of(tiny_model()), [1, 3, 4], 8)
    assert [(p.at, p.tokens, p.text) for p in found] == [((0, 2), (1, 2), "x"), ((1,), (3,), "y")]


def test_a_grammar_outranks_what_was_kept() -> None:
    class Only:
        """Takes 5, then 6, then nothing but 9."""

        def __init__(self) -> None:
            self.left, self.finished = [5, 6, 9], False

        def forced(self) -> list[int]:
            return []

        def takes(self, token: int) -> bool:
            return token == self.left[0]

    grammar, kept, taken = Only(), deque([5, 6, 7, 8]), []
    for token, picker in predetermined(grammar, kept):  # type: ignore[arg-type]
        taken.append((token, picker))
        grammar.left.pop(0)
    assert taken == [(5, "slm"), (6, "slm")]
    assert not kept
