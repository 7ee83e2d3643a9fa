"""Checks of a model's files before they are loaded: nothing that never ends, is too large, pickled, or no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

from .errors import ModelNotFound, UnsafeWeights
from .hub import MAX_JSON_BYTES, ModelSource

MAX_NAME_CHARS = 255
"""Longest file name; file systems refuse longer ones."""

MAX_MODULES = 4096
"""Layers, heads, experts, labels that a config may have if the weights do not give a lower limit."""

_COUNT_KEYS = re.compile(
    r".*(layer|block|expert|head|stage|label|level|group|flow|function|codebook|quantizer)s?|.*depth|.*dense_replace",
    re.IGNORECASE,
)
"""Numbers of a config by which transformers makes one object each, some of them before it knows the weights."""

_NO_CAUSAL_LM = re.compile(
    r"For(\w*Classification|\w*Answering|MaskedLM|PreTraining|MultipleChoice|NextSentencePrediction|\w*Retrieval)$"
    "|RewardModel$"
)
"""Classes by which checkpoints say that they write no text, though their layers may be a chat model's."""

_LAYER_COUNT_KEYS = re.compile(r"(num|n)_(\w+_)?layers?")
_READ_WHOLE = (
    "*.index.json",
    "*config.json",
    "tokenizer.*",
    "*token*.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.*",
    "tekken.json",
    "*.model",
)


def check_files(source: ModelSource) -> None:
    """Refuse a path that is no folder, and one with pipes, which may not end when read, or with too large files.

    Raises:
        ModelNotFound: a URL, a file, GGUF.
        UnsafeWeights: a directory, pipe, device or broken link instead of a file; a file that is read whole and
            has more than ``MAX_JSON_BYTES``.
    """
    source.refuse_url()
    if source.folder is None:
        if Path(source.path).is_file():
            raise ModelNotFound(f"{source.name!r} is a file.", hint="Give the directory that it lies in.")
        return
    whole = {each for pattern in _READ_WHOLE for each in source.folder.glob(pattern)}
    for file in sorted({*whole, *source.folder.glob("*.safetensors")}):
        if not file.is_file():
            raise UnsafeWeights(f"{file.name} in {source.name!r} is no regular file.", hint="Copy the model again.")
        if file in whole and (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise UnsafeWeights(
                f"{file.name} in {source.name!r} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read.",
                hint="Copy the model again.",
            )


def check_weights(source: ModelSource) -> None:
    """Refuse a folder without a causal LM's safetensors weights, judged by file names.

    Raises:
        ModelNotFound: an adapter, a sentence embedder, GGUF; no config.
        UnsafeWeights: pickles only; shards that are missing or outside the folder; as ``check_files``.
    """
    check_files(source)
    folder = source.folder
    if folder is None:
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelNotFound(
            f"{source.name!r} holds an adapter, which is no model by itself.",
            hint="Merge it into its base (peft: merge_and_unload, save_pretrained) and give that.",
        )
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"no model at {source.name!r}: it holds no config.json.", hint=source.hint)
    if (folder / "modules.json").is_file():
        raise ModelNotFound(f"{source.name!r} is a sentence embedder: it writes no text.", hint="Give a chat model.")
    if (generation := source.file("generation_config.json")) is not None:
        source.json(generation)  # transformers ignores an invalid one, and the end tokens in it
    _refuse_pickles(source, folder)
    _check_shards(source, folder)


def _refuse_pickles(source: ModelSource, folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or "gguf_file" in source.weights:
        return
    if any(folder.glob("*.safetensors.index.json")):
        return  # _check_shards names the missing shards
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
    found = f"only {pickles[0]}" if pickles else "no weights"
    raise UnsafeWeights(
        f"{source.name!r} holds {found}; only safetensors files are read.",
        hint="Convert them with save_pretrained(safe_serialization=True) on a machine that trusts them.",
    )


def _check_shards(source: ModelSource, folder: Path) -> None:
    for shard in shards(source, folder):
        if Path(shard).name != shard:
            raise UnsafeWeights(f"{source.name!r} names weights outside its own folder: {shard!r}.")
        if len(shard) > MAX_NAME_CHARS or not (folder / shard).is_file():
            raise UnsafeWeights(f"{source.name!r} lacks its weights file {shard!r:.80}.", hint="Download it again.")


def shards(source: ModelSource, folder: Path) -> list[str]:
    """Names of the weight files that would be read, by the index."""
    variant = f".{source.weights['variant']}" if source.weights.get("variant") else ""
    index = folder / f"model.safetensors.index{variant}.json"
    if (folder / f"model{variant}.safetensors").is_file():
        return [f"model{variant}.safetensors"]
    if not index.is_file():
        return []
    files = source.json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
        raise UnsafeWeights(f"{index.name} of {source.name!r} has no weight_map from tensors to files.")
    return sorted(set(files.values()))


def check_classes(classes: Any, name: str) -> None:
    """Refuse a checkpoint all of whose classes are known to write no text.

    Args:
        classes: the ``architectures`` of its config; None where it names none.
        name: of the model.

    Raises:
        ModelNotFound: naming the first.
    """
    if isinstance(classes, list) and classes and all(_NO_CAUSAL_LM.search(str(each)) for each in classes):
        raise ModelNotFound(
            f"{name!r} is no causal language model: its config says {classes[0]!r}, which writes no text.",
            hint="Give the chat model that it was made of, or another one.",
        )


def check_counts(source: ModelSource, config: Mapping[str, Any], max_layers: int) -> None:
    """Refuse a config with no layers, with so many that creating them does not end, or with NaN.

    Args:
        source: names the model.
        config: its ``config.json``.
        max_layers: the number of tensors in the weight files, an upper bound of the layers.

    Raises:
        UnsafeWeights: naming the key.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(source, value, max_layers)
        elif _is_impossible(key, value, max(max_layers, MAX_MODULES)):
            raise UnsafeWeights(f"the config of {source.name!r} says {key}={value}; that is no model.")
        elif _LAYER_COUNT_KEYS.fullmatch(key) and isinstance(value, int) and value > max_layers > 0:
            raise UnsafeWeights(
                f"the config of {source.name!r} says {key}={value}; its files have {max_layers} tensors."
            )


def _is_impossible(key: str, value: Any, max_layers: int) -> bool:
    if isinstance(value, float):
        return isnan(value)
    if not isinstance(value, int):
        return False
    return (bool(_COUNT_KEYS.fullmatch(key)) and abs(value) > max_layers) or (key == "num_hidden_layers" and value < 1)
