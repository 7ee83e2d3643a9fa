"""Labelled groups per second: training in one pass over a trajectory, beside the published way.

one pass     the base reads the trajectory once without gradient; all candidates of all its groups train in one row
published    every candidate of every group re-reads the whole prefix, through the student (with gradient) and through
             the frozen reference (without), in 512-token rows

Same architecture, same random weights, same LoRA. The published way is given its best case here: no output layer and
no text logits. One of its candidates is timed and multiplied by K, because a whole group takes minutes on a CPU.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from s2t_agents.backends.torch.lora import Lora
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors.activated import ActivatedSelector
from s2t_agents.selectors.published import PublishedSelector
from s2t_agents.testing import tiny_config, tiny_tokenizer
from s2t_agents.training.config import Adapter
from s2t_agents.training.groups import Example
from s2t_agents.training.losses import selection_loss
from s2t_agents.training.objectives import AdapterObjective

SHAPES: dict[str, dict[str, int]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "tiny": {},
}
TARGET = 20.0
"""Times the published way's groups per second, at 512 tokens of prefix."""


def run(
    *, shape: str = "0.5b", prefix: int = 512, groups: int = 10, k: int = 8, repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Measure both ways.

    Args:
        shape: a key of ``SHAPES``; Qwen2.5-0.5B's layers over a byte vocabulary (the output layer takes no part).
        prefix: tokens before the first group.
        groups: in the trajectory, five tokens apart.
        k: candidates per group.
        repeats: of each measurement; the median counts.
        seed: of weights and tokens.

    Returns:
        ``{"groups_per_s": {"one_pass": x, "published": y}, "ratio": ..., "target": ..., "met": ..., ...}``.
    """
    model = _model(shape, prefix + 5 * groups + 1, seed)
    example = _example(prefix, groups, k, seed)
    ours = _median(lambda: _one_pass(model, example), repeats)
    theirs = _median(lambda: _one_candidate(model, example, prefix), repeats) * k * groups
    rates = {"one_pass": groups / ours, "published": groups / theirs}
    return {
        "groups_per_s": rates,
        "ratio": rates["one_pass"] / rates["published"],
        "target": TARGET,
        "met": rates["one_pass"] >= TARGET * rates["published"],
        "shape": shape,
        "prefix": prefix,
        "groups": groups,
        "k": k,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    title = f"{result['shape']} shape, prefix {result['prefix']}, {result['groups']} groups of {result['k']} candidates"
    shown = Table("training", "groups/s", title=title)
    for name, rate in result["groups_per_s"].items():
        shown.add_row(name.replace("_", " "), f"{rate:.4g}")
    shown.add_row("ratio", f"{result['ratio']:.1f} (target {result['target']:.0f})")
    return shown


def _model(shape: str, length: int, seed: int) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    overrides = {"max_position_embeddings": length + 8, "initializer_range": 0.02, **SHAPES[shape]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config("qwen2", **overrides))
    return LanguageModel(model.eval().requires_grad_(False), tiny_tokenizer(), name=shape)


def _example(prefix: int, groups: int, k: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    positions = prefix + 5 * torch.arange(groups)
    length = int(positions[-1])
    return Example(
        ids=torch.randint(0, 256, (length,), generator=generator).tolist(),
        item="0",
        positions=positions,
        candidates=torch.randint(0, 256, (groups, k), generator=generator),
        slm=torch.randn(groups, k, generator=generator).log_softmax(-1),
        llm=torch.randn(groups, k, generator=generator).log_softmax(-1),
        all_positions=positions,
        differs=torch.zeros(groups, dtype=torch.bool),
        entropy=torch.zeros(groups),
    )


def _one_pass(model: LanguageModel, example: Example) -> None:
    """All groups of the trajectory, forward and backward."""
    selector = ActivatedSelector(model, _lora(model))
    for piece in AdapterObjective(selector, [example], max_row=4096, tokens=1 << 20).pieces([0]):
        selection_loss(piece.scores, piece.llm, soft=0.5, temperature=1.0).backward()  # type: ignore[no-untyped-call]


def _one_candidate(model: LanguageModel, example: Example, prefix: int) -> None:
    """Prefix and one candidate: student forward and backward, reference forward."""
    selector = PublishedSelector(model, _lora(model))
    row = torch.tensor([[*example.ids[: prefix - 1], int(example.candidates[0, 0])]])
    with selector.lora.on(model.model):
        hidden = model.torch_backend.decoder(input_ids=row, use_cache=False).last_hidden_state[:, -1]
    selector.correction(hidden).sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.torch_backend.decoder(input_ids=row, use_cache=False)


def _lora(model: LanguageModel) -> Lora:
    adapter = Adapter(rank=8)
    return Lora.fresh(model.model, targets=list(adapter.targets), rank=adapter.rank, alpha=adapter.alpha)


def _median(work: Callable[[], None], repeats: int) -> float:
    """Seconds, after one run to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
