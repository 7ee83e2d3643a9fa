"""Train one model of the demo pair from scratch.

    python -m benchmarks.demo_pair.pretrain benchmarks/demo_pair/slm.toml --resume --export s2t_agents/demo/weights/slm

A run's checkpoints (weights, both optimizers, place in the corpus, random state) are under ``runs/NAME``; `--resume`
goes on from the last one and ends with the same weights as a run that never stopped. Matrices are trained with Muon,
which on so small a model learns from fewer tokens than AdamW; embeddings and norms with AdamW.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from s2t_agents.bundled import WEIGHTS

from . import tokenizer as tokenizers
from .corpus import Batch, Corpus, Position
from .recipe import Recipe, read_recipe

CONTEXT = 1024
"""Longest sequence, in tokens, that the models' configuration admits (training sees at most about 300)."""


def make_model(recipe: Recipe, tokenizer: Any) -> Qwen3ForCausalLM:
    """A fresh model in fp32, weights drawn at d^-1/2: the usual 0.02 is too small at this width."""
    torch.manual_seed(recipe.seed)
    shape = recipe.shape
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=round(shape.hidden**-0.5, 4),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        use_cache=True,
    )
    # Sequences are so short that plain attention beats the fused kernels on CPU, by half as many tokens again.
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


def make_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings and norms, Muon for the matrices (with a `matrix_lr` of 0: AdamW for all)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices} if recipe.matrix_lr else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    if not recipe.matrix_lr:
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay)]


def batch_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy over the positions that have a weight (the others never meet the vocabulary)."""
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    wanted = weights > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(batch.ids[:, :-1], use_cache=False).last_hidden_state
        logits = hidden[wanted] @ model.lm_head.weight.T
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights[wanted].sum()


class Run:
    """One training run: a model, its optimizers, its place in the corpus."""

    def __init__(self, recipe: Recipe, tokenizer: Any, folder: Path) -> None:
        torch.set_num_threads(recipe.threads)
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.model = make_model(recipe, tokenizer)
        if recipe.start:
            known = Qwen3ForCausalLM.from_pretrained(WEIGHTS / recipe.start, dtype=torch.float32)
            self.model.load_state_dict(known.state_dict())
        self.optimizers = make_optimizers(self.model, recipe)
        self.corpus = Corpus(recipe, tokenizer)
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step = self.tokens = 0
        self.seconds = 0.0

    def train_step(self) -> float:
        """One optimizer step; returns the loss (nats per weighted token)."""
        began = time.perf_counter()
        batch = self.corpus.next(self.step)
        factor = self.recipe.rate_at(self.step)
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = batch_loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if value != value:
            raise FloatingPointError(
                f"{self.recipe.name}: the loss is not a number at step {self.step}; lower the rates"
            )
        self.step += 1
        self.tokens += batch.ids.numel()
        self.seconds += time.perf_counter() - began
        return value

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `resume` reads."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; a crash half-way leaves the old one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": asdict(self.corpus.position),
            "random": torch.get_rng_state(),
            "counts": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint, which must be of the same recipe (its number of steps may differ)."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.corpus = Corpus(self.recipe, self.tokenizer, Position(**state["position"]))
        torch.set_rng_state(state["random"])
        for name, value in state["counts"].items():
            setattr(self, name, value)


def export(model: Qwen3ForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint, weights in bf16."""
    twin = Qwen3ForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    twin.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(run: Run, until: int, export_to: Path | None = None) -> None:
    """Train up to step `until` under a progress bar, saving as the recipe says."""
    console = Console(stderr=True)
    columns = (
        "{task.description}",
        BarColumn(),
        "{task.completed}/{task.total}",
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*[TextColumn(c) if isinstance(c, str) else c for c in columns], console=console) as progress:
        bar = progress.add_task(run.recipe.name, total=run.recipe.steps, completed=run.step)
        smooth = 0.0
        while run.step < until:
            loss = run.train_step()
            smooth = loss if not smooth else 0.98 * smooth + 0.02 * loss
            rate = run.tokens / max(run.seconds, 1e-9)
            told = f"{run.recipe.name}  loss {smooth:.4f}  {rate:,.0f} tokens/s"
            progress.update(bar, completed=run.step, description=told)
            if run.step % run.recipe.save_every == 0 or run.step == until:
                run.save()
                if export_to:
                    export(run.model, run.tokenizer, export_to)
                if not console.is_terminal:
                    console.print(
                        f"step {run.step}  {told}  {run.tokens / 1e6:.1f}M tokens  {run.seconds / 60:.1f} min"
                    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train one model of the demo pair from scratch.")
    parser.add_argument("recipe", type=Path, help="a TOML file, such as slm.toml beside this module")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints go")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=WEIGHTS / "slm",
        help="a folder with the tokenizer; built afresh if it is missing",
    )
    parser.add_argument("--export", type=Path, help="write the model here at every checkpoint")
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--threads", type=int, help="another number of threads than the recipe's")
    parser.add_argument("--until", type=int, help="stop at this step, to go on later")
    given = parser.parse_args()
    recipe = read_recipe(given.recipe, steps=given.steps, threads=given.threads)
    tokenizer = tokenizers.load(given.tokenizer) if given.tokenizer.exists() else tokenizers.build()
    run = Run(recipe, tokenizer, given.runs / recipe.name)
    if given.resume and run.checkpoint.exists():
        run.resume()
    train(run, min(given.until or recipe.steps, recipe.steps), given.export)


if __name__ == "__main__":
    main()
