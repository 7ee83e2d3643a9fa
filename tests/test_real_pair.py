"""examples/real_pair: the pair that is made of one checkpoint, and what its file trains and tests on."""

import json
from pathlib import Path

import pytest
import torch

from s2t_agents.errors import AdapterMismatch, ConfigError
from s2t_agents.selectors import SelectorConfig, load_selector
from s2t_agents.testing import tiny_model
from s2t_agents.training.choices import evaluation
from s2t_agents.training.config import read_config
from s2t_agents.training.tasks import disjoint

RECIPE = Path(__file__).parent.parent / "examples" / "real_pair"


def test_a_quantised_copy_is_an_ordinary_checkpoint_near_the_original(tmp_path):
    pytest.importorskip("hqq")
    from examples.real_pair.quantise import quantise
    from s2t_agents import LanguageModel

    made = tiny_model("qwen2", seed=1, hidden_size=64, intermediate_size=128)
    made.model.save_pretrained(tmp_path / "llm")
    made.tokenizer.save_pretrained(tmp_path / "llm")
    memory = quantise(tmp_path / "llm", tmp_path / "slm")
    assert memory.packed < memory.half
    slm = LanguageModel.load(str(tmp_path / "slm"))
    theirs_by_name = dict(slm.model.named_parameters())
    for name, ours in made.model.named_parameters():
        theirs = theirs_by_name[name]
        if ours.ndim == 2 and ".layers." in name:
            assert 0 < (ours - theirs).norm() / ours.norm() < 0.3, name
            assert len(theirs.flatten()[:16].unique()) <= 16, name
        else:
            assert torch.equal(ours, theirs), name


def pair_file(folder, data):
    """The example's file with its data and outcome elsewhere."""
    text = (RECIPE / "smollm2.toml").read_text().replace("runs/smollm2/bfcl", str(data))
    file = folder / "pair.toml"
    file.write_text(text.replace("runs/smollm2", str(folder)))
    return read_config(file)


def test_named_tasks_are_those_of_the_file_so_many_of_them_spaced_out(tmp_path):
    pipeline = pair_file(tmp_path, tmp_path)
    problem = {"Body": "Dan had 3 pens.", "Question": "How many has he?", "Answer": 3.0}
    (tmp_path / "svamp.json").write_text(json.dumps([problem] * 10))
    asked = evaluation(pipeline, "svamp", 3, None, [], None, sweep=False)
    assert [item.id for item in asked.task.open().items] == ["svamp-0", "svamp-3", "svamp-6"]
    assert len(evaluation(pipeline, "svamp", None, None, [], None, sweep=False).task.open().items) == 10
    with pytest.raises(ConfigError, match="no task and no file") as error:
        evaluation(pipeline, "aime", 3, None, [], None, sweep=False)
    assert "bfcl, multiple, svamp, gsm8k" in str(error.value)


@pytest.mark.parametrize("file", sorted(RECIPE.glob("*.toml")), ids=lambda file: file.stem)
def test_every_file_of_the_example_can_be_read(file):
    read_config(file)


@pytest.mark.real
def test_the_files_parts_share_no_item(tmp_path, bfcl):
    pipeline = pair_file(tmp_path, bfcl)
    train, heldout, test = (getattr(pipeline.tasks, part).open() for part in ("train", "heldout", "test"))
    disjoint(train, heldout)
    for tested in (test, pipeline.tasks.named["multiple"].open()):
        disjoint(train, tested)
        disjoint(heldout, tested)
    assert [len(task.items) for task in (train, heldout, test)] == [320, 96, 400]
    spaced = evaluation(pipeline, "bfcl", 100, None, [], None, sweep=False).task.open()
    assert [item.id for item in spaced.items[:3]] == ["simple_python_0", "simple_python_4", "simple_python_8"]


def test_the_agent_calls_a_tool_and_says_what_it_took():
    from examples.real_pair.agent import ask, models

    run = ask(models("s2t-demo-llm", "s2t-demo")["the pair"])
    assert run["call"]["name"] == "triangle_area"
    base, height = (run["call"]["args"][name] for name in ("base", "height"))
    assert run["returned"].endswith(f"= {base * height / 2:g}")
    assert run["tokens"] > 0
    assert 0 <= run["asked"] <= 40


@pytest.mark.real
@pytest.mark.slow
def test_the_agent_on_real_weights(smollm2):
    from examples.real_pair.agent import ask, models

    run = ask(models(str(smollm2), str(smollm2))["full weights"])
    assert run["call"]["args"] == {"base": 14, "height": 9}
    assert "63" in run["answer"]


@pytest.mark.parametrize("kind", ["head", "adapted"])
def test_a_kept_selector_is_small_calibrated_and_for_the_pairs_small_model(kind):
    folder = RECIPE / "selectors" / kind
    config = SelectorConfig.load(folder)
    assert (config.kind, config.base.name) == (kind, "runs/smollm2/slm")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 4e6
    assert config.calibration.agreement_ci95[0] > config.calibration.agreement_greedy
    with pytest.raises(AdapterMismatch, match="trained for 'runs/smollm2/slm'"):
        load_selector(folder, tiny_model("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3))
