"""Damaged and hostile model folders: loaded, or one clear error; no code of them runs."""

import copy
import json
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from observers import cache_key
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from s2t_agents import ChatS2T, LocalLLM
from s2t_agents.backends.torch.loading import load_tokenizer, refuse_infinite
from s2t_agents.cli import app
from s2t_agents.errors import ConfigError, EscalationFailed, ModelNotFound, UnsafeWeights
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model, tiny_tokenizer

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_model("llama").model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def text(name: str, content: str | bytes) -> Damage:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def config(**changes: Any) -> Damage:
    return edited("config.json", lambda read: {**read, **changes})


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return write


def without(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names] and None  # type: ignore[return-value]


def together(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages] and None  # type: ignore[return-value]


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def bytes_of_weights(change: Callable[[bytes], bytes]) -> Damage:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(change((folder / "model.safetensors").read_bytes()))

    return write


def own_template(template: Any) -> Damage:
    """In the tokenizer's config, as older checkpoints have it."""
    there = edited("tokenizer_config.json", lambda read: {**read, "chat_template": template})
    return together(without("chat_template.jinja"), there)


def value(name: str, number: float) -> Damage:
    return weights(lambda tensors: tensors[name].view(-1)[-1:].fill_(number))


def in_its_place(name: str, make: Callable[[Path], Any]) -> Damage:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return replace


def index(**files: str) -> Damage:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return write


