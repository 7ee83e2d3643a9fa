"""A chat model on a GGUF file: everything above the engine works as on a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool

from s2t_agents import ChatS2T, Escalation, LocalLLM, triggers
from s2t_agents.errors import ConfigError, EscalationFailed, ModelNotFound, UnsafeWeights
from s2t_agents.scheduling.language_model import LanguageModel

pytest.importorskip("llama_cpp")


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata={"context_length": 2048})


@pytest.fixture(scope="module")
def chat(file: Path) -> ChatS2T:
    return ChatS2T(model=str(file), max_tokens=12, model_kwargs={"n_ctx": 4096})


def test_it_answers_streams_and_batches_alike(chat: ChatS2T) -> None:
    whole = chat.invoke("hello").content
    assert "".join(str(chunk.content) for chunk in chat.stream("hello")) == whole
    said = chat.batch(["hello", "you", "hello"])
    assert said[0].content == said[2].content == whole
    assert chat.profile["max_input_tokens"] == 2048


def test_a_forced_call_always_parses(chat: ChatS2T) -> None:
    answer = chat.bind_tools([add], tool_choice="any").invoke("1 + 2?", max_tokens=200)
    assert answer.tool_calls[0]["name"] == "add"
    assert set(answer.tool_calls[0]["args"]) == {"a", "b"}


def test_a_second_turn_reads_what_is_new(chat: ChatS2T) -> None:
    first = [HumanMessage("tell me a story of some length")]
    answer = chat.invoke(first)
    again = chat.invoke([*first, AIMessage(answer.content), HumanMessage("go on")])
    assert again.response_metadata["s2t"]["reused_tokens"] > 20


def test_a_folder_or_a_named_file_is_the_same_model(chat: ChatS2T, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(file)
    (folder / "mmproj-model.gguf").write_bytes(b"GGUF")
    want = chat.engine.slm.weights_fingerprint
    assert ChatS2T(model=str(folder), max_tokens=12).engine.slm.weights_fingerprint == want
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"model\.gguf, other\.gguf"):
        ChatS2T(model=str(folder), max_tokens=12).invoke("hello")
    named = ChatS2T(model=str(folder), max_tokens=12, model_kwargs={"gguf_file": "model.gguf"})
    assert named.engine.slm.weights_fingerprint == want
    with pytest.raises(ModelNotFound, match="missing"):
        ChatS2T(model=str(folder), model_kwargs={"gguf_file": "missing.gguf"}).invoke("hello")


def test_a_file_of_the_hub_is_named_beside_the_id(chat: ChatS2T, file: Path, tmp_path: Path) -> None:
    commit = "1" * 40
    repository = tmp_path / "models--someone--tiny-GGUF"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "tiny-q8_0.gguf").symlink_to(file)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    named = ChatS2T(
        model="someone/tiny-GGUF", max_tokens=12, model_kwargs={**options, "gguf_file": "tiny-q8_0.gguf", "n_ctx": 512}
    )
    assert named.invoke("hello").content == chat.invoke("hello").content
    with pytest.raises(ModelNotFound, match="missing"):
        ChatS2T(model="someone/tiny-GGUF", model_kwargs={**options, "gguf_file": "missing.gguf"}).invoke("hello")


CPU = b"CPU : AVX2 = 1 | OPENMP = 1 | "
CUDA = b"CUDA : ARCHS = 900 | USE_GRAPHS = 1 | " + CPU


def built(monkeypatch: pytest.MonkeyPatch, backends: bytes, gpu: bool) -> None:
    """llama.cpp says that it was compiled for other processors, and whether there is one."""
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_print_system_info", lambda: backends)
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_supports_gpu_offload", lambda: gpu)


FOREIGN = {
    "no GPU build": (CPU, False, 0, ["cuda", "cuda:0", "cuda:1", "mps", "meta", "xpu", "gpu"]),
    "a build without its GPU": (CUDA, False, 0, ["cuda", "cuda:0", "mps"]),
    "NVIDIA's": (CUDA, True, 1, ["cuda:1", "mps", "meta"]),
    "several": (CUDA, True, 2, ["cuda:0", "cuda:1"]),
    "Apple's": (b"MTL : EMBED_LIBRARY = 1 | " + CPU, True, 0, ["cuda", "mps:1"]),
}


@pytest.mark.parametrize("machine", FOREIGN)
def test_a_device_that_is_not_what_runs_is_refused(machine: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends, gpu, count, devices = FOREIGN[machine]
    built(monkeypatch, backends, gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    for device in devices:
        with pytest.raises(ConfigError, match=rf"device is '{device}'.*(Leave it out|Say)"):
            ChatS2T(model=str(file), device=device).invoke("hello")
        with pytest.raises(EscalationFailed, match=rf"device is '{device}'"):
            LocalLLM(str(file), device=device).load()


@pytest.mark.parametrize(
    ("backends", "gpu", "device"),
    [
        (CPU, False, None),
        (CPU, False, "cpu"),
        (CPU, False, "cpu:0"),
        (CUDA, True, None),
        (CUDA, True, "cpu"),
        (CUDA, True, "cuda"),
        (CUDA, True, "cuda:0"),
        (b"ROCm : NO_VMM = 1 | " + CPU, True, "cuda"),
        (b"Metal : EMBED_LIBRARY = 1 | " + CPU, True, "mps"),
        (b"MTL : EMBED_LIBRARY = 1 | " + CPU, True, "mps"),
    ],
)
def test_a_device_that_is_what_runs_is_taken(
    backends: bytes, gpu: bool, device: str | None, chat: ChatS2T, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(monkeypatch, backends, gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: int(gpu))
    answer = ChatS2T(model=str(file), max_tokens=12, device=device, model_kwargs={"n_ctx": 2048}).invoke("hello")
    assert answer.content == chat.invoke("hello").content


@pytest.mark.parametrize("options", [{"n_ctx": 4096}, {"n_ctx": 4096, "type_k": "q8_0"}, {"gguf_file": "model.gguf"}])
def test_llama_cpps_options_go_to_no_checkpoint_that_a_call_names(
    options: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").symlink_to(file)
    chat = ChatS2T(model=str(tmp_path), max_tokens=4, model_kwargs=options)
    want = ChatS2T(model="s2t-demo", max_tokens=4).invoke("hello").content
    assert chat.invoke("hello", model="s2t-demo").content == want


def test_a_checkpoints_options_go_to_no_gguf_file_that_a_call_names(chat: ChatS2T, file: Path) -> None:
    options = {"attn_implementation": "eager", "revision": "main", "token": False}
    own = ChatS2T(model="s2t-demo", max_tokens=12, model_kwargs=options)
    assert own.invoke("hello", model=str(file)).content == chat.invoke("hello").content


def test_another_gguf_file_gets_llama_cpps_options(chat: ChatS2T, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", metadata={"context_length": 2048})
    small = ChatS2T(model="s2t-demo", model_kwargs={"n_ctx": -1})
    with pytest.raises(ConfigError, match="n_ctx"):
        small.invoke("hello", model=str(other))


def test_an_llm_from_a_gguf_file_is_asked(file: Path, tmp_path: Path) -> None:
    llm = LocalLLM(str(write_gguf(tmp_path / "llm.gguf", seed=9)), n_ctx=1024)
    escalation = Escalation(llm, margin=1.0)
    chat = ChatS2T(model=str(file), trigger=triggers.entropy(above=0.0), escalation=escalation, max_tokens=8)
    said = chat.invoke("hello").response_metadata["s2t"]
    assert said["escalations"] == 8
    assert said["flips"] > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"model_kwargs": {"n_ctx": -1}}, "n_ctx"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "attn_implementation"),
    ],
)
def test_a_setting_that_gguf_has_not_is_named(settings: dict[str, Any], named: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        ChatS2T(model=str(file), **settings).invoke("hello")


def test_a_file_without_a_template_takes_one(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", template=None)
    with pytest.raises(ConfigError, match="chat_template"):
        ChatS2T(model=str(file), max_tokens=4).invoke("hello")
    given = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert (
        ChatS2T(model=str(file), max_tokens=4, chat_template=given).invoke("hello").response_metadata["s2t"]["tokens"]
    )


def test_a_template_that_is_none_is_one_error(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", template="{% for m in %}")
    with pytest.raises(ConfigError, match="template"):
        ChatS2T(model=str(file), max_tokens=4).invoke("hello")


def test_a_damaged_file_is_one_error(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UnsafeWeights, match=r"cut\.gguf"):
        ChatS2T(model=str(tmp_path / "cut.gguf")).invoke("hello")


def test_a_selector_that_needs_the_weights_in_pytorch_says_so(file: Path) -> None:
    with pytest.raises(ConfigError, match="head selector"):
        _ = LanguageModel.load(str(file), n_ctx=512).model


def test_a_forked_child_goes_on(file: Path) -> None:
    import os

    chat = ChatS2T(model=str(file), max_tokens=6)
    want = chat.invoke("hello").content
    child = os.fork()
    if not child:
        os._exit(0 if chat.invoke("hello").content == want else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert chat.invoke("hello").content == want


@pytest.mark.real
@pytest.mark.parametrize("page", ["README.md", "docs/gguf.md"])
def test_the_documentation_s_agent_runs_on_real_weights(
    page: str, smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if smollm2_gguf.name in code)

    def get_stock(item: str) -> int:
        """Look up the stock of an item."""
        return 85

    exec(block.replace(smollm2_gguf.name, str(smollm2_gguf)), {"get_stock": get_stock})
    assert capsys.readouterr().out.strip()
