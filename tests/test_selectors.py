"""Selectors rank the SLM's candidates, start as greedy decoding, and never change the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sequences import appended, read

from s2t_agents.backends.statistics import FLOOR
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.errors import AdapterMismatch, ConfigError, ModelNotFound, UnsafeWeights
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors import (
    ActivatedSelector,
    AdaptedSelector,
    HeadSelector,
    SelectorConfig,
    confidence_margin,
    load_selector,
)
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.selectors.published import PublishedSelector
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model

IDS = list(range(20))


def targets(model: LanguageModel) -> list[str]:
    return ["qkv_proj", "o_proj"] if "phi3" in model.name else ["q_proj", "o_proj", "down_proj"]


def activated(model: LanguageModel, *, trained: bool) -> ActivatedSelector:
    torch.manual_seed(3)
    selector = ActivatedSelector(model, Lora.fresh(model.model, targets=targets(model), rank=4, alpha=8))
    if trained:
        for layer in selector.lora.layers:
            torch.nn.init.normal_(layer.b, std=0.3)
        torch.nn.init.normal_(selector.head.weight, std=0.5)
    return selector.requires_grad_(False)


def head(model: LanguageModel, *, trained: bool) -> HeadSelector:
    torch.manual_seed(3)
    selector = HeadSelector(model, width=16)
    if trained:
        torch.nn.init.normal_(selector.out.weight, std=0.5)
    return selector.requires_grad_(False)


def published(model: LanguageModel, *, trained: bool) -> PublishedSelector:
    torch.manual_seed(3)
    selector = PublishedSelector(model, Lora.fresh(model.model, targets=targets(model), rank=4, alpha=8))
    if trained:
        for layer in selector.lora.layers:
            torch.nn.init.normal_(layer.b, std=0.3)
        torch.nn.init.normal_(selector.rows.weight, std=0.5)
    return selector.requires_grad_(False)


def adapted(model: LanguageModel, *, trained: bool) -> AdaptedSelector:
    torch.manual_seed(3)
    selector = AdaptedSelector(model, Lora.fresh(model.model, targets=targets(model), rank=4, alpha=8))
    for layer in selector.lora.layers:
        for matrix in (layer.a, layer.b):
            if trained:
                torch.nn.init.normal_(matrix, std=0.3)
            matrix.data = matrix.data.half().float()  # as its file has them
    return selector.requires_grad_(False)


def proposal(model: LanguageModel) -> Proposal:
    prefix = read(model, IDS)
    return Proposal(prefix, 8)


KINDS = [activated, adapted, head, published]


def test_the_published_selectors_idle_kv_keeps_to_its_scope() -> None:
    model = tiny_model()
    selector = published(model, trained=True)
    prefix = TokenSequence(model, "a")
    prefix.append(IDS)
    selector.scores(Proposal(prefix, 8))
    assert selector.prefixes.idle.take(IDS, "b") is None
    assert selector.prefixes.idle.take(IDS, None) is None
    kept = selector.prefixes.idle.take(IDS, "a")
    assert kept is not None
    assert kept.ids == IDS


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_selector_scores_as_the_slm(kind: Any) -> None:
    model = tiny_model()
    look = proposal(model)
    scores = kind(model, trained=False).scores(look)
    torch.testing.assert_close(scores, look.candidate_log_probs, atol=1e-6, rtol=1e-6)
    assert kind is adapted or torch.equal(scores, look.candidate_log_probs)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_adapted_scores_are_the_log_probabilities_of_the_model_with_the_adapter_on(name: str) -> None:
    model = tiny_model(name)
    selector = adapted(model, trained=True)
    watched = TokenSequence(model)
    for ids in (IDS, [7], [8, 9]):  # caught up from selection to selection
        watched.append(ids)
        look = Proposal(watched, 8)
        with torch.inference_mode(), selector.lora.on(model.model):
            logits = model.model(input_ids=torch.tensor([watched.ids])).logits[0, -1].float()
        wanted = logits.log_softmax(-1)[look.candidates]
        torch.testing.assert_close(selector.scores(look), wanted, atol=1e-4, rtol=1e-4)


def test_what_a_grammar_forbids_stays_forbidden_whatever_the_adapter_says() -> None:
    selector = adapted(tiny_model(), trained=True)
    slm = torch.tensor([[-0.1, -2.0, -torch.inf, FLOOR]])
    scores = slm + selector.correction(slm, torch.randn(1, 256) * 50, torch.tensor([[3, 4, 5, 6]]))
    assert scores[0, 2] == -torch.inf
    assert scores[0, 3] == FLOOR
    assert scores[0, :2].isfinite().all()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_activated_scores_equal_full_forwards_with_the_adapter_on_at_the_candidate_only(name: str) -> None:
    model = tiny_model(name)
    selector = activated(model, trained=True)
    look = proposal(model)
    expected = []
    for candidate in look.candidates.tolist():
        cache = model.new_cache()
        appended(model, torch.tensor(IDS), cache)  # the prefix, adapter off
        with torch.inference_mode(), selector.lora.on(model.model):
            at = {"position_ids": torch.tensor([[len(IDS)]]), "past_key_values": cache}
            hidden = model.torch_backend.decoder(input_ids=torch.tensor([[candidate]]), **at).last_hidden_state
        expected.append(float(selector.head(hidden[0, -1])))
    wanted = look.candidate_log_probs + torch.tensor(expected)
    assert torch.allclose(selector.scores(look), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_with_a_selector_at_work_the_base_stays_bitwise_itself(name: str, kind: Any) -> None:
    model = tiny_model(name)
    selector = kind(model, trained=True)
    watched, alone = TokenSequence(model), TokenSequence(model)
    for prefix in (watched, alone):
        prefix.append(IDS)
    for token in (7, 8, 9):
        selector.scores(Proposal(watched, 8))
        watched.append([token])
        alone.append([token])
        assert torch.equal(watched.logits, alone.logits)
    for ours, theirs in zip(watched.cache.layers, alone.cache.layers, strict=True):
        if isinstance(getattr(ours, "keys", None), torch.Tensor):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def config(kind: str, model: LanguageModel, **changes: Any) -> SelectorConfig:
    return SelectorConfig(kind=kind, base=BaseIdentity.of(model), k=8, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_selector_comes_back_with_the_same_scores(kind: Any, tmp_path: Path) -> None:
    model = tiny_model()
    selector = kind(model, trained=True)
    selector.save(tmp_path, config(kind.__name__, model))
    again, loaded = load_selector(tmp_path, model)
    assert torch.equal(again.scores(proposal(model)), selector.scores(proposal(model)))
    assert loaded.base.name == model.name


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_base_that_it_was_saved_on_a_selector_loads_without_a_warning(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    kind(model, trained=True).save(tmp_path, config(kind.__name__, model))
    load_selector(tmp_path, model)
    assert [record for record in caplog.records if record.name.startswith("s2t_agents")] == []


@pytest.mark.parametrize(
    ("kind", "file", "tensors"),
    [
        (activated, "score_head.safetensors", {"other": torch.zeros(1)}),
        (published, "score_rows.safetensors", {"other": torch.zeros(1)}),
        (head, "head.safetensors", {"out.weight": torch.zeros(3)}),
        (head, "head.safetensors", {"other": torch.zeros(1)}),
    ],
)
def test_a_file_that_holds_something_else_is_named(
    kind: Any, file: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = tiny_model()
    kind(model, trained=True).save(tmp_path, config(kind.__name__, model))
    save_file(tensors, tmp_path / file)
    with pytest.raises(AdapterMismatch, match=file):
        load_selector(tmp_path, model)


@pytest.mark.parametrize(
    ("kind", "file"),
    [(activated, "score_head.safetensors"), (published, "score_rows.safetensors"), (head, "head.safetensors")],
)
def test_a_file_in_half_precision_is_read_as_the_selector_computes(kind: Any, file: str, tmp_path: Path) -> None:
    model = tiny_model()
    kind(model, trained=True).save(tmp_path, config(kind.__name__, model))
    wide, _ = load_selector(tmp_path, model)
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / file).items()}
    (tmp_path / file).unlink()  # not over it: its pages may be the weights of the one above
    save_file(halves, tmp_path / file)
    narrow, _ = load_selector(tmp_path, model)
    assert torch.allclose(narrow.scores(proposal(model)), wide.scores(proposal(model)), atol=1e-2)


def test_temperature_flattens_scores_and_keeps_their_order() -> None:
    model = tiny_model()
    cold, warm = head(model, trained=True), head(model, trained=True)
    warm.temperature = 4.0
    assert torch.allclose(cold.scores(proposal(model)) / 4, warm.scores(proposal(model)))
    assert confidence_margin(warm.scores(proposal(model))) < confidence_margin(cold.scores(proposal(model)))


def test_confidence_margin_lies_between_0_and_1() -> None:
    assert confidence_margin(torch.tensor([1.0, 1.0])) == pytest.approx(0)
    assert confidence_margin(torch.tensor([1.0, -40.0])) == pytest.approx(1)
    assert confidence_margin(torch.tensor([1.0])) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_selector_for_another_base_is_refused_by_what_differs(kind: Any, tmp_path: Path) -> None:
    model = tiny_model()
    kind(model, trained=True).save(tmp_path, config(kind.__name__, model))
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(tmp_path, tiny_model(seed=1))
    with pytest.raises(AdapterMismatch, match="model_type is 'llama'"):
        load_selector(tmp_path, tiny_model("llama"))


def test_the_weights_fingerprint_does_not_depend_on_the_loading_dtype() -> None:
    wide, narrow = tiny_model(), tiny_model()
    narrow.model.to(torch.bfloat16)
    assert wide.weights_fingerprint == narrow.weights_fingerprint
    assert wide.weights_fingerprint != tiny_model(seed=1).weights_fingerprint
    half = tiny_model()
    half.model.to(torch.bfloat16).to(torch.float16)
    assert half.weights_fingerprint == narrow.weights_fingerprint


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_change_in_any_layer_makes_other_weights(name: str) -> None:
    known = tiny_model(name)
    for parameter, _ in known.model.named_parameters():
        changed = tiny_model(name)
        changed.model.get_parameter(parameter).data.add_(0.5)
        assert changed.weights_fingerprint != known.weights_fingerprint, parameter


def test_a_selector_is_refused_by_a_fine_tune_with_frozen_embeddings(tmp_path: Path) -> None:
    model, tuned = tiny_model(), tiny_model()
    head(model, trained=True).save(tmp_path, config("head", model))
    tuned.model.get_decoder().layers[0].mlp.up_proj.weight.data.add_(0.01)
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(tmp_path, tuned)


def test_where_the_layers_are_not_known_the_embedding_decides(tmp_path: Path) -> None:
    model, quantised = tiny_model(), tiny_model()
    quantised.model.config.quantization_config = {"quant_method": "any"}
    embedding, _ = model.weights_fingerprint.split("/")
    assert quantised.weights_fingerprint == embedding
    head(model, trained=True).save(tmp_path, config("head", model))
    assert load_selector(tmp_path, quantised)
    head(model, trained=True).save(tmp_path, config("head", quantised))  # as selectors of before knew no layers
    assert load_selector(tmp_path, model)
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(tmp_path, tiny_model(seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 65}, "k: "), ({"format": 9}, "format"), ({"kind": "oracle"}, "kind"), ({"surprise": 1}, "surprise")],
)
def test_a_bad_config_is_refused_field_by_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model()
    good = json.loads(config("head", model).model_dump_json())
    (tmp_path / "selector.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(ConfigError, match=message):
        load_selector(tmp_path, model)


def test_missing_and_corrupt_files_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ModelNotFound, match=r"selector\.json is missing"):
        load_selector(tmp_path, model)
    config("head", model).save(tmp_path)
    with pytest.raises(ModelNotFound, match=r"head\.safetensors is missing"):
        load_selector(tmp_path, model)
    (tmp_path / "head.safetensors").write_bytes(b"\x80\x04\x95")
    with pytest.raises(UnsafeWeights, match="not readable safetensors"):
        load_selector(tmp_path, model)
