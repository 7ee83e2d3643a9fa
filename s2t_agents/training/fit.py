"""The training loop: batches, accumulated gradients, the learning rate's warm-up and decay, looks at held-back prompts,
checkpoints, early stopping.

Everything that decides the next step is in the checkpoint or follows from the settings, so a run that was killed and
resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic_write import write_whole
from ..errors import InputError, S2TError
from ..scheduling.language_model import LanguageModel
from .config import Fit
from .losses import agreements, selection_loss
from .objectives import Objective, autocast
from .progress import bar
from .workers import Workers

CHECKPOINT = "checkpoint.pt"


@dataclass
class Look:
    """One look at the held-back prompts: mean loss per group since the last look, and agreement with the LLM."""

    step: int
    train_loss: float
    agreement: float


@dataclass
class State:
    """Where the loop stands."""

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    bad_looks: int = 0
    loss_sum: float = 0.0
    groups: int = 0
    looks: list[Look] = field(default_factory=list)


def fit(
    selector: nn.Module,
    base: LanguageModel,
    train: Objective,
    validation: Objective,
    settings: Fit,
    folder: Path,
    workers: Workers | None = None,
) -> State:
    """Train until the epochs are over or agreement stops growing; the best weights stay in ``selector``.

    Args:
        selector: its parameters that require gradients are trained.
        base: for device and lock.
        train: units to learn from.
        validation: units of other prompts.
        settings: see ``Fit``.
        folder: for the checkpoint.
        workers: the processes that train together; by default those that were launched.

    Raises:
        InputError: a checkpoint that does not fit.
        S2TError: the loss is no longer a number; the last checkpoint stands.
    """
    weights = dict(selector.named_parameters())
    optimiser = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    training = _Training(selector, base, train, validation, settings, optimiser, workers or Workers())
    state, best = _restore(folder / CHECKPOINT, selector, optimiser)
    if best is None:
        best = _copy(selector)
        state.best = training.agreement()
        state.looks.append(Look(0, float("nan"), state.best))
    what, steps = f"train {folder.name}", training.steps
    with bar(what, steps) as progress:
        progress.advance(state.step)
        while state.step < steps and state.bad_looks < settings.patience:
            training.learn(state)
            progress.advance()
            if state.step % settings.evaluate_every == 0 or state.step == steps:
                best = training.look(state, best)
                progress.say(f"{what}  agreement {state.looks[-1].agreement:.3f} (best {state.best:.3f})")
                if training.workers.first:
                    save_checkpoint(folder / CHECKPOINT, selector, optimiser, state, best)
    selector.load_state_dict(best)
    return state


@dataclass(frozen=True)
class _Training:
    """What stays the same from step to step; see ``fit``."""

    selector: nn.Module
    base: LanguageModel
    train: Objective
    validation: Objective
    settings: Fit
    optimiser: torch.optim.Optimizer
    workers: Workers

    @property
    def per_epoch(self) -> int:
        """Steps."""
        return math.ceil(len(self.train.sizes) / self.settings.batch)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.per_epoch * self.settings.epochs

    @torch.no_grad()
    def agreement(self) -> float:
        """Share of all held-back groups where the selector's best candidate is the LLM's."""
        right = total = 0
        units = self.workers.part(range(len(self.validation.sizes)))
        for first in range(0, len(units), 64):
            with autocast(self.base, self.settings.bf16):
                for piece in self.validation.pieces(units[first : first + 64]):
                    right += int(agreements(piece.scores, piece.llm).sum())
                    total += len(piece.scores)
        right_of_all, total_of_all = self.workers.add_up([right, total], self.base.device)
        return right_of_all / total_of_all

    def learn(self, state: State) -> None:
        """One optimiser step; the gradient is the mean over the batch's groups (and prompts), however it was cut."""
        batch = self._batch(state.step)
        groups = sum(self.train.sizes[unit] for unit in batch)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * _schedule(state.step, self.settings.warmup, self.steps)
        self.optimiser.zero_grad()
        loss = self._backward(batch, groups, state.step)
        norm = nn.utils.clip_grad_norm_(self.selector.parameters(), self.settings.clip)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            step = state.looks[-1].step
            kept = f"The checkpoint of step {step} is kept. " if step else ""
            raise S2TError(
                f"the loss is {loss} and the gradient's norm {float(norm)} at step {state.step}; nothing was changed.",
                hint=f"{kept}Lower lr, or turn bf16 off.",
            )
        self.optimiser.step()
        state.step += 1
        state.loss_sum += loss
        state.groups += groups

    def _backward(self, batch: Sequence[int], groups: int, step: int) -> float:
        """The batch's gradients, and its loss, of all workers."""
        settings, mine = self.settings, self.workers.part(batch)
        total = 0.0
        with autocast(self.base, settings.bf16):
            for piece in self.train.pieces(mine, step) if mine else ():
                loss = selection_loss(
                    piece.scores, piece.llm, soft=settings.soft, temperature=settings.label_temperature
                )
                if piece.prompts is not None:
                    loss = loss + piece.prompts * (groups / len(batch))
                (loss / groups).backward()  # type: ignore[no-untyped-call]
                total += loss.item()
        self.workers.add_gradients(self.selector.parameters())
        (total,) = self.workers.add_up([total], self.base.device)
        return total

    def look(self, state: State, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure, and keep the weights if they are the best so far."""
        now = self.agreement()
        state.looks.append(Look(state.step, state.loss_sum / max(1, state.groups), now))
        state.loss_sum, state.groups = 0.0, 0
        if now > state.best:
            state.best, state.best_step, state.bad_looks = now, state.step, 0
            return _copy(self.selector)
        state.bad_looks += 1
        return best

    def _batch(self, step: int) -> list[int]:
        """The units of one step: a fresh order every epoch, a function of seed and step alone."""
        epoch, at = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train.sizes), generator=generator)
        return order[at * self.settings.batch : (at + 1) * self.settings.batch].tolist()


def _schedule(step: int, warmup: int, steps: int) -> float:
    """Linear up, cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _copy(selector: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in selector.state_dict().items()}


def save_checkpoint(
    file: Path, selector: nn.Module, optimiser: torch.optim.Optimizer, state: State, best: dict[str, Tensor]
) -> None:
    """Write all that a killed training needs to go on."""
    buffer = io.BytesIO()
    torch.save(
        {"weights": selector.state_dict(), "optimiser": optimiser.state_dict(), "state": asdict(state), "best": best},
        buffer,
    )
    write_whole(file, buffer.getvalue())


def _restore(
    file: Path, selector: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[State, dict[str, Tensor] | None]:
    """Where a killed run stood; a fresh state where there was none.

    Raises:
        InputError: a checkpoint that does not fit.
    """
    if not file.exists():
        return State(), None
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        selector.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
    except Exception as error:
        raise InputError(f"{file} does not fit this training: {error}.", hint="Delete it to start anew.") from error
    looks = [Look(**look) for look in saved["state"].pop("looks")]
    return State(**saved["state"], looks=looks), saved["best"]
