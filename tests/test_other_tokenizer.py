"""LocalLLM of another family: the candidates' bytes are scored in its own tokens, its own template, its own turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import random_tokenizer
from sequences import read
from tokenizers import normalizers
from training_fixtures import prompts
from transformers import AutoModelForCausalLM

from s2t_agents import Budget, ChatS2T
from s2t_agents.backends.base import Append
from s2t_agents.chat.asked_conversation import AskedConversation
from s2t_agents.errors import EscalationFailed, TokenizerMismatch
from s2t_agents.llms import LocalLLM, Question
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import tiny_config, tiny_model
from s2t_agents.training.config import EvaluateConfig, EvaluationRows, Models
from s2t_agents.training.evaluate import evaluate_with
from s2t_agents.training.tasks import DemoTaskConfig
from s2t_agents.triggers import always
from s2t_agents.types import Step

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer]\n{% endif %}"
)


def family(kind: str, seed: int = 3, *, template: str | None = TEMPLATE, added: Sequence[str] = ()) -> LanguageModel:
    """A random LLM with a tokenizer of its own, of a family that has sliding windows."""
    tokenizer = random_tokenizer(kind, seed, alphabet="the an'", merges=40)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config("gemma3", vocab_size=len(tokenizer), tie_word_embeddings=False)
    )
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, name=f"other-{kind}")


def read_text(slm: LanguageModel, text: str) -> TokenSequence:
    return read(slm, slm.tokenizer.encode(text))


def asked(slm: LanguageModel, prompt: str, answer: str, candidates: Sequence[int]) -> Question:
    from langchain_core.messages import HumanMessage

    conversation = AskedConversation([HumanMessage(prompt)], (), len(slm.tokenizer.encode(prompt)))
    prefix = read_text(slm, prompt + answer)
    return Question(prefix.ids, candidates, prefix=prefix, conversation=conversation)


class Forwards:
    """What goes through a model: how many forwards, and how many tokens."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Any]] = []
        run = model.backend.forward

        def forward(batch: Sequence[Any]) -> Any:
            self.batches.append(list(batch))
            return run(batch)

        monkeypatch.setattr(model.backend, "forward", forward)

    @property
    def tokens(self) -> int:
        return sum(len(work.ids) for batch in self.batches for work in batch)


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
def test_a_chat_model_answers_with_an_llm_of_another_family(kind: str) -> None:
    steps: list[Step] = []
    chat = ChatS2T(
        model=tiny_model(),
        escalation=LocalLLM(family(kind)),
        trigger=always(),
        max_tokens=8,
        budget=Budget(llm_tokens=10_000),
        on_step=lambda _, step: steps.append(step),
    )
    told = chat.invoke("the cat").response_metadata["s2t"]
    assert told["escalations"] > 0
    assert not told["degraded"]
    reports = [step.escalation for step in steps if step.escalation is not None]
    assert all(each.outcome == "picked" and each.reason.startswith("exact") for each in reports)
    assert all(each.actual == each.reserved for each in reports)
    fed = sum(each.actual.llm_tokens for each in reports if each.actual is not None)
    assert told["budget"]["spent"]["llm_tokens"] == fed


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
@pytest.mark.parametrize("trees", [True, False])
def test_every_question_is_one_forward_of_what_was_quoted(
    kind: str, trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slm, llm = tiny_model(), family(kind)
    llm.backend.capabilities = replace(llm.capabilities, tree_scoring=trees)
    forwards = Forwards(llm, monkeypatch)
    session = LocalLLM(llm).open()
    answer, candidates = "", [ord("t"), ord("a"), ord("h"), slm.tokenizer.encode("e")[0]]
    for more in ("", "the", " than", "a", " then the an"):
        answer += more
        question = asked(slm, "say the", answer, candidates)
        quoted = session.quote(question)
        before, tokens = len(forwards.batches), forwards.tokens
        scores = session.ask(question).scores
        assert all(math.isfinite(score) and score < 0 for score in scores)
        assert question.owed == quoted
        assert forwards.tokens - tokens == quoted.llm_tokens - 1
        assert len(forwards.batches) == before + 1 or not trees
        fresh = LocalLLM(family(kind)).open().ask(asked(slm, "say the", answer, candidates))
        assert scores == pytest.approx(fresh.scores, abs=1e-4)
    session.close()


def test_the_llm_reads_its_own_template_and_the_answer_as_its_own_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    slm, llm = tiny_model(), family("pieces")
    forwards = Forwards(llm, monkeypatch)
    LocalLLM(llm).open().ask(asked(slm, "say the", "then the ", [ord("t"), ord("a")]))
    (batch,) = forwards.batches
    read_ids = [token for work in batch if isinstance(work, Append) for token in work.ids.tolist()]
    text = llm.tokenizer.decode(read_ids)
    assert text.startswith("[user] say the\n[answer]\nthen the")


def test_a_template_of_ones_own_and_a_plain_one_for_models_without() -> None:
    for given, begin in ((None, "User:\nsay the\n\nAssistant:\nthe"), ("{{ messages[0].content }}>", "say the>the")):
        llm = LocalLLM(family("byte-level", template=None), chat_template=given)
        slm = tiny_model()
        session = llm.open()
        session.ask(asked(slm, "say the", "then the an", [ord("t"), ord("a")]))
        session.close()
        (kept,) = [llm.idle.take([], None)]
        assert kept is not None
        assert llm.load().tokenizer.decode(kept.ids).startswith(begin)


def test_control_tokens_are_compared_by_role_and_what_has_no_counterpart_is_left_out() -> None:
    slm = tiny_model()
    end, odd = slm.tokenizer.eos_token_id, slm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    call = slm.tokenizer.convert_tokens_to_ids("<tool_call>")
    llm = family("byte-level")
    answer = LocalLLM(llm).open().ask(asked(slm, "say", "the ", [ord("t"), end, odd, call]))
    assert answer.scores[2] is None
    assert all(score is not None for at, score in enumerate(answer.scores) if at != 2)
    assert "1 of 4 candidates have no counterpart" in answer.note


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
def test_all_tokens_of_the_slm_and_the_end_of_the_turn_add_up_to_one(kind: str) -> None:
    slm = tiny_model()
    everything = [*range(256), slm.tokenizer.eos_token_id]
    answer = LocalLLM(family(kind)).open().ask(asked(slm, "say", "the than", everything))
    assert sum(math.exp(score) for score in answer.scores if score is not None) == pytest.approx(1, abs=1e-4)


def test_a_control_token_that_both_have_stands_for_itself() -> None:
    slm = tiny_model()
    call = slm.tokenizer.convert_tokens_to_ids("<tool_call>")
    llm = family("byte-level", added=["<tool_call>"])
    tokens = LocalLLM(llm).token_map(slm)
    assert tokens is not None
    assert tokens.of(call) == frozenset({llm.tokenizer.convert_tokens_to_ids("<tool_call>")})
    assert tokens.of(slm.tokenizer.eos_token_id) == llm.eos_ids
    without = LocalLLM(family("byte-level", seed=4)).token_map(slm)
    assert without is not None
    assert without.of(call) == b"<tool_call>"


def test_a_question_with_nothing_to_compare_fails_before_it_costs() -> None:
    slm = tiny_model()
    odd = slm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    question = asked(slm, "say", "the", [odd, ord("t")])
    with pytest.raises(EscalationFailed, match="nothing for all but one"):
        LocalLLM(family("pieces")).open().quote(question)
    assert question.owed is None


def test_text_that_the_llm_cannot_write_fails_the_question_alone() -> None:
    slm = tiny_model()
    with pytest.raises(EscalationFailed, match="cannot write"):
        LocalLLM(family("pieces")).open().quote(asked(slm, "say", "a▁b", [ord("t"), ord("a")]))


def test_a_prompt_alone_is_read_as_a_text() -> None:
    slm = tiny_model()
    prefix = read_text(slm, "the than")
    answer = LocalLLM(family("byte-level")).open().ask(Question(prefix.ids, [ord("t"), ord("a")], prefix=prefix))
    assert all(score is not None and math.isfinite(score) for score in answer.scores)


def test_an_llm_that_changes_bytes_is_refused_by_name() -> None:
    llm = family("byte-level")
    llm.backend.given_tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerMismatch, match=r"'other-byte-level'.*Lowercase"):
        ChatS2T(model=tiny_model(), escalation=LocalLLM(llm)).invoke("hello")


