"""Where a model comes from: a folder or hub id, with what names a part of it, and what its files say before any is run.

Options of ``from_pretrained`` are split here and nowhere else: those that say which files are meant go to config,
tokenizer and weights alike; the rest are the weights' own.
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
from .errors import ConfigError, ModelNotFound, S2TError, UnsafeWeights
from .redaction import without_secrets

PLACE = frozenset({"token", "cache_dir", "local_files_only", "proxies", "force_download"})
"""How the hub is reached, whatever the model."""

PART = frozenset({"revision", "subfolder", "trust_remote_code", "code_revision"})
"""Which files of one repository are meant, and consent to run its code: they say nothing of another repository."""

OURS = frozenset(
    {"device", "dtype", "torch_dtype", "use_safetensors", "output_loading_info", "ignore_mismatched_sizes"}
)
"""Options that this package sets itself."""

MOST_JSON = 64_000_000
"""Bytes of the largest config that is read; real ones have a few thousand."""

MOST_OF_A_NAME = 255
"""Characters of a file's name; systems refuse to look for longer ones."""

MOST_OF_A_KIND = 4096
"""Layers, heads and experts that a config may ask for where no weights tell better."""

_COUNTS = re.compile(r".*(layer|block|expert|head|stage)s?|depth", re.IGNORECASE)
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")
_READ = ("*.safetensors", "*.index.json", "*config.json", "tokenizer.*", "*token*.json", "chat_template.*", "vocab.*")


