"""Gradient checkpointing: less is kept for the backward pass, and nothing else changes."""

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import (
    QUICK,
    SMALL,
    awake,
    killed_at_its_first_checkpoint,
    prompts,
    some_examples,
    tiny_pair,
    training,
)

from s2t_agents.testing import ARCHITECTURES, tiny_model
from s2t_agents.training.collect import collect_with
from s2t_agents.training.losses import selection_loss
from s2t_agents.training.objectives import autocast, fresh_selector, objective_for
from s2t_agents.training.train import train_with


def gradients(selector, examples, settings) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes kept for the backward pass, over all examples."""
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    total = 0.0
    objective = objective_for(selector, examples, [], settings)
    for piece in kept_pieces(objective, keep):
        loss = selection_loss(piece.scores, piece.llm, soft=0.5, temperature=1.0)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in selector.named_parameters()}, sum(kept)


def kept_pieces(objective, keep):
    """Pieces of all units, every tensor that the graph saves shown to ``keep``."""
    pieces = objective.pieces(list(range(len(objective.sizes))))
    while True:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["activated", "adapted", "published"])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_keeps_less_and_changes_nothing(architecture, kind, bf16):
    slm = tiny_model(architecture)
    examples = some_examples(slm)
    plain = SMALL.model_copy(update={"max_row": 8})  # several pieces
    spared = plain.model_copy(update={"checkpointing": True})
    with autocast(slm, bf16):
        loss, wanted, kept = gradients(awake(fresh_selector(slm, kind, plain)), examples, plain)
        same_loss, found, less = gradients(awake(fresh_selector(slm, kind, spared)), examples, spared)
    assert same_loss == loss
    for name, gradient in wanted.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0, msg=name)
    assert less < kept / 3
    assert all("forward" not in vars(layer) for layer in slm.torch_backend.decoder.layers)
    assert not any(module._forward_hooks for module in slm.model.modules())


def test_a_training_may_go_on_with_checkpointing(tmp_path):
    slm, _, teacher = tiny_pair()
    rollouts = tmp_path / "rollouts"
    collect_with(slm, teacher, prompts(tmp_path, 16), QUICK, rollouts)
    train_with(slm, training("activated", rollouts, tmp_path / "whole"))
    killed_at_its_first_checkpoint(lambda: train_with(slm, training("activated", rollouts, tmp_path / "spared")))
    train_with(
        slm, training("activated", rollouts, tmp_path / "spared", SMALL.model_copy(update={"checkpointing": True}))
    )
    for name in ("adapter_model.safetensors", "score_head.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("whole", "spared"))
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-6, rtol=1e-5)