def test_llama_cpp_reads_the_tree_as_forks_of_one_sequence(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from gguf_files import write_gguf

    from s2t_agents.backends.llamacpp.backend import LlamaCppBackend

    slm = family("pieces")
    loaded = LlamaCppBackend.load(write_gguf(tmp_path / "tiny.gguf", kind="F32"), n_ctx=1024)
    session = LocalLLM(LanguageModel.on(loaded), chat_template=TEMPLATE).open()
    candidates = [slm.tokenizer.encode(each)[0] for each in ("the", "t", "an", " ")]
    answer = ""
    for more in ("the", " than", "a"):
        answer += more
        question = asked(slm, "say the", answer, candidates)
        scores = session.ask(question).scores
        fresh = LocalLLM(LanguageModel.on(loaded), chat_template=TEMPLATE).open()
        assert scores == pytest.approx(fresh.ask(asked(slm, "say the", answer, candidates)).scores, abs=0.05)
        fresh.close()
    session.close()
    loaded.close()


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
def test_an_evaluation_asks_it_by_bytes(kind: str, tmp_path: Path) -> None:
    slm, llm = tiny_model(), family(kind, template=None)
    rows = EvaluationRows(votes=2, max_tokens=8, k=4, ks=(2,), batch=2, llm_trigger_entropy=0.0)
    config = EvaluateConfig(models=Models(), task=DemoTaskConfig(), selectors={}, rows=rows)
    report = evaluate_with(slm, llm, prompts(tmp_path, 3), config)
    assert list(report.rows) == ["slm", "maj2", "llm_select", "llm"]  # it cannot write the SLM's tokens
    asked_ = report.rows["llm_select"]
    assert asked_.llm_calls > 0
    assert asked_.llm_tokens > asked_.llm_calls
    assert asked_.agreement is None
    assert report.sweeps["k"]["llm_select, K = 2"].llm_calls > 0
    again = evaluate_with(slm, llm, prompts(tmp_path, 3), config).rows["llm_select"]
    assert (again.tokens, again.llm_calls, again.llm_tokens) == (asked_.tokens, asked_.llm_calls, asked_.llm_tokens)


def test_an_evaluation_refuses_one_that_changes_bytes(tmp_path: Path) -> None:
    llm = family("byte-level")
    llm.backend.given_tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    config = EvaluateConfig(models=Models(), task=DemoTaskConfig(), selectors={}, rows=EvaluationRows())
    with pytest.raises(TokenizerMismatch, match=r"'other-byte-level'.*Lowercase"):
        evaluate_with(tiny_model(), llm, prompts(tmp_path, 3), config)
