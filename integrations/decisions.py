"""A decision model over the engine: typed questions, answered by the probabilities of what an answer would say.

state + question + options -> prompt + "The answer is:" -> log-probability of each option's name
                                                           minus the same without the state, mean over two orders

A small model favours some names, and some places in a list. What it would say without the state is therefore taken off
(Holtzman et al. 2021, arXiv 2104.08315), and every question is put twice, with its options in the given order and in
the reverse. SmolLM2-135M, asked for the letter of an option, is at chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from langchain_core.decisions import (
    Answer,
    BaseDecisionModel,
    Box,
    Choice,
    ChoiceAnswer,
    ClassifierResponse,
    Noul,
    NoulAnswer,
    Question,
    Score,
    ScoreAnswer,
    State,
)
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from pydantic import ConfigDict, PrivateAttr, SkipValidation, model_validator
from torch import Tensor

from s2t_agents.chat.chat_model import ChatS2T
from s2t_agents.chat.content_blocks import is_media
from s2t_agents.chat.output_messages import PROVIDER
from s2t_agents.engine.engine import MAX_K
from s2t_agents.errors import ConfigError, InputError
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import Waiting, gather
from s2t_agents.selectors.base import scoring

OPENING = "The answer is:"
"""Begins the answer; an option's name comes next."""
BASELINES = 256
"""Questions whose scores without a state are remembered."""


@dataclass(frozen=True)
class _Option:
    """What can be chosen.

    Attributes:
        name: as an answer says it.
        shown: as it is listed in the prompt.
    """

    name: str
    shown: str


class DecisionS2T(BaseDecisionModel):
    """Answers LangChain's typed questions (``Noul``, ``Choice``, ``Score``) with a local model's probabilities.

    ::

        classifier = DecisionS2T(chat_model=ChatS2T(model="path/to/slm", selector="path/to/selector"))
        ModelRouterMiddleware(choices=..., instructions=..., classifier=classifier)

    Where the chat model's trigger fires at the first token of the options, its selector's scores take the place of the
    SLM's. No LLM is asked. ``confidence`` is the probability of the most likely option; the probabilities are as well
    calibrated as the model, so choose a threshold on examples of yours.

    Args:
        chat_model: whose model, selector, trigger, template variables, cache scope and concurrency are used.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    chat_model: SkipValidation[ChatS2T]
    model: str = ""
    _baselines: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _named_after_its_model(self) -> Self:
        self.model = self.chat_model.model_name
        return self

    @property
    def _provider(self) -> str:
        return PROVIDER

    def _classify(self, state: State, questions: dict[str, Question]) -> ClassifierResponse:
        """Answer one request.

        Raises:
            InputError: media in the state; a ``Box`` question; more than ``MAX_K`` options; no question.
            ContextOverflow: state and question do not fit the context window.
            ConfigError: a model that thinks before it answers.
            Overloaded: too many generations at once.
        """
        if not questions:
            raise InputError("there are no questions.", hint="Ask at least one.")
        text, engine = _text_of(state), self.chat_model.runtime.engine
        options = {name: _options(question) for name, question in questions.items()}
        keys = {name: question.model_dump_json() for name, question in questions.items()}
        new = {keys[name]: (questions[name], options[name]) for name in questions if keys[name] not in self._baselines}
        asked = [(text, questions[name], options[name]) for name in questions]
        asked += [("", question, listed) for question, listed in new.values()]
        prompts = [prompt for each in asked for prompt in self._in_both_orders(*each)]
        listed = [each for _, _, each in asked for _ in range(2)]
        with engine.admission.enter() as ticket:
            ticket.wait()
            found = gather([self._scored(*each) for each in zip(prompts, listed, strict=True)])
        means = [torch.stack(found[at : at + 2]).mean(0) for at in range(0, len(found), 2)]
        known = {**self._baselines, **dict(zip(new, means[len(questions) :], strict=True))}
        self._baselines = dict(list(known.items())[-BASELINES:])
        answers = {
            name: _answer(questions[name], options[name], (scores - known[keys[name]]).softmax(0).tolist())
            for name, scores in zip(questions, means, strict=False)
        }
        read = sum(map(len, prompts))
        usage = UsageMetadata(input_tokens=read, output_tokens=0, total_tokens=read)
        return ClassifierResponse(model=self.model, answers=answers, usage=usage)

    def _in_both_orders(
        self, state: str, question: Question, options: Sequence[_Option]
    ) -> tuple[list[int], list[int]]:
        return self._prompt(state, question, options), self._prompt(state, question, options[::-1])

    def _prompt(self, state: str, question: Question, options: Sequence[_Option]) -> list[int]:
        """Up to the answer's opening, as token ids."""
        runtime = self.chat_model.runtime
        slm, encoder = runtime.engine.slm, runtime.encoder
        listed = "\n".join(f"- {option.shown}" for option in options)
        asked = f"{state}\n\nQuestion: {_written(question.instructions)}\nOptions:\n{listed}"
        opening = encoder.text_ids(OPENING)
        longest = max(len(encoder.text_ids(f" {option.name}")) for option in options)
        prompt = encoder.encode([HumanMessage(asked)], limit=slm.context_window - len(opening) - longest)
        format = encoder.reasoning
        if format is not None and format.phase_after(slm.tokenizer, prompt) == "thought":
            raise ConfigError(
                f"{slm.name!r} thinks before it answers, and a decision is the beginning of its answer.",
                hint='Turn thoughts off: ChatS2T(template_args={"enable_thinking": False}).',
            )
        return prompt + opening

    def _scored(self, prompt: list[int], options: Sequence[_Option]) -> Waiting[Tensor]:
        """Log-probabilities of the options' names ``[N]``, up to a constant."""
        runtime, engine = self.chat_model.runtime, self.chat_model.runtime.engine
        names = [runtime.encoder.text_ids(f" {option.name}") for option in options]
        with (yield from TokenSequence.from_prefix_cache(engine.slm, prompt, self.chat_model.cache_scope)) as prefix:
            yield from prefix.appending(prompt[len(prefix) :])
            firsts = torch.zeros(engine.slm.vocab_size, dtype=torch.bool)
            firsts[[name[0] for name in names]] = True
            prefix.ensure_legal_logits(firsts)
            proposal = Proposal(prefix, MAX_K, allowed=firsts)
            scores = proposal.candidate_log_probs
            if engine.selector is not None and engine.trigger(proposal):
                scores = yield from scoring(engine.selector, proposal)
            first = dict(zip(proposal.candidates.tolist(), torch.as_tensor(scores).float().tolist(), strict=True))
            sums = [first.get(name[0], -torch.inf) for name in names]
            with prefix.forks(len(names)) as forks:
                for at in range(1, max(map(len, names))):
                    seen = yield from forks.appending([name[at - 1] if at < len(name) else None for name in names])
                    for n, logits in enumerate(seen):
                        if logits is not None:
                            sums[n] += float(logits.log_softmax(0)[names[n][at]])
            return torch.tensor(sums)


