"""Steps and selections over KV of fixed capacity, played from a tape: what the eager ones say, wherever they apply."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import appended, moved, read, scored_after
from tape import Tape
from torch_models import runner

from s2t_agents import Engine
from s2t_agents.backends.base import Append
from s2t_agents.backends.statistics import statistics_at
from s2t_agents.backends.torch import model_runner
from s2t_agents.backends.torch.cuda import attention
from s2t_agents.backends.torch.cuda.cuda_graph import Recorder, played
from s2t_agents.backends.torch.cuda.graph_runner import GraphRunner, agrees
from s2t_agents.backends.torch.cuda.kv_pool import SMALLEST, KVPools, PooledKVCache, bucket
from s2t_agents.backends.torch.fused_ops import EAGER, PointwiseOps
from s2t_agents.backends.torch.kv_cache import KVCache
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.engine.decode_loop import fetched, in_one_trip
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors.activated import ActivatedSelector
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen3", {}),
    ("llama", {}),
    ("mistral", {"sliding_window": 16}),
    ("mistral", {"sliding_window": 1}),
]
CANDIDATES = torch.tensor([5, 9, 200, 33, 90])


def pooled_model(
    name: str = "qwen3",
    record: Recorder | None = None,
    pools: KVPools | None = None,
    ops: PointwiseOps | None = None,
    often: int = 99,
    **overrides: Any,
) -> LanguageModel:
    """A tiny model whose steps go over arenas, as on a GPU."""
    model = tiny_model(name, max_position_embeddings=4096, **overrides)
    rows = runner(model).decoder_batch
    assert rows is not None
    model.torch_backend.use_graphs(GraphRunner(rows, record or Tape(), pools, ops or EAGER, often=often))
    return LanguageModel.on(model.backend)


def eager_model(name: str = "qwen3", **overrides: Any) -> LanguageModel:
    return tiny_model(name, max_position_embeddings=4096, **overrides)


def some_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(one: TokenSequence, other: TokenSequence) -> None:
    assert torch.allclose(one.logits, other.logits, atol=1e-4)
    assert torch.allclose(one.hidden, other.hidden, atol=1e-4)


def is_seated(prefix: TokenSequence) -> bool:
    return isinstance(prefix.cache, PooledKVCache) and prefix.cache.pool is not None


def some_lora(model: LanguageModel, seed: int = 0) -> Lora:
    torch.manual_seed(seed)
    lora = Lora.fresh(model.model, targets=["q_proj", "v_proj", "o_proj", "down_proj"], rank=4, alpha=8)
    for layer in lora.layers:
        torch.nn.init.normal_(layer.b)
    return lora


def greedy(model: LanguageModel, seed: int, count: int, engine: Engine | None = None) -> list[int]:
    steps = (engine or Engine(model)).steps(some_ids(3 + 11 * seed, seed), Sampling(max_tokens=count))
    return [step.token_id for step in steps]


@pytest.mark.parametrize(("name", "more"), FAMILIES)
def test_a_played_step_says_what_the_eager_one_says(name: str, more: dict[str, Any]) -> None:
    ours, theirs = pooled_model(name, **more), eager_model(name, **more)
    one, other = read(ours, some_ids(30)), read(theirs, some_ids(30))
    for token in some_ids(12, 1):
        one.append([token])
        other.append([token])
        same(one, other)
    assert is_seated(one)


@pytest.mark.parametrize(("name", "more"), FAMILIES)
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_played_selection_says_what_the_overlay_says(name: str, more: dict[str, Any], with_lora: bool) -> None:
    ours, theirs = pooled_model(name, **more), eager_model(name, **more)
    one, other = read(ours, some_ids(30)), read(theirs, some_ids(30))
    for token in some_ids(5, 1):
        one.append([token])
        other.append([token])
        looked = [
            scored_after(prefix, CANDIDATES, some_lora(prefix.model) if with_lora else None) for prefix in (one, other)
        ]
        assert torch.allclose(*looked, atol=1e-4)
        same(one, other)


def test_graphs_are_made_once_and_played_for_every_token_and_sequence() -> None:
    tape = Tape()
    model = pooled_model(record=tape)
    lora = some_lora(model)
    for seed in range(3):
        prefix = read(model, some_ids(9, seed))
        for token in some_ids(6, seed):
            prefix.append([token])
            scored_after(prefix, CANDIDATES, lora)
        del prefix
        gc.collect()
    assert tape.recorded == 2


def test_a_sequence_grows_past_its_capacity() -> None:
    ours, theirs = pooled_model(), eager_model()
    one, other = read(ours, some_ids(SMALLEST - 4)), read(theirs, some_ids(SMALLEST - 4))
    seen = set()
    for token in some_ids(8, 1):
        one.append([token])
        other.append([token])
        same(one, other)
        assert isinstance(one.cache, PooledKVCache)
        assert one.cache.slot is not None
        seen.add(one.cache.slot.pool.capacity)
    assert seen == {SMALLEST, 2 * SMALLEST}


def test_a_prompt_that_outgrows_its_row_finds_another() -> None:
    ours, theirs = pooled_model(), eager_model()
    one, other = read(ours, some_ids(20)), read(theirs, some_ids(20))
    for ids in ([7], some_ids(600, 1), [8], [9]):
        one.append(ids)
        other.append(ids)
        same(one, other)
    assert is_seated(one)


def test_capacities_come_in_few_sizes_that_are_never_too_small() -> None:
    sizes = {bucket(tokens) for tokens in range(1, 33_000)}
    assert all(bucket(tokens) > tokens for tokens in range(1, 33_000))
    assert len(sizes) < 14
    assert all(size % attention.CHUNK == 0 for size in sizes)


def test_a_cut_sequence_goes_on_from_the_cut() -> None:
    ours, theirs = pooled_model(), eager_model()
    one, other = read(ours, some_ids(20)), read(theirs, some_ids(20))
    for prefix in (one, other):
        prefix.append([7])
        prefix.append([8])
        assert moved(prefix, [*some_ids(20)[:15], 3, 4]) == 2
        prefix.append([5])
    same(one, other)


def test_what_is_kept_of_a_generation_leaves_its_row_and_serves_the_next() -> None:
    ours, theirs = pooled_model(), eager_model()
    for model in (ours, theirs):
        model.backend.eos_ids = frozenset()
        prompt = some_ids(40)
        answer = [step.token_id for step in Engine(model).steps(prompt, Sampling(max_tokens=10))]
        again = list(Engine(model).steps([*prompt, *answer, *some_ids(5, 1)], Sampling(max_tokens=10)))
        assert again[0].reused_tokens == 49
        model.answers = (answer, [step.token_id for step in again])  # type: ignore[attr-defined]
        (entry,) = model.prefix_cache.entries
        assert entry.cache.nbytes <= model.prefix_cache.nbytes < 2 * 4 * 2 * 8 * 4 * 512
    assert ours.answers == theirs.answers  # type: ignore[attr-defined]
    assert all(
        isinstance(entry.cache, PooledKVCache) and entry.cache.pool is None for entry in ours.prefix_cache.entries
    )
    following = read(ours, some_ids(9))
    following.append([7])
    assert isinstance(following.cache, PooledKVCache)
    assert following.cache.slot is not None
    assert following.cache.slot.pool is not None
    assert (following.cache.slot.row, following.cache.slot.pool.rows) == (0, 1)


def test_several_sequences_take_a_step_together_whoever_sits_out() -> None:
    ours, theirs = pooled_model(), eager_model()
    lengths = (2, 30, 9, 17)
    ones, others = ([read(model, some_ids(n, n)) for n in lengths] for model in (ours, theirs))
    for turn, taking_part in enumerate([(0, 1), (0, 1, 2, 3), (1, 3), (2,), (0, 2, 3), (0, 1, 2, 3)]):
        for model, prefixes in ((ours, ones), (theirs, others)):
            segments = [
                Append(torch.tensor([40 + turn + at]), prefixes[at].cache, len(prefixes[at])) for at in taking_part
            ]
            for at, said in zip(taking_part, model.backend.forward(segments), strict=True):
                prefixes[at].ids.append(40 + turn + at)
                prefixes[at].logits, prefixes[at].hidden = said
        for at in taking_part:
            same(ones[at], others[at])
        for prefix in (ones[0], others[0]):  # its last token becomes another while others take a step without it
            if turn == 1:
                moved(prefix, [*prefix.ids[:-1], 99])
    assert all(map(is_seated, ones))


def test_generations_at_once_say_what_each_says_alone() -> None:
    expected = [greedy(eager_model(), seed, 15) for seed in range(6)]
    model = pooled_model(record=played)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda seed: greedy(model, seed, 15), range(6))) == expected


@pytest.mark.parametrize("kind", ["head", "activated"])
def test_selectors_pick_the_same_tokens(kind: str) -> None:
    picked = []
    for model in (pooled_model(), eager_model()):
        torch.manual_seed(3)
        if kind == "head":
            selector: Any = HeadSelector(model)
            torch.nn.init.normal_(selector.out.weight)
        else:
            selector = ActivatedSelector(model, some_lora(model))
            torch.nn.init.normal_(selector.head.weight)
        engine = Engine(model, trigger=always(), selector=selector.requires_grad_(False))
        steps = list(engine.steps(some_ids(25), Sampling(max_tokens=12)))
        assert all(step.picked_by == "selector" for step in steps)
        picked.append([step.token_id for step in steps])
    assert picked[0] == picked[1]


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("name", ["o_proj", "post_attention_layernorm", "embed_tokens"])
def test_weights_that_were_replaced_are_not_played_from_where_they_lay(name: str, prefetched: bool) -> None:
    ours, theirs = pooled_model(), eager_model()
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    for turn in range(7):
        if turn == 6:
            for model in (ours, theirs):
                (module, *_) = (each for path, each in model.model.named_modules() if path.endswith(name))
                changed = torch.linspace(-1, 1, module.weight.numel()).view_as(module.weight)  # type: ignore[operator,union-attr]
                module.weight = torch.nn.Parameter(changed, requires_grad=False)
        token = int(other.logits.argmax()) if prefetched else 4 + turn
        one.append([token])
        other.append([token])
        looked = [scored_after(prefix, CANDIDATES) for prefix in (one, other)]
        assert torch.allclose(*looked, atol=1e-4)
        same(one, other)


def test_nothing_is_compiled_before_the_first_single_token_or_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(model_runner, "graph_runner_of", lambda *of: made.append(of))
    model = eager_model()
    model.torch_backend.use_graphs()
    prefix = read(model, some_ids(9))
    prefix.append(some_ids(5))
    assert made == []
    prefix.append([4])
    prefix.append(some_ids(5))
    assert len(made) == 1


def test_looking_ahead_never_writes_to_the_row() -> None:
    model = pooled_model()
    prefix = read(model, some_ids(12))
    prefix.append([3])
    assert isinstance(prefix.cache, PooledKVCache)
    assert prefix.cache.slot is not None
    before = prefix.cache.slot.pool.kv.clone()
    scored_after(prefix, CANDIDATES)
    assert torch.equal(prefix.cache.slot.pool.kv, before)


def test_what_a_row_held_before_does_not_reach_its_next_guest() -> None:
    ours = pooled_model()
    first = read(ours, some_ids(12))
    first.append([3])
    assert isinstance(first.cache, PooledKVCache)
    assert first.cache.slot is not None
    pool = first.cache.slot.pool
    del first
    gc.collect()
    with torch.inference_mode():
        pool.kv.fill_(torch.nan)
    second, other = read(ours, some_ids(5)), read(eager_model(), some_ids(5))
    for prefix in (second, other):
        prefix.append([4])
    assert isinstance(second.cache, PooledKVCache)
    assert second.cache.slot is not None
    assert second.cache.slot.pool is pool
    same(second, other)


def test_after_a_failed_capture_all_goes_the_eager_way_and_the_log_says_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(body: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    ours, theirs = pooled_model(record=fails), eager_model()
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    with caplog.at_level(logging.WARNING):
        for token in (4, 5, 6):
            for prefix in (one, other):
                prefix.append([token])
            same(one, other)
            assert torch.allclose(scored_after(one, CANDIDATES), scored_after(other, CANDIDATES), atol=1e-4)
    assert [record.message for record in caplog.records] == [
        "steps and selections go on without captured graphs: operation not permitted when stream is capturing"
    ]


def test_with_somebodys_hook_on_the_decoder_a_selection_goes_through_the_modules() -> None:
    model = pooled_model()
    prefix = read(model, some_ids(9))
    prefix.append([4])
    seen = []
    handle = model.torch_backend.decoder.layers[0].mlp.register_forward_hook(lambda *_: seen.append("look"))  # type: ignore[index,union-attr]
    try:
        scored_after(prefix, CANDIDATES)
    finally:
        handle.remove()
    assert seen == ["look"]


def test_a_static_step_that_says_something_else_is_found_out() -> None:
    model = eager_model()
    assert runner(model).llama_decoder is not None
    assert runner(model).decoder_batch is not None
    assert agrees(
        model.model,
        runner(model).decoder_batch,
        GraphRunner(runner(model).decoder_batch, Tape()),
    )

    def stuck(body: Any) -> Any:
        outputs = body()
        return lambda: outputs

    assert not agrees(
        model.model,
        runner(model).decoder_batch,
        GraphRunner(runner(model).decoder_batch, stuck),
    )


def test_on_the_cpu_nothing_of_this_is_used() -> None:
    model = tiny_model("qwen3")
    prefix = read(model, [1, 2, 3])
    prefix.append([4])
    assert runner(model).graph_runner is None
    assert not isinstance(prefix.cache, PooledKVCache)


@pytest.mark.parametrize("legal", [1, 2, 300])
def test_what_is_fetched_in_one_trip_is_what_is_read_one_by_one(legal: int) -> None:
    model = eager_model()
    allowed = torch.zeros(model.vocab_size, dtype=torch.bool)
    allowed[20 : 20 + legal] = True
    proposal = Proposal(read(model, some_ids(9)), 8, allowed=allowed)
    found = statistics_at(proposal.logits)
    assert found.best == proposal.best
    assert found.entropy == pytest.approx(proposal.entropy, abs=1e-6)
    assert found.margin == pytest.approx(proposal.margin, abs=1e-6)
    rows = (proposal.candidate_log_probs, proposal.candidates)
    assert in_one_trip(*rows) == fetched(*rows) == [row.tolist() for row in rows]


def test_the_path_is_type_checked_and_its_import_touches_no_gpu() -> None:
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]
    assert (settings["strict"], settings["packages"]) == (True, ["s2t_agents", "benchmarks"])
    names = ["in_flight", "kv_pool", "attention", "graph_runner", "cuda_graph"]
    text = "".join((root / "s2t_agents" / "backends" / "torch" / "cuda" / f"{name}.py").read_text() for name in names)
    assert "mypy: ignore" not in text
    assert set(re.findall(r"type: ignore(\S*)", text)) <= {"[no-untyped-call]"}  # torch.cuda.Stream has no types
    load = f"from s2t_agents.backends.torch.cuda import {', '.join(names)}"
    code = f"import torch; {load}; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_a_copy_of_a_kept_sequence_lies_in_one_block_and_has_room_for_the_next_turn() -> None:
    model, ids = pooled_model(), some_ids(20)
    steps = list(Engine(model).steps(ids, Sampling(max_tokens=6)))
    kept = [*ids, *(step.token_id for step in steps[:-1])]
    copy, length = model.prefix_cache.match([*kept, 7])
    (entry,) = model.prefix_cache.entries
    assert isinstance(copy, PooledKVCache)
    assert isinstance(entry.cache, PooledKVCache)
    assert (length, copy.read) == (len(kept), len(kept))
    assert entry.cache.nbytes == 2 * sum(layer.keys.nbytes for layer in entry.cache.layers)  # and no more than it needs
    before = [layer.keys.clone() for layer in entry.cache.layers]
    addresses = {layer.keys.data_ptr() for layer in copy.layers}
    appended(model, torch.tensor(some_ids(100, 1)), copy)
    assert {layer.keys.data_ptr() for layer in copy.layers} == addresses
    appended(model, torch.tensor(some_ids(1000, 1)), copy)  # more than there is room for
    assert copy.slot is not None
    assert copy.slot.outgrown
    reference = read(eager_model(), [*kept, *some_ids(100, 1), *some_ids(1000, 1)])
    assert isinstance(reference.cache, KVCache)
    for ours, theirs in zip(copy.layers, reference.cache.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(entry.cache.layers, before, strict=True))


def test_a_sequence_that_was_reset_has_no_seat() -> None:
    model = pooled_model()
    prefix = read(model, some_ids(5))
    prefix.append([3])
    cache = prefix.cache
    assert isinstance(cache, PooledKVCache)
    cache.reset()
    assert cache.slot is None
    assert runner(model).graph_runner is not None
    runner(model).graph_runner.prefill_graphs.often = 0
    logits, _ = appended(model, torch.tensor([1, 2, 3]), cache)
    assert not runner(model).graph_runner.failed
    assert torch.allclose(logits, read(eager_model(), [1, 2, 3]).logits, atol=1e-4)


def test_a_selection_that_goes_the_eager_way_spoils_no_step_that_is_under_way() -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    for _ in range(4):
        token = int(other.logits.argmax())
        one.append([token])
        other.append([token])
    hook = ours.model.get_decoder().register_forward_hook(lambda *given: None)  # nothing is played while it is there
    try:
        assert torch.allclose(scored_after(one, CANDIDATES), scored_after(other, CANDIDATES), atol=1e-4)
    finally:
        hook.remove()
    for _ in range(3):
        token = int(other.logits.argmax())
        assert token not in CANDIDATES
        one.append([token])
        other.append([token])
        same(one, other)


def test_what_a_sequence_has_outgrown_is_not_kept() -> None:
    model = pooled_model()
    prefix = read(model, some_ids(SMALLEST - 4))
    prefix.append([3])
    cache = prefix.cache
    assert isinstance(cache, PooledKVCache)
    assert cache.slot is not None
    prefix.append(some_ids(10))
    assert cache.slot.outgrown
    assert cache.slot.kv.numel() == 0


def test_a_sequence_whose_row_is_taken_from_it_meanwhile_takes_no_step_in_anothers() -> None:
    ours, theirs = pooled_model(), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(2)] for model in (ours, theirs))
    for prefix in (*ones, *others):
        prefix.append([4])
    leaves = ones[1].cache
    assert isinstance(leaves, PooledKVCache)
    assert runner(ours).graph_runner is not None
    real = runner(ours).graph_runner.pools.slot

    def interrupted(*given: Any) -> Any:
        seated = real(*given)
        leaves.park()  # its generation was interrupted, and does not wait for the forward
        return seated

    runner(ours).graph_runner.pools.slot = interrupted  # type: ignore[method-assign]
    parts = [Append(torch.tensor([5]), each.cache, len(each)) for each in ones]
    said = runner(ours).graph_runner.serve(parts)
    assert set(said) == {0}
    others[0].append([5])
    assert torch.allclose(said[0][0], others[0].logits, atol=1e-4)
