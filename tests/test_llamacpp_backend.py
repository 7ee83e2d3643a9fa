"""GGUF models in llama.cpp: what the engine itself says, whatever is batched, forked, cut back or moved."""

from __future__ import annotations

import gc
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ending import ended
from gguf_files import write_gguf
from sequences import appended
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from s2t_agents.backends.base import Append, ScoreCandidates, StepOutput
from s2t_agents.backends.llamacpp.backend import LlamaCppBackend
from s2t_agents.backends.llamacpp.context import Context, Interrupted, Options
from s2t_agents.backends.llamacpp.gguf_header import read_header
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError, ModelNotFound, Overloaded
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import tiny_tokenizer
from s2t_agents.types import Sampling

llama_cpp = pytest.importorskip("llama_cpp")

CLOSE = {"rtol": 0.01, "atol": 0.02}
"""Of logits of 3 and more: llama.cpp's attention sums up in fp16, otherwise for one token than for many."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend.load(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), n_ctx=1024)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend.load(smollm2_gguf, n_ctx=4096)
    yield backend
    backend.close()


def draw(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed))


def read(backend: LlamaCppBackend, cache: Any, ids: Tensor) -> StepOutput:
    (output,) = backend.forward([Append(ids, cache, cache.length)])
    assert isinstance(output, StepOutput)
    cache.mark_read(cache.length)
    return output


def fresh(backend: LlamaCppBackend, ids: Tensor) -> StepOutput:
    cache = backend.new_cache()
    try:
        return read(backend, cache, ids)
    finally:
        cache.close()


def same(one: StepOutput, other: StepOutput) -> None:
    torch.testing.assert_close(one.logits, other.logits, **CLOSE)
    torch.testing.assert_close(one.hidden, other.hidden, **CLOSE)


def greedy(backend: LlamaCppBackend, prompt: Sequence[int], tokens: int) -> list[int]:
    cache, said = backend.new_cache(), []
    output = read(backend, cache, torch.tensor(prompt))
    for _ in range(tokens):
        said.append(int(output.logits.argmax()))
        output = read(backend, cache, torch.tensor(said[-1:]))
    cache.close()
    return said


def greedy_of_the_binding(path: Path, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[list[int]]:
    llama = llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True, **options
    )
    said = []
    for prompt in prompts:
        llama.reset()
        found = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        said.append([next(found) for _ in range(tokens)])
    llama.close()
    return said


def test_greedy_is_the_binding_s_own_greedy(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", kind="Q8_0", seed=3)
    backend = LlamaCppBackend.load(file, n_ctx=1024, n_threads=1)
    prompts = [draw(length, seed=length).tolist() for length in (1, 7, 9, 40, 200)]
    assert [greedy(backend, prompt, 24) for prompt in prompts] == greedy_of_the_binding(file, prompts, 24)
    backend.close()


@pytest.mark.real
@pytest.mark.parametrize("part", [slice(0, 5), pytest.param(slice(5, 50), marks=pytest.mark.slow)], ids=["5", "45"])
def test_greedy_on_real_weights_is_the_binding_s_own(
    part: slice, smol: LlamaCppBackend, smollm2_gguf: Path, bfcl: Path
) -> None:
    rows = (json.loads(line) for line in (bfcl / "BFCL_v4_simple_python.json").read_text().splitlines()[part])
    texts = [row["question"][0][0]["content"] for row in rows]
    prompts = [
        smol.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    assert [greedy(smol, prompt, 16) for prompt in prompts] == greedy_of_the_binding(smollm2_gguf, prompts, 16)


@pytest.mark.real
@pytest.mark.parametrize(("kind", "number"), [("q8_0", 8), ("q4_0", 2)])
def test_over_quantised_kv_too(kind: str, number: int, smollm2_gguf: Path) -> None:
    backend = LlamaCppBackend.load(smollm2_gguf, n_ctx=1024, n_threads=1, type_k=kind, type_v=kind)
    chat = [{"role": "user", "content": "Why is the sky blue, and the evening red?"}]
    prompt = backend.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    theirs = greedy_of_the_binding(smollm2_gguf, [prompt], 24, type_k=number, type_v=number)
    assert [greedy(backend, prompt, 24)] == theirs
    backend.close()


@pytest.mark.real
def test_by_default_kv_of_fewer_bits_holds_more_tokens_in_the_same_memory(smollm2_gguf: Path) -> None:
    header = read_header(smollm2_gguf)
    cells = {}
    for kind in ("f32", "f16", "q8_0"):
        context = Context(header, Options(n_threads=1, type_k=kind, type_v=kind))
        cells[kind] = context.cells
        context.close()
    assert cells["f16"] / cells["f32"] == pytest.approx(2, rel=0.05)
    assert cells["q8_0"] / cells["f16"] == pytest.approx(16 / 8.5, rel=0.05)


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 64])
def test_a_prompt_in_chunks_is_the_prompt(tiny: LlamaCppBackend, chunk: int) -> None:
    ids, cache = draw(100), tiny.new_cache()
    for part in torch.split(ids, chunk):
        output = read(tiny, cache, part)
    same(output, fresh(tiny, ids))
    assert cache.length == cache.read == 100
    cache.close()


def test_a_prompt_longer_than_a_batch_is_read(tiny: LlamaCppBackend) -> None:
    ids, cache = draw(700), tiny.new_cache()
    whole = fresh(tiny, ids)
    read(tiny, cache, ids[:400])
    same(read(tiny, cache, ids[400:]), whole)
    cache.close()


def test_sequences_together_are_each_alone(tiny: LlamaCppBackend) -> None:
    prompts = [draw(length, seed=length) for length in (3, 50, 9, 1, 21)]
    caches = [tiny.new_cache() for _ in prompts]
    for part in (slice(0, -1), slice(-1, None)):
        work = [
            Append(ids[part], cache, cache.length) for ids, cache in zip(prompts, caches, strict=True) if len(ids[part])
        ]
        outputs = tiny.forward(work)
    for output, ids, cache in zip(outputs, prompts, caches, strict=True):
        same(output, fresh(tiny, ids))
        cache.close()


def test_candidates_are_separate_sequences_and_leave_theirs_as_it_is(tiny: LlamaCppBackend) -> None:
    ids, candidates = draw(30), draw(16, seed=5)
    cache, beside = tiny.new_cache(), tiny.new_cache()
    read(tiny, cache, ids)
    read(tiny, beside, ids[:7])
    scored, step, other = tiny.forward([
        ScoreCandidates(candidates, cache, 30), Append(ids[7:8], beside, 7), ScoreCandidates(candidates[:2], cache, 30),
    ])  # fmt: skip
    alone = torch.stack([fresh(tiny, torch.cat([ids, token[None]])).hidden for token in candidates])
    torch.testing.assert_close(scored, alone, **CLOSE)
    torch.testing.assert_close(other, alone[:2], **CLOSE)
    same(step, fresh(tiny, ids[:8]))
    assert cache.length == 30
    same(read(tiny, cache, ids[:1]), fresh(tiny, torch.cat([ids, ids[:1]])))
    for each in (cache, beside):
        each.close()


def test_more_candidates_than_numbers_are_scored(tiny: LlamaCppBackend) -> None:
    ids = draw(12)
    caches = [tiny.new_cache() for _ in range(50)]
    for at, cache in enumerate(caches):
        read(tiny, cache, ids[: 1 + at % 3])
    cache = caches[2]
    (scored,) = tiny.forward([ScoreCandidates(torch.arange(64), cache, cache.length)])
    (few,) = tiny.forward([ScoreCandidates(torch.arange(4), cache, cache.length)])
    assert scored.shape == (64, tiny.hidden_size)
    torch.testing.assert_close(scored[:4], few, **CLOSE)
    for cache in caches:
        cache.close()


def test_an_adapter_is_refused_wherever_it_would_be_on(tiny: LlamaCppBackend) -> None:
    model = LanguageModel.on(tiny)
    with pytest.raises(ConfigError, match="no adapter"):
        TokenSequence(model, lora=object())
    sequence = TokenSequence(model)
    sequence.append([1, 2, 3])
    with pytest.raises(ConfigError, match="no adapter"):
        finish(sequence.scoring_candidates(torch.tensor([5, 6]), object()))
    assert finish(sequence.scoring_candidates(torch.tensor([5, 6]))).shape == (2, tiny.hidden_size)
    sequence.close()


def test_forks_share_a_front_and_go_their_own_ways(tiny: LlamaCppBackend) -> None:
    ids, cache = draw(40), tiny.new_cache()
    read(tiny, cache, ids)
    fork = cache.fork(25)
    assert (fork.length, fork.read) == (25, 25)
    cache.truncate(30)
    same(read(tiny, fork, ids[:5]), fresh(tiny, torch.cat([ids[:25], ids[:5]])))
    same(read(tiny, cache, ids[9:12]), fresh(tiny, torch.cat([ids[:30], ids[9:12]])))
    cache.close()
    same(read(tiny, fork, ids[:1]), fresh(tiny, torch.cat([ids[:25], ids[:5], ids[:1]])))
    empty = fork.fork(0)
    assert empty.length == 0
    fork.close()


def test_dropped_caches_give_their_numbers_back(tiny: LlamaCppBackend) -> None:
    for _ in range(200):
        read(tiny, tiny.new_cache(), draw(3))
    gc.collect()
    same(fresh(tiny, draw(9)), fresh(tiny, draw(9)))


def test_parked_caches_make_room_and_come_back_from_memory(tiny: LlamaCppBackend) -> None:
    parked = []
    for seed in range(6):  # 6 x 300 tokens, of 1,024
        cache = tiny.new_cache()
        read(tiny, cache, draw(300, seed))
        cache.park()
        parked.append(cache)
    for seed in (0, 5, 2):
        fork = parked[seed].fork(280)
        same(read(tiny, fork, draw(2, 9)), fresh(tiny, torch.cat([draw(300, seed)[:280], draw(2, 9)])))
        fork.close()
    parked[1].truncate(100)
    same(read(tiny, parked[1], draw(1)), fresh(tiny, torch.cat([draw(300, 1)[:100], draw(1)])))
    for cache in parked:
        cache.close()


def test_idle_sequences_leave_the_context_and_nobody_notices(
    tiny: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    saved = Context.saved
    monkeypatch.setattr(Context, "saved", lambda self, number: moved.append(number) or saved(self, number))
    idle = []
    for seed in range(5):
        cache = tiny.new_cache()
        read(tiny, cache, draw(140, seed))
        cache.park()
        idle.append(cache)
    running, ids = tiny.new_cache(), draw(120, 9)
    for at in range(len(ids)):
        output = read(tiny, running, ids[at : at + 1])
    assert len(moved) >= 5  # all of the idle ones, and what runs, to the first cells
    torch.testing.assert_close(output.logits, fresh(tiny, ids).logits, **CLOSE)
    more = draw(3, 10)
    for seed, cache in enumerate(idle):
        again = cache.fork(140)
        torch.testing.assert_close(
            read(tiny, again, more).logits, fresh(tiny, torch.cat([draw(140, seed), more])).logits, **CLOSE
        )
        again.close()
        cache.close()
    running.close()


def test_sequences_in_use_stay_where_they_are(tiny: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "saved", lambda self, number: pytest.fail("a sequence was moved"))
    paused, running = tiny.new_cache(), tiny.new_cache()
    read(tiny, paused, draw(600))  # its generation has not ended: it waits for its consumer
    few = tiny.new_cache()
    read(tiny, few, draw(50))
    few.park()
    for at in range(100):
        read(tiny, running, draw(1, at))
    for cache in (paused, few, running):
        cache.close()


def test_a_parked_sequence_that_goes_on_makes_no_room(tiny: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    saved = Context.saved
    monkeypatch.setattr(Context, "saved", lambda self, number: moved.append(number) or saved(self, number))
    expected = fresh(tiny, torch.cat([draw(300, 0), draw(500, 2)]))
    resumed, idle = tiny.new_cache(), tiny.new_cache()
    for seed, cache in enumerate((resumed, idle)):
        read(tiny, cache, draw(300, seed))
        cache.park()
    resumed.unpark()
    number = resumed.number
    moved.clear()
    output = read(tiny, resumed, draw(500, 2))  # of 1,024 cells: one has to leave
    assert moved
    assert number not in moved
    same(output, expected)
    for cache in (resumed, idle):
        cache.close()


def test_a_prompt_whose_fork_finds_no_room_is_told_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = LanguageModel.on(LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf"), n_ctx=600, n_threads=1))
    engine, turn = Engine(model), [at % 200 for at in range(200)]
    list(engine.steps(turn, Sampling(max_tokens=1)))
    unread = [engine.steps([token] * length, Sampling(max_tokens=9)) for token, length in ((7, 400), (8, 300))]
    for steps in unread:
        next(steps)
    for prompt in ([*turn[:150], 5, 6], [*turn, 5, 6]):
        with pytest.raises(Overloaded, match="no room for .* among"):
            next(engine.steps(prompt))
    for steps in unread:
        steps.close()
    assert len(model.running) == 0


def test_too_much_at_once_is_told_and_changes_nothing(tiny: LlamaCppBackend) -> None:
    caches = [tiny.new_cache() for _ in range(4)]
    for seed, cache in enumerate(caches[:3]):
        read(tiny, cache, draw(300, seed))
    with pytest.raises(Overloaded, match="full: no room for .* among 1,024"):
        read(tiny, caches[3], draw(300, 3))
    assert caches[3].length == 0
    caches[0].close()
    caches[1].close()
    same(read(tiny, caches[3], draw(300, 3)), fresh(tiny, draw(300, 3)))
    for cache in caches:
        cache.close()


def test_a_forward_under_way_is_stopped_from_another_thread(tmp_path: Path) -> None:
    backend = LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf", layers=24), n_ctx=4096)
    cache = backend.new_cache()
    read(backend, cache, draw(20))
    failed: list[BaseException] = []

    def forward() -> None:
        try:
            for _ in range(1000):
                backend.forward([Append(draw(500), cache, 20)])
                cache.truncate(20)
        except Interrupted as error:
            failed.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    time.sleep(0.2)
    backend.interrupt()
    thread.join(20)
    assert not thread.is_alive()
    assert failed
    assert cache.length == 20
    backend.resume()
    same(read(backend, cache, draw(3)), fresh(backend, torch.cat([draw(20), draw(3)])))
    backend.close()


def test_a_caller_that_is_interrupted_stops_its_forward_half_way(tmp_path: Path) -> None:
    model = LanguageModel.on(LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf", layers=24), n_ctx=4096))
    cache = model.new_cache()
    appended(model, draw(20), cache)

    def go_on() -> None:
        for _ in range(1000):
            appended(model, draw(500), cache)
            cache.truncate(20)

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)  # SIGINT may be ignored where tests run
    try:
        threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            go_on()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cache.length in (20, 520)  # all of a forward where it came behind one
    cache.truncate(20)
    same(appended(model, draw(3), cache), fresh(model.backend, torch.cat([draw(20), draw(3)])))
    model.backend.close()


def test_two_models_at_once_are_two_models(tiny: LlamaCppBackend, tmp_path: Path) -> None:
    other = LlamaCppBackend.load(write_gguf(tmp_path / "b.gguf", seed=7), n_ctx=512)
    ids, said = draw(10), {}

    def run(backend: LlamaCppBackend) -> None:
        said[backend.name] = [fresh(backend, ids).logits for _ in range(10)]

    threads = [threading.Thread(target=run, args=(each,)) for each in (tiny, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for backend in (tiny, other):
        for logits in said[backend.name]:
            torch.testing.assert_close(logits, fresh(backend, ids).logits, **CLOSE)
    assert not torch.allclose(fresh(tiny, ids).logits, fresh(other, ids).logits, atol=0.1)
    assert tiny.weights_fingerprint != other.weights_fingerprint
    assert tiny.tokenizer_fingerprint == other.tokenizer_fingerprint
    other.close()


def test_what_is_left_of_a_closed_model_does_no_harm(tmp_path: Path) -> None:
    backend = LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf"), n_ctx=512)
    cache, other = backend.new_cache(), backend.new_cache()
    read(backend, cache, draw(5))
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.forward([Append(draw(1), other, 0)])
    with pytest.raises(RuntimeError, match="closed"):
        cache.fork(3)
    cache.close()
    del other
    gc.collect()


def test_models_are_freed(tmp_path: Path) -> None:
    import resource

    file = write_gguf(tmp_path / "a.gguf", layers=8)
    most = []
    for _ in range(12):
        backend = LlamaCppBackend.load(file, n_ctx=4096)
        fresh(backend, draw(50))
        backend.close()
        most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert most[-1] - most[3] < 20_000  # KiB


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_the_output_layer_dequantised_gives_the_logits(kind: str, tmp_path: Path) -> None:
    backend = LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf", kind=kind), n_ctx=512)
    output = fresh(backend, draw(20))
    assert backend.output_embedding.shape == (backend.vocab_size, backend.hidden_size)
    off = (backend.output_embedding.float() @ output.hidden - output.logits).abs().max()
    assert off < 0.02 * output.logits.abs().max()  # llama.cpp rounds activations to 8 bits
    backend.close()


def test_the_type_of_the_kv_passes_through(tmp_path: Path, tiny: LlamaCppBackend) -> None:
    file, nbytes = write_gguf(tmp_path / "a.gguf"), {}
    for kind in ("f32", "f16"):
        backend = LlamaCppBackend.load(file, n_ctx=512, type_k=kind, type_v=kind)
        cache = backend.new_cache()
        same(read(backend, cache, draw(30)), fresh(tiny, draw(30)))
        nbytes[kind] = cache.nbytes
        backend.close()
    assert nbytes["f32"] > 1.5 * nbytes["f16"] > 0
    with pytest.raises(ConfigError, match="block size 32"):
        LlamaCppBackend.load(file, n_ctx=512, type_k="q8_0")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_ctx": "many"}, "n_ctx"),
        ({"n_threads": -1}, "n_threads"),
        ({"n_gpu_layers": 1.5}, "n_gpu_layers"),
        ({"type_k": "q3"}, "type_k"),
        ({"rope": 1}, "rope"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf"), **options)


def test_a_context_that_no_memory_holds_is_refused_before_any_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_ctx is 2147483136"):
        LlamaCppBackend.load(write_gguf(tmp_path / "a.gguf"), n_ctx=2**31 - 512)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"missing\.gguf"):
        LlamaCppBackend.load(tmp_path / "missing.gguf")


def told(caplog: pytest.LogCaptureFixture, file: Path, **options: Any) -> list[tuple[str, str]]:
    """Levels and messages that loading a file brings."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "s2t_agents"):
        LlamaCppBackend.load(file, **{"n_ctx": 512, **options}).close()
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def with_end(**changes: Any) -> Any:
    """The tokenizer of the tiny file with another kind of end token, or without one."""
    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [
        {**each, **changes} if each["content"] == "<|im_end|>" else each
        for each in described["added_tokens"]
        if changes or each["content"] != "<|im_end|>"
    ]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


