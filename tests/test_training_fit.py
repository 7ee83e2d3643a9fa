"""Training: zero at the start, exact in one pass, learns what can be learnt, resumes to the same weights."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sequences import read
from training_fixtures import (
    QUICK,
    SMALL,
    awake,
    killed_at_its_first_checkpoint,
    prompts,
    save_model,
    some_examples,
    tiny_pair,
    training,
)

from s2t_agents.errors import AdapterMismatch, ConfigError, InputError, S2TError
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors import SelectorConfig, load_selector
from s2t_agents.testing import ARCHITECTURES, tiny_model
from s2t_agents.training import fit as fitting
from s2t_agents.training.collect import collect_with
from s2t_agents.training.config import read_config
from s2t_agents.training.disagreement import fit_probe, hidden_along
from s2t_agents.training.groups import choose, read_for, split, threshold_for
from s2t_agents.training.losses import selection_loss
from s2t_agents.training.objectives import fresh_selector, objective_for
from s2t_agents.training.train import train, train_with

KINDS = ("head", "activated", "adapted", "published")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def rollouts(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(folder, 16), QUICK, folder / "rollouts")
    return folder / "rollouts"


def all_scores(objective):
    return [piece for unit in range(len(objective.sizes)) for piece in objective.pieces([unit])]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_selector_scores_as_the_slm_does(pair, kind):
    slm, _, _ = pair
    examples = some_examples(slm)
    selector = fresh_selector(slm, kind, SMALL)
    for piece in all_scores(objective_for(selector, examples, hidden_along(slm, examples), SMALL)):
        torch.testing.assert_close(piece.scores, piece.slm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_scores_what_the_selector_scores_in_use(architecture, kind):
    slm = tiny_model(architecture)
    examples = some_examples(slm)
    selector = awake(fresh_selector(slm, kind, SMALL))
    pieces = all_scores(objective_for(selector, examples, hidden_along(slm, examples), SMALL))
    trained = torch.cat([piece.scores - piece.slm for piece in pieces])
    live = []
    for example in examples:
        for position, candidates in zip(example.positions.tolist(), example.candidates, strict=True):
            prefix = TokenSequence(slm)
            prefix.append(example.ids[:position])
            proposal = Proposal(prefix, 4)
            proposal.__dict__["candidates"] = candidates
            live.append(selector.scores(proposal) - proposal.candidate_log_probs)
    torch.testing.assert_close(trained, torch.stack(live), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(pair, kind):
    slm, _, _ = pair
    examples = some_examples(slm)
    hidden = hidden_along(slm, examples)
    gradients = []
    for max_row, together in ((512, True), (4, True), (512, False)):
        settings = SMALL.model_copy(update={"max_row": max_row})
        selector = awake(fresh_selector(slm, kind, settings))
        objective = objective_for(selector, examples, hidden, settings)
        units = list(range(len(objective.sizes)))
        for batch in [units] if together else [[unit] for unit in units]:
            for piece in objective.pieces(batch):
                selection_loss(piece.scores, piece.llm, soft=0.5, temperature=1.0).backward()
        gradients.append({name: p.grad.clone() for name, p in selector.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert float((other[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max())


def test_the_adapters_learn_and_the_base_does_not(pair):
    slm, _, _ = pair
    examples = some_examples(slm)
    before = {name: p.clone() for name, p in slm.model.named_parameters()}
    for kind in ("activated", "adapted", "published"):
        selector = awake(fresh_selector(slm, kind, SMALL))
        for piece in objective_for(selector, examples, hidden_along(slm, examples), SMALL).pieces([0, 1, 2]):
            selection_loss(piece.scores, piece.llm, soft=0.0, temperature=1.0).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in selector.lora.parameters())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in slm.model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_selector_learns_a_rule_that_holds_everywhere(pair, kind, tmp_path):
    """The LLM here always wants the lowest of eight tokens that come up as candidates."""
    slm, _, _ = pair
    examples = [example for seed in range(12) for example in some_examples(slm, seed=seed)]
    few = [replace(e, candidates=e.candidates % 8 + 65) for e in examples]
    ruled = [replace(e, llm=(-2 * e.candidates.float()).log_softmax(-1)) for e in few]
    hidden = hidden_along(slm, ruled)
    settings = SMALL.model_copy(update={"epochs": 30, "batch": 16, "lr": 1e-2, "patience": 50})
    selector = fresh_selector(slm, kind, settings)
    learn, hold = objective_for(selector, ruled[:27], hidden[:27], settings), ruled[27:]
    state = fitting.fit(selector, slm, learn, objective_for(selector, hold, hidden[27:], settings), settings, tmp_path)
    assert state.looks[0].agreement < 0.5
    assert state.best > state.looks[0].agreement + 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_ends_with_the_same_weights(pair, rollouts, kind, tmp_path):
    slm, _, _ = pair
    train_with(slm, training(kind, rollouts, tmp_path / "whole"))
    killed_at_its_first_checkpoint(lambda: train_with(slm, training(kind, rollouts, tmp_path / "broken")))
    assert (tmp_path / "broken" / "checkpoint.pt").exists()
    train_with(slm, training(kind, rollouts, tmp_path / "broken"))
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_finished_training_is_left_alone_and_another_is_refused(pair, rollouts, tmp_path):
    slm, _, _ = pair
    train_with(slm, training("head", rollouts, tmp_path / "head"))
    written = (tmp_path / "head" / "head.safetensors").stat().st_mtime_ns
    train_with(slm, training("head", rollouts, tmp_path / "head"))
    assert (tmp_path / "head" / "head.safetensors").stat().st_mtime_ns == written
    others = SMALL.model_copy(update={"lr": 1.0, "k": 3})
    message = r"other settings: k is 4 there and 3 now; lr is 0.001 there and 1.0 now\. .*mv .*/head .*/head-before"
    with pytest.raises(ConfigError, match=message):
        train_with(slm, training("head", rollouts, tmp_path / "head", others))


@pytest.mark.parametrize("wrong", [{"k": 9}, {"validation": 1e-9}, {"validation": 1 - 1e-9}])
def test_a_training_that_is_refused_leaves_nothing_that_blocks_the_corrected_one(pair, rollouts, tmp_path, wrong):
    slm, _, _ = pair
    out = tmp_path / "head"
    with pytest.raises(S2TError, match=r"keeps 8 candidates|are too few"):
        train_with(slm, training("head", rollouts, out, SMALL.model_copy(update=wrong)))
    assert not out.exists()
    out.mkdir()
    (out / "training.json").write_text('{"fit": {"k": 9}}')  # of an older version, which wrote it first
    train_with(slm, training("head", rollouts, out))
    assert (out / "selector.json").exists()


def test_a_half_trained_selector_of_other_settings_is_refused(pair, rollouts, tmp_path):
    slm, _, _ = pair
    killed_at_its_first_checkpoint(lambda: train_with(slm, training("head", rollouts, tmp_path / "head")))
    with pytest.raises(ConfigError, match="half-trained selector of other settings: lr is"):
        train_with(slm, training("head", rollouts, tmp_path / "head", SMALL.model_copy(update={"lr": 1.0})))


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(pair, rollouts, tmp_path, monkeypatch):
    slm, _, _ = pair
    loss = fitting.selection_loss
    calls = []

    def breaks_late(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(fitting, "selection_loss", breaks_late)
    with pytest.raises(S2TError, match=r"the loss is nan.*step 4.*checkpoint of step 3 is kept"):
        train_with(slm, training("head", rollouts, tmp_path / "head"))
    saved = torch.load(tmp_path / "head" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved["weights"].values())


def test_training_stops_when_agreement_does_not_grow(pair, rollouts, tmp_path):
    slm, _, _ = pair
    settings = SMALL.model_copy(update={"epochs": 50, "patience": 2, "lr": 1e-9, "evaluate_every": 1})
    train_with(slm, training("head", rollouts, tmp_path / "head", settings))
    figures = json.loads((tmp_path / "head" / "selector.json").read_text())["training"]
    assert figures["steps"] == 2
    assert figures["agreement"] == figures["agreement_untrained"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_loads_and_scores_the_same(pair, rollouts, kind, tmp_path):
    slm, _, _ = pair
    train_with(slm, training(kind, rollouts, tmp_path / kind))
    selector, config = load_selector(tmp_path / kind, slm)
    assert (config.kind, config.k) == (kind, 4)
    prefix = read(slm, [65, 66, 67])
    proposal = Proposal(prefix, 4)
    again, _ = load_selector(tmp_path / kind, slm)
    assert torch.equal(selector.scores(proposal), again.scores(proposal))
    card = (tmp_path / kind / "README.md").read_text()
    assert f"{config.training['agreement']}" in card
    assert slm.weights_fingerprint in card
    assert "Not calibrated yet" in card


def test_a_selector_for_other_weights_is_refused(pair, rollouts, tmp_path):
    slm, _, _ = pair
    train_with(slm, training("head", rollouts, tmp_path / "head"))
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(tmp_path / "head", tiny_model(seed=9))
    with pytest.raises(ConfigError, match="other weights"):
        train_with(tiny_model(seed=9), training("head", rollouts, tmp_path / "other"))


def test_more_candidates_than_were_collected_are_refused(pair, rollouts, tmp_path):
    slm, _, _ = pair
    with pytest.raises(ConfigError, match="k is 12.*keeps 8"):
        train_with(slm, training("head", rollouts, tmp_path / "head", SMALL.model_copy(update={"k": 12})))


def test_too_few_rollouts_are_named(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path, 1), QUICK, tmp_path / "rollouts")
    with pytest.raises(InputError, match="are too few"):
        train_with(slm, training("head", tmp_path / "rollouts", tmp_path / "head"))


def test_critical_steps_are_the_most_uncertain_and_the_most_disputed(pair, rollouts):
    slm, _, _ = pair
    shards = read_for(slm, [rollouts], 4)
    entropy = torch.cat([shard.entropy for _, shard in shards])
    kl = torch.cat([shard.kl for _, shard in shards])
    by_entropy = choose(shards, k=4, rate=0.1, kl_rate=0.0)
    both = choose(shards, k=4, rate=0.1, kl_rate=0.1)
    wanted = entropy >= threshold_for(entropy, 0.1)
    assert sum(len(e.positions) for e in by_entropy) == int(wanted.sum()) == round(0.1 * len(entropy))
    assert sum(len(e.positions) for e in both) == int((wanted | (kl >= threshold_for(kl, 0.1))).sum())


def test_all_answers_to_one_prompt_stay_on_one_side(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK.model_copy(update={"samples": 2}), tmp_path / "rollouts")
    examples = choose(read_for(slm, [tmp_path / "rollouts"], 4), k=4, rate=1.0, kl_rate=0.0)
    learn, hold = split(examples, 0.3)
    assert learn
    assert hold
    assert not {e.item for e in learn} & {e.item for e in hold}


def test_the_probe_finds_what_can_be_found(pair):
    slm, _, _ = pair
    examples = [example for seed in range(8) for example in some_examples(slm, seed=seed)]
    hidden = hidden_along(slm, examples)
    marked = [replace(e, differs=h[:, 3] > 0) for e, h in zip(examples, hidden, strict=True)]
    probe = fit_probe(marked[:16], hidden[:16], seed=0)
    likely = torch.cat([probe.probabilities(h, e.entropy) for e, h in zip(marked[16:], hidden[16:], strict=True)])
    assert float(((likely > 0.5) == torch.cat([e.differs for e in marked[16:]])).float().mean()) > 0.9


def test_hidden_states_are_those_that_a_prefix_has(pair):
    slm, _, _ = pair
    examples = some_examples(slm)
    for example, hidden in zip(examples, hidden_along(slm, examples), strict=True):
        prefix = read(slm, example.ids[: int(example.all_positions[4])])
        torch.testing.assert_close(hidden[4], prefix.hidden, atol=1e-4, rtol=1e-4)


def test_the_loss_is_cross_entropy_and_a_soft_term():
    scores = torch.tensor([[0.0, 1.0]])
    llm = torch.tensor([[0.7, 0.3]]).log()
    hard = selection_loss(scores, llm, soft=0.0, temperature=1.0)
    assert float(hard) == pytest.approx(float(-scores.log_softmax(-1)[0, 0]))
    both = selection_loss(scores, llm, soft=2.0, temperature=1.0)
    kl = (llm.exp() * (llm - scores.log_softmax(-1))).sum()
    assert float(both) == pytest.approx(float(hard + 2 * kl))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_training_runs(pair, rollouts, kind, tmp_path):
    slm, _, _ = pair
    train_with(slm, training(kind, rollouts, tmp_path / kind, SMALL.model_copy(update={"bf16": True, "epochs": 1})))
    assert (tmp_path / kind / "selector.json").exists()


TOML = """
out = "{out}"
[models]
slm = "{slm}"
device = "cpu"
[tasks.train]
task = "demo"
count = 10
[tasks.heldout]
task = "demo"
first = 10
count = 10
[tasks.test]
task = "demo"
first = 20
count = 10
[train.head]
k = 4
rate = 1
epochs = 8
lr = 0.01
batch = 8
evaluate_every = 3
warmup = 2
validation = 0.4
width = 16
"""

WORKER = """
import sys
from pathlib import Path
import torch
from s2t_agents.cli import main
from s2t_agents.training.workers import Workers

