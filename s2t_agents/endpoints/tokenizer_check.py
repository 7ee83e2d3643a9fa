"""Check that a server serves the model with the SLM's tokenizer, by its ``/models`` and ``/tokenize`` endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from ..errors import EndpointBusy, EndpointDown, EndpointRefused, EscalationFailed, ModelNotFound, TokenizerMismatch
from .endpoint import Endpoint

SAMPLE_TEXT = "The 37 shells cost $4.05; naïve façades, 東京 and наука.\n\tdef f(x): return x**2  # {'a': [1, 2]}\n"
SAMPLED_TOKENS = 64
"""Tokens, evenly spread over the vocabulary, that are added to the sample text."""


class Tokenizing(Protocol):
    """A model, as far as its tokenizer is concerned."""

    @property
    def name(self) -> str:
        """Path or hub id."""
        ...

    @property
    def tokenizer(self) -> Any:
        """A fast one."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of its ids."""
        ...


@dataclass(frozen=True)
class TokenizerSample:
    """A sample text and its token ids in the SLM's tokenizer."""

    slm: str
    fingerprint: str
    text: str
    ids: tuple[int, ...]

    @classmethod
    def of(cls, slm: Tokenizing) -> TokenizerSample:
        """The sample text, and tokens from all over the vocabulary."""
        tokenizer = slm.tokenizer
        step = max(1, len(tokenizer) // SAMPLED_TOKENS)
        words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(0, len(tokenizer), step)]
        text = SAMPLE_TEXT + " ".join(word for word in words if "\ufffd" not in word)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        return cls(slm.name, slm.tokenizer_fingerprint, text, ids)


class ServedModel(BaseModel):
    """A model as the server lists it; vLLM gives its context window in tokens."""

    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: tuple[ServedModel, ...]


class _Tokens(BaseModel):
    tokens: tuple[int, ...]


ANOTHER_LLM = "Serve an LLM of the same family, or take ChatJudge, which needs no shared tokenizer."
UNAUTHORIZED = 401


async def verify_tokenizer(
    endpoint: Endpoint, model: str, spelling: TokenizerSample, *, hint: str = ANOTHER_LLM
) -> ServedModel | None:
    """Compare model name and tokenizer with the server's; skips what the server does not offer.

    Args:
        endpoint: of the server.
        model: its name of the model.
        spelling: a sample text's token ids here.
        hint: the way out where they are others there.

    Returns:
        The model as the server lists it; None where it lists none.

    Raises:
        ModelNotFound: the server lists its models without this one.
        TokenizerMismatch: it tokenizes the sample text differently.
        EndpointDown, EndpointBusy: it could not be asked.
        EndpointRefused: it wants another key, or the environment has none.
    """
    found: ServedModel | None = None
    with _skip_if_missing():
        served = _Models.model_validate_json(await endpoint.get("models")).data
        found = next((each for each in served if each.id == model), None)
        if served and found is None:
            names = endpoint.redacted(", ".join(each.id for each in served[:5]))
            raise ModelNotFound(
                f"{endpoint.url.host} does not serve {model!r} but {names}.",
                hint="Name one of these.",
            )
    with _skip_if_missing():
        body = {"model": model, "prompt": spelling.text, "add_special_tokens": False}
        theirs = _Tokens.model_validate_json(await endpoint.post(endpoint.root.join("tokenize"), body)).tokens
        if theirs != spelling.ids:
            raise TokenizerMismatch(
                f"{model!r} at {endpoint.url.host} and {spelling.slm!r} do not spell a sample text in the same ids.",
                hint=hint,
            )
    return found


@contextlib.contextmanager
def _skip_if_missing() -> Iterator[None]:
    """Ignore an endpoint that does not exist or returns something else."""
    try:
        yield
    except (EndpointDown, EndpointBusy):
        raise
    except EndpointRefused as error:
        if error.status in (None, UNAUTHORIZED):  # None: there was no key to ask it with
            raise
    except (EscalationFailed, ValidationError):
        return