@pytest.mark.parametrize("changes", [{"rstrip": True}, {"lstrip": True}, {}], ids=["right", "left", "text"])
def test_a_tokenizer_that_reads_marked_tokens_otherwise_than_llama_cpp_is_told(
    changes: dict[str, bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    assert told(caplog, file) == []
    ((level, message),) = told(caplog, file, tokenizer=with_end(**changes))
    assert level == "INFO"
    assert "llama.cpp's own" in message


def test_an_end_that_a_file_has_as_text_and_llama_cpp_has_not_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 256}
    file = write_gguf(tmp_path / "a.gguf", types={"<|im_end|>": 1}, eos="<|endoftext|>", keys=keys)
    ((_, message),) = told(caplog, file)
    assert "llama.cpp's own" in message


def with_rope_factors(path: Path, original: int | None) -> Path:
    """Trained on 8,192 tokens, on ``original`` at first, with factors for more and for fewer."""
    scaling = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": 1.0}
    return write_gguf(
        path,
        metadata={"context_length": 8192, **scaling},
        keys={"llama.rope.scaling.type": "longrope"},
        vectors={"rope_factors_long.weight": [3.0] * 8, "rope_factors_short.weight": [1.0] * 8},
    )


@pytest.mark.parametrize(
    ("original", "n_ctx", "long"),
    [(1024, 2048, True), (1024, None, True), (1024, 1024, False), (1024, 512, False), (None, 8192, False)],
)
def test_factors_for_long_prompts_are_told_exactly_where_llama_cpp_takes_them(
    original: int | None, n_ctx: int | None, long: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, plain = with_rope_factors(tmp_path / "a.gguf", original), write_gguf(tmp_path / "plain.gguf")
    backend, unscaled = LlamaCppBackend.load(file, n_ctx=n_ctx), LlamaCppBackend.load(plain, n_ctx=512)
    ids = draw(40)
    assert torch.allclose(fresh(backend, ids).logits, fresh(unscaled, ids).logits, atol=0.1) is not long
    for each in (backend, unscaled):
        each.close()
    messages = told(caplog, file, n_ctx=n_ctx)
    assert [level for level, _ in messages] == ["INFO"] * long
    assert all("rope factors" in message and "n_ctx=1024" in message for _, message in messages)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"penalty_repeat": 1.1}, ["general.sampling.penalty_repeat=1.1"]),
        ({"xtc_probability": 0.5, "penalty_repeat": 1.0}, ["general.sampling.xtc_probability=0.5"]),
        ({"penalty_repeat": 0.9, "xtc_probability": 1.0, "temp": 0.7}, ["penalty_repeat=0.9", "xtc_probability=1"]),
        ({"penalty_repeat": 2}, ["general.sampling.penalty_repeat=2"]),
        ({"penalty_repeat": "no number"}, []),
        ({"temp": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1}, []),
        ({"penalty_repeat": 1.0, "penalty_last_n": 64, "xtc_probability": 0.0}, []),
    ],
)
def test_sampling_of_a_file_that_would_choose_others_than_the_likeliest_is_warned_of(
    keys: dict[str, str | float], named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(tmp_path / "a.gguf", keys={f"general.sampling.{key}": value for key, value in keys.items()})
    messages = told(caplog, file)
    assert [level for level, _ in messages] == ["WARNING"] * bool(named)
    assert all(each in message for _, message in messages for each in named)


@pytest.mark.real
def test_our_tokenizer_is_llama_cpp_s_on_real_text(smol: LlamaCppBackend, smollm2_gguf: Path, bfcl: Path) -> None:
    theirs = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    texts = (bfcl / "BFCL_v4_live_simple.json").read_text().splitlines()[:100]
    for text in [*texts, "x  17", "a\n\n  1,000 naïve 你好 😀"]:
        assert smol.tokenizer.encode(text, add_special_tokens=False) == theirs.tokenize(text.encode(), add_bos=False)


@pytest.mark.real
def test_it_says_nearly_what_the_dequantised_checkpoint_says(smol: LlamaCppBackend, smollm2: Path) -> None:
    from s2t_agents.scheduling.language_model import LanguageModel

    model = LanguageModel.load(str(smollm2))
    ids = torch.tensor(smol.tokenizer.encode("The capital of France is Paris, and that of Italy is"))
    theirs, ours = appended(model, ids, model.new_cache()), fresh(smol, ids)
    assert int(ours.logits.argmax()) == int(theirs.logits.argmax())
    assert (ours.logits.log_softmax(0) - theirs.logits.log_softmax(0)).abs().max() < 1.5
    assert (ours.hidden - theirs.hidden).norm() < 0.1 * theirs.hidden.norm()


@pytest.mark.slow
def test_weights_that_the_scheduler_gives_back_as_the_interpreter_ends(tmp_path: Path) -> None:
    program = f"""
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.types import Sampling

def answer():
    slm = LanguageModel.load({str(write_gguf(tmp_path / "tiny.gguf"))!r})
    print(len(list(Engine(slm).steps([65, 66], Sampling(max_tokens=8, ignore_eos=True)))))

answer()
end_slowly()
"""
    done = ended(program)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
