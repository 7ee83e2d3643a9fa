"""The source of a model: a folder or hub id, its ``from_pretrained`` options, and checks of its files before loading.

Options of ``from_pretrained`` are split here only: those that select files apply to config, tokenizer and weights; the
rest apply to the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from .bundled import model_path
from .errors import ConfigError, ModelNotFound, S2TError, UnsafeWeights, first_line, is_rust_panic

HUB_OPTIONS = frozenset({"token", "cache_dir", "local_files_only", "proxies", "force_download"})
"""Options for reaching the hub, independent of the model."""

REPOSITORY_OPTIONS = frozenset({"revision", "subfolder", "trust_remote_code", "code_revision"})
"""Options that select files of one repository or permit its code; they do not apply to another repository."""

OWN_OPTIONS = frozenset(
    {"device", "dtype", "torch_dtype", "use_safetensors", "output_loading_info", "ignore_mismatched_sizes"}
)
"""Options that this package sets itself."""

MAX_JSON_BYTES = 64_000_000
"""Largest file that is read whole (JSON, a tokenizer, a template); the largest real ones have 35 million."""

MAX_NAME_CHARS = 255
"""Longest file name; file systems refuse longer ones."""

MAX_MODULES = 4096
"""Layers, heads, experts, labels that a config may have if the weights do not give a lower limit."""

_CHECKPOINTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.pkl")
_NOT_A_MODEL = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$|mmproj|imatrix", re.IGNORECASE)
"""GGUF files that are later parts of a split model, an image encoder, or statistics for quantization."""

_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 1_000
"""Parts of a split GGUF model that are downloaded."""

_COUNT_KEYS = re.compile(
    r".*(layer|block|expert|head|stage|label|level|group|flow|function|codebook|quantizer)s?|.*depth|.*dense_replace",
    re.IGNORECASE,
)
"""Numbers of a config by which transformers makes one object each, some of them before it knows the weights."""
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


@dataclass(frozen=True)
class ModelSource:
    """A model's name and its ``from_pretrained`` options.

    Attributes:
        name: directory, GGUF file, hub id or bundled name.
        hub: options for config, tokenizer, weights and generation config; ``trust_remote_code`` is False by default.
        weights: options for the weights only, such as ``quantization_config``.
    """

    name: str
    hub: Mapping[str, Any]
    weights: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> ModelSource:
        """Split ``options``.

        Raises:
            ConfigError: an option that this package sets.
        """
        if reserved := sorted(OWN_OPTIONS & options.keys()):
            raise ConfigError(
                f"{reserved[0]} cannot be passed on to from_pretrained.", hint="dtype=... and device=... are settings."
            )
        hub_options = {
            key: value
            for key, value in options.items()
            if key in HUB_OPTIONS | REPOSITORY_OPTIONS and value is not None
        }
        weight_options = {key: value for key, value in options.items() if key not in HUB_OPTIONS | REPOSITORY_OPTIONS}
        return cls(
            name, {**hub_options, "trust_remote_code": hub_options.get("trust_remote_code") is True}, weight_options
        )

    @property
    def path(self) -> str:
        """The path or hub id for ``from_pretrained``."""
        path = model_path(self.name)
        return str(Path(path).expanduser()) if path.startswith("~") else path

    @property
    def folder(self) -> Path | None:
        """The local folder with the files; None for a hub id."""
        root = Path(self.path)
        return root / str(self.hub.get("subfolder") or "") if root.is_dir() else None

    def gguf(self, *, here: bool = False) -> Path | None:
        """The GGUF file that is meant; None if a ``transformers`` checkpoint is.

        A hub id names its file by the option ``gguf_file``. With a ``quantization_config`` beside it, transformers
        reads the file itself.

        Args:
            here: look on this disk only.

        Raises:
            ModelNotFound: a URL; the file is not there, or a folder holds several and none is named.
        """
        self._refuse_url()
        named = self.weights.get("gguf_file")
        if named is not None:
            return None if "quantization_config" in self.weights else self._named_gguf(str(named), here)
        if self.path.lower().endswith(".gguf") or _begins_as_gguf(Path(self.path)):
            return Path(self.path)
        if self.folder is None or any(any(self.folder.glob(each)) for each in _CHECKPOINTS):
            return None
        found = sorted(each for each in self.folder.glob("*") if _is_visible_gguf(each))
        models = [each for each in found if _NOT_A_MODEL.search(each.name) is None]
        if len(models) > 1:
            names = ", ".join(each.name for each in models[:5])
            raise ModelNotFound(
                f"{self.name!r} holds several models: {names}.", hint='Name one: model_kwargs={"gguf_file": ...}.'
            )
        if not found and not (self.folder / "config.json").exists():
            self._refuse_deeper(self.folder)
        return next(iter(models or found), None)  # reading what is none says what it is

    def _named_gguf(self, name: str, here: bool) -> Path:
        found = self.file(name, here=here)
        if found is None:
            raise ModelNotFound(f"{self.name!r} holds no file {name!r}.", hint="Check gguf_file.")
        part = _PART.fullmatch(name)
        if part is not None and self.folder is None:  # llama.cpp looks for the others beside it
            for number in range(1, min(int(part["count"]), MOST_PARTS) + 1):
                self.file(f"{part['name']}-{number:05d}-of-{part['count']}.gguf", here=here)
        return found

    def _refuse_deeper(self, folder: Path) -> None:
        deeper = sorted(each for each in folder.glob("*/*") if _is_visible_gguf(each))
        if deeper:
            names = ", ".join(str(each.relative_to(folder)) for each in deeper[:5])
            raise ModelNotFound(
                f"{self.name!r} holds models in folders of its own: {names}.",
                hint='Name one: model_kwargs={"gguf_file": ...}.',
            )

    @property
    def hint(self) -> str:
        """The hint of an error about missing files."""
        if Path(self.path).exists() or self.path.startswith((".", "/")):
            return "Check that the directory holds config.json, tokenizer.json and *.safetensors."
        return (
            "Give a local directory, or a hub id with the hub reachable (HF_HUB_OFFLINE unset); 's2t-demo' is bundled."
        )

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Context in which errors of a library about the files of ``what`` become one error that names the model.

        Raises:
            ModelNotFound: no files, or an unknown kind of model.
            UnsafeWeights: damaged files, or repository code that was not permitted.
            ConfigError: a package that these files need is missing.
        """
        try:
            yield
        except S2TError:
            raise
        except BaseException as error:
            if not (isinstance(error, Exception) or is_rust_panic(error)):
                raise
            raise self._loading_error(what, error) from error

    def _loading_error(self, what: str, error: BaseException) -> ConfigError:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            return UnsafeWeights(
                f"{self.name!r} needs code of its own repository for its {what}; it is not run unless you say so.",
                hint='Read it, pin it with "revision", and pass model_kwargs={"trust_remote_code": True}.',
            )
        if isinstance(error, ImportError):
            return ConfigError(f"the {what} of {self.name!r} need a package: {reason}.", hint="Install it.")
        if isinstance(error, OSError):
            return ModelNotFound(f"no {what} at {self.name!r}: {reason}.", hint=self.hint)
        if type(error) is ValueError and what == "weights":
            return ModelNotFound(f"{self.name!r} is no causal language model: {reason}.", hint=self.hint)
        if type(error) is ValueError:
            return ModelNotFound(f"no {what} at {self.name!r}: {reason}.", hint=self.hint)
        return UnsafeWeights(
            f"the {what} of {self.name!r} cannot be read: {reason}.", hint="Copy or download it again."
        )

    def file(self, name: str, *, here: bool = False) -> Path | None:
        """The path of one of the model's files, downloaded if needed; None if it does not exist.

        Args:
            name: inside the folder or repository.
            here: do not download.
        """
        from transformers.utils import cached_file

        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        options = {key: value for key, value in self.hub.items() if key in HUB_OPTIONS | {"revision", "subfolder"}}
        if here:
            options["local_files_only"] = True
        try:
            found = cached_file(self.path, name, **options, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
        return Path(found) if found else None

    def config(self, *, here: bool = False) -> dict[str, Any] | None:
        """The content of ``config.json``; None if there is none.

        Raises:
            UnsafeWeights: it is not a JSON object.
        """
        found = self.file("config.json", here=here)
        return None if found is None else self.json(found)

    def json(self, file: Path) -> dict[str, Any]:
        """The content of a JSON file of the model.

        Raises:
            UnsafeWeights: it is not a JSON object.
        """
        try:
            if file.stat().st_size > MAX_JSON_BYTES:
                raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
            read = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UnsafeWeights(f"{file.name} of {self.name!r} is no JSON: {first_line(error)}.") from error
        if not isinstance(read, dict):
            raise UnsafeWeights(f"{file.name} of {self.name!r} is no JSON object but a {type(read).__name__}.")
        return read

    def check_files(self) -> None:
        """Refuse a path that is no folder, and one with pipes, which may not end when read, or with too large files.

        Raises:
            ModelNotFound: a URL, a file, GGUF.
            UnsafeWeights: a directory, pipe, device or broken link instead of a file; a file that is read whole and
                has more than ``MAX_JSON_BYTES``.
        """
        self._refuse_url()
        if self.folder is None:
            if Path(self.path).is_file():
                raise ModelNotFound(f"{self.name!r} is a file.", hint="Give the directory that it lies in.")
            return
        whole = {each for pattern in _READ_WHOLE for each in self.folder.glob(pattern)}
        for file in sorted({*whole, *self.folder.glob("*.safetensors")}):
            if not file.is_file():
                raise UnsafeWeights(f"{file.name} in {self.name!r} is no regular file.", hint="Copy the model again.")
            if file in whole and (size := file.stat().st_size) > MAX_JSON_BYTES:
                raise UnsafeWeights(
                    f"{file.name} in {self.name!r} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read.",
                    hint="Copy the model again.",
                )

    def _refuse_url(self) -> None:
        """It is not repeated: any part may be a secret."""
        if "://" in self.path and not Path(self.path).exists():
            raise ModelNotFound(
                "the model's name is a URL.", hint="Give a directory or a hub id, such as 'Qwen/Qwen3-0.6B'."
            )

    def check_weights(self) -> None:
        """Refuse a folder without a causal LM's safetensors weights, judged by file names.

        Raises:
            ModelNotFound: an adapter, a sentence embedder, GGUF; no config.
            UnsafeWeights: pickles only; shards that are missing or outside the folder; as ``check_files``.
        """
        self.check_files()
        folder = self.folder
        if folder is None:
            return
        if not (folder / "config.json").is_file():
            self._refuse_without_config(folder)
        if (folder / "adapter_config.json").is_file():
            raise _adapter_error(self.name)
        if (folder / "modules.json").is_file():
            raise ModelNotFound(f"{self.name!r} is a sentence embedder: it writes no text.", hint="Give a chat model.")
        if (generation := self.file("generation_config.json")) is not None:
            self.json(generation)  # transformers ignores an invalid one, and the end tokens in it
        self._refuse_pickles(folder)
        self._check_shards(folder)

    def _refuse_without_config(self, folder: Path) -> None:
        if (folder / "adapter_config.json").is_file():
            raise _adapter_error(self.name)
        raise ModelNotFound(f"no model at {self.name!r}: it holds no config.json.", hint=self.hint)

    def _refuse_pickles(self, folder: Path) -> None:
        if any(folder.glob("*.safetensors")) or "gguf_file" in self.weights:
            return
        if any(folder.glob("*.safetensors.index.json")):
            return  # _check_shards names the missing shards
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        found = f"only {pickles[0]}" if pickles else "no weights"
        raise UnsafeWeights(
            f"{self.name!r} holds {found}; only safetensors files are read.",
            hint="Convert them with save_pretrained(safe_serialization=True) on a machine that trusts them.",
        )

    def _check_shards(self, folder: Path) -> None:
        for shard in self.shards(folder):
            if Path(shard).name != shard:
                raise UnsafeWeights(f"{self.name!r} names weights outside its own folder: {shard!r}.")
            if len(shard) > MAX_NAME_CHARS or not (folder / shard).is_file():
                raise UnsafeWeights(f"{self.name!r} lacks its weights file {shard!r:.80}.", hint="Download it again.")

    def shards(self, folder: Path) -> list[str]:
        """Names of the weight files that would be read, by the index."""
        variant = f".{self.weights['variant']}" if self.weights.get("variant") else ""
        index = folder / f"model.safetensors.index{variant}.json"
        if (folder / f"model{variant}.safetensors").is_file():
            return [f"model{variant}.safetensors"]
        if not index.is_file():
            return []
        files = self.json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise UnsafeWeights(f"{index.name} of {self.name!r} has no weight_map from tensors to files.")
        return sorted(set(files.values()))

    def check_counts(self, config: Mapping[str, Any], max_layers: int) -> None:
        """Refuse a config with no layers, with so many that creating them does not end, or with NaN.

        Args:
            config: ``config.json``.
            max_layers: the number of tensors in the weight files, an upper bound of the layers.

        Raises:
            UnsafeWeights: naming the key.
        """
        for key, value in config.items():
            if isinstance(value, dict):
                self.check_counts(value, max_layers)
            elif _is_impossible(key, value, max(max_layers, MAX_MODULES)):
                raise UnsafeWeights(f"the config of {self.name!r} says {key}={value}; that is no model.")
            elif _LAYER_COUNT_KEYS.fullmatch(key) and isinstance(value, int) and value > max_layers > 0:
                raise UnsafeWeights(
                    f"the config of {self.name!r} says {key}={value}; its files have {max_layers} tensors."
                )


def _is_visible_gguf(path: Path) -> bool:
    """By name alone; macOS leaves files such as ``._model.gguf`` on other systems' disks."""
    return path.suffix.lower() == ".gguf" and not path.name.startswith(".")


def _begins_as_gguf(path: Path) -> bool:
    """Whether it is a GGUF file under another name, as Ollama keeps them."""
    try:
        if not path.is_file():  # opening a pipe may never end
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def _is_impossible(key: str, value: Any, max_layers: int) -> bool:
    if isinstance(value, float):
        return isnan(value)
    if not isinstance(value, int):
        return False
    return (bool(_COUNT_KEYS.fullmatch(key)) and abs(value) > max_layers) or (key == "num_hidden_layers" and value < 1)


def options_for_other_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that apply to this repository only."""
    return {key: value for key, value in options.items() if key not in REPOSITORY_OPTIONS}


def _adapter_error(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"{name!r} holds an adapter, which is no model by itself.",
        hint="Merge it into its base (peft: merge_and_unload, save_pretrained) and give that.",
    )
