"""Every command of examples/real_pair on tiny random models of the same architecture, the teacher behind HTTP."""

import importlib.util
import json
from pathlib import Path

import forked
import pytest
import torch
from servers import serving
from training_fixtures import save_model
from typer.testing import CliRunner

from benchmarks.train import run as bench
from s2t_agents import ChatS2T, Engine
from s2t_agents.backends.statistics import FLOOR
from s2t_agents.endpoints.completions import TOP_LOGPROBS
from s2t_agents.grammar.grammar import tool_grammar
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.testing import tiny_model
from s2t_agents.training.commands import app
from s2t_agents.training.labels import LocalTeacher, along, label
from s2t_agents.training.remote import RemoteTeacher
from s2t_agents.types import Sampling

RECIPE = Path(__file__).parent.parent / "examples" / "real_pair"


@pytest.fixture(scope="module")
def pair():
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256}
    return tiny_model("qwen2", seed=1, **sizes), tiny_model("qwen2", seed=2, **sizes)


@pytest.fixture(scope="module")
def server(pair):
    with serving(pair[1]) as running:
        yield running


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    for name, model in zip(("slm", "llm"), pair, strict=True):
        save_model(model, folder / name)
    return folder


def script(name):
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gsm8k(at: int, mark: str) -> dict[str, str]:
    return {"question": f"{at} + {at}?{mark}", "answer": f"So it is.\n#### {2 * at}"}


def math(at: int, mark: str) -> dict[str, str]:
    return {"problem": f"Simplify ${at} + {at}/7$.{mark}", "solution": rf"It is $\boxed{{\frac{{{8 * at}}}{{7}}}}$."}


def commands() -> list[list[str]]:
    """The README's own command lines, in order."""
    lines = [line.strip() for line in (RECIPE / "README.md").read_text().splitlines() if line.startswith("       ")]
    return [line.split() for line in lines if line.startswith(("s2t ", "python examples"))]


