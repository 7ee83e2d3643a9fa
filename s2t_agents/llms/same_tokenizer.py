"""Does a server read token ids as we mean them? Asked of the server itself, where it can say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from ..backends.torch.language_model import LanguageModel
from ..errors import EndpointBusy, EndpointDown, EscalationFailed, ModelNotFound, TokenizerMismatch
from .endpoint import Endpoint

SAMPLE = "The 37 shells cost $4.05; naïve façades, 東京 and наука.\n\tdef f(x): return x**2  # {'a': [1, 2]}\n"
SPREAD = 64
"""Tokens from all over the vocabulary that are spelled out beside the sample."""


@dataclass(frozen=True)
class Spelling:
    """A text and the ids that the SLM's tokenizer gives it."""

    slm: str
    fingerprint: str
    text: str
    ids: tuple[int, ...]

    @classmethod
    def of(cls, slm: LanguageModel) -> Spelling:
        """A sample, and words from all over the vocabulary."""
        tokenizer = slm.tokenizer
        step = max(1, len(tokenizer) // SPREAD)
        words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(0, len(tokenizer), step)]
        text = SAMPLE + " ".join(word for word in words if "\ufffd" not in word)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        return cls(slm.name, slm.tokenizer_fingerprint, text, ids)


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: tuple[_Model, ...]


class _Tokens(BaseModel):
    tokens: tuple[int, ...]


async def verify(endpoint: Endpoint, model: str, spelling: Spelling) -> None:
    """Compare with what the server lists and spells; what it does not offer is taken on trust.

    Raises:
        ModelNotFound: it lists its models, and this is none of them.
        TokenizerMismatch: it spells the sample in other ids.
        EndpointDown, EndpointBusy: it could not be asked.
    """
    with _if_offered():
        served = _Models.model_validate_json(await endpoint.get("models")).data
        if served and model not in (each.id for each in served):
            names = endpoint.hidden(", ".join(each.id for each in served[:5]))
            raise ModelNotFound(
                f"{endpoint.url.host} does not serve {model!r} but {names}.",
                hint="Name one of these.",
            )
    with _if_offered():
        body = {"model": model, "prompt": spelling.text, "add_special_tokens": False}
        theirs = _Tokens.model_validate_json(await endpoint.post(endpoint.root.join("tokenize"), body)).tokens
        if theirs != spelling.ids:
            raise TokenizerMismatch(
                f"{model!r} at {endpoint.url.host} and {spelling.slm!r} do not spell a sample text in the same ids.",
                hint="Serve an LLM of the same family, or take ChatJudge, which needs no shared tokenizer.",
            )


@contextlib.contextmanager
def _if_offered() -> Iterator[None]:
    """Pass over a page that is not there, or is something else."""
    try:
        yield
    except (EndpointDown, EndpointBusy):
        raise
    except (EscalationFailed, ValidationError):
        return
