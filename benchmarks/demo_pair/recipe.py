"""What a training run is: everything that decides its outcome, read from a TOML file beside this one."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from s2t_agents.demo.problem import Kind

from .drills import DRILLS

KINDS: tuple[str, ...] = (*get_args(Kind), *DRILLS)
"""Of a mixture: problems of the demo world, and drills."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int


@dataclass(frozen=True)
class Stage:
    """A part of the run, up to the fraction `until` of its steps: weights of the kinds, and of the prompt's tokens."""

    until: float
    mixture: dict[str, float]
    prompt_weight: float


@dataclass(frozen=True)
class Recipe:
    """A whole run. `tokens` are those of one step (padding included), `noise` the rate of forgotten carries.

    `masked_noise` is the rate of forgotten carries without loss (see `loss_mask`); a recipe has these or `noise`.
    `start` names the bundled model whose weights the run goes on from; empty begins from fresh ones.
    """

    name: str
    seed: int
    noise: float
    steps: int
    tokens: int
    lr: float
    matrix_lr: float
    weight_decay: float
    warmup: float
    decay: float
    clip: float
    save_every: int
    threads: int
    shape: Shape
    stages: tuple[Stage, ...]
    start: str = ""
    masked_noise: float = 0.0

    def stage_at(self, step: int) -> Stage:
        """The stage which `step` falls into."""
        done = step / self.steps
        return next((stage for stage in self.stages if done < stage.until), self.stages[-1])

    def rate_at(self, step: int) -> float:
        """The learning rate's factor at `step`: linear warmup, flat, linear decay to a twentieth."""
        warmup, decay = max(1.0, self.warmup * self.steps), max(1.0, self.decay * self.steps)
        left = (self.steps - step) / decay
        return min(1.0, (step + 1) / warmup, max(0.05, left))


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """The recipe in `path`; unknown or missing keys are an error which names them."""
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    data.setdefault("name", path.stem)
    data.setdefault("start", "")
    data.setdefault("masked_noise", 0.0)
    data |= {key: value for key, value in overrides.items() if value is not None}
    known = {field.name for field in fields(Recipe)}
    if wrong := sorted(set(data) ^ known):
        raise ValueError(f"{path}: unknown or missing keys: {', '.join(wrong)}")
    if data["noise"] and data["masked_noise"]:
        both = f"noise is {data['noise']} and masked_noise {data['masked_noise']}"
        raise ValueError(f"{path}: {both}; one of them must be 0")
    stages = tuple(Stage(**stage) for stage in data.pop("stages"))
    for stage in stages:
        if strange := sorted(set(stage.mixture) - set(KINDS)):
            raise ValueError(f"{path}: the mixture names unknown kinds: {', '.join(strange)}")
    return Recipe(shape=Shape(**data.pop("shape")), stages=stages, **data)
