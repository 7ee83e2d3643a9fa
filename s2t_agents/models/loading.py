"""From a path or a hub id to weights and a tokenizer: safetensors only, no remote code unless asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ModelNotFound, UnsafeWeights
from .bundled import model_path
from .processor import widens

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever reads weights: transformers changes torch's default dtype meanwhile, for all threads."""

SMALL_ON_CPU = 300_000_000
"""Up to so many parameters a model runs in fp32 on a CPU: exact, and not slower there."""

WIDENED_ON_CPU = 2_000_000_000
"""And up to so many where the CPU has no instructions for the checkpoint's half precision, see ``processor``."""


def default_device() -> torch.device:
    """CUDA when there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_tokenizer(path: str, **options: Any) -> Any:
    """The fast tokenizer at a path or hub id.

    Raises:
        ModelNotFound: nothing there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(path), **options)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"no tokenizer at {path!r}: {first_line(error)}.", hint=_where(path)) from error


def load_weights(path: str, *, device: torch.device, dtype: torch.dtype | None, **options: Any) -> Any:
    """The causal language model at a path or hub id, in eval mode, on ``device``.

    Args:
        path: a directory, or a hub id.
        device: where it runs; ignored when ``options`` carries a ``device_map``.
        dtype: None takes fp32 on a CPU for small models, and for larger ones where it has no instructions for the
            checkpoint's half precision; the checkpoint's own otherwise.
        options: passed to ``from_pretrained`` (``quantization_config``, ``attn_implementation``, ...).

    Raises:
        ModelNotFound: nothing there.
        UnsafeWeights: there are weights, but pickled, corrupt or incomplete ones.
    """
    from transformers import AutoModelForCausalLM

    where = model_path(path)
    _refuse_pickles(where)
    placed = "device_map" in options or "quantization_config" in options
    try:
        with _without_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
            )
    except OSError as error:
        raise ModelNotFound(f"no model at {path!r}: {first_line(error)}.", hint=_where(path)) from error
    except ValueError as error:
        raise ModelNotFound(f"{path!r} is no causal language model: {first_line(error)}.", hint=_where(path)) from error
    except Exception as error:
        raise UnsafeWeights(f"the weights at {path!r} cannot be read: {first_line(error)}.") from error
    if report.get("missing_keys") or report.get("mismatched_keys"):
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UnsafeWeights(f"the weights at {path!r} lack {len(lacking)} tensors of the config, {lacking[0]} first.")
    model.eval().requires_grad_(False)
    if not placed:
        model.to(device)
    if dtype is None and device.type == "cpu" and not placed and model.num_parameters() <= _exact_up_to(model.dtype):
        model.float()
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws no bars in this block; a download of gigabytes still does."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # these two switch both kinds
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()


def _exact_up_to(dtype: torch.dtype) -> int:
    """Parameters up to which a checkpoint of this dtype is read as fp32 on a CPU."""
    return WIDENED_ON_CPU if widens(dtype) else SMALL_ON_CPU


def _refuse_pickles(path: str) -> None:
    """A directory with a config and weights, none of them safetensors, is refused by name."""
    folder = Path(path)
    if not folder.is_dir() or not (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
    found = f"only {pickles[0]}" if pickles else "no weights"
    raise UnsafeWeights(
        f"{path!r} holds {found}; only safetensors files are read.",
        hint="Convert them with save_pretrained(safe_serialization=True) on a machine that trusts them.",
    )


def context_window(config: Any, tokenizer: Any) -> int:
    """Tokens that fit: the config's ``max_position_embeddings``, else the tokenizer's limit, else 4,096."""
    for limit in (
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ):
        if limit and limit < 10**9:
            return int(limit)
    return 4096


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's and the tokenizer's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = listed if isinstance(listed, list) else [listed]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file, or an error that names it."""
    if not file.is_file():
        raise ModelNotFound(
            f"{file} is missing.", hint="Copy the whole selector directory, or train one with `s2t train`."
        )
    try:
        return load_file(file)
    except Exception as error:
        raise UnsafeWeights(f"{file} is not readable safetensors: {error}.") from error


def first_line(error: BaseException) -> str:
    """An error's first line, for use inside another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _where(path: str) -> str:
    if Path(path).exists() or path.startswith((".", "/", "~")):
        return "Check that the directory holds config.json, tokenizer.json and *.safetensors."
    return "Give a local directory, or a hub id with the hub reachable (HF_HUB_OFFLINE unset); 's2t-demo' is bundled."
