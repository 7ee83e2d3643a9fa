"""How each kind of selector is scored in training: one pass over a trajectory, never one prefix per candidate.

head        hidden states once, without gradient, then the MLP alone
activated   the base once, without gradient ─ KV ─ then all M x K candidates of the trajectory in one row, adapter on
adapted     the trajectory once, adapter on, gradients throughout; the candidates' logits are read off it
published   as activated, but the adapter is on for the prefix too, and gradients flow through its KV
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..backends.torch.lora import Lora
from ..scheduling.language_model import LanguageModel
from ..selectors import LocalSelector
from ..selectors.activated import ActivatedSelector
from ..selectors.adapted import AdaptedSelector
from ..selectors.head import HeadSelector
from ..selectors.published import PublishedSelector
from .batch_reading import left_padded
from .batching import BATCH_TOKENS, batches
from .config import Fit, Kind
from .gradient_checkpointing import recomputed
from .groups import Example


@dataclass(frozen=True)
class Scored:
    """M groups of one piece of a batch.

    Attributes:
        scores: ``[M, K]``.
        slm: ``[M, K]`` log-probabilities.
        llm: ``[M, K]``, likewise.
        prompts: what is to be learned from the piece's prompts besides: a loss, summed over its trajectories.
    """

    scores: Tensor
    slm: Tensor
    llm: Tensor
    prompts: Tensor | None = None


class Objective(Protocol):
    """Training units of one selector (groups or trajectories).

    Attributes:
        sizes: groups in each unit.
    """

    sizes: list[int]

    def pieces(self, units: Sequence[int], step: int | None = None) -> Iterator[Scored]:
        """Score these units, in as many pieces as memory wants; the graph of each may be freed before the next.

        Args:
            units: to score.
            step: of the training, which decides what is drawn; None: they are looked at, not learned from.
        """
        ...


class HeadObjective:
    """Units are single groups over hidden states that were computed once.

    Args:
        selector: the head.
        examples: whose groups these are.
        hidden: per example ``[n, H]``, of every completion step.
    """

    def __init__(self, selector: HeadSelector, examples: Sequence[Example], hidden: Sequence[Tensor]) -> None:
        self._selector = selector
        with_groups = [(e, h) for e, h in zip(examples, hidden, strict=True) if len(e.positions)]
        device = selector.base.device
        self._hidden = torch.cat([h[e.positions - e.all_positions[0]] for e, h in with_groups]).to(device)
        self._candidates = torch.cat([e.candidates for e, _ in with_groups]).to(device)
        self._slm = torch.cat([e.slm for e, _ in with_groups]).to(device)
        self._llm = torch.cat([e.llm for e, _ in with_groups]).to(device)
        self.sizes = [1] * len(self._slm)

    def pieces(self, units: Sequence[int], step: int | None = None) -> Iterator[Scored]:
        """All at once."""
        at = torch.tensor(units, device=self._slm.device)
        correction = self._selector.correction(self._hidden[at], self._candidates[at])
        yield Scored(self._slm[at] + correction, self._slm[at], self._llm[at])


class AdapterObjective:
    """Units are trajectories.

    Args:
        selector: activated or published.
        examples: those without groups are left out.
        max_row: candidates per row and forward.
        checkpointing: activations are computed again in the backward pass instead of kept.
        tokens: prefix tokens and candidates per forward, padding included.
    """

    def __init__(
        self,
        selector: ActivatedSelector | PublishedSelector,
        examples: Sequence[Example],
        *,
        max_row: int,
        checkpointing: bool = False,
        tokens: int = BATCH_TOKENS,
    ) -> None:
        self._selector = selector
        self._examples = [example for example in examples if len(example.positions)]
        self._max_row, self._tokens, self._checkpointing = max_row, tokens, checkpointing
        self.sizes = [len(example.positions) for example in self._examples]

    def pieces(self, units: Sequence[int], step: int | None = None) -> Iterator[Scored]:
        """Trajectories of like length together; long rows of candidates in parts."""
        chosen = [self._examples[unit] for unit in units]
        costs = [len(example.ids) + example.candidates.numel() for example in chosen]
        for batch in batches(costs, self._tokens):
            part = [chosen[at] for at in batch]
            k = part[0].candidates.shape[1]
            groups = max(1, self._max_row // k)
            for first in range(0, max(len(example.positions) for example in part), groups):
                yield self._scored(part, slice(first, first + groups))

    def _scored(self, examples: Sequence[Example], steps: slice) -> Scored:
        """The groups ``steps`` of each of these examples."""
        examples = [example for example in examples if len(example.positions[steps])]
        base, selector = self._selector.base, self._selector
        ids, mask = left_padded([example.ids for example in examples], base.device)
        longest = max(len(example.positions[steps]) for example in examples)
        k = examples[0].candidates.shape[1]
        positions = torch.zeros(len(examples), longest, dtype=torch.long)
        candidates = torch.zeros(len(examples), longest, k, dtype=torch.long)
        real = torch.zeros(len(examples), longest, dtype=torch.bool)
        for row, example in enumerate(examples):
            m = len(example.positions[steps])
            positions[row, :m], candidates[row, :m] = example.positions[steps], example.candidates[steps]
            real[row, :m] = True
        hidden = self._after(ids, mask, candidates.flatten(1), positions.repeat_interleave(k, 1))
        correction = selector.correction(hidden.view(len(examples), longest, k, -1)[real.to(base.device)])
        slm = torch.cat([example.slm[steps] for example in examples]).to(base.device)
        llm = torch.cat([example.llm[steps] for example in examples]).to(base.device)
        return Scored(slm + correction, slm, llm)

    def _after(self, ids: Tensor, mask: Tensor, candidates: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[B, M * K, H]`` after the candidates."""
        base = self._selector.base
        on_prefix = isinstance(self._selector, PublishedSelector)
        cache = DynamicCache()
        with base.lock:
            with self._adapted() if on_prefix else torch.no_grad():
                base.torch_backend.read_rows(ids, mask, cache, 1)
            with self._adapted():
                rows = candidates.to(base.device), positions.to(base.device)
                return base.torch_backend.candidate_rows(*rows, mask, cache)

    def _adapted(self) -> AbstractContextManager[None]:
        return adapter_on(self._selector.base, self._selector.lora, checkpointing=self._checkpointing)


