"""From a model's name to the backend that runs it: GGUF files by llama.cpp, checkpoints by PyTorch, or a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_checks import check_classes
from ..errors import ConfigError, ModelNotFound
from ..hub import HUB_OPTIONS, REPOSITORY_OPTIONS, ModelSource
from ..tokenization.vocabulary import drop_tokens_without_embedding
from .base import Backend
from .completions.backend import SCHEME, CompletionsBackend, split_address
from .engine_options import LLAMACPP_OPTIONS, SERVER_OPTIONS
from .llamacpp.gguf_header import read_header
from .llamacpp.library import offloads_to
from .llamacpp.tokenizer import read_tokenizer
from .torch.backend import TorchBackend
from .torch.loading import ends_listed
from .torch.loading import load_tokenizer as checkpoint_tokenizer


def load_backend(path: str, **options: Any) -> Backend:
    """Read a model.

    Args:
        path: a directory, bundled name or hub id; a GGUF file, or a directory that holds one; ``vllm://host:port/name``.
        options: ``device``, ``dtype``, ``tokenizer``; for GGUF files those of ``llamacpp.context.Options``; for servers
            ``completions.backend.ServerOptions``; for checkpoints ``prepack`` and those of ``from_pretrained``.

    Raises:
        ConfigError: an option that cannot be; a package is missing.
        ModelNotFound, UnsafeWeights: see ``torch.loading.load_weights`` and ``LlamaCppBackend.load``.
    """
    if path.startswith(SCHEME):
        return CompletionsBackend.load(path, **_of_a_server(path, options))
    file = _gguf(path, options)
    if file is None:
        return TorchBackend.load(path, **options)
    from .llamacpp.backend import LlamaCppBackend

    return LlamaCppBackend.load(file, name=path, **_of_the_engine(options))


def load_tokenizer(path: str, **options: Any) -> Any:
    """The fast tokenizer of a model; errors as ``load_backend``.

    Args:
        path: as there; a server's model has the tokenizer of the hub id or directory that it is called by.
        options: as there.
    """
    if path.startswith(SCHEME):
        path = split_address(path)[1]
    file = _gguf(path, options)
    return checkpoint_tokenizer(path, **options) if file is None else read_tokenizer(read_header(file))


def fitted_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer as the model's weights will have it, without reading these; errors as ``load_backend``."""
    options = dict(options)
    if path.startswith(SCHEME):
        return _of_a_server(path, options)["tokenizer"]
    tokenizer = options.pop("tokenizer", None) or load_tokenizer(path, **options)
    config = described(path, options)
    check_classes(config.get("architectures"), path)
    rows = config.get("vocab_size")
    return drop_tokens_without_embedding(tokenizer, rows, path) if isinstance(rows, int) else tokenizer


def described(path: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the files on this disk say of the part that reads text, by ``config.json``'s names; empty where none does.

    Raises:
        ConfigError: damaged files.
    """
    if path.startswith(SCHEME):
        return {}
    file = _gguf(path, options, here=True)
    if file is not None:
        header = read_header(file)
        window = header.number(f"{header.architecture}.context_length")
        return {"vocab_size": len(header.tokens), "max_position_embeddings": window}
    read = ModelSource.of(path, options).config(here=True) or {}
    part = read.get("text_config")
    return {**read, **part} if isinstance(part, dict) else read


def is_gguf(path: str, **options: Any) -> bool:
    """Whether a model is a GGUF file; errors as ``load_backend``."""
    return _gguf(path, options) is not None


def options_for_other_model(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one model's options that apply to another one: all that the engine of that one takes.

    What says which files the first consists of (``revision``, ``gguf_file``, ...) does not, and its ``tokenizer`` to
    servers alone, which compare it with their own.

    Args:
        path: of the other model, as of ``load_backend``.
        options: of the first.

    Raises:
        ModelNotFound: several GGUF files in the other's folder.
    """
    if path.startswith(SCHEME):
        kept = HUB_OPTIONS | SERVER_OPTIONS | {"tokenizer"}
    elif is_gguf(path):
        kept = HUB_OPTIONS | LLAMACPP_OPTIONS
    else:
        foreign = LLAMACPP_OPTIONS | SERVER_OPTIONS | REPOSITORY_OPTIONS | {"gguf_file", "tokenizer"}
        kept = frozenset(options) - foreign
    return {name: value for name, value in options.items() if name in kept}


def _gguf(path: str, options: Mapping[str, Any], *, here: bool = False) -> Path | None:
    ours = {"device", "dtype", "tokenizer", "prepack"}
    return ModelSource.of(path, {name: value for name, value in options.items() if name not in ours}).gguf(here=here)


def _of_the_engine(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of llama.cpp itself.

    Raises:
        ConfigError: a dtype, which the file has; a device that is not what llama.cpp would run on.
    """
    kept = {
        name: value
        for name, value in options.items()
        if name not in {*HUB_OPTIONS, *REPOSITORY_OPTIONS, "gguf_file", "prepack"}
    }
    device, dtype = kept.pop("device", None), kept.pop("dtype", None)
    if dtype is not None:
        raise ConfigError(f"dtype is {dtype}, but a GGUF file has types of its own.", hint="Leave it out.")
    if device is not None and _checked_device(device).type == "cpu":
        kept.setdefault("n_gpu_layers", 0)
    return kept


def _checked_device(given: str | torch.device) -> torch.device:
    """A device that runs GGUF files: the CPU, or what llama.cpp is compiled for, of which it uses all that it sees.

    Raises:
        ConfigError: another one, or one of several.
    """
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigError(f"device is {given!r}.", hint='Say "cpu", or leave it out.') from None
    if device.type == "cpu":
        return device
    if not offloads_to(device.type):
        raise ConfigError(
            f"device is {str(given)!r}, but llama.cpp, which runs GGUF files, has no such device here.",
            hint="Leave it out, or compile llama-cpp-python for it: CMAKE_ARGS=-DGGML_CUDA=on pip install ...",
        )
    if device.index is not None and (device.index or torch.cuda.device_count() > 1):
        raise ConfigError(
            f"device is {str(given)!r}, but llama.cpp, which runs GGUF files, uses all GPUs that it sees.",
            hint=f'Say "{device.type}". CUDA\'s are chosen in the environment: CUDA_VISIBLE_DEVICES={device.index}.',
        )
    return device


def _of_a_server(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a server, with the tokenizer and the end tokens of its model.

    Raises:
        ConfigError: no such address; a device or dtype, which are the server's.
        ModelNotFound: no such tokenizer here.
    """
    served_name = split_address(address)[1]
    kept = dict(options)
    for name in ("device", "dtype"):
        if kept.pop(name, None) is not None:
            raise ConfigError(f"{name} is set, but {address!r} runs on its server.", hint="Leave it out.")
    source = {name: kept.pop(name) for name in HUB_OPTIONS | REPOSITORY_OPTIONS if name in kept}
    given = kept.get("tokenizer")
    if given is not None and not isinstance(given, str | Path):
        return kept
    path = served_name if given is None else str(given)
    try:
        kept["tokenizer"] = load_tokenizer(path, **source)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"the tokenizer of {address!r} is not to be had: {error}",
            hint='Say where it is: model_kwargs={"tokenizer": "directory or hub id"}; for a command line, serve '
            "the model under that name (--served-model-name).",
        ) from error
    if _gguf(path, source) is None:
        listed = ends_listed(path, **source)
        kept.setdefault("eos_token_ids", [*listed, kept["tokenizer"].eos_token_id])
    return kept
