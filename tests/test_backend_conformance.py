"""What every backend must do, whatever engine is behind it; see ``backends.base``.

Each backend gives a model to the fixture ``backend``: a real one, tiny, in full precision where the engine can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2t_agents.backends.base import Append, Backend, ScoreCandidates, ScoreTree, SequenceCache, StepOutput
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

CLOSE = 1e-4
"""Largest difference of logits between two ways of computing them, where the engine computes in fp32."""

IDS = [(7 * at) % 251 for at in range(1, 40)]
CANDIDATES = [5, 9, 200, 33, 90]


LLAMA_CPP_CLOSE = {"F32": 0.03, "Q8_0": 0.15}
"""llama.cpp's attention sums up in fp16, otherwise for one token than for many; beside quantised weights it rounds the
activations to 8 bits, and carries that difference on."""


@pytest.fixture(params=[*(f"torch:{name}" for name in (*ARCHITECTURES, *RECURRENT)), "llamacpp:F32", "llamacpp:Q8_0"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    engine, _, name = request.param.partition(":")
    if engine == "torch":
        yield tiny_model(name).backend
        return
    pytest.importorskip("llama_cpp")
    from gguf_files import write_gguf

    from s2t_agents.backends.llamacpp.backend import LlamaCppBackend

    monkeypatch.setitem(globals(), "CLOSE", LLAMA_CPP_CLOSE[name])
    loaded = LlamaCppBackend.load(write_gguf(tmp_path / "tiny.gguf", kind=name), n_ctx=1024)
    yield loaded
    loaded.close()


def append(backend: Backend, cache: SequenceCache, ids: Sequence[int]) -> StepOutput:
    (output,) = backend.forward([Append(torch.tensor(list(ids)), cache, cache.length)])
    assert isinstance(output, StepOutput)
    cache.mark_read(cache.length)
    return output


def read(backend: Backend, ids: Sequence[int]) -> tuple[SequenceCache, StepOutput]:
    cache = backend.new_cache()
    return cache, append(backend, cache, ids)


def score(backend: Backend, cache: SequenceCache, candidates: Sequence[int]) -> Tensor:
    (hidden,) = backend.forward([ScoreCandidates(torch.tensor(list(candidates)), cache, cache.length)])
    assert isinstance(hidden, Tensor)
    return hidden


def same(one: Tensor, other: Tensor) -> None:
    assert torch.allclose(one, other, atol=CLOSE), float((one - other).abs().max())


def test_it_describes_its_model(backend: Backend) -> None:
    assert backend.name
    assert backend.architecture
    assert backend.context_window > len(IDS)
    assert backend.eos_ids
    assert max(backend.eos_ids) < backend.vocab_size
    assert len(backend.tokenizer) <= backend.vocab_size
    assert backend.output_embedding.shape == (backend.vocab_size, backend.hidden_size)
    assert backend.tokenizer_fingerprint
    assert backend.weights_fingerprint == backend.weights_fingerprint


TREE, PARENTS = [5, 9, 200, 33, 90, 7], [-1, 0, 1, 1, -1, 4]
PATHS = [[5], [5, 9], [5, 9, 200], [5, 9, 33], [90], [90, 7]]


@pytest.mark.parametrize("new", [0, 1, 9])
def test_a_tree_is_scored_as_its_paths_are_read_and_leaves_the_cache_as_it_is(backend: Backend, new: int) -> None:
    if not backend.capabilities.tree_scoring:
        pytest.skip("reads no trees")
    cache, _ = read(backend, IDS[: len(IDS) - new])
    tree = ScoreTree(torch.tensor(TREE), torch.tensor(PARENTS), cache, len(IDS))
    before = [Append(torch.tensor(IDS[-new:]), cache, cache.length)] if new else []
    *appended, logits = backend.forward([*before, tree])
    assert isinstance(logits, Tensor)
    assert (logits.shape, logits.dtype, cache.length) == ((len(TREE), backend.vocab_size), torch.float32, len(IDS))
    for output in appended:
        assert isinstance(output, StepOutput)
        same(output.logits, read(backend, IDS)[1].logits)
    for row, path in zip(logits, PATHS, strict=True):
        same(row, read(backend, [*IDS, *path])[1].logits)
    same(append(backend, cache, [11]).logits, read(backend, [*IDS, 11])[1].logits)


def test_outputs_have_the_promised_shapes_and_are_finite(backend: Backend) -> None:
    cache, (logits, hidden) = read(backend, IDS)
    assert (logits.shape, logits.dtype) == ((backend.vocab_size,), torch.float32)
    assert hidden.shape == (backend.hidden_size,)
    assert -inf < float(logits.min()) <= float(logits.max()) < inf
    assert (cache.length, cache.read) == (len(IDS), len(IDS))
    assert cache.nbytes > 0


def test_a_prompt_in_chunks_and_token_by_token_is_the_prompt(backend: Backend) -> None:
    _, whole = read(backend, IDS)
    chunked, _ = read(backend, IDS[:17])
    same(append(backend, chunked, IDS[17:]).logits, whole.logits)
    cache, output = read(backend, IDS[:1])
    for token in IDS[1:]:
        output = append(backend, cache, [token])
    same(output.logits, whole.logits)
    same(output.hidden, whole.hidden)


def test_hidden_states_through_the_output_layer_are_the_logits(backend: Backend) -> None:
    if not backend.capabilities.hidden_states:
        pytest.skip("this backend gives no hidden states")
    _, (logits, hidden) = read(backend, IDS)
    through = backend.output_embedding.float() @ hidden.float()
    assert int(through.argmax()) == int(logits.argmax())


def test_sequences_in_one_batch_are_each_as_alone(backend: Backend) -> None:
    if not backend.capabilities.batching:
        pytest.skip("this backend runs one item at a time")
    prompts = [IDS[:5], IDS[3:30], IDS[10:11]]
    alone = [read(backend, prompt)[1] for prompt in prompts]
    caches = [backend.new_cache() for _ in prompts]
    batch = [Append(torch.tensor(ids), cache, 0) for ids, cache in zip(prompts, caches, strict=True)]
    for output, expected in zip(backend.forward(batch), alone, strict=True):
        assert isinstance(output, StepOutput)
        same(output.logits, expected.logits)
        same(output.hidden, expected.hidden)
    assert [cache.length for cache in caches] == [len(prompt) for prompt in prompts]


def test_candidates_are_scored_as_separate_sequences_and_leave_nothing_behind(backend: Backend) -> None:
    if not backend.capabilities.candidate_scoring:
        pytest.skip("this backend does not score candidates")
    cache, _ = read(backend, IDS)
    hidden = score(backend, cache, CANDIDATES)
    assert hidden.shape == (len(CANDIDATES), backend.hidden_size)
    for row, candidate in zip(hidden, CANDIDATES, strict=True):
        same(row, read(backend, [*IDS, candidate])[1].hidden)
    assert cache.length == len(IDS)
    same(append(backend, cache, [3]).logits, read(backend, [*IDS, 3])[1].logits)


def test_candidates_and_tokens_share_a_forward(backend: Backend) -> None:
    if not (backend.capabilities.batching and backend.capabilities.candidate_scoring):
        pytest.skip("this backend runs one item at a time")
    (one, _), (other, _) = read(backend, IDS[:9]), read(backend, IDS)
    expected, hidden = read(backend, [*IDS[:9], 4])[1], score(backend, other, CANDIDATES)
    step, scored = backend.forward(
        [
            Append(torch.tensor([4]), one, one.length),
            ScoreCandidates(torch.tensor(CANDIDATES), other, other.length),
        ]
    )
    assert isinstance(step, StepOutput)
    assert isinstance(scored, Tensor)
    same(step.logits, expected.logits)
    same(scored, hidden)


def test_a_fork_is_independent(backend: Backend) -> None:
    cache, _ = read(backend, IDS)
    fork = cache.fork(len(IDS))
    other = append(backend, fork, [11, 12])
    same(append(backend, cache, [3]).logits, read(backend, [*IDS, 3])[1].logits)
    same(other.logits, read(backend, [*IDS, 11, 12])[1].logits)
    fork.close()
    same(append(backend, cache, [4]).logits, read(backend, [*IDS, 3, 4])[1].logits)


def test_a_front_can_be_forked_and_the_rest_forgotten(backend: Backend) -> None:
    if not backend.capabilities.truncation:
        pytest.skip("recurrent states cannot be cut")
    cache, _ = read(backend, IDS)
    fork = cache.fork(12)
    assert (fork.length, fork.read) == (12, 12)
    expected = read(backend, [*IDS[:12], 8])[1].logits
    same(append(backend, fork, [8]).logits, expected)
    cache.truncate(12)
    assert cache.length == 12
    same(append(backend, cache, [8]).logits, expected)
    cache.truncate(0)
    same(append(backend, cache, IDS[:5]).logits, read(backend, IDS[:5])[1].logits)


def test_a_parked_cache_goes_on_where_it_was(backend: Backend) -> None:
    cache, _ = read(backend, IDS)
    for at in range(3):
        cache.park()
        assert cache.length == len(IDS) + at
        cache.unpark()
        same(append(backend, cache, [at]).logits, read(backend, [*IDS, *range(at + 1)])[1].logits)


def test_a_closed_cache_is_empty_and_others_go_on(backend: Backend) -> None:
    (gone, _), (cache, _) = read(backend, IDS), read(backend, IDS)
    gone.close()
    assert gone.length == 0
    if backend.capabilities.truncation:
        fork = gone.fork(12)
        assert (fork.length, fork.read) == (0, 0)
        same(append(backend, fork, [3]).logits, read(backend, [3])[1].logits)
    same(append(backend, cache, [3]).logits, read(backend, [*IDS, 3])[1].logits)


def test_a_forward_that_fails_can_be_undone(backend: Backend) -> None:
    if not backend.capabilities.truncation:
        pytest.skip("recurrent states cannot be cut")
    cache, _ = read(backend, IDS)
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is the engine's
        backend.forward([Append(torch.tensor([10**6]), cache, cache.length)])
    cache.truncate(len(IDS))
    same(append(backend, cache, [3]).logits, read(backend, [*IDS, 3])[1].logits)


def test_statistics_are_those_of_the_logits_where_a_step_brings_them(backend: Backend) -> None:
    cache, (logits, _) = read(backend, IDS)
    found = cache.statistics()
    assert found is None or found.best == int(logits.argmax())
    assert cache.unbilled_s() >= 0
