"""What an SLM and an LLM can do together, found out without reading weights or asking anybody for an answer."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ..backends.fingerprint import tokenizer_fingerprint
from ..backends.loading import fitted_tokenizer
from ..errors import S2TError
from ..llms import ChatJudge, LLMSelector, LocalLLM, OpenAILLM
from ..llms.covering import Covering, Places
from ..tokenization.byte_tokenizer import ByteTokenizer

TEXT = (
    "The farmer had 12 apples and gave 5 of them to his neighbour, so 7 were left. To find the total, we first"
    " calculate the price of one box: $3.50. In short, the answer follows from the two steps above."
)
"""A text at whose tokens questions are tried."""

OTHERS = (" the", " a", " it", ".", ",", " 1", "s")
"""Candidates beside the text's own token."""


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer and name; see ``endpoints.tokenizer_check.Tokenizing``."""

    name: str
    tokenizer: Any

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of its ids."""
        return tokenizer_fingerprint(self.tokenizer)


@dataclass(frozen=True)
class Diagnosis:
    """What a pair can do.

    Attributes:
        slm: name of the small model.
        llm: name of the large one.
        runs: where the LLM runs.
        tokenizer: whether it is the SLM's.
        scores: what the LLM says of the candidates.
        extra_tokens: LLM tokens of a question beside those that are new in the text, mean; None where that is unknown.
        price: whether dollars can be counted.
        works: whether the pair can be used at all.
    """

    slm: str
    llm: str
    runs: str
    tokenizer: str
    scores: str
    extra_tokens: float | None
    price: str
    works: bool = True

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def lines(found: Diagnosis) -> list[str]:
    """A diagnosis for people."""
    cost = "what is new in the text"
    if found.extra_tokens is not None:
        cost += (
            f", and {found.extra_tokens:.3g} more on average"
            if found.extra_tokens > 1
            else ", and the one that is written"
        )
    told = {
        "small model": found.slm,
        "large model": f"{found.llm}, {found.runs}",
        "tokenizer": found.tokenizer,
        "scores": found.scores,
        "LLM tokens of a question": cost if found.works else "-",
        "price": found.price,
    }
    return [f"{name:26}{value}" for name, value in told.items()]


def diagnosed(slm: str, llm: LLMSelector, **options: Any) -> Diagnosis:
    """What an SLM and an LLM can do together.

    Args:
        slm: a directory, hub id, GGUF file or ``vllm://`` address.
        llm: of this package.
        options: of the SLM, as ``ChatS2T``'s ``model_kwargs``.

    Raises:
        ConfigError, ModelNotFound: no such SLM, or LLM.
    """
    small = Tokens(slm, fitted_tokenizer(slm, **options))
    price = "known" if llm.price is not None else "unknown: limit escalations or llm_tokens, or give it a price"

    def diagnosis(
        runs: str, tokenizer: str, scores: str, extra: float | None = None, *, works: bool = True
    ) -> Diagnosis:
        return Diagnosis(slm, llm.name, runs, tokenizer, scores, extra, price, works)

    if isinstance(llm, ChatJudge):
        return diagnosis("a chat model as judge", "not needed: it reads text", "names one of K short continuations")
    if not isinstance(llm, LocalLLM | OpenAILLM):
        return diagnosis(f"as {type(llm).__name__} does", "its own matter", "its own matter")
    runs = "on this machine" if isinstance(llm, LocalLLM) else "on a completions server"
    try:
        llm.check(small)
    except S2TError as error:
        return diagnosis(runs, str(error), "none", works=False)
    if llm.shares_tokens(small):
        known = "the same" if isinstance(llm, LocalLLM) else "the same, as far as the server tells"
        return diagnosis(runs, known, "exact, by token ids", 1.0)
    if isinstance(llm, OpenAILLM):
        return diagnosis(runs, "another", "by bytes: exact or approximate, as each receipt says")
    extra = extra_tokens(view_of(small.tokenizer, slm), view_of(llm.given_tokenizer(), llm.name))
    return diagnosis(runs, "another", "exact, by bytes", extra)


def view_of(tokenizer: Any, name: str) -> ByteTokenizer:
    """The byte view of all of a tokenizer's ids."""
    return ByteTokenizer(tokenizer, 1 + max(tokenizer.get_vocab().values()), name=name)


def extra_tokens(slm: ByteTokenizer, llm: ByteTokenizer) -> float:
    """Tokens of the tree that a question wants, and the one that is written: mean over a sample text."""
    ids, places = slm.encode(TEXT.encode()), Places(llm)
    others = [slm.decode(slm.encode(each.encode())[:1]) for each in OTHERS]
    sizes = []
    for at in range(1, len(ids)):
        candidates = list(dict.fromkeys([slm.decode(ids[at : at + 1]), *others]))
        sizes.append(1 + len(Covering(places, slm.decode(ids[:at]), candidates).tree.ids))
    return statistics.fmean(sizes)