@pytest.mark.parametrize(("data", "row"), [("gsm8k", gsm8k), ("math", math)])
def test_every_command_of_the_recipe(folder, server, data, row):
    url = server.url
    home = folder / data
    home.mkdir()
    for part, count in (("train", 24), ("test", 4)):
        rows = [
            row(at, part if at == 0 or part == "test" else "") for at in range(count)
        ]  # train and test share no prompt
        (home / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = (RECIPE / "pair.toml").read_text()
    for real, tiny in (
        ("Qwen/Qwen2.5-1.5B-Instruct", str(folder / "slm")),
        ("Qwen/Qwen2.5-32B-Instruct", str(folder / "llm")),
        ("http://localhost:8000/v1", url),
        ("runs/qwen", str(home / "runs")),
        ("count = 2000", "count = 16"),
        ("first = 2000\ncount = 300", "first = 16\ncount = 8"),
        ("max_tokens = 512", "max_tokens = 12"),
        ("width = 1024", "width = 16"),
        ("0.05", "0.5"),
        ('dtype = "bfloat16"', 'dtype = "float32"\ndevice = "cpu"'),
    ):
        assert real in config, real
        config = config.replace(real, tiny)
    (home / "pair.toml").write_text(config)
    here = {
        "examples/real_pair/pair.toml": str(home / "pair.toml"),
        "examples/real_pair/prepare.py": str(RECIPE / "prepare.py"),
        "gsm8k/train.jsonl": str(home / "train.jsonl"),
        "gsm8k/test.jsonl": str(home / "test.jsonl"),
    }
    run = []
    for words in commands():
        words = [here.get(word, word.replace("runs/qwen", str(home / "runs"))) for word in words]
        run.append(words[1] if words[0] == "s2t" else "prepare")
        if words[0] == "python":
            done = forked.run(*words[1:])
            assert done.stdout.endswith("prompts\n"), done.stderr
            continue
        shown = CliRunner().invoke(app, words[1:])
        assert shown.exit_code == 0, f"{words}: {shown.output}"
    assert run == ["prepare", "prepare", "collect", "probe", "train", "calibrate", "eval"]
    made = home / "runs/evaluation"
    report = json.loads((made / "report.json").read_text())
    assert {"slm", "activated", "head", "hybrid_2", "llm"} <= set(report["rows"])
    assert set(report["sweeps"]) == {"k", "rate"}
    assert {"pareto.png", "sweep-k.png", "sweep-rate.png"} <= {file.name for file in made.iterdir()}
    answer = ChatS2T(model=str(folder / "slm"), selector=str(home / "runs/activated"), max_tokens=8).invoke("2 + 2?")
    assert 1 <= answer.response_metadata["s2t"]["tokens"] <= 8


def test_a_served_teacher_says_what_a_local_one_says(pair, folder, server):
    slm, llm = pair
    url = server.url
    teacher = RemoteTeacher(url, "llm", slm, tokenizer=str(folder / "llm"))
    trajectories = [(list(b"1 + 1?"), list(b"2, I think")), (list(b"x"), list(b"yz"))]
    remote = label(slm, teacher, trajectories, 4)
    local = label(slm, LocalTeacher(llm), trajectories, 4)
    for trajectory, ours, theirs in zip(trajectories, remote, local, strict=True):
        assert torch.equal(ours.llm_best, theirs.llm_best)
        assert (ours.kl <= theirs.kl + 1e-3).all()
        listed = along(llm, [trajectory])[0].topk(TOP_LOGPROBS).indices
        seen = (ours.candidates[:, :, None] == listed[:, None]).any(-1)
        torch.testing.assert_close(ours.llm[seen], theirs.llm[seen], atol=1e-4, rtol=1e-4)
        assert (ours.llm[~seen] >= theirs.llm[~seen]).all()
        assert not seen.all()


def test_math_answers_are_read_from_their_boxes():
    prepare = script("prepare")
    assert prepare.boxed(r"so $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert prepare.prompt_of({"problem": "p", "solution": r"\boxed{3}, no: \boxed{4}"}) == (
        "p" + prepare.ASK_BOXED,
        "4",
    )
    assert prepare.boxed("no box") == ""


def test_problems_are_not_written_over_themselves(tmp_path):
    source, link = tmp_path / "train.jsonl", tmp_path / "link.jsonl"
    source.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    link.hardlink_to(source)
    before = source.read_bytes()
    for target in (source, link):
        with pytest.raises(SystemExit, match="is the file that is read"):
            script("prepare").prepare(source, target)
    assert source.read_bytes() == before


def test_the_training_benchmark_runs():
    result = bench(shape="tiny", prefix=100, groups=4, k=4, repeats=1)
    assert result["ratio"] > 1
    assert set(result["groups_per_s"]) == {"one_pass", "published"}


def test_a_served_teacher_sees_what_is_legal(pair, folder, server):
    slm, llm = pair
    url = server.url
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "boolean"}}}}}
    words = cached_vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))
    compiled = tool_grammar(words, [tool], "any", parallel=False)
    steps = Engine(slm).steps(list(b"f?"), Sampling(max_tokens=150), grammar=compiled.start(150))
    said = [(list(b"f?"), [step.token_id for step in steps])]
    (ours,) = label(slm, RemoteTeacher(url, "llm", slm, tokenizer=str(folder / "llm")), said, 4, [compiled.start(150)])
    (local,) = label(slm, LocalTeacher(llm), said, 4, [compiled.start(150)])
    illegal = local.llm <= FLOOR
    assert illegal.any()
    assert torch.equal(ours.llm <= FLOOR, illegal)
    forced = (local.slm > FLOOR).sum(-1) == 1
    assert forced.any()
    assert (ours.llm_best[forced] == ours.candidates[forced, 0]).all()
    assert (ours.kl[forced] == 0).all()
    assert (ours.kl < 100).all()