class AdaptedObjective:
    """Units are trajectories.

    Args:
        selector: the adapted one.
        examples: those without groups are left out.
        checkpointing: activations are computed again in the backward pass instead of kept.
        prompts: what is learned from the prompts besides.
    """

    def __init__(
        self,
        selector: AdaptedSelector,
        examples: Sequence[Example],
        *,
        checkpointing: bool = False,
        prompts: PromptDistillation | None = None,
    ) -> None:
        self._selector, self._checkpointing, self._prompts = selector, checkpointing, prompts
        self._examples = [example for example in examples if len(example.positions)]
        self.sizes = [len(example.positions) for example in self._examples]

    def pieces(self, units: Sequence[int], step: int | None = None) -> Iterator[Scored]:
        """Trajectories of like length together."""
        chosen = [self._examples[unit] for unit in units]
        for batch in batches([len(example.ids) for example in chosen]):
            yield self._scored([chosen[at] for at in batch], step)

    def _scored(self, examples: Sequence[Example], step: int | None) -> Scored:
        base, selector = self._selector.base, self._selector
        ids, mask = left_padded([example.ids for example in examples], base.device)
        back = max(len(example.ids) - int(example.positions[0]) + 1 for example in examples)
        width = ids.shape[1]
        drawn = self._prompts.columns(width, step) if self._prompts else torch.empty(0, dtype=torch.long)
        columns = torch.cat([drawn, torch.arange(width - back, width)]).to(base.device)
        with base.lock, adapter_on(base, selector.lora, checkpointing=self._checkpointing):
            logits, _ = base.torch_backend.read_rows(ids, mask, None, columns)
        found = []
        for row, example in enumerate(examples):
            at = len(drawn) + back - len(example.ids) + example.positions - 1  # the token before each step
            found.append(logits[row, at.to(base.device)])
        prompts = None
        if self._prompts and len(drawn):
            ends = torch.tensor([width - len(each.ids) + int(each.all_positions[0]) - 1 for each in examples])
            prompts = self._prompts.loss(ids, mask, ends, drawn, logits[:, : len(drawn)])
        slm = torch.cat([example.slm for example in examples]).to(base.device)
        llm = torch.cat([example.llm for example in examples]).to(base.device)
        candidates = torch.cat([example.candidates for example in examples]).to(base.device)
        return Scored(slm + selector.correction(slm, torch.cat(found), candidates), slm, llm, prompts)