@dataclass(frozen=True)
class Origin:
    """A model's name and the options of ``from_pretrained``, split by who reads them.

    Attributes:
        name: directory, hub id or bundled name.
        hub: for config, tokenizer, weights and generation config alike; no remote code unless it was asked for.
        weights: for the weights alone, such as ``quantization_config``.
    """

    name: str
    hub: Mapping[str, Any]
    weights: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Origin:
        """Split ``options``.

        Raises:
            ConfigError: an option that is this package's own to set.
        """
        if taken := sorted(OURS & options.keys()):
            raise ConfigError(
                f"{taken[0]} cannot be passed on to from_pretrained.", hint="dtype=... and device=... are settings."
            )
        asked = {key: value for key, value in options.items() if key in PLACE | PART and value is not None}
        rest = {key: value for key, value in options.items() if key not in PLACE | PART}
        return cls(name, {**asked, "trust_remote_code": asked.get("trust_remote_code") is True}, rest)

    @property
    def path(self) -> str:
        """What ``from_pretrained`` is given."""
        path = model_path(self.name)
        return str(Path(path).expanduser()) if path.startswith("~") else path

    @property
    def folder(self) -> Path | None:
        """The folder on this disk that holds the files; None for a hub id."""
        root = Path(self.path)
        return root / str(self.hub.get("subfolder") or "") if root.is_dir() else None

    @property
    def hint(self) -> str:
        """The way out when something is missing."""
        if Path(self.path).exists() or self.path.startswith((".", "/")):
            return "Check that the directory holds config.json, tokenizer.json and *.safetensors."
        return (
            "Give a local directory, or a hub id with the hub reachable (HF_HUB_OFFLINE unset); 's2t-demo' is bundled."
        )

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Whatever a library raises over the files of ``what`` becomes one error that names the model.

        Raises:
            ModelNotFound: nothing there, or no model of a known kind.
            UnsafeWeights: something damaged, or code of the repository that nobody consented to.
            ConfigError: a package that these files need is missing.
        """
        try:
            yield
        except S2TError:
            raise
        except BaseException as error:
            if not (isinstance(error, Exception) or panicked(error)):
                raise
            raise self._refusal(what, error) from error

    def _refusal(self, what: str, error: BaseException) -> ConfigError:
        said = first_line(error)
        if "trust_remote_code" in str(error):
            return UnsafeWeights(
                f"{self.name!r} needs code of its own repository for its {what}; it is not run unless you say so.",
                hint='Read it, pin it with "revision", and pass model_kwargs={"trust_remote_code": True}.',
            )
        if isinstance(error, ImportError):
            return ConfigError(f"the {what} of {self.name!r} need a package: {said}.", hint="Install it.")
        if isinstance(error, OSError):
            return ModelNotFound(f"no {what} at {self.name!r}: {said}.", hint=self.hint)
        if type(error) is ValueError and what == "weights":
            return ModelNotFound(f"{self.name!r} is no causal language model: {said}.", hint=self.hint)
        if type(error) is ValueError:
            return ModelNotFound(f"no {what} at {self.name!r}: {said}.", hint=self.hint)
        return UnsafeWeights(f"the {what} of {self.name!r} cannot be read: {said}.", hint="Copy or download it again.")

    def file(self, name: str, *, here: bool = False) -> Path | None:
        """One of the model's files, fetched where it must be; None where there is none.

        Args:
            name: inside the folder or repository.
            here: look on this disk only.
        """
        from transformers.utils import cached_file

        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        options = {key: value for key, value in self.hub.items() if key in PLACE | {"revision", "subfolder"}}
        if here:
            options["local_files_only"] = True
        try:
            found = cached_file(self.path, name, **options, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
        return Path(found) if found else None

    def config(self, *, here: bool = False) -> dict[str, Any] | None:
        """``config.json`` as it is; None where there is none.

        Raises:
            UnsafeWeights: it is no JSON object.
        """
        found = self.file("config.json", here=here)
        return None if found is None else self.json(found)

    def json(self, file: Path) -> dict[str, Any]:
        """One of the model's files, which must hold a JSON object.

        Raises:
            UnsafeWeights: it does not.
        """
        try:
            if file.stat().st_size > MOST_JSON:
                raise ValueError(f"it has more than {MOST_JSON:,} bytes")
            read = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UnsafeWeights(f"{file.name} of {self.name!r} is no JSON: {first_line(error)}.") from error
        if not isinstance(read, dict):
            raise UnsafeWeights(f"{file.name} of {self.name!r} is no JSON object but a {type(read).__name__}.")
        return read

    def check_files(self) -> None:
        """Refuse a path that is no folder, or holds something else where a file should be: reading that may never end.

        Raises:
            ModelNotFound: a URL, a file, GGUF.
            UnsafeWeights: a directory, pipe, device or broken link in a file's place.
        """
        if "://" in self.path and not Path(self.path).exists():
            raise ModelNotFound(
                f"{without_secrets(self.name)!r} is a URL.",
                hint="Give a directory or a hub id, such as 'Qwen/Qwen3-0.6B'.",
            )
        if self.path.endswith(".gguf"):
            raise _gguf(self.name, Path(self.path).name)
        if self.folder is None:
            if Path(self.path).is_file():
                raise ModelNotFound(f"{self.name!r} is a file.", hint="Give the directory that it lies in.")
            return
        for pattern in _READ:
            if odd := sorted(each.name for each in self.folder.glob(pattern) if not each.is_file()):
                raise UnsafeWeights(f"{odd[0]} in {self.name!r} is no regular file.", hint="Copy the model again.")

    def check_weights(self) -> None:
        """Refuse by name a folder that holds something else than a causal LM's weights, before any is read.

        Raises:
            ModelNotFound: an adapter, a sentence embedder, GGUF; no config.
            UnsafeWeights: pickles only; shards that are missing or lie elsewhere; as ``check_files``.
        """
        self.check_files()
        folder = self.folder
        if folder is None:
            return
        if not (folder / "config.json").is_file():
            self._refuse_without_config(folder)
        if (folder / "adapter_config.json").is_file():
            raise _adapter(self.name)
        if (folder / "modules.json").is_file():
            raise ModelNotFound(f"{self.name!r} is a sentence embedder: it writes no text.", hint="Give a chat model.")
        if (generation := self.file("generation_config.json")) is not None:
            self.json(generation)  # transformers passes over a broken one, and with it what ends an answer
        self._refuse_pickles(folder)
        self._check_shards(folder)

    def _refuse_without_config(self, folder: Path) -> None:
        if (folder / "adapter_config.json").is_file():
            raise _adapter(self.name)
        if files := sorted(each.name for each in folder.glob("*.gguf")):
            raise _gguf(self.name, files[0])
        raise ModelNotFound(f"no model at {self.name!r}: it holds no config.json.", hint=self.hint)

    def _refuse_pickles(self, folder: Path) -> None:
        if any(folder.glob("*.safetensors")) or "gguf_file" in self.weights:
            return
        if any(folder.glob("*.safetensors.index.json")):
            return  # the missing shards are named
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        if not pickles and (files := sorted(each.name for each in folder.glob("*.gguf"))):
            raise _gguf(self.name, files[0])
        found = f"only {pickles[0]}" if pickles else "no weights"
        raise UnsafeWeights(
            f"{self.name!r} holds {found}; only safetensors files are read.",
            hint="Convert them with save_pretrained(safe_serialization=True) on a machine that trusts them.",
        )

    def _check_shards(self, folder: Path) -> None:
        for shard in self.shards(folder):
            if Path(shard).name != shard:
                raise UnsafeWeights(f"{self.name!r} names weights outside its own folder: {shard!r}.")
            if len(shard) > MOST_OF_A_NAME or not (folder / shard).is_file():
                raise UnsafeWeights(f"{self.name!r} lacks its weights file {shard!r:.80}.", hint="Download it again.")

    def shards(self, folder: Path) -> list[str]:
        """Names of the weight files that would be read, as the index gives them."""
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

    def check_counts(self, config: Mapping[str, Any], most: int) -> None:
        """Refuse a config that asks for no layers, for so many that making them, empty, takes for ever, or for NaN.

        Args:
            config: ``config.json``.
            most: layers that there can be: tensors in the weight files.

        Raises:
            UnsafeWeights: naming the key.
        """
        for key, value in config.items():
            if isinstance(value, dict):
                self.check_counts(value, most)
            elif _is_no_model(key, value, max(most, MOST_OF_A_KIND)):
                raise UnsafeWeights(f"the config of {self.name!r} says {key}={value}; that is no model.")
            elif _LAYERS.fullmatch(key) and isinstance(value, int) and value > most > 0:
                raise UnsafeWeights(f"the config of {self.name!r} says {key}={value}; its files have {most} tensors.")


def _is_no_model(key: str, value: Any, most: int) -> bool:
    if isinstance(value, float):
        return isnan(value)
    if not isinstance(value, int):
        return False
    return (bool(_COUNTS.fullmatch(key)) and value > most) or (key == "num_hidden_layers" and value < 1)


def panicked(error: BaseException) -> bool:
    """Whether it is a panic of Rust code, which pyo3 raises past ``except Exception``."""
    return type(error).__name__ == "PanicException"


def elsewhere(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for another repository: neither this one's revision nor the consent to its code."""
    return {key: value for key, value in options.items() if key not in PART}


def first_line(error: BaseException) -> str:
    """An error's first line, for use inside another message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return said.rstrip(".")


def _adapter(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"{name!r} holds an adapter, which is no model by itself.",
        hint="Merge it into its base (peft: merge_and_unload, save_pretrained) and give that.",
    )


def _gguf(name: str, file: str) -> ModelNotFound:
    return ModelNotFound(
        f"{name!r} holds GGUF weights ({file}), which are not read.",
        hint="Give the safetensors checkpoint that the file was made from.",
    )
