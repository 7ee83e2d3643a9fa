"""Labels of an LLM of another family: what it says when it is asked, and a selector that learns from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_other_tokenizer import family
from training_fixtures import QUICK, save_model, tiny_pair, training, write_prompts

from s2t_agents.backends.statistics import FLOOR
from s2t_agents.chat.asked_conversation import AskedConversation
from s2t_agents.llms import LocalLLM, Question
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.selectors import SelectorConfig
from s2t_agents.training.collect import collect
from s2t_agents.training.config import CollectConfig, Models
from s2t_agents.training.shards import read_shards
from s2t_agents.training.tasks import JsonlTaskConfig
from s2t_agents.training.train import train


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> CollectConfig:
    folder = tmp_path_factory.mktemp("families")
    save_model(tiny_pair()[0], folder / "slm")
    save_model(family("pieces"), folder / "llm")
    task = JsonlTaskConfig(task="jsonl", path=write_prompts(folder / "prompts.jsonl", 8))
    models = Models(slm=str(folder / "slm"), llm=str(folder / "llm"))
    config = CollectConfig(models=models, task=task, out=folder / "rollouts", rollouts=QUICK)
    collect(config)
    return config


def test_labels_are_what_the_llm_says_when_it_is_asked(collected: CollectConfig) -> None:
    from langchain_core.messages import convert_to_messages

    slm, llm = (LanguageModel.load(str(each)) for each in (collected.models.slm, collected.models.llm))
    items = collected.task.open().items
    shard = read_shards(collected.out)[0]
    asked = LocalLLM(llm)
    for row, (prompt, ids, steps) in enumerate(shard.trajectories()):
        conversation = AskedConversation(convert_to_messages(items[int(shard.item[row])].messages), (), len(prompt))
        session, prefix = asked.open(), TokenSequence(slm)
        for at in (0, len(ids) // 2):
            candidates = shard.candidates[steps][at].tolist()
            question = Question([*prompt, *ids[:at]], candidates, prefix=prefix, conversation=conversation)
            given = [FLOOR if score is None else max(FLOOR, score) for score in session.ask(question).scores]
            assert shard.llm[steps][at].tolist() == pytest.approx(given, abs=1e-3)
            assert int(shard.llm_best[steps][at]) == candidates[given.index(max(given))]
        session.close()
    assert bool((shard.kl >= 0).all())
    assert torch.isfinite(shard.llm).all()


def test_a_selector_is_trained_from_them(collected: CollectConfig, tmp_path: Path) -> None:
    fit = training("head", collected.out, tmp_path / "head").model_copy(update={"models": collected.models})
    train(fit)
    assert SelectorConfig.load(tmp_path / "head").kind == "head"
