"""``adapter_config.json`` as PEFT writes it: rank and strength of each layer's correction.

A setting that makes something other than a plain LoRA of an adapter (DoRA, AdaLoRA, a bias, weights of the base that
were changed at its initialisation, ...) is refused: without it the same tensors compute something else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import regex
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ...atomic_write import write_whole
from ...errors import AdapterMismatch

CONFIG_FILE = "adapter_config.json"

ANOTHER_KIND = re.compile(
    r"use_(?!rslora$)\w+|(arrow|kasa|monteclora)_config|lora_bias|alora_invocation_tokens|layer_replication"
    r"|modules_to_save|target_parameters|trainable_token_indices"
)
"""Settings that make something else of an adapter where they are on; those of a training alone are not among them."""

PATTERN_S = 1.0
"""Seconds in which a pattern of layers' names has to match, or not to."""

T = TypeVar("T")


class PeftConfig(BaseModel):
    """What an adapter's tensors do not tell; names of the fields, and patterns of layers' names, are PEFT's."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA", None] = "LORA"
    r: PositiveInt
    lora_alpha: float
    use_rslora: bool | None = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal", None] = True

    @classmethod
    def load(cls, folder: Path) -> PeftConfig:
        """Read a directory's ``adapter_config.json``.

        Raises:
            AdapterMismatch: there is none, or it is no plain LoRA's; the message names each setting.
        """
        file = folder / CONFIG_FILE
        try:
            found = cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise AdapterMismatch(f"no adapter at {str(folder)!r}: {CONFIG_FILE} is missing.") from error
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors())
            raise AdapterMismatch(f"{file} is not that of a plain LoRA: {wrong}.", hint=_HINT) from error
        odd = [
            f"{name}={value!r:.60}"
            for name, value in (found.model_extra or {}).items()
            if ANOTHER_KIND.fullmatch(name) and value
        ]
        if odd:
            raise AdapterMismatch(f"{file} is not that of a plain LoRA: {', '.join(odd)}.", hint=_HINT)
        return found

    def rank_of(self, layer: str) -> int:
        """Of a layer, by its name in the base model.

        Raises:
            AdapterMismatch: a pattern that cannot be matched.
        """
        return _first_match(self.rank_pattern or {}, layer, self.r)

    def alpha_of(self, layer: str) -> float:
        """Of a layer, such that its correction is multiplied by alpha / rank.

        Raises:
            AdapterMismatch: as ``rank_of``.
        """
        alpha = _first_match(self.alpha_pattern or {}, layer, self.lora_alpha)
        return alpha * self.rank_of(layer) ** 0.5 if self.use_rslora else alpha


_HINT = "Merge the adapter into its base with PEFT, or train it as a plain LoRA."


def save_peft_config(folder: Path, layers: Mapping[str, tuple[int, float]], *, base_name: str) -> None:
    """Write ``adapter_config.json`` so that PEFT gives each layer the strength that it has here.

    Args:
        folder: where to.
        layers: rank and alpha by the layer's name; at least one.
        base_name: name of the base model.
    """
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*layers.values(), strict=True))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "inference_mode": True,
    }
    ranks = {_exactly(name): each for name, (each, _) in layers.items() if each != rank}
    alphas = {_exactly(name): each for name, (_, each) in layers.items() if each != alpha}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    config.update({name: found for name, found in patterns.items() if found})
    write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _first_match(patterns: Mapping[str, T], layer: str, default: T) -> T:
    """What the first pattern that fits a layer's name, or the end of it after a dot, says; else the default."""
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=PATTERN_S):
                return value
        except (regex.error, TimeoutError) as error:
            raise AdapterMismatch(
                f"{pattern!r:.80} in {CONFIG_FILE} is no pattern of layers' names: {error}."
            ) from error
    return default


def _exactly(name: str) -> str:
    """The pattern of one layer's whole name."""
    return f"^{regex.escape(name)}"
