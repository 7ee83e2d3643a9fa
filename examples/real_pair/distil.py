"""python examples/real_pair/distil.py smollm2.toml: train the pair's adapted selector with its LLM at hand.

``s2t train`` learns from what rollouts keep: the LLM's word on K candidates at each step of an answer. Where both
models fit on one machine, there is more to learn from: what the LLM says at *every* token of a prompt, over the whole
vocabulary. The adapter then mends what quantisation did to the reading of tools and questions, not of answers alone.

    loss = KL(LLM || SLM with adapter) at a share of the prompt's tokens
         + 1/8 of the sum over the answer's open steps of KL + 1/2 cross-entropy over the K candidates;
           unsure steps count in full, the others by a fifth

Reads the rollouts of ``[tasks.train]`` (``s2t collect``) and writes the selector's directory, which
``s2t calibrate --kind adapted`` finishes; the trigger's probe is the head's (``s2t train --kind head``), if there is
one: it reads the small model alone. Processes share the sequences of a step; gradients are summed over loopback.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional

from s2t_agents import LanguageModel
from s2t_agents.backends.statistics import FLOOR
from s2t_agents.selectors import AdaptedSelector, SelectorConfig
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.selectors.learned_trigger import PROBE_FILE
from s2t_agents.training.card import write_card
from s2t_agents.training.config import Adapter, Fit, Pipeline, read_config
from s2t_agents.training.groups import Example, choose, read_for, threshold_for
from s2t_agents.training.objectives import fresh_selector

K = 8
SHARE = 0.4
"""Of a prompt's tokens, drawn anew each time."""
SYSTEM = 20
"""The template's own first tokens, the same in every prompt."""
WARMUP = 8


def hidden(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """``[n, H]``, of every token."""
    out = model.torch_backend.decoder(input_ids=torch.tensor([ids]), use_cache=False)
    states: Tensor = out.last_hidden_state[0]
    return states


def log_probs(model: LanguageModel, states: Tensor) -> Tensor:
    """``[n, V]``, from hidden states ``[n, H]``."""
    said: Tensor = model.model.get_output_embeddings()(states).float().log_softmax(-1)
    return said


class Distillation:
    """The loss of one answer.

    Args:
        slm: proposes the candidates.
        llm: teaches.
        selector: learns.
        unsure: nats from which a step of an answer counts in full.
        seed: of the prompt's tokens that are drawn.
    """

    def __init__(
        self, slm: LanguageModel, llm: LanguageModel, selector: AdaptedSelector, unsure: float, seed: int
    ) -> None:
        self._slm, self._llm, self._selector, self._unsure = slm, llm, selector, unsure
        self._draw = torch.Generator().manual_seed(seed)
        self._said: dict[int, Tensor] = {}  # the LLM's hidden states, by example: it reads each answer once

    def loss(self, number: int, example: Example) -> Tensor:
        """Of the answer with this number."""
        with torch.no_grad():
            if number not in self._said:
                self._said[number] = hidden(self._llm, example.ids)
        theirs = self._said[number]
        with self._selector.lora.on(self._slm.model):
            ours = hidden(self._slm, example.ids)
        prompt = int(example.all_positions[0])
        at = torch.arange(SYSTEM, prompt - 1)
        at = at[torch.rand(len(at), generator=self._draw) < SHARE]
        reading = self._reading(ours[at], theirs[at]) if len(at) else ours.new_zeros(())
        return reading + self._answering(example, ours) / 8

    def _reading(self, ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = log_probs(self._llm, theirs)
        return (wanted.exp() * (wanted - log_probs(self._slm, ours))).sum(-1).mean()

    def _answering(self, example: Example, ours: Tensor) -> Tensor:
        open_ = example.slm[:, 1] > FLOOR
        if not open_.any():
            return ours.new_zeros(())
        candidates, slm, llm = example.candidates[open_], example.slm[open_], example.llm[open_]
        rows = self._slm.output_embedding[candidates]
        scores = torch.einsum("nh,nkh->nk", ours[example.positions[open_] - 1], rows).float()
        scores = scores.masked_fill(slm <= FLOOR, FLOOR)
        near = functional.kl_div(scores.log_softmax(-1), llm.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        right = functional.cross_entropy(scores, llm.argmax(-1), reduction="none")
        unsure = example.entropy[example.positions[open_] - example.all_positions[0]] >= self._unsure
        return ((near + right / 2) * torch.where(unsure, 1.0, 0.2)).sum()


def batches(count: int, epochs: int, size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of examples, a fresh order every epoch."""
    order = random.Random(seed)
    for _ in range(epochs):
        numbers = order.sample(range(count), count)
        yield from (numbers[at : at + size] for at in range(0, count - size + 1, size))


def distil(rank: int, args: argparse.Namespace, port: int) -> None:
    """One of the processes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // args.processes))
    if args.processes > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes
        )
    pipeline = read_config(args.config)
    slm, llm = pipeline.models.load_slm(), pipeline.models.load_llm()
    for model in (slm, llm):
        model.model.requires_grad_(False)
    shards = read_for(slm, [pipeline.rollouts("train")], K)
    examples = choose(shards, k=K, rate=1.0, kl_rate=0.0)
    unsure = threshold_for(torch.cat([example.entropy for example in examples]), pipeline.calibrate.trigger_rate)
    fit = Fit(k=K, adapter=Adapter(rank=args.rank, alpha=2 * args.rank), seed=pipeline.seed)
    selector = fresh_selector(slm, "adapted", fit)
    assert isinstance(selector, AdaptedSelector)
    work = Distillation(slm, llm, selector, unsure, pipeline.seed + rank)
    weights = list(selector.lora.parameters())
    optimiser = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps, started = args.epochs * (len(examples) // args.batch), time.monotonic()
    for step, batch in enumerate(batches(len(examples), args.epochs, args.batch, pipeline.seed)):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        total = 0.0
        for number in batch[rank :: args.processes]:
            loss = work.loss(number, examples[number]) / len(batch)
            loss.backward()
            total += loss.item()
        if args.processes > 1:
            for weight in weights:
                distributed.all_reduce(weight.grad)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if not rank and step % 5 == 0:
            took = time.monotonic() - started
            print(f"step {step + 1} of {steps}  loss {total * args.processes:.3f}  {took:.0f} s", flush=True)
        last = step + 1 == min(steps, args.stop or steps)
        if not rank and (step % 20 == 19 or last):
            save(pipeline, slm, selector, args, step + 1, len(examples))
        if last:
            break


def save(
    pipeline: Pipeline, slm: LanguageModel, selector: AdaptedSelector, args: argparse.Namespace, step: int, answers: int
) -> None:
    """The selector's directory, as it is after this step."""
    figures = {
        "made_by": "examples/real_pair/distil.py",
        "trajectories": answers,
        "steps": step,
        **{name: getattr(args, name) for name in ("rank", "epochs", "batch", "lr")},
    }
    out = pipeline.selector("adapted")
    out.mkdir(parents=True, exist_ok=True)
    selector.save(out, SelectorConfig(kind="adapted", base=BaseIdentity.of(slm), k=K, training=figures))
    write_card(out)
    probe = pipeline.selector("head") / PROBE_FILE
    if probe.exists():
        shutil.copy(probe, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--stop", type=int, help="end after so many steps of the schedule")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.processes == 1:
        distil(0, args, 0)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(distil, (args, port), nprocs=args.processes)


if __name__ == "__main__":
    main()
