"""Paid selections as training data: the selector learns from them, and nothing else does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sequences import read
from training_fixtures import QUICK, prompts, tiny_pair
from typer.testing import CliRunner

from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError, InputError
from s2t_agents.escalation import Escalation, PaidGroup, read_groups
from s2t_agents.llms import LocalLLM
from s2t_agents.proposal import Proposal
from s2t_agents.selectors import load_selector
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.testing import ScriptedLLM, tiny_model
from s2t_agents.training.collect import collect_with
from s2t_agents.training.commands import app
from s2t_agents.training.config import Adapter, Fit, Models, Pipeline, TrainConfig
from s2t_agents.training.disagreement import hidden_along
from s2t_agents.training.labels import Opinion
from s2t_agents.training.losses import agreements, selection_loss
from s2t_agents.training.objectives import fresh_selector, objective_for
from s2t_agents.training.paid import read_paid
from s2t_agents.training.train import train_with
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

KINDS = ("head", "activated", "adapted", "published")
SMALL = Fit(
    k=4, rate=0.5, epochs=2, batch=4, evaluate_every=3, warmup=2, validation=0.3, width=16, adapter=Adapter(rank=2)
)


def low_first(ids, candidates):
    """An LLM with a rule: of two candidates the one with the lower id."""
    return torch.tensor([-0.5 * token for token in candidates]).log_softmax(0).tolist()


class LowFirst:
    """The same LLM as a teacher of rollouts."""

    def __init__(self, identity):
        self.identity = identity

    def opinions(self, trajectories, slm, candidates, conversations=None):
        found = []
        for log_probs, ids in zip(slm, candidates, strict=True):
            scores = (-0.5 * ids.float()).log_softmax(-1)
            found.append(Opinion(scores, ids.min(-1).values, torch.zeros(len(log_probs))))
        return found


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def rollouts(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paid")
    slm, _, teacher = pair
    collect_with(slm, LowFirst(teacher.identity), prompts(folder, 16), QUICK, folder / "rollouts")
    return folder / "rollouts"


def pay(slm, llm, path: Path, *, k: int = 4, starts=range(65, 77), tokens: int = 10) -> Path:
    """Answers in which the LLM is asked at every step, recorded."""
    engine = Engine(slm, k=k, trigger=always(), escalation=Escalation(llm, margin=1.0, record=path))
    for start in starts:
        list(engine.steps([start, 66, 67], Sampling(max_tokens=tokens)))
    return path


@pytest.fixture(scope="module")
def paid(pair, tmp_path_factory):
    return pay(pair[0], ScriptedLLM(low_first), tmp_path_factory.mktemp("record") / "paid.jsonl")


def training(kind, rollouts, out, paid=(), fit=SMALL) -> TrainConfig:
    return TrainConfig(models=Models(), kind=kind, rollouts=(rollouts,), paid=paid, out=out, fit=fit)


def agreement(slm, selector, path: Path) -> float:
    """Share of paid selections where the selector, as it is used, picks what the LLM picked."""
    right = []
    for group in read_groups(path, slm):
        prefix = read(slm, group.ids)
        picked = int(selector.scores(Proposal(prefix, len(group.candidates))).argmax())
        right.append(picked == group.pick)
    return sum(right) / len(right)


# ---------------------------------------------------------------------- it learns


@pytest.mark.parametrize("kind", KINDS)
def test_a_selector_agrees_more_at_what_was_paid_for_when_it_learnt_from_it(pair, rollouts, paid, kind, tmp_path):
    slm = pair[0]
    settings = SMALL.model_copy(update={"epochs": 6, "lr": 1e-2, "patience": 50, "width": 64, "rate": 0.05})
    of = {}
    for name, files in {"without": (), "with": (paid,)}.items():
        train_with(slm, training(kind, rollouts, tmp_path / name, files, settings))
        of[name] = agreement(slm, load_selector(tmp_path / name, slm)[0], paid)
    before = agreement(slm, fresh_selector(slm, kind, settings), paid)
    assert of["with"] > before + 0.2
    assert of["with"] > of["without"]
    figures = json.loads((tmp_path / "with" / "selector.json").read_text())["training"]
    assert (figures["paid_groups"], figures["paid_left_out"]) == (len(list(read_groups(paid))), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_scored_in_training_as_in_use(pair, paid, kind):
    slm = pair[0]
    examples = read_paid(slm, [paid], 4).examples
    selector = fresh_selector(slm, kind, SMALL)
    for parameter in selector.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    objective = objective_for(selector, examples, hidden_along(slm, examples), SMALL)
    in_training = {}
    for unit in range(len(objective.sizes)):
        for piece in objective.pieces([unit]):
            for slm_row, row in zip(piece.slm.tolist(), piece.scores, strict=True):
                in_training[tuple(slm_row)] = row.detach()
    for group in read_groups(paid):
        prefix = read(slm, group.ids)
        live = selector.scores(Proposal(prefix, 4))
        torch.testing.assert_close(in_training[group.slm], live.detach(), atol=2e-3, rtol=1e-3)


def test_selections_along_one_answer_are_read_together(pair, paid):
    slm = pair[0]
    found = read_paid(slm, [paid], 4)
    assert found.groups == sum(len(e.positions) for e in found.examples) == len(list(read_groups(paid)))
    assert len(found.examples) == 12
    for example in found.examples:
        for position, candidates in zip(example.positions.tolist(), example.candidates.tolist(), strict=True):
            assert any(
                group.ids == tuple(example.ids[:position]) and list(group.candidates) == candidates
                for group in read_groups(paid)
            )


# ---------------------------------------------------------------------- and nothing else does


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_paid_file_every_byte_is_as_before(pair, rollouts, kind, tmp_path):
    slm = pair[0]
    (tmp_path / "empty.jsonl").touch()
    train_with(slm, training(kind, rollouts, tmp_path / "none"))
    train_with(slm, training(kind, rollouts, tmp_path / "empty", (tmp_path / "empty.jsonl",)))
    assert "paid" not in (tmp_path / "none" / "training.json").read_text()
    assert "paid" not in (tmp_path / "none" / "selector.json").read_text()
    for weights in (tmp_path / "none").glob("*.safetensors"):
        assert (tmp_path / "empty" / weights.name).read_bytes() == weights.read_bytes(), weights.name


def test_probe_and_validation_stay_on_the_rollouts(pair, rollouts, paid, tmp_path):
    slm = pair[0]
    settings = SMALL.model_copy(update={"epochs": 8, "lr": 1e-2})
    train_with(slm, training("head", rollouts, tmp_path / "without", (), settings))
    train_with(slm, training("head", rollouts, tmp_path / "with", (paid,), settings))
    figures = [json.loads((tmp_path / name / "selector.json").read_text())["training"] for name in ("without", "with")]
    for name in ("groups", "trajectories", "validation_groups", "validation_trajectories", "agreement_untrained"):
        assert figures[0][name] == figures[1][name]
    probes = [load_file(tmp_path / name / "probe.safetensors") for name in ("without", "with")]
    assert all(torch.equal(probes[0][name], probes[1][name]) for name in probes[0])
    heads = [load_file(tmp_path / name / "head.safetensors") for name in ("without", "with")]
    assert any(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_more_paid_selections_are_another_training(pair, rollouts, paid, tmp_path):
    slm = pair[0]
    file = tmp_path / "paid.jsonl"
    lines = paid.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]))
    train_with(slm, training("head", rollouts, tmp_path / "head", (file,)))
    train_with(slm, training("head", rollouts, tmp_path / "head", (file,)))  # finished: left alone
    file.write_bytes(b"".join(lines[:6]))
    with pytest.raises(ConfigError, match=r"other settings: paid selections \(hash\) is \w+ there and \w+ now"):
        train_with(slm, training("head", rollouts, tmp_path / "head", (file,)))


def test_a_file_of_paid_selections_that_is_not_there_is_named_with_the_way_out(pair, rollouts, tmp_path):
    with pytest.raises(InputError, match=r"payed.jsonl: No such file in .*Escalation\(record="):
        train_with(pair[0], training("head", rollouts, tmp_path / "head", (tmp_path / "payed.jsonl",)))
    assert not (tmp_path / "head").exists()


def test_one_line_of_the_config_gives_them_to_every_kind(tmp_path):
    tasks = {part: {"task": "demo", "count": 4, "split": "train", "first": 9} for part in ("train", "heldout", "test")}
    config = Pipeline.model_validate(
        {"out": tmp_path, "tasks": tasks, "paid": ["paid.jsonl"], "train": {kind: {} for kind in KINDS}}
    )
    assert all(config.training(kind).paid == (Path("paid.jsonl"),) for kind in KINDS)
    assert config.first().paid == ()  # on-policy rollouts do not change with what was paid for since


# ---------------------------------------------------------------------- what the LLM did not say


def group_of(model, /, **fields) -> PaidGroup:
    known = {
        "slm_model": BaseIdentity.of(model),
        "llm_model": "judge",
        "ids": (65, 66),
        "candidates": (10, 11, 12, 13, 14, 15),
        "slm": (-1.0, -1.5, -2.0, -2.5, -3.0, -3.5),
        "selector": None,
        "llm": (None, None, 0.0, None, None, None),
    }
    return PaidGroup(**{**known, **fields})


def written(path: Path, *groups: PaidGroup) -> Path:
    path.write_text("".join(group.model_dump_json() + "\n" for group in groups))
    return path


def test_a_judges_pick_is_learnt_and_what_it_did_not_score_has_no_made_up_probability():
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    nan = float("nan")
    judged = torch.tensor([[nan, 0.0, nan, nan], [nan, nan, nan, 0.0]])
    loss = selection_loss(scores, judged, soft=2.0, temperature=1.0)
    picked = torch.tensor([1, 3])
    assert float(loss.detach()) == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores.detach(), picked, reduction="sum"))
    )
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert agreements(judged.nan_to_num(-9), judged).all()


def test_unscored_candidates_are_left_out_of_both_distributions():
    scores = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    llm = torch.tensor([[-0.5, float("nan"), -1.0, -2.0]])
    soft = selection_loss(scores, llm, soft=1.0, temperature=1.0) - selection_loss(
        scores, llm, soft=0.0, temperature=1.0
    )
    kept = torch.tensor([0, 2, 3])
    ours, theirs = scores[:, kept].log_softmax(-1), llm[:, kept].log_softmax(-1)
    assert float(soft) == pytest.approx(float((theirs.exp() * (theirs - ours)).sum()), abs=1e-5)
    other = scores.clone()
    other[0, 1] += 3  # how likely the unscored one is held to be changes nothing there
    again = selection_loss(other, llm, soft=1.0, temperature=1.0) - selection_loss(
        other, llm, soft=0.0, temperature=1.0
    )
    assert float(again) == pytest.approx(float(soft), abs=1e-5)


def test_where_every_score_is_known_the_loss_is_the_same_to_the_bit():
    generator = torch.Generator().manual_seed(2)
    scores, llm = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator).log_softmax(-1)
    hard = torch.nn.functional.cross_entropy(scores, llm.argmax(-1), reduction="sum")
    near = torch.nn.functional.kl_div(scores.log_softmax(-1), llm.log_softmax(-1), reduction="sum", log_target=True)
    assert torch.equal(selection_loss(scores, llm, soft=0.5, temperature=1.0), hard + 0.5 * near)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_with_fewer_candidates_is_filled_up_with_what_has_no_chance(pair, kind, tmp_path):
    slm = pair[0]
    narrow = group_of(slm, candidates=(10, 11), slm=(-1.0, -1.5), llm=(None, 0.0))
    wide = group_of(slm, ids=(65, 66, 67), llm=(-3.0, -2.0, -1.0, None, -4.0, None))
    examples = read_paid(slm, [written(tmp_path / "paid.jsonl", narrow, wide)], 4).examples
    assert [len(example.positions) for example in examples] == [2]
    selector = fresh_selector(slm, kind, SMALL)
    objective = objective_for(selector, examples, hidden_along(slm, examples), SMALL)
    pieces = list(objective.pieces(list(range(len(objective.sizes)))))
    scores = torch.cat([piece.scores for piece in pieces])
    assert torch.equal(scores.softmax(-1)[0, 2:], torch.zeros(2))
    total = sum(selection_loss(piece.scores, piece.llm, soft=1.0, temperature=1.0) for piece in pieces)
    total.backward()
    gradients = [p.grad for p in selector.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_pick_beyond_the_candidates_that_are_ranked_teaches_nothing_and_is_counted(pair, tmp_path):
    slm = pair[0]
    beyond = group_of(slm, llm=(None, None, None, None, None, 0.0))
    found = read_paid(slm, [written(tmp_path / "paid.jsonl", beyond, group_of(slm, ids=(80,)))], 4)
    assert (found.groups, found.left_out, len(found.examples)) == (1, 1, 1)


# ---------------------------------------------------------------------- files that are none


def test_paid_selections_of_another_model_are_refused_before_anything_is_written(pair, rollouts, tmp_path):
    other = pay(tiny_model(seed=9), LocalLLM(tiny_model(seed=5)), tmp_path / "other.jsonl", starts=[65])
    with pytest.raises(ConfigError, match=r"other\.jsonl, line 1, comes from 'tiny-qwen3-9' with other weights"):
        train_with(pair[0], training("head", rollouts, tmp_path / "head", (other,)))
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [10, 11]}, "line 2, is no group: .*2 candidates do not have as many scores"),
        ({"llm": [None] * 6}, "line 2, is no group: .*no score of the LLM"),
        ({"ids": []}, "line 2, is no group: .*no prefix"),
        ({"slm": ["x"] * 6}, "line 2, is no group"),
        ({"format": 2}, "line 2, is no group"),
        ({"ids": [65, 10**6]}, "line 2: .* has tokens 0 to"),
        ({"candidates": [-1, 11, 12, 13, 14, 15]}, "line 2: .* has tokens 0 to"),
        ({"ids": [65] * 600}, "a context of 512"),
    ],
)
def test_a_line_that_does_not_fit_is_named_before_anything_is_written(pair, rollouts, change, message, tmp_path):
    slm = pair[0]
    file = written(tmp_path / "paid.jsonl", group_of(slm))
    with file.open("a") as end:
        end.write(json.dumps({**json.loads(group_of(slm).model_dump_json()), **change}) + "\n")
    with pytest.raises(InputError, match=message):
        train_with(slm, training("head", rollouts, tmp_path / "head", (file,)))
    assert not (tmp_path / "head").exists()


def test_a_file_that_is_not_there_is_named(pair, rollouts, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl: No such file"):
        train_with(pair[0], training("head", rollouts, tmp_path / "head", (tmp_path / "nothing.jsonl",)))
    assert not (tmp_path / "head").exists()


def test_the_command_line_takes_them_too_and_names_a_file_that_is_not_there(tmp_path):
    missing = str(tmp_path / "nothing.jsonl")
    result = CliRunner().invoke(app, ["train", "--kind", "head", "--paid", missing])
    assert result.exit_code == 2
    assert "nothing.jsonl: No such file" in result.stderr
