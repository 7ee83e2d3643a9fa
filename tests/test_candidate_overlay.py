"""K candidates in one forward equal K full forwards, on every architecture, and leave the base alone."""

import pytest
import torch
from sequences import read, scored_after

from s2t_agents.backends.torch import attention, packed_batch
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

CANDIDATES = torch.tensor([5, 9, 200, 33, 90, 91, 7, 128])


@pytest.fixture(params=[*ARCHITECTURES, *RECURRENT])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


@pytest.fixture
def ids() -> list[int]:
    return torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def reference(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Logits ``[K, V]`` of K full forwards of prefix + candidate."""
    return torch.stack([model.model(torch.tensor([[*ids, c]])).logits[0, -1] for c in CANDIDATES.tolist()])


def looked_ahead(model: LanguageModel, prefix: TokenSequence) -> torch.Tensor:
    return model.model.get_output_embeddings()(scored_after(prefix, CANDIDATES))


def error(model: LanguageModel, ids: list[int]) -> float:
    prefix = read(model, ids)
    return float((looked_ahead(model, prefix) - reference(model, ids)).abs().max())


def test_look_ahead_equals_full_forwards(model: LanguageModel, ids: list[int]) -> None:
    assert error(model, ids) < 1e-4


def test_recurrent_models_take_cloned_rows_and_all_others_the_overlay() -> None:
    assert all(tiny_model(name).capabilities.truncation for name in ARCHITECTURES)
    assert not any(tiny_model(name).capabilities.truncation for name in RECURRENT)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mask_that_lets_candidates_see_each_other_would_be_caught(
    name: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_branching(seen: torch.Tensor, length: int, window: int | None, *, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, len(seen), length, dtype=like.dtype)

    monkeypatch.setattr(attention, "branching", open_branching)
    monkeypatch.setattr(packed_batch, "branching", open_branching)
    assert error(tiny_model(name), ids) > 1e-2


def test_a_mask_that_forgets_the_sliding_window_would_be_caught(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_window(seen: torch.Tensor, length: int, window: int | None, *, like: torch.Tensor) -> torch.Tensor:
        return attention.branching(seen, length, None, like=like)

    monkeypatch.setattr(packed_batch, "branching", without_window)
    assert error(tiny_model("gemma3"), ids) > 1e-3


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_uniform_sliding_windows_are_exact_too(name: str, ids: list[int]) -> None:
    more = {"use_sliding_window": True, "max_window_layers": 0} if name == "qwen2" else {}
    assert error(tiny_model(name, sliding_window=16, **more), ids) < 1e-4


def test_looking_ahead_leaves_logits_and_kv_bitwise_as_they_were(model: LanguageModel, ids: list[int]) -> None:
    watched, alone = TokenSequence(model), TokenSequence(model)
    for prefix in (watched, alone):
        prefix.append(ids)
    scored_after(watched, CANDIDATES)
    for prefix in (watched, alone):
        prefix.append([17])
    assert torch.equal(watched.logits, alone.logits)
    for ours, theirs in zip(watched.cache.layers, alone.cache.layers, strict=True):
        for name in ("keys", "values"):
            if isinstance(getattr(ours, name, None), torch.Tensor):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
