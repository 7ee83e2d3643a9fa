"""From recipe to batches: endless, deterministic, and resumable from three numbers.

Documents are made in shards of `SHARD`; a shard is sorted by length, cut into batches of about `tokens` padded tokens
each, and the batches are shuffled. One document per row, padded on the right: causal attention needs no mask then.

    ids      B x T   token ids, padded with <|endoftext|>
    weights  B x T   weight of *predicting* the token: 1 in assistant turns (their <|im_end|> included), the stage's
                     prompt weight elsewhere, 0 in the padding
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import torch

from s2t_agents.demo.arithmetic import NOISE, work
from s2t_agents.demo.problem import Kind, Message, Problem, answer_line
from s2t_agents.demo.smalltalk import draw_talk
from s2t_agents.demo.world import generate

from .drills import DRILLS, draw_drill
from .loss_mask import masked
from .recipe import Recipe, Stage

SHARD = 1024
GRAIN = 16
"""Widths of batches are multiples of this, in tokens."""
FAILING = 0.06
"""Share of tool calls that fail."""
CHATTY = 0.06
"""Share of conversations which open with an exchange of small talk, so that a later turn is no surprise."""

Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Batch:
    """One step's input: token ids and loss weights, both B x T."""

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass
class Position:
    """Where a run is in its corpus; `shard_step` is the step at which the shard began and so decides its stage."""

    shard: int = 0
    batch: int = 0
    shard_step: int = 0


class Corpus:
    """The batches of a recipe, one after the other."""

    def __init__(self, recipe: Recipe, tokenizer: Any, position: Position | None = None) -> None:
        self._recipe = recipe
        self._encode = Encoder(tokenizer, mask_wrong_results=bool(recipe.masked_noise))
        self.position = position or Position()
        self._batches: list[Batch] | None = None

    def next(self, step: int) -> Batch:
        """The batch of `step`; steps must be asked for in order."""
        if self._batches is None:
            self._batches = self._make(self.position)
        if self.position.batch >= len(self._batches):
            self.position = Position(self.position.shard + 1, 0, step)
            self._batches = self._make(self.position)
        self.position.batch += 1
        return self._batches[self.position.batch - 1]

    def _make(self, position: Position) -> list[Batch]:
        recipe, stage = self._recipe, self._recipe.stage_at(position.shard_step)
        rows = []
        for number in range(position.shard * SHARD, (position.shard + 1) * SHARD):
            messages, tools = self._document(Random(f"{recipe.seed}/{number}"), stage)
            rows.append(self._encode(messages, tools, stage.prompt_weight))
        rng = Random(f"{recipe.seed}/shard/{position.shard}")
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row[0]))
        batches = [pad(rows[low:high], self._encode.pad) for low, high in cut(rows, recipe.tokens)]
        rng.shuffle(batches)
        return batches

    def _document(self, rng: Random, stage: Stage) -> tuple[list[Message], list[dict[str, Any]]]:
        kinds = list(stage.mixture)
        kind = rng.choices(kinds, weights=[stage.mixture[k] for k in kinds])[0]
        seed, noise = rng.getrandbits(48), self._recipe.noise or self._recipe.masked_noise
        if kind in DRILLS:
            return draw_drill(seed, kind).written(rng, noise), []
        problem = generate(seed, "train", cast("Kind", kind))
        messages = written(problem, rng, noise)
        if rng.random() < CHATTY:
            said, reply = draw_talk(rng)
            at = len(problem.prompt) - 1
            messages[at:at] = [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        return messages, list(problem.tools)


def written(problem: Problem, rng: Random, noise: float = NOISE) -> list[Message]:
    """A problem's gold conversation as the corpus has it: carries forgotten at rate `noise`.

    At a rate of ``FAILING`` the tool call fails, so that a failure is no surprise: the answer then says so and ends.
    """
    messages = [dict(message) for message in problem.gold]
    if problem.expected_call is not None and rng.random() < FAILING:
        error = rng.choice(("nothing found", f"no tool named {problem.expected_call.name}"))
        messages[-2]["content"] = json.dumps({"error": error})
        messages[-1]["content"] = f"The tool says {error}."
        return messages
    if problem.working is not None:
        sentences, total = work(problem.working.start, problem.working.moves, rng, noise)
        before = [problem.working.before] if problem.working.before else []
        messages[-1]["content"] = " ".join([*before, *sentences, answer_line(total)])
    return messages


class Encoder:
    """Messages to token ids and loss weights, through the chat template that users of the models go through."""

    def __init__(self, tokenizer: Any, *, mask_wrong_results: bool = False) -> None:
        self._tokenizer = tokenizer
        self._mask_wrong_results = mask_wrong_results
        self.pad: int = tokenizer.pad_token_id
        self._end: int = tokenizer.eos_token_id
        self._opening: list[int] = tokenizer.encode("<|im_start|>assistant\n")

    def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt_weight: float) -> Row:
        """One document; its last turn is an assistant's."""
        text = self._tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        weights = [prompt_weight] * len(ids)
        width = len(self._opening)
        at = 0
        while at < len(ids):
            if ids[at : at + width] == self._opening:
                at += width
                end = ids.index(self._end, at) + 1
                weights[at:end] = [1.0] * (end - at)
                at = end
            at += 1
        return ids, masked(weights, text, encoded["offset_mapping"]) if self._mask_wrong_results else weights


def cut(rows: Sequence[Row], tokens: int) -> list[tuple[int, int]]:
    """Slices of rows (sorted by length) which hold at most `tokens` each when padded to their longest."""
    slices, low = [], 0
    for high in range(1, len(rows) + 1):
        if high == len(rows) or (high + 1 - low) * _width(rows[high]) > tokens:
            slices.append((low, high))
            low = high
    return slices


def _width(row: Row) -> int:
    # Few distinct shapes: memory stays unfragmented, and compiled kernels are found again.
    return -(-len(row[0]) // GRAIN) * GRAIN


def pad(rows: Sequence[Row], filler: int) -> Batch:
    """Rows padded on the right to the longest, rounded up."""
    width = max(map(_width, rows))
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    weights = torch.zeros((len(rows), width))
    for at, (row, weight) in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        weights[at, : len(row)] = torch.tensor(weight)
    return Batch(ids, weights)
