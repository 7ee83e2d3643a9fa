"""The calibrated trigger of a selector directory: an entropy threshold, or a learned probe."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..atomic_write import write_whole
from ..backends.torch.loading import read_tensors
from ..errors import AdapterMismatch, ConfigError
from ..triggers import Trigger, entropy, probe
from .config import SelectorConfig

PROBE_FILE = "probe.safetensors"


def save_probe(path: Path, weight: Tensor, bias: float) -> None:
    """Write a probe's ``weight`` ``[H + 1]`` and bias into a selector directory."""
    tensors = {"weight": weight.float().cpu().contiguous(), "bias": torch.tensor([bias])}
    write_whole(path / PROBE_FILE, save(tensors))


def load_probe(path: Path, config: SelectorConfig) -> tuple[Tensor, float]:
    """A directory's probe: ``weight`` ``[H + 1]`` and bias.

    Raises:
        ModelNotFound, UnsafeWeights: no such file, or not readable.
        AdapterMismatch: it is for another hidden size.
    """
    tensors = read_tensors(path / PROBE_FILE)
    wanted = config.base.hidden_size + 1
    if "weight" not in tensors or "bias" not in tensors or tensors["weight"].shape != (wanted,):
        raise AdapterMismatch(f"{path / PROBE_FILE} is no probe for a hidden size of {config.base.hidden_size}.")
    return tensors["weight"], float(tensors["bias"])


def calibrated_trigger(path: Path, config: SelectorConfig) -> Trigger:
    """The trigger with the calibrated threshold: probe or entropy, whichever finds more disagreements at the same rate.

    Raises:
        ConfigError: the selector was never calibrated.
    """
    if config.calibration is None:
        raise ConfigError(f"the selector at {str(path)!r} has no thresholds.", hint="Run `s2t calibrate`.")
    if config.calibration.probe_above is None:
        return entropy(above=config.calibration.trigger_entropy)
    weight, bias = load_probe(path, config)
    return probe(weight, bias, above=config.calibration.probe_above)
