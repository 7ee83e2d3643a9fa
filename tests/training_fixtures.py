"""Tiny pairs and prompt files for the tests of training. Random weights: nothing they say means anything."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import SelectorConfig
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.selectors.reference import Reference
from s2t_agents.testing import tiny_model
from s2t_agents.training import fit
from s2t_agents.training.config import Adapter, Fit, Models, Rollouts, TrainConfig
from s2t_agents.training.groups import Example
from s2t_agents.training.labels import LocalTeacher
from s2t_agents.training.tasks import JsonlTask

QUICK = Rollouts(k=8, max_tokens=12, shard_items=4)
SMALL = Fit(
    k=4, rate=0.5, epochs=2, batch=4, evaluate_every=3, warmup=2, validation=0.3, width=16, adapter=Adapter(rank=2)
)

JSONL_TASKS = """
[tasks.train]
task = "jsonl"
path = "{folder}/train.jsonl"
[tasks.heldout]
task = "jsonl"
path = "{folder}/heldout.jsonl"
[tasks.test]
task = "jsonl"
path = "{folder}/test.jsonl"
"""
"""Tasks of a TOML config, to be formatted with their folder."""


def write_prompts(path: Path, count: int = 12, *, first: int = 0) -> Path:
    rows = [
        {"id": str(first + at), "prompt": f"{first + at} + {at}?", "answer": str(first + 2 * at)} for at in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def prompts(path: Path, count: int = 12, *, first: int = 0) -> JsonlTask:
    return JsonlTask(write_prompts(path / f"prompts-{first}-{count}.jsonl", count, first=first), "numeric")


def tiny_pair(architecture: str = "qwen3"):
    """A small and a large model over one vocabulary, and the large one as teacher."""
    slm = tiny_model(architecture, seed=1)
    llm = (
        tiny_model(architecture, seed=2, hidden_size=48, head_dim=12)
        if architecture == "qwen3"
        else tiny_model(architecture, seed=2)
    )
    return slm, llm, LocalTeacher(llm)


def saved_head(base: LanguageModel, folder: Path) -> Path:
    """A head of random weights that changes picks, with the reference that it was saved with."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        selector = HeadSelector(base, width=8)
        selector.out.weight.data.normal_(0, 0.2)
    Reference.of(selector, base).save(folder)
    selector.save(folder, SelectorConfig(kind="head", base=BaseIdentity.of(base), k=4))
    return folder


def save_model(model, folder: Path) -> Path:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def killed_at_its_first_checkpoint(train: Callable[[], None]) -> None:
    """Run a training that dies right after it has written a checkpoint."""
    save = fit.save_checkpoint

    def dies(*args) -> None:
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            train()


def training(kind, rollouts, out, fit=SMALL) -> TrainConfig:
    return TrainConfig(models=Models(), kind=kind, rollouts=(rollouts,), out=out, fit=fit)


def some_examples(model, *, length=20, seed=0) -> list[Example]:
    """Trajectories of random tokens with random candidates, three critical steps in each; the SLM's are its own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for at, extra in enumerate((0, 7, 3)):
        ids = torch.randint(0, 256, (length + extra,), generator=generator).tolist()
        before = torch.arange(5, length + extra + 1)
        positions = before[[1, 6, -1]]
        candidates = torch.randint(0, 256, (3, 4), generator=generator)
        row = torch.tensor([ids])
        with torch.no_grad():
            logits, _ = model.torch_backend.read_rows(row, torch.ones_like(row), None, len(ids))
        found.append(
            Example(
                ids=ids,
                item=str(at),
                positions=positions,
                candidates=candidates,
                slm=logits[0, positions - 1].log_softmax(-1).gather(1, candidates),
                llm=torch.randn(3, 4, generator=generator).log_softmax(-1),
                all_positions=before,
                differs=torch.zeros(len(before), dtype=torch.bool),
                entropy=torch.rand(len(before), generator=generator),
            )
        )
    return found


def awake(selector):
    """The selector with every weight away from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in selector.parameters():
            parameter.data.normal_(0, 0.2)
    return selector
