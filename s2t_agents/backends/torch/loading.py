"""From a path or a hub id to weights and a tokenizer: safetensors only, no remote code unless asked; weights that lack
tensors, or hold NaN, are refused.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint_checks import check_classes, check_counts, check_files, check_weights, shards
from ...errors import ModelNotFound, UnsafeWeights
from ...fork_safety import LOADING, hold_while_forking
from ...hub import ModelSource
from ..engine_options import unknown_option
from .checkpoint_warnings import tell_left_out, tell_unfollowed
from .cpu_features import is_emulated

ONE_AT_A_TIME = threading.RLock()
hold_while_forking(sys.modules[__name__], "ONE_AT_A_TIME", LOADING)
"""Held while weights are read: transformers changes torch's default dtype meanwhile, for all threads."""

SMALL_ON_CPU = 300_000_000
"""Up to so many parameters a model runs in fp32 on a CPU: exact, and not slower there."""

WIDENED_ON_CPU = 2_000_000_000
"""And up to so many where the CPU has no instructions for the checkpoint's half precision, see ``cpu_features``."""

VALUES_PER_BYTE = 8
"""Most weights that a byte holds in the tightest quantisation."""

MOST_BUFFERED = 2**30
"""Values of a buffer (rotary tables, masks) from which on it counts as weights do: it will be allocated."""

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")

CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes whose values can be compared."""

CHECKED_BYTES = (
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
)
"""Dtypes of one byte, which are compared by it."""


def default_device() -> torch.device:
    """CUDA when there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_tokenizer(path: str, **options: Any) -> Any:
    """The fast tokenizer at a path or hub id.

    Args:
        path: a directory, bundled name or hub id.
        options: of ``from_pretrained``; those of the weights alone are left out.

    Raises:
        ModelNotFound: nothing there.
        UnsafeWeights: its files are damaged, or need code of their repository.
    """
    from transformers import AutoTokenizer

    origin = ModelSource.of(path, options)
    check_files(origin)
    check_counts(origin, origin.config(here=True) or {}, 0)  # transformers may make the config on the way
    with origin.reading("tokenizer"):
        return AutoTokenizer.from_pretrained(origin.path, **origin.hub)


def load_weights(path: str, *, device: torch.device, dtype: torch.dtype | None, **options: Any) -> Any:
    """The causal language model at a path or hub id, in eval mode, on ``device``.

    Args:
        path: a directory, bundled name or hub id.
        device: where it runs; ignored when ``options`` carries a ``device_map``.
        dtype: None takes fp32 on a CPU for small models, and for larger ones where it has no instructions for the
            checkpoint's half precision; the checkpoint's own otherwise.
        options: passed to ``from_pretrained`` (``revision``, ``quantization_config``, ``attn_implementation``, ...).

    Raises:
        ConfigError: an option that is set otherwise, such as ``dtype``, or unknown; a package that these weights need.
        ModelNotFound: nothing there, or no causal LM.
        UnsafeWeights: there are weights, but pickled, corrupt, incomplete or not finite ones, or they need code of
            their repository that was not consented to.
    """
    origin = ModelSource.of(path, options)
    check_sizes(origin)
    placed = "device_map" in options or "quantization_config" in options
    with _without_bars(), origin.reading("weights"), _naming_unknown_options(origin):
        model, report = _kind_of(_config_of(origin), path).from_pretrained(
            origin.path,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **origin.hub,
            **origin.weights,
        )
    _check_report(origin, model, report)
    if (ends := origin.weights.get("eos_token_id")) is not None:
        model.generation_config.eos_token_id = ends  # generation_config.json goes before the config that it went into
    tell_unfollowed(origin.name, model.generation_config)
    model.config.return_dict = True  # models read their own parts' outputs by name
    model.eval().requires_grad_(False)
    if not placed:
        model.to(device)
    refuse_infinite(origin.name, model)
    if dtype is None and device.type == "cpu" and not placed and model.num_parameters() <= _exact_up_to(model.dtype):
        model.float()
    return model


@contextmanager
def _naming_unknown_options(origin: ModelSource) -> Iterator[None]:
    """What neither ``from_pretrained`` nor the config takes comes to the model's constructor, which refuses it."""
    try:
        yield
    except TypeError as error:
        refused = _UNEXPECTED.search(str(error))
        if refused is None or refused[1] not in origin.weights:
            raise
        raise unknown_option(refused[1], origin.name) from error


def check_sizes(origin: ModelSource) -> None:
    """Compare what the config asks for with what the weight files can hold, before anything is allocated.

    Raises:
        ModelNotFound, UnsafeWeights: see ``load_weights``.
    """
    check_weights(origin)
    config = origin.config(here=True)
    if config is None:
        return
    folder = origin.folder
    files = [folder / shard for shard in shards(origin, folder)] if folder is not None else []
    tensors, size = 0, sum(file.stat().st_size for file in files)
    for file in files:
        with origin.reading("weights"), safe_open(file, "pt") as opened:
            tensors += len(opened.keys())
    check_counts(origin, config, tensors)
    if not files or origin.hub["trust_remote_code"]:
        return  # nothing to compare with, or code that need not know of empty tensors
    with origin.reading("config"):
        needed = _values_of(origin)
    most = size * (VALUES_PER_BYTE if "quantization_config" in config else 1)
    if needed > most:
        raise UnsafeWeights(
            f"the config of {origin.name!r} asks for {needed:,} values; its files of {size:,} bytes cannot hold them."
        )