@dataclass(frozen=True)
class PromptDistillation:
    """KL(LLM || SLM with adapter) over the whole vocabulary, at some of a prompt's tokens.

    Attributes:
        llm: on this machine.
        share: of the tokens.
        seed: of what is drawn.
    """

    llm: LanguageModel
    share: float
    seed: int

    def columns(self, width: int, step: int | None) -> Tensor:
        """``[n]``: which of ``width`` columns are drawn for this step; None draws none.

        They are counted from the right, where rows end: the same for a row whatever else is in its batch.
        """
        if step is None:
            return torch.empty(0, dtype=torch.long)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        lots = torch.rand(self.llm.context_window, generator=generator)[:width]
        return width - 1 - (lots < self.share).nonzero()[:, 0]

    def loss(self, ids: Tensor, mask: Tensor, ends: Tensor, columns: Tensor, ours: Tensor) -> Tensor:
        """The mean over each row's columns, summed over the rows.

        Args:
            ids: ``[B, T]``, padding on the left.
            mask: ``[B, T]``, 0 for padding.
            ends: ``[B]``: the column of each prompt's last token, whose next token is the answer's first.
            columns: ``[n]``.
            ours: logits ``[B, n, V]`` of the SLM with its adapter.
        """
        at, device = columns.to(self.llm.device), ours.device
        with torch.no_grad():
            theirs, _ = self.llm.torch_backend.read_rows(ids.to(at.device), mask.to(at.device), None, at)
            width = min(theirs.shape[-1], ours.shape[-1])
            wanted = theirs[..., :width].to(device).log_softmax(-1)
        kl = (wanted.exp() * (wanted - ours[..., :width].log_softmax(-1))).sum(-1)
        real = mask[:, columns.to(device)].bool() & (columns < ends[:, None]).to(device)
        return (kl.where(real, 0.0).sum(1) / real.sum(1).clamp_min(1)).sum()


@contextmanager
def adapter_on(base: LanguageModel, lora: Lora, *, checkpointing: bool) -> Iterator[None]:
    """The adapter is on, and activations are kept or not."""
    spared = recomputed(base.model, base.torch_backend.decoder, lora) if checkpointing else nullcontext()
    with lora.on(base.model), spared:
        yield


def fresh_selector(base: LanguageModel, kind: Kind, fit: Fit) -> LocalSelector:
    """An untrained selector: it scores as the SLM does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        if kind == "head":
            return HeadSelector(base, width=fit.width)
        adapter = fit.adapter
        lora = Lora.fresh(base.model, targets=list(adapter.targets), rank=adapter.rank, alpha=adapter.alpha)
        if kind == "activated":
            return ActivatedSelector(base, lora)
        return AdaptedSelector(base, lora) if kind == "adapted" else PublishedSelector(base, lora)


def objective_for(
    selector: LocalSelector,
    examples: Sequence[Example],
    hidden: Sequence[Tensor],
    fit: Fit,
    llm: LanguageModel | None = None,
) -> Objective:
    """The objective of a selector over some examples; ``llm`` is needed where ``fit.prompt_share`` is not 0."""
    if isinstance(selector, HeadSelector):
        return HeadObjective(selector, examples, hidden)
    if isinstance(selector, AdaptedSelector):
        prompts = PromptDistillation(llm, fit.prompt_share, fit.seed) if llm is not None else None
        return AdaptedObjective(selector, examples, checkpointing=fit.checkpointing, prompts=prompts)
    return AdapterObjective(selector, examples, max_row=fit.max_row, checkpointing=fit.checkpointing)


def autocast(base: LanguageModel, bf16: bool) -> torch.autocast | nullcontext[None]:
    """bf16 where it is asked for."""
    return torch.autocast(base.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