def sparse(name: str) -> Damage:
    """More than any real file, and no room on the disk."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(3 * 2**30)

    return write


COUNTS: list[dict[str, Any]] = [  # of each, transformers makes as many objects as it says, or takes it from another one
    {"num_labels": 10**9},
    {"num_codebooks": 10**9},
    {"vision_config": {"num_labels": 10**9}},
    {"first_k_dense_replace": -(10**9)},
    {"first_k_dense_replace": 10**9},
]
WHOLE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
WHOLE += ["added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/x.jinja"]
WHOLE += ["vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "preprocessor_config.json"]
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
DAMAGED: dict[str, Damage] = {
    "config: a list": text("config.json", "[]"),
    "config: a number": text("config.json", "7"),
    "config: empty": text("config.json", ""),
    "config: nested": text("config.json", '{"a":' + "[" * 100_000),
    "config: not UTF-8": text("config.json", b'{"model_type": "\xff\xfe"}'),
    "config: nothing in it": text("config.json", "{}"),
    "config: missing": without("config.json"),
    "config: a directory": in_its_place("config.json", Path.mkdir),
    "config: a pipe": in_its_place("config.json", os.mkfifo),
    "config: a device": in_its_place("config.json", lambda path: path.symlink_to("/dev/zero")),
    "config: a broken link": in_its_place("config.json", lambda path: path.symlink_to("nowhere")),
    "config: unknown type": config(model_type="zzz"),
    "config: no causal LM": config(model_type="clip"),
    "config: another family": config(model_type="gpt2"),
    "config: a text for a size": config(hidden_size="x"),
    "config: null for a size": config(vocab_size=None),
    "config: a list for a size": config(num_attention_heads=[4]),
    "config: negative": config(hidden_size=-1),
    "config: zero heads": config(num_key_value_heads=0),
    "config: 10**12 wide": config(hidden_size=10**12),
    "config: 10**6 wide": config(hidden_size=10**6),
    "config: 10**12 tokens": config(vocab_size=10**12),
    "config: 10**8 inside": config(intermediate_size=10**8),
    "config: 10**9 layers": config(num_hidden_layers=10**9),
    "config: 3000 layers": config(num_hidden_layers=3000),
    "config: 10**9 heads": config(num_attention_heads=10**9),
    "config: other sizes": config(hidden_size=64),
    "config: other vocabulary": config(vocab_size=270),
    "config: unknown activation": config(hidden_act="nope"),
    "config: unknown dtype": config(dtype="float77"),
    "config: no layers": config(num_hidden_layers=0),
    "config: NaN": config(rms_norm_eps=float("nan")),
    "config: tables of infinity": config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
    "config: odd parts": config(text_config=7),
    "config: odd quantisation": config(quantization_config=[]),
    "config: odd code": config(auto_map=7),
    "generation config: a text for an id": text("generation_config.json", '{"eos_token_id": "x"}'),
    "generation config: texts for ids": text("generation_config.json", '{"eos_token_id": ["x"]}'),
    "generation config: a mapping": text("generation_config.json", '{"eos_token_id": {"a": 1}}'),
    "generation config: broken": text("generation_config.json", "[["),
    "generation config: a list": text("generation_config.json", "[]"),
    "generation config: a pipe": in_its_place("generation_config.json", os.mkfifo),
    "tokenizer: missing": without("tokenizer.json", "tokenizer_config.json"),
    "tokenizer: empty": text("tokenizer.json", ""),
    "tokenizer: a list": text("tokenizer.json", "[]"),
    "tokenizer: nested": text("tokenizer.json", '{"model":' + "[" * 100_000),
    "tokenizer: no model": edited("tokenizer.json", lambda read: {**read, "model": None}),
    "tokenizer: a pipe": in_its_place("tokenizer.json", os.mkfifo),
    "tokenizer: another model's": edited(
        "tokenizer.json",
        lambda read: {**read, "model": {**read["model"], "vocab": {**read["model"]["vocab"], "zz": 9999}}},
    ),
    "tokenizer config: a list": text("tokenizer_config.json", "[]"),
    "tokenizer config: broken": text("tokenizer_config.json", "{"),
    "tokenizer config: odd class": edited("tokenizer_config.json", lambda read: {**read, "tokenizer_class": 7}),
    "tokenizer config: odd tokens": edited("tokenizer_config.json", lambda read: {**read, "eos_token": ["x"]}),
    "template: a number": own_template(7),
    "template: numbers": own_template([{"name": "default", "template": 7}]),
    "template: none for plain conversations": own_template([{"name": "tool_use", "template": "{{ messages }}"}]),
    "template: broken": text("chat_template.jinja", "{% if %}"),
    "template: not UTF-8": text("chat_template.jinja", b"\xff\xfe"),
    "template: a device": in_its_place("chat_template.jinja", lambda path: path.symlink_to("/dev/zero")),
    "weights: missing": without("model.safetensors"),
    "weights: empty": bytes_of_weights(lambda read: b""),
    "weights: cut off": bytes_of_weights(lambda read: read[: len(read) // 2]),
    "weights: cut in the header": bytes_of_weights(lambda read: read[:100]),
    "weights: no header": bytes_of_weights(lambda read: b"\0" * 4096),
    "weights: a header of 2**62 bytes": bytes_of_weights(lambda read: (2**62).to_bytes(8, "little") + read[8:]),
    "weights: a pickle by that name": bytes_of_weights(lambda read: pickle.dumps({"a": 1})),
    "weights: tensors missing": weights(lambda tensors: tensors.pop(NORM)),
    "weights: other shapes": weights(lambda tensors: tensors.update({NORM: torch.ones(7)})),
    "weights: NaN": value(NORM, float("nan")),
    "weights: NaN in the first": value(EMBEDDING, float("nan")),
    "weights: infinite": value(EMBEDDING, float("-inf")),
    "weights: a directory": in_its_place("model.safetensors", Path.mkdir),
    "weights: a pipe": in_its_place("model.safetensors", os.mkfifo),
    "weights: pickles": together(text("pytorch_model.bin", pickle.dumps({})), without("model.safetensors")),
    "shards: missing": index(**{NORM: "model-00001-of-00002.safetensors"}),
    "shards: outside": index(**{NORM: "../elsewhere.safetensors"}),
    "shards: far outside": index(**{NORM: "/etc/passwd"}),
    "shards: a name beyond the system's": index(**{NORM: "a" * 5000}),
    "shards: of no tensors": index(),
    "shards: no text": index(**{NORM: 7}),  # type: ignore[arg-type]
    "shards: a broken index": together(
        index(**{NORM: "part.safetensors"}), text("model.safetensors.index.json", "[" * 100_000)
    ),
    "an adapter": together(
        without("config.json", "model.safetensors"),
        text("adapter_config.json", '{"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA"}'),
    ),
    "an adapter beside its base": text("adapter_config.json", '{"peft_type": "LORA"}'),
    "a sentence embedder": text("modules.json", "[]"),
    "GGUF": together(without("config.json", "model.safetensors"), text("model-q4.gguf", b"GGUF")),
    "GGUF and a config": together(without("model.safetensors"), text("model-q4.gguf", b"GGUF")),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_folder_is_one_named_error(damage: Damage, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        ChatS2T(model=str(folder), max_tokens=4).invoke("hello")
    assert str(folder) in str(caught.value) or "chat template" in str(caught.value)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("read", [LanguageModel.load, load_tokenizer])
def test_a_count_beyond_any_model_is_refused_before_it_is_made(
    read: Callable[[str], Any], counts: dict[str, Any], folder: Path
) -> None:
    config(**counts)(folder)
    edited("tokenizer_config.json", lambda read: {**read, "tokenizer_class": None})(folder)  # the config says it then
    with pytest.raises(UnsafeWeights, match=r"says \w+=-?10+;"):
        read(str(folder))


@pytest.mark.parametrize("name", WHOLE)
def test_no_file_that_would_be_read_whole_is_larger_than_the_limit(name: str, folder: Path) -> None:
    sparse(name)(folder)
    model = ChatS2T(model=str(folder), max_tokens=4)
    assert model.profile is not None
    with pytest.raises(UnsafeWeights, match=rf"{Path(name).name}.* bytes"):
        model.invoke("hello")


def test_all_else_in_a_folder_is_passed_over(folder: Path) -> None:
    want = ChatS2T(model=str(folder), max_tokens=4).invoke("hello").content
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    (folder / "README.md").mkdir()
    os.mkfifo(folder / "train.log")
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 10000000, -3]}')
    real = folder.parent / "blob"
    (folder / "model.safetensors").rename(real)
    (folder / "model.safetensors").symlink_to(real)  # as in the hub's cache
    assert ChatS2T(model=str(folder), max_tokens=4, dtype="float32").invoke("hello").content == want


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is a file"),
        ("config.json", "is a file"),
        ("nothing/there", "no tokenizer"),
    ],
)
def test_a_path_that_is_no_folder_says_so(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        LanguageModel.load(str(folder / name))


def test_a_config_that_asks_for_tuples_changes_nothing(folder: Path) -> None:
    right = ChatS2T(model=str(folder), max_tokens=4).invoke("hello").content
    other = Path(shutil.copytree(folder, folder.parent / "tuples"))
    config(return_dict=False, output_hidden_states=True, output_attentions=True)(other)
    assert ChatS2T(model=str(other), max_tokens=4).invoke("hello").content == right


def test_a_url_is_refused_without_its_credentials() -> None:
    secret = "S3CRET"
    with pytest.raises(ModelNotFound, match="is a URL") as caught:
        ChatS2T(model=f"https://user:{secret}@hub/acme/model").invoke("hello")
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_nan_is_found_in_shards_of_half_precision_and_names_the_tensor(folder: Path) -> None:
    model = tiny_model().model.to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UnsafeWeights, match=r"model\.layers\.2\.mlp\.up_proj\.weight of .* holds NaN"):
        LanguageModel.load(str(folder))


@pytest.mark.parametrize("dtype", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"])
def test_nan_is_found_in_weights_of_eight_bits(dtype: str) -> None:
    scales = torch.nn.Module()
    for name, number in (("sound", 1.0), ("damaged", float("nan"))):
        scales.register_buffer(name, torch.tensor([1.0, number, 0.5]).to(getattr(torch, f"float8_{dtype}")))
    with pytest.raises(UnsafeWeights, match="damaged of 'm' holds NaN"):
        refuse_infinite("m", scales)
    del scales.damaged
    refuse_infinite("m", scales)


def test_a_cast_that_overflows_is_found_too(folder: Path) -> None:
    value(NORM, 1e30)(folder)
    assert LanguageModel.load(str(folder)).model.dtype == torch.float32
    with pytest.raises(UnsafeWeights, match=NORM):
        LanguageModel.load(str(folder), dtype=torch.float16)


def test_a_tokenizer_whose_expressions_never_end_is_a_named_error(folder: Path) -> None:
    hostile = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
    edited("tokenizer.json", lambda read: {**read, "normalizer": hostile})(folder)
    model = ChatS2T(model=str(folder), max_tokens=4)
    with pytest.raises(ConfigError, match="tokenizer"):
        model.invoke("x" * 60)
    with pytest.raises(ConfigError, match="tokenizer"):
        model.get_num_tokens("x" * 60)


# ------------------------------------------------------------------ code of a repository

CODE = """
open({ran!r}, "a").write("ran ")
from transformers import Qwen3Config, Qwen3ForCausalLM, PreTrainedTokenizerFast
class C(Qwen3Config):
    model_type = "zzz"
