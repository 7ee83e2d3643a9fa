"""What may come next, token by token: as much of a grammar as is needed to look ahead without leaving it."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor


class Constraint(Protocol):
    """The state of one generation under a grammar; the engine's grammars are such."""

    def allowed(self, logits: Tensor | None = None) -> Tensor | None:
        """``[V]`` bool on the CPU: tokens that are legal now; None permits all."""

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""

    def accept(self, token_id: int) -> None:
        """Take the next token, chosen or forced."""

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""

    def fork(self) -> Self:
        """A state of its own that begins here: what it takes, this one does not."""
