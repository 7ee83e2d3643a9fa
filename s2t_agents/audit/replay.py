"""The small model reads logged answers token by token, along the log: what it would have said, doubted and asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from langchain_core.messages import AIMessage, BaseMessage

from ..chat.runtime import Runtime
from ..errors import ContextOverflow, InputError
from ..proposal import Proposal
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Waiting, gather
from ..selectors.base import confidence_margin, scoring
from .logs import LoggedAnswer, NotAnAnswer

MAX_ANSWER = 2048
"""Tokens of an answer that are read; the rest is left out."""


@dataclass(frozen=True)
class ReplayedQuestion:
    """One that the LLM would be asked.

    Attributes:
        prefix_tokens: that it would have to read.
        new_tokens: of those, how many came since the question before it; the whole prefix for the first.
    """

    prefix_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class ReplayedAnswer:
    """What became of one answer, token by token along the log.

    Attributes:
        tokens: in the small model's vocabulary, the end token included.
        triggered: at which the trigger fired.
        slm: the small model's best was the logged one.
        local: the same, with the selector at triggered ones.
        asked: the same, where the LLM, asked, picks the logged one if it is among the candidates.
        questions: that would be asked.
        lost: questions at which the logged token is not among the candidates.
    """

    tokens: int
    triggered: int
    slm: int
    local: int
    asked: int
    questions: tuple[ReplayedQuestion, ...]
    lost: int


def replay(runtime: Runtime, answers: Sequence[LoggedAnswer]) -> list[ReplayedAnswer | NotAnAnswer]:
    """Each answer along the log, in order, their forwards together; what the model cannot be shown says why."""
    encoded = [_encoded(runtime, each) for each in answers]
    ids = [each for each in encoded if not isinstance(each, NotAnAnswer)]
    replayed = iter(gather([_along(runtime, prompt, answer) for prompt, answer in ids]))
    return [each if isinstance(each, NotAnAnswer) else next(replayed) for each in encoded]


def _encoded(runtime: Runtime, logged: LoggedAnswer) -> tuple[list[int], list[int]] | NotAnAnswer:
    """Prompt and answer as token ids."""
    slm = runtime.engine.slm
    try:
        prompt = runtime.encoder.encode(logged.messages, logged.tools, limit=slm.context_window - 1)
        answer = _answer_ids(runtime, logged.messages, logged.answer, logged.tools, prompt)
    except ContextOverflow:
        return NotAnAnswer(f"longer than the model's context of {slm.context_window:,} tokens")
    except InputError:
        return NotAnAnswer("a conversation that the chat template cannot show")
    answer = answer[: min(MAX_ANSWER, slm.context_window - len(prompt))]
    if any(not 0 <= token < slm.vocab_size for token in answer) or not answer:
        return NotAnAnswer("an answer that the chat template cannot show")
    return prompt, answer


def _answer_ids(
    runtime: Runtime, messages: list[BaseMessage], answer: AIMessage, tools: list[dict[str, object]], prompt: list[int]
) -> list[int]:
    """As the template writes an answer after the prompt, up to its end token; a text can be written without it."""
    eos = runtime.engine.slm.eos_ids
    whole = runtime.encoder.encode([*messages, answer], tools, generation_prompt=False)
    if whole[: len(prompt)] == prompt:
        ids = whole[len(prompt) :]
        end = next((at for at, token in enumerate(ids) if token in eos), len(ids) - 1)
        return ids[: end + 1]
    if answer.tool_calls:
        return []
    return [*runtime.encoder.text_ids(answer.text), *sorted(eos)[:1]]


def _along(runtime: Runtime, prompt: list[int], answer: list[int]) -> Waiting[ReplayedAnswer]:
    engine = runtime.engine
    triggered = slm = local = asked = lost = 0
    questions: list[ReplayedQuestion] = []
    with (yield from TokenSequence.from_prefix_cache(engine.slm, prompt, "s2t audit")) as prefix:
        pending = prompt[len(prefix) :]
        for token in answer:
            yield from prefix.appending(pending)
            proposal = Proposal(prefix, engine.k, allowed=engine.slm.with_text)
            pending, best = [token], proposal.best
            slm += best == token
            if not engine.trigger(proposal):
                local += best == token
                asked += best == token
                continue
            triggered += 1
            candidates = proposal.candidates.tolist()
            scores = proposal.candidate_log_probs
            if engine.selector is not None:
                scores = yield from scoring(engine.selector, proposal)
            pick = candidates[int(torch.as_tensor(scores).argmax())]
            local += pick == token
            if len(candidates) < 2 or float(confidence_margin(torch.as_tensor(scores))) >= engine.threshold:
                asked += pick == token
                continue
            read = questions[-1].prefix_tokens if questions else 0
            questions.append(ReplayedQuestion(len(prefix), len(prefix) - read))
            asked += token in candidates
            lost += token not in candidates
    return ReplayedAnswer(len(answer), triggered, slm, local, asked, tuple(questions), lost)