class M(Qwen3ForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path) -> Path:
    ran = folder / "ran"
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    tiny_model().model.save_pretrained(folder)
    config(model_type="zzz", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})(folder)
    return ran


@pytest.mark.parametrize("said", ["y\nhello\n", "yes\n", ""])
def test_nobody_is_asked_whether_to_run_code(folder: Path, said: str) -> None:
    ran = with_code(folder)
    result = CliRunner().invoke(app, ["chat", "--model", str(folder)], input=said)
    assert isinstance(result.exception, UnsafeWeights)
    assert "trust_remote_code" in str(result.exception)
    assert (result.stdout, ran.exists()) == ("", False)


@pytest.mark.parametrize("consent", [None, False, "no", 1])
def test_only_true_is_consent(folder: Path, consent: Any) -> None:
    ran = with_code(folder)
    with pytest.raises(UnsafeWeights, match="trust_remote_code"):
        LanguageModel.load(str(folder), trust_remote_code=consent)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        ChatS2T(model=str(folder), model_kwargs={"trust_remote_code": consent}).invoke("hello")
    with pytest.raises(EscalationFailed, match="own repository"):
        LocalLLM(str(folder), trust_remote_code=consent).load()
    assert not ran.exists()


def test_code_of_a_tokenizer_alone_is_not_run_either(folder: Path) -> None:
    ran = with_code(folder)
    (folder / "config.json").unlink()
    tiny_model().model.config.save_pretrained(folder)
    edited(
        "tokenizer_config.json",
        lambda read: {**read, "tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}},
    )(folder)
    load_tokenizer(str(folder))  # the library's own class does
    edited("tokenizer_config.json", lambda read: {**read, "tokenizer_class": "T"})(folder)
    config(model_type="zzz", auto_map={"AutoConfig": "own.C"})(folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "own.T"]}}')
    with pytest.raises(UnsafeWeights, match="trust_remote_code"):
        load_tokenizer(str(folder))
    with pytest.raises(UnsafeWeights, match="trust_remote_code"):
        ChatS2T(model=str(folder)).get_num_tokens("x")
    with pytest.raises(UnsafeWeights, match="trust_remote_code"):
        LocalLLM(str(folder)).check(tiny_model())
    assert not ran.exists()