def _values_of(origin: ModelSource) -> int:
    """Parameters and buffers of the model that the config describes."""
    config = _config_of(origin)
    with torch.device("meta"):
        model = _kind_of(config, origin.name).from_config(config, trust_remote_code=False)
    sizes = [each.numel() for each in model.parameters()]
    sizes += [each.numel() for each in model.buffers() if each.numel() > MOST_BUFFERED]
    return int(sum(sizes))


def _config_of(origin: ModelSource) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(origin.path, **origin.hub)


def _kind_of(config: Any, name: str) -> Any:
    """The auto class that makes a model of this config; models that see, too, are read for their text.

    Raises:
        ModelNotFound: no model of this kind writes text.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    check_classes(getattr(config, "architectures", None), name)
    code = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if "AutoModelForImageTextToText" in code or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ModelNotFound(
        f"{name!r} is no causal language model but {_article(type(config).__name__.removesuffix('Config'))}.",
        hint="Give a chat model; of one that sees or hears, transformers must have a class that writes text.",
    )


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def _check_report(origin: ModelSource, model: Any, report: Mapping[str, Any]) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelNotFound(f"{origin.name!r} is an adapter.", hint="Merge it into its base and give that.")
    mismatched = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report["mismatched_keys"])
    if mismatched:
        raise UnsafeWeights(
            f"the weights at {origin.name!r} have other sizes than its config says: {mismatched[0]} first.",
            hint="Use config and weights of one model.",
        )
    if lacking := sorted(map(str, report["missing_keys"])):
        raise UnsafeWeights(
            f"the weights at {origin.name!r} lack {len(lacking)} tensors of the config, {lacking[0]} first."
        )
    tell_left_out(origin.name, model, sorted(map(str, report["unexpected_keys"])))


@torch.inference_mode()
def refuse_infinite(name: str, model: Any) -> None:
    """Look at every weight and table once: a NaN or infinity in one makes every answer nonsense that looks like one.

    Args:
        name: of the model, for the error.
        model: any module; packed integers and what lies offloaded are passed over. Buffers that are computed, not
            read, may hold minus infinity: masks do.

    Raises:
        UnsafeWeights: naming the tensor.
    """
    finite: dict[str, Tensor] = {}
    seen: set[int] = set()
    read = model.state_dict()
    for tensor_name, tensor in {**dict(model.named_buffers()), **read}.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel() or tensor.data_ptr() in seen:
            continue  # tied ones once
        if tensor.dtype in CHECKED_BYTES:
            odd = [(tensor.view(torch.uint8) == each).any() for each in _odd(tensor.dtype)]
            finite[tensor_name] = ~torch.stack(odd).any()
        elif tensor.dtype in CHECKED:
            least, most = torch.aminmax(tensor)  # NaN comes through both
            finite[tensor_name] = most < inf if tensor_name not in read else (-inf < least) & (most < inf)
        seen.add(tensor.data_ptr())
    for tensor_name, sound in finite.items():
        if not sound:
            raise UnsafeWeights(f"{tensor_name} of {name!r} holds NaN or infinite values.", hint="Download it again.")


@cache
def _odd(dtype: torch.dtype) -> list[int]:
    """The bytes that are NaN or infinite in a dtype of one byte."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return [int(each) for each in (~values.isfinite()).nonzero()]


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
    return WIDENED_ON_CPU if is_emulated(dtype) else SMALL_ON_CPU


def context_window(config: Any, tokenizer: Any) -> int:
    """Tokens that fit: the config's ``max_position_embeddings``, else the tokenizer's limit, else 4,096."""
    for limit in (
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ):
        if limit and limit < 10**9:
            return int(limit)
    return 4096


def refuse_bidirectional(config: Any, name: str) -> None:
    """Refuse a model whose tokens see those after them, by its text model's config.

    Raises:
        ModelNotFound: such a model.
    """
    both = getattr(config, "use_bidirectional_attention", None)
    if both in (True, "all") or getattr(config, "is_causal", None) is False:
        said = f"use_bidirectional_attention={both!r}" if both in (True, "all") else "is_causal=False"
        raise ModelNotFound(
            f"{name!r} does not write its text from left to right: its config says {said}.",
            hint="Give a causal language model.",
        )


def end_ids(model: Any, tokenizer: Any, name: str) -> frozenset[int]:
    """Every token that ends an answer and has a logit: the generation config's and the tokenizer's.

    Raises:
        UnsafeWeights: a generation config that names something else than ids.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(listed if isinstance(listed, list | tuple) else [listed]), tokenizer.eos_token_id]
    known = [each for each in ids if each is not None]
    for each in known:
        if not isinstance(each, int) or isinstance(each, bool):
            raise UnsafeWeights(
                f"eos_token_id in the generation config of {name!r} is {listed!r}, which is no token id.",
                hint="Mend generation_config.json.",
            )
    rows = model.get_output_embeddings().weight.shape[0]
    return frozenset(each for each in known if 0 <= each < rows)


def ends_listed(path: str, **options: Any) -> list[int]:
    """The end tokens of a model's ``generation_config.json``, without that file of its ``config.json``; may be none."""
    origin = ModelSource.of(path, options)
    file = origin.file("generation_config.json")
    read = (origin.config() or {}) if file is None else origin.json(file)
    listed, text = read.get("eos_token_id"), read.get("text_config")
    if listed is None and isinstance(text, dict):
        listed = text.get("eos_token_id")
    return [each for each in (listed if isinstance(listed, list) else [listed]) if each is not None]


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