def _options(question: Question) -> list[_Option]:
    """What can be chosen.

    Raises:
        InputError: nothing that this model can answer.
    """
    match question:
        case Noul():
            yes, no = (question.criteria.true, question.criteria.false) if question.criteria else (None, None)
            options = [_option("yes", yes), _option("no", no)]
        case Choice():
            options = [_option(label, text) for label, text in question.criteria.items()]
        case Score():
            options = [_option(str(level), text) for level, text in enumerate(question.criteria)]
        case Box():
            raise InputError("a Box question locates something in an image, and this model reads text alone.")
    if len(options) > MAX_K:
        raise InputError(f"a question has {len(options)} options; at most {MAX_K} can be told apart.")
    if not all(option.name.strip() for option in options):
        raise InputError("an option has no name.", hint="Label every option.")
    return options


def _option(name: str, description: Any) -> _Option:
    return _Option(name, name if description is None else f"{name}: {_written(description)}")


def _answer(question: Question, options: Sequence[_Option], probabilities: Sequence[float]) -> Answer:
    best = max(range(len(probabilities)), key=lambda at: probabilities[at])
    confidence = min(1.0, probabilities[best])
    match question:
        case Noul():
            return NoulAnswer(type="noul", noul=min(1.0, probabilities[0]))
        case Choice():
            by_label = dict(zip(question.criteria, probabilities, strict=True))
            return ChoiceAnswer(type="choice", choice=options[best].name, probabilities=by_label, confidence=confidence)
        case Score():
            return ScoreAnswer(
                type="score",
                score=sum(level * probability for level, probability in enumerate(probabilities)),
                legend=dict(enumerate(question.criteria)),
                probabilities=dict(enumerate(probabilities)),
                confidence=confidence,
            )
        case Box():
            raise AssertionError  # refused before it was asked


def _text_of(state: State) -> str:
    """The state as text: messages as turns, all else as JSON."""
    return state if isinstance(state, str) else _written(_plain(state))


def _written(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(_plain(content), ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """Messages as data, at any depth.

    Raises:
        InputError: a block that is no text.
    """
    if isinstance(value, BaseMessage):
        told: dict[str, Any] = {"role": value.type, "content": _plain(value.content)}
        if isinstance(value, AIMessage) and value.tool_calls:
            told["tool_calls"] = [{"name": call["name"], "args": call["args"]} for call in value.tool_calls]
        return told
    if isinstance(value, Mapping):
        if is_media(value):
            raise InputError(f"the state holds a {value['type']} block, and this model reads text alone.")
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    return value
