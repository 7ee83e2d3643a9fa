"""Tokenizers larger or smaller than the model: ids without a row are not fed, ids without a token not generated."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s2t_agents import Budget, ChatS2T, Engine, Escalation, LocalLLM
from s2t_agents.errors import ConfigError, EscalationFailed, TokenizerMismatch
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import CHATML, tiny_model, tiny_tokenizer
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

SIZE = len(tiny_tokenizer())
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}


def larger(*added: str, **special: str) -> Any:
    """The tiny tokenizer with added tokens that the tiny models have no row for."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({**special, "additional_special_tokens": list(added)})
    return tokenizer


def with_holes() -> Any:
    """Ids with gaps between them, and the specials far behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i + 10 * (i > 100) for i, char in enumerate(alphabet)}
    vocabulary |= {"<|endoftext|>": 290, "<|im_start|>": 292, "<|im_end|>": 299}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "tokenizer",
    [
        larger(pad_token="[PAD]"),
        larger("<a>", "<b>", "<c>", pad_token="[PAD]"),
        larger(eos_token="<end>", bos_token="<begin>"),
    ],
    ids=["one", "four", "the end token"],
)
def test_an_added_token_without_an_embedding_is_ordinary_text(tokenizer: Any, tie: bool) -> None:
    model = LanguageModel(tiny_model(tie_word_embeddings=tie).model, tokenizer, name="larger")
    plain = ChatS2T(model=tiny_model(tie_word_embeddings=tie), max_tokens=8)
    chat = ChatS2T(model=model, max_tokens=8)
    for text in ("hello", "[PAD]", "a<a>b<|im_end|>[PAD] <begin>", "".join(tokenizer.all_special_tokens)):
        assert chat.get_token_ids(text) == plain.get_token_ids(text)
        assert chat.invoke(text).content == plain.invoke(text).content
    assert max(model.eos_ids) < SIZE
    assert tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens[-1]) is not None  # the given one is as it was


def test_tool_calls_work_beside_such_a_token() -> None:
    model = LanguageModel(tiny_model().model, larger("<a>", pad_token="[PAD]"), name="larger")
    called = ChatS2T(model=model, max_tokens=200).bind_tools([TOOL], tool_choice="any").invoke("[PAD]")
    assert called.tool_calls[0]["name"] == "f"


def test_a_template_that_writes_such_a_token_gets_its_text() -> None:
    tokenizer = larger(bos_token="<begin>")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    model = LanguageModel(tiny_model().model, tokenizer, name="larger")
    chat = ChatS2T(model=model, max_tokens=8)
    plain = ChatS2T(model=tiny_model(), chat_template="<begin>" + CHATML, max_tokens=8)
    assert chat.invoke("hello").content == plain.invoke("hello").content


def test_ordinary_tokens_without_an_embedding_are_refused_by_name() -> None:
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    described["model"]["vocab"]["zz"] = SIZE + 4
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), chat_template=CHATML)
    with pytest.raises(
        TokenizerMismatch, match=r"1 ordinary tokens outside the model's 263 embeddings, 'zz' \(id 267\)"
    ):
        LanguageModel(tiny_model().model, other, name="other's")


@pytest.mark.parametrize("rows", [SIZE + 1, 320, 384])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_rows_are_never_generated(rows: int, temperature: float) -> None:
    raw = tiny_model(vocab_size=rows).model
    with torch.no_grad():  # the model wants nothing but padding
        raw.get_output_embeddings().weight[SIZE:] = 50 * raw.get_output_embeddings().weight[:1]
        raw.get_output_embeddings().weight[SIZE + (rows - SIZE) // 2 :] *= -1
    model = LanguageModel(raw, tiny_tokenizer(), name="padded")
    steps = Engine(model).steps(list(range(20)), Sampling(max_tokens=30, temperature=temperature, seed=1))
    assert all(step.token_id < SIZE for step in steps)
    seen: list[int] = []
    chat = ChatS2T(
        model=model, max_tokens=30, temperature=temperature, seed=1, k=64, trigger=always(),
        selector=None, escalation=Escalation(LocalLLM(tiny_model(seed=3)), margin=1.0), budget=Budget(escalations=9),
        on_step=lambda _, step: seen.extend([step.token_id, *(each.token_id for each in step.candidates)]),
    )  # fmt: skip
    chat.invoke("hello")
    assert seen
    assert max(seen) < SIZE
    chat.bind_tools([TOOL], tool_choice="any").invoke("hello", max_tokens=200)
    assert max(seen) < SIZE


def test_holes_between_ids_are_never_generated() -> None:
    tokenizer = with_holes()
    known = set(tokenizer.get_vocab().values())
    model = LanguageModel(tiny_model(vocab_size=300).model, tokenizer, name="holes")
    chat = ChatS2T(model=model, max_tokens=20)
    assert set(chat.get_token_ids("hello wörld")) <= known
    seen = [step.token_id for step in Engine(model).steps([1, 2, 3], Sampling(max_tokens=60, temperature=9.0, seed=2))]
    chat = ChatS2T(
        model=model, max_tokens=60, temperature=9.0, seed=2, on_step=lambda _, step: seen.append(step.token_id)
    )
    chat.invoke("hello")
    assert set(seen) <= known
    small = LanguageModel(tiny_model(vocab_size=292).model, tokenizer, name="holes, cut")  # two specials have no row
    assert small.eos_ids == frozenset({258})  # of the generation config alone
    assert ChatS2T(model=small, max_tokens=5).invoke("<|im_end|>").usage_metadata


def test_counting_without_weights_knows_it_too(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    larger("<a>", pad_token="[PAD]").save_pretrained(tmp_path)
    chat = ChatS2T(model=str(tmp_path))
    before = chat.get_token_ids("[PAD]<a>"), chat.get_num_tokens_from_messages([HumanMessage("[PAD]<a>")])
    assert max(before[0]) < SIZE
    assert chat.invoke("[PAD]<a>", max_tokens=2).usage_metadata["input_tokens"] - before[1] <= 22  # the answer's head
    assert ChatS2T(model=chat.engine.slm).get_token_ids("[PAD]<a>") == before[0]


def test_pairs_whose_sizes_differ_by_padding_or_by_a_pad_token_work() -> None:
    for slm, llm in (
        (tiny_model(vocab_size=320), tiny_model(seed=5)),
        (tiny_model(), tiny_model(seed=5, vocab_size=384)),
        (LanguageModel(tiny_model().model, larger(pad_token="[PAD]"), name="slm"), tiny_model(seed=5)),
        (tiny_model(), LanguageModel(tiny_model(seed=5).model, larger(pad_token="[PAD]"), name="llm")),
    ):
        chat = ChatS2T(
            model=slm, max_tokens=6, trigger=always(), k=64,
            escalation=Escalation(LocalLLM(llm), margin=1.0), budget=Budget(escalations=50),
        )  # fmt: skip
        told = chat.invoke("hello").response_metadata["s2t"]
        assert told["escalations"] > 0
        assert not told["degraded"]


def test_a_token_that_the_llm_has_no_row_for_cannot_be_chosen_by_it() -> None:
    session = LocalLLM(tiny_model(vocab_size=SIZE - 2)).open()
    first, outside = session.scores([1, 2, 3], [5, SIZE - 1])
    assert first > outside == float("-inf")
    with pytest.raises(EscalationFailed, match=f"no embedding for token {SIZE - 2}"):
        session.scores([1, SIZE - 2], [5, 6])


def test_the_fingerprint_is_that_of_the_tokenizer_as_it_was_given() -> None:
    tokenizer = larger(pad_token="[PAD]")
    cut = LanguageModel(tiny_model().model, tokenizer, name="cut").tokenizer_fingerprint
    whole = LanguageModel(tiny_model(vocab_size=SIZE + 1).model, tokenizer, name="whole").tokenizer_fingerprint
    assert cut == whole != tiny_model().tokenizer_fingerprint


def test_a_tokenizer_that_no_grammar_can_read_is_refused_by_name() -> None:
    tokenizer = with_holes()
    tokenizer.backend_tokenizer.decoder = None
    model = LanguageModel(tiny_model(vocab_size=300).model, tokenizer, name="no decoder")
    with pytest.raises(ConfigError, match="grammar cannot read this tokenizer"):
        ChatS2T(model=model).invoke("hello")
