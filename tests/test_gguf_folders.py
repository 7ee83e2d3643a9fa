"""GGUF files as people have them: split, among other files, under other names, with templates of several kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import split_gguf, write_gguf
from langchain_core.tools import tool

from s2t_agents import ChatS2T, LocalLLM
from s2t_agents.backends.loading import load_tokenizer
from s2t_agents.errors import ConfigError, EscalationFailed, InputError, ModelNotFound
from s2t_agents.testing import CHATML

pytest.importorskip("llama_cpp")

SMALL = {"n_ctx": 512}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def said(model: Path | str, **options: Any) -> Any:
    return ChatS2T(model=str(model), max_tokens=6, model_kwargs={**SMALL, **options}).invoke("hello").content


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def answer(file: Path) -> Any:
    return said(file)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model in three files."""
    return split_gguf(tmp_path_factory.mktemp("parts"))


def test_a_split_model_is_loaded_from_any_part_or_from_its_folder(
    parts: list[Path], answer: Any, tmp_path: Path
) -> None:
    for part in parts:
        (tmp_path / part.name).symlink_to(part)
    assert said(parts[2]) == said(tmp_path) == answer


def test_a_file_without_its_ending_is_known_by_its_first_bytes(file: Path, answer: Any, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0f1e"  # as Ollama names them
    blob.symlink_to(file)
    assert said(blob) == answer
    shutil.copy(file, tmp_path / "MODEL.GGUF")
    blob.unlink()
    assert said(tmp_path) == answer


BESIDE: dict[str, bytes] = {
    "mmproj-tiny-f16.gguf": b"GGUF",
    "tiny.imatrix.gguf": b"GGUF",
    "._tiny.gguf": b"\0\5\x16\7",
    "README.md": b"# tiny",
}


def test_what_lies_beside_a_model_is_passed_over(file: Path, answer: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").symlink_to(file)
    for name, data in BESIDE.items():
        (tmp_path / name).write_bytes(data)
    assert said(tmp_path) == answer


def encoder(folder: Path) -> None:
    write_gguf(folder / "mmproj-tiny.gguf", metadata={"attention.causal": False})


def later_part(folder: Path) -> None:
    split_gguf(folder)
    (folder / "whole.gguf").unlink()
    (folder / "tiny-00001-of-00003.gguf").unlink()


def deeper(folder: Path) -> None:
    (folder / "Q4_0").mkdir()
    write_gguf(folder / "Q4_0" / "tiny.gguf")


def two(folder: Path) -> None:
    for name in ("tiny-q4_0.gguf", "tiny-q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")


def embedder(folder: Path) -> None:
    write_gguf(folder / "tiny.gguf", metadata={"pooling_type": 1})


def diffusion(folder: Path) -> None:
    write_gguf(folder / "tiny.gguf", architecture="llada")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model, but what sees": (encoder, r"mmproj-tiny\.gguf.*left to right"),
    "parts without the first": (later_part, r"tiny-00001-of-00003\.gguf"),
    "a folder for each quantization": (deeper, r"Q4_0/tiny\.gguf.*gguf_file"),
    "two models": (two, r"tiny-q4_0\.gguf, tiny-q8_0\.gguf.*gguf_file"),
    "an embedder": (embedder, "one vector"),
    "a model that fills gaps": (diffusion, "llada.*does not write"),
    "nothing": (lambda folder: None, "model|tokenizer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_holds_no_model_or_several_says_so(name: str, tmp_path: Path) -> None:
    make, message = FOLDERS[name]
    make(tmp_path)
    with pytest.raises(ModelNotFound, match=message) as caught:
        said(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(EscalationFailed, match=message):
        LocalLLM(str(tmp_path), **SMALL).load()


def test_a_file_in_a_folder_of_its_own_can_be_named(answer: Any, tmp_path: Path) -> None:
    deeper(tmp_path)
    assert said(tmp_path, gguf_file="Q4_0/tiny.gguf") == answer


def test_every_part_of_a_split_model_is_fetched_from_the_hub(
    parts: list[Path], answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {f"Q4_0/{part.name}": part for part in parts}

    def cached_file(repository: str, name: str, **options: Any) -> str | None:
        if name not in there:
            return None
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(there[name], target)
        return str(target)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    named = "Q4_0/tiny-00001-of-00003.gguf"
    assert said("someone/tiny-GGUF", gguf_file=named) == answer
    shutil.rmtree(tmp_path / "Q4_0")
    del there["Q4_0/tiny-00002-of-00003.gguf"]
    with pytest.raises(ModelNotFound, match="tiny-00002-of-00003"):
        said("someone/tiny-GGUF", gguf_file=named)


def test_a_file_of_version_2_is_the_same_model(file: Path, answer: Any, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "old.gguf").write_bytes(data[:4] + (2).to_bytes(4, "little") + data[8:])
    assert said(tmp_path / "old.gguf") == answer


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", (ConfigError, InputError)),
        ("{% include '/etc/passwd' %}", (ConfigError, InputError)),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ConfigError),
        ("{{ raise_exception('no') }}", InputError),
        ("  ", (ConfigError, InputError)),
    ],
    ids=["classes", "files", "for ever", "refuses", "writes nothing"],
)
def test_a_template_that_does_harm_is_one_error(template: str, error: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=r"[Tt]emplate"):
        said(write_gguf(tmp_path / "a.gguf", template=template))


def test_a_template_for_tools_is_taken_where_tools_are_given(tmp_path: Path) -> None:
    for_tools = (Path(__file__).parent / "templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    named = {"default": CHATML, "tool_use": for_tools}
    file = write_gguf(
        tmp_path / "a.gguf",
        metadata={"context_length": 2048},
        template=[{"name": name, "template": text} for name, text in named.items()],
    )
    assert load_tokenizer(str(file)).chat_template == named

    def prompt_tokens(given: str | None) -> int:
        chat = ChatS2T(model=str(file), max_tokens=6, chat_template=given, model_kwargs={"n_ctx": 2048})
        usage = chat.bind_tools([add]).invoke("hello").usage_metadata
        assert usage is not None
        return usage["input_tokens"]

    assert prompt_tokens(None) == prompt_tokens(for_tools) != prompt_tokens(CHATML)
