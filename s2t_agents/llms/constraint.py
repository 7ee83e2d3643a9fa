"""The part of a grammar state's interface that previews need."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor


class Constraint(Protocol):
    """A grammar state, such as ``grammar.grammar.Grammar``."""

    def allowed(self, logits: Tensor | None = None) -> Tensor | None:
        """Token mask ``[V]`` (bool, CPU) of the next token; None permits all."""

    def forced(self) -> list[int]:
        """The next tokens, as far as there is only one legal continuation."""

    def accept(self, token_id: int) -> None:
        """Advance by a token, chosen or forced."""

    @property
    def finished(self) -> bool:
        """Whether no token is legal any more."""

    def fork(self) -> Self:
        """An independent copy of the state."""
