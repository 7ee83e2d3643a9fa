"""The adapted kind learns from its prompts, with the LLM at hand: prompt_share."""

import shutil

import pytest
import torch
from training_fixtures import save_model, tiny_pair, write_prompts

from s2t_agents.errors import ConfigError, ModelNotFound
from s2t_agents.selectors import load_selector
from s2t_agents.training import fit
from s2t_agents.training.collect import collect
from s2t_agents.training.config import read_config
from s2t_agents.training.crew import Crew
from s2t_agents.training.groups import choose, read_for
from s2t_agents.training.train import train

TOML = """
out = "{out}"
[models]
slm = "{out}/slm"
llm = "{out}/llm"
device = "cpu"
[tasks]
train = {{ task = "jsonl", path = "{out}/train.jsonl" }}
heldout = {{ task = "jsonl", path = "{out}/heldout.jsonl" }}
test = {{ task = "jsonl", path = "{out}/test.jsonl" }}
[collect]
k = 8
max_tokens = 6
[train.adapted]
prompt_share = 0.5
rate = 0.5
epochs = 6
batch = 2
lr = 2e-2
warmup = 2
validation = 0.3
evaluate_every = 5
patience = 100
adapter = {{ rank = 4, alpha = 8 }}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pair, its rollouts and its file."""
    folder = tmp_path_factory.mktemp("pair")
    slm, llm, _ = tiny_pair()
    save_model(slm, folder / "slm")
    save_model(llm, folder / "llm")
    write_prompts(folder / "train.jsonl", 12)
    (folder / "pair.toml").write_text(TOML.format(out=folder))
    collect(read_config(folder / "pair.toml").collecting("train"))
    return folder


@pytest.fixture
def pipeline(made, tmp_path):
    """The same in a folder of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "pair.toml"
    file.write_text(file.read_text().replace(str(made), str(tmp_path)))
    return read_config(file)


def reading_loss(pipeline, with_adapter):
    """KL(LLM || SLM) at every token of the prompts, in nats."""
    slm, llm = pipeline.models.load_slm(), pipeline.models.load_llm()
    selector, _ = load_selector(pipeline.selector("adapted"), slm)
    total = 0.0
    for example in choose(read_for(slm, [pipeline.rollouts("train")], 8), k=8, rate=1.0, kl_rate=0.0):
        ids = torch.tensor([example.ids[: int(example.all_positions[0])]])
        with torch.no_grad():
            theirs = llm.model(ids).logits[0].log_softmax(-1)
            if with_adapter:
                with selector.lora.on(slm.model):
                    ours = slm.model(ids).logits[0].log_softmax(-1)
            else:
                ours = slm.model(ids).logits[0].log_softmax(-1)
        total += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    return total


def weights(pipeline):
    selector, _ = load_selector(pipeline.selector("adapted"), pipeline.models.load_slm())
    return dict(selector.lora.named_parameters())


def assert_same(one, other, tolerance):
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=tolerance, rtol=tolerance)


def test_prompts_are_learned_whatever_answers_there_were(pipeline):
    train(pipeline.training("adapted"))
    assert reading_loss(pipeline, True) < 0.95 * reading_loss(pipeline, False)


def test_a_killed_training_draws_the_same_tokens_when_it_goes_on(pipeline, monkeypatch):
    training = pipeline.training("adapted")
    train(training)
    whole = weights(pipeline)
    shutil.rmtree(pipeline.selector("adapted"))

    def killed(*args):
        save(*args)
        raise KeyboardInterrupt

    save = fit.save_checkpoint
    monkeypatch.setattr(fit, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(training)
    monkeypatch.setattr(fit, "save_checkpoint", save)
    train(training)
    assert_same(whole, weights(pipeline), 1e-3)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(pipeline):
    training = pipeline.training("adapted")
    train(training)
    alone = weights(pipeline)
    shutil.rmtree(pipeline.selector("adapted"))
    with Crew(2) as crew:
        train(training, crew)
    assert_same(alone, weights(pipeline), 2e-3)


def test_an_llm_that_is_not_at_hand_is_an_error_before_anything_is_read(pipeline):
    shutil.rmtree(pipeline.out / "llm")
    with pytest.raises(ModelNotFound, match="llm"):
        train(pipeline.training("adapted"))
    assert not (pipeline.selector("adapted") / "selector.json").exists()


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('device = "cpu"', 'llm_server = "http://localhost:8000/v1"', "llm_server out"),
        ("[train.adapted]", "[train.head]", "only the adapted kind"),
    ],
)
def test_what_cannot_work_is_an_error_of_the_file(pipeline, was, now, message):
    file = pipeline.out / "pair.toml"
    text = file.read_text().replace(was, now)
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(file)