torch.set_num_threads(1)
toml, counts = sys.argv[1:]
sys.argv = ["s2t", "train", toml, "--json"]
try:
    main()
finally:
    workers = Workers()
    (Path(counts) / str(workers.rank)).write_text(str(workers.count))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_only_the_first_prints(pair, rollouts, tmp_path):
    slm = save_model(pair[0], tmp_path / "slm")
    configs = {}
    for count in (1, 2):
        out = tmp_path / f"made-by-{count}"
        shutil.copytree(rollouts, out / "rollouts" / "train")
        configs[count] = tmp_path / f"{count}.toml"
        configs[count].write_text(TOML.format(out=out, slm=slm))
    one = train(read_config(configs[1]).training("head"))
    assert SelectorConfig.load(one).training["best_step"] > 0  # what is compared has moved

    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "counts").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = [*launch, str(tmp_path / "worker.py"), str(configs[2]), str(tmp_path / "counts")]
    done = subprocess.run(call, timeout=240, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = {file.name: file.read_text() for file in (tmp_path / "counts").iterdir()}
    assert counts == {"0": "2", "1": "2"}
    printed = json.loads(done.stdout)  # one document
    two = tmp_path / "made-by-2" / "head"
    assert printed["training"] == SelectorConfig.load(one).training
    alone, together = (load_file(folder / "head.safetensors") for folder in (one, two))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=1e-4)
