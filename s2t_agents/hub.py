"""The source of a model, of checkpoints and of GGUF: a folder, file or hub id, its ``from_pretrained`` options, its
files; which GGUF of a folder is meant (``gguf_file``).

Options of ``from_pretrained`` are split here only: those that select files apply to config, tokenizer and weights; the
rest apply to the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

_CHECKPOINTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.pkl")
_NOT_A_MODEL = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$|mmproj|imatrix", re.IGNORECASE)
"""GGUF files that are later parts of a split model, an image encoder, or statistics for quantization."""

_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 1_000
"""Parts of a split GGUF model that are downloaded."""


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
        self.refuse_url()
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
        if self.is_path:
            return "Check that the directory holds config.json, tokenizer.json and *.safetensors."
        return (
            "It is to run on this machine: give a directory, a hub id with the hub reachable (HF_HUB_OFFLINE unset), "
            "a .gguf file, or vllm://host:port/name for a model that is served; 's2t-demo' is bundled."
        )

    @property
    def is_path(self) -> bool:
        """Whether the name is meant as a path of this machine."""
        return Path(self.path).exists() or self.path.startswith((".", "/"))

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
        if type(error) is ValueError and what == "weights":
            return ModelNotFound(f"{self.name!r} is no causal language model: {reason}.", hint=self.hint)
        if isinstance(error, OSError) or type(error) is ValueError:
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

    def refuse_url(self) -> None:
        """Refuse a URL as the name (ModelNotFound); it is not repeated: any part may be a secret."""
        if "://" in self.path and not Path(self.path).exists():
            raise ModelNotFound(
                "the model's name is a URL.",
                hint="Give a directory, a hub id, such as 'Qwen/Qwen3-0.6B', or vllm://host:port/name if it is served.",
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
