"""The learned trigger: a logistic probe on the SLM's hidden state and entropy, fitted beside the selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..scheduling.language_model import LanguageModel
from .batch_reading import left_padded
from .batching import batches_of_dialogues, dialogues
from .groups import Example
from .progress import bar
from .stepwise import outputs_along

LARGEST = 200_000
"""Steps that the probe is fitted on, at most."""

DECAY = 1e-3
"""L2 penalty on its weights, features standardised."""


@dataclass(frozen=True)
class Probe:
    """``sigmoid(hidden . weight[:-1] + entropy * weight[-1] + bias)``: will the LLM disagree here?"""

    weight: Tensor
    bias: float

    def probabilities(self, hidden: Tensor, entropy: Tensor) -> Tensor:
        """``[N]`` from hidden states ``[N, H]`` and entropies ``[N]``."""
        return (hidden.float() @ self.weight[:-1] + entropy * self.weight[-1] + self.bias).sigmoid()


@torch.inference_mode()
def hidden_along(model: LanguageModel, examples: Sequence[Example]) -> list[Tensor]:
    """Last hidden states ``[n, H]`` before every completion step, each dialogue read once."""
    found: list[Tensor | None] = [None] * len(examples)
    with bar("read", len(examples)) as progress:
        for batch in batches_of_dialogues([example.ids for example in examples]):
            rows = [examples[at].ids for at in batch]
            if model.library != "torch":
                for at, states in zip(batch, _stepwise(model, [examples[at] for at in batch]), strict=True):
                    found[at] = states
                progress.advance(len(batch))
                continue
            read = dialogues(rows)
            ids, mask = left_padded([rows[places[-1]] for places in read], model.device)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model.torch_backend.decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            )
            for row, places in enumerate(read):
                for at in places:
                    end = ids.shape[1] - len(rows[places[-1]]) + len(rows[at])
                    steps = len(examples[batch[at]].all_positions)
                    found[batch[at]] = out.last_hidden_state[row, end - steps : end].float().cpu().clone()
            progress.advance(len(batch))
    return [each for each in found if each is not None]


def _stepwise(model: LanguageModel, examples: Sequence[Example]) -> list[Tensor]:
    """The same of a model that does not run in torch."""
    firsts = [int(example.all_positions[0]) for example in examples]
    last = [0]  # the last token of a completion: nothing is read after it
    rows = [(each.ids[:first], each.ids[first:] + last) for each, first in zip(examples, firsts, strict=True)]
    return outputs_along(model, rows, lambda output: output.hidden.float())


def fit_probe(examples: Sequence[Example], hidden: Sequence[Tensor], *, seed: int) -> Probe:
    """Logistic regression of "the LLM's best token is another" on every step, by L-BFGS.

    Args:
        examples: training trajectories.
        hidden: per example ``[n, H]``.
        seed: of the sample when there are more than ``LARGEST`` steps.
    """
    features = torch.cat([torch.cat([h, e.entropy[:, None]], 1) for e, h in zip(examples, hidden, strict=True)])
    wanted = torch.cat([example.differs for example in examples])
    if len(wanted) > LARGEST:
        chosen = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed))[:LARGEST]
        features, wanted = features[chosen], wanted[chosen]
    mean, spread = features.mean(0), features.std(0).nan_to_num(1.0).clamp_min(1e-4)
    x, y = ((features - mean) / spread).clone(), wanted.float()
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.binary_cross_entropy_with_logits(x @ weight + bias, y) + DECAY * weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    scaled = (weight / spread).detach()
    return Probe(scaled, float(bias.detach() - (scaled * mean).sum()))