def test_with_consent_in_code_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = with_code(folder)
    options = {"trust_remote_code": True}
    model = ChatS2T(model=str(folder), model_kwargs=options, max_tokens=4)
    assert model.invoke("hello").content == ChatS2T(model=tiny_model(), max_tokens=4).invoke("hello").content
    assert ran.exists()
    with pytest.raises(UnsafeWeights, match="trust_remote_code"):  # consent is for this repository alone
        ChatS2T(model="s2t-demo", model_kwargs=options).invoke(
            "hello", model=str(shutil.copytree(folder, tmp_path / "b"))
        )


# ------------------------------------------------------------------ which files are meant


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A hub cache with two revisions of acme/tiny, each with a template, a window and weights of its own."""
    cache = tmp_path / "hub"
    repo = cache / "models--acme--tiny"
    (repo / "refs").mkdir(parents=True)
    for seed, ref in enumerate(("main", "v2")):
        commit = str(seed) * 40
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.chat_template = "+" * seed + tokenizer.chat_template
        for part in ("", "inner"):
            model = tiny_model(seed=seed + 10 * bool(part), max_position_embeddings=512 + seed + 10 * bool(part)).model
            model.generation_config.eos_token_id = [258, seed]
            model.save_pretrained(repo / "snapshots" / commit / part)
            tokenizer.save_pretrained(repo / "snapshots" / commit / part)
        (repo / "refs" / ref).write_text(commit)
    return cache


@pytest.mark.parametrize("revision", ["main", "v2"])
@pytest.mark.parametrize("part", [None, "inner"])
def test_revision_cache_and_subfolder_reach_everything(hub: Path, revision: str, part: str | None) -> None:
    options = {"revision": revision, "cache_dir": str(hub), "subfolder": part, "token": "hf_secret"}
    options = {key: given for key, given in options.items() if given}
    seed, deeper = int(revision == "v2"), 10 * bool(part)
    chat = ChatS2T(model="acme/tiny", model_kwargs=options)
    assert chat.profile["max_input_tokens"] == 512 + seed + deeper
    counted = chat.get_num_tokens_from_messages([HumanMessage("x")])
    slm = chat.engine.slm
    want = tiny_model(seed=seed + deeper, max_position_embeddings=512 + seed + deeper)
    assert torch.equal(slm.output_embedding, want.output_embedding)
    assert slm.tokenizer.chat_template.startswith("+" * seed + "{%")
    assert slm.eos_ids == {258, seed}
    assert slm.context_window == 512 + seed + deeper
    assert counted == chat.get_num_tokens_from_messages([HumanMessage("x")])
    assert "hf_secret" not in cache_key(chat) + repr(chat)

    llm = LocalLLM("acme/tiny", **options)
    llm.check(slm)
    assert llm.load().weights_fingerprint == pickle.loads(pickle.dumps(llm)).load().weights_fingerprint
    assert llm.load().weights_fingerprint == slm.weights_fingerprint
    assert "hf_secret" not in repr(llm)


def test_two_revisions_are_two_models_to_every_cache(hub: Path) -> None:
    models = [
        ChatS2T(model="acme/tiny", model_kwargs={"revision": revision, "cache_dir": str(hub)}, max_tokens=6)
        for revision in ("main", "v2", "main")
    ]
    first, second, again = (model.engine.slm for model in models)
    assert first is again
    assert first is not second
    keys = {cache_key(model) for model in models}
    assert len(keys) == 2
    asking = [ChatS2T(model="x", escalation=LocalLLM("acme/tiny", revision=revision)) for revision in ("main", "v2")]
    assert len({cache_key(model) for model in asking}) == 2
    counts = [model.get_num_tokens_from_messages([HumanMessage("hello")]) for model in models]
    assert counts[0] + 1 == counts[1]
    assert counts[0] == counts[2]
    again_pickled = pickle.loads(pickle.dumps(models[1]))
    assert again_pickled.engine.slm is second


def test_a_calls_model_has_its_own_revision_and_the_same_cache(hub: Path) -> None:
    other = hub / "models--acme--other"
    shutil.copytree(hub / "models--acme--tiny", other)
    (other / "refs" / "v2").unlink()  # this one has no v2
    chat = ChatS2T(model="acme/tiny", model_kwargs={"revision": "v2", "cache_dir": str(hub)}, max_tokens=6)
    main = ChatS2T(model="acme/other", model_kwargs={"cache_dir": str(hub)}, max_tokens=6)
    assert chat.invoke("x", model="acme/other").content == main.invoke("x").content


def test_options_of_the_weights_do_not_reach_the_tokenizer(folder: Path) -> None:
    options = {"attn_implementation": "eager", "device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}}
    chat = ChatS2T(model=str(folder), model_kwargs=options)
    assert chat.get_num_tokens("abc") == 3
    assert chat.engine.slm.torch_backend.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("n_ctx", "llama.cpp takes it, for GGUF files"),
        ("type_k", "llama.cpp takes it, for GGUF files"),
        ("timeout_s", "vllm://host:port/name"),
        ("atn_implementation", "Did you mean attn_implementation?"),
        ("quantisation_config", "Did you mean quantization_config?"),
        ("zzz", "Leave it out"),
    ],
)
def test_an_option_that_no_checkpoint_takes_is_named_and_no_damage(folder: Path, name: str, way_out: str) -> None:
    with pytest.raises(ConfigError, match=f"takes no {name} for ") as refused:
        ChatS2T(model=str(folder), model_kwargs={name: 1}).invoke("hello")
    assert not isinstance(refused.value, UnsafeWeights)
    assert way_out in refused.value.hint


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "use_safetensors", "output_loading_info"])
def test_an_option_that_is_a_setting_is_refused_by_name(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot be passed on"):
        ChatS2T(model=str(folder), model_kwargs={name: False})


def test_a_missing_revision_or_subfolder_says_so(folder: Path, hub: Path) -> None:
    for model, options in (
        (str(folder), {"subfolder": "none"}),
        ("acme/tiny", {"cache_dir": str(hub), "revision": "x"}),
    ):
        with pytest.raises(ModelNotFound, match=model):
            ChatS2T(model=model, model_kwargs=options).invoke("hello")
