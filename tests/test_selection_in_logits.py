"""A head selector on a batch's logits picks what the engine picks, and the log-probabilities tell what it did."""

import ast
import importlib
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import appended
from servers import CompletionServer, selecting, serving

from s2t_agents import Budget, ChatS2T, Engine, Escalation, LanguageModel, Ledger, OpenAILLM, TokenPrice
from s2t_agents.budget import MemoryStore
from s2t_agents.chat.engine_settings import EngineSettings
from s2t_agents.chat.runtime import build
from s2t_agents.endpoints.served_selection import read_back
from s2t_agents.errors import ConfigError
from s2t_agents.selectors import HeadSelector
from s2t_agents.selectors.in_logits import EntropyAbove, LogitSelection, ProbeAbove
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import Trigger, entropy, probe
from s2t_agents.types import Sampling, Step

NATS, K = 4.5, 6


@pytest.fixture(scope="module")
def slm() -> LanguageModel:
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def head(slm: LanguageModel) -> HeadSelector:
    return random_head(slm)


def random_head(slm: LanguageModel) -> HeadSelector:
    torch.manual_seed(8)
    selector = HeadSelector(slm, width=16, temperature=1.3, caution=0.2)
    torch.nn.init.normal_(selector.out.weight, std=2.0)
    return selector.requires_grad_(False)


def here(slm: LanguageModel, head: HeadSelector, prompt: list[int], trigger: Trigger) -> list[Step]:
    engine = Engine(slm, k=K, trigger=trigger, selector=head)
    return list(engine.steps(prompt, Sampling(max_tokens=20)))


@pytest.fixture
def served(slm: LanguageModel, head: HeadSelector) -> Iterator[CompletionServer]:
    """A server whose logits go through a selection, as the plugin's do."""
    with serving(selecting(slm, LogitSelection(head, EntropyAbove(NATS), K))) as server:
        yield server


def far(server: CompletionServer, **more: Any) -> EngineSettings:
    return EngineSettings(
        f"vllm://127.0.0.1:{server.server_port}/{server.model.name}",
        selector="server",
        k=K,
        model_kwargs={"tokenizer": server.model.tokenizer},
        **more,
    )


def test_rows_pick_what_the_engine_picks_alone(slm: LanguageModel, head: HeadSelector) -> None:
    weight = torch.randn(slm.hidden_size + 1, generator=torch.Generator().manual_seed(1))
    kinds: list[tuple[Trigger, Any]] = [
        (entropy(above=NATS), EntropyAbove(NATS)),
        (probe(weight, 0.3, above=0.5), ProbeAbove(weight, 0.3, 0.5)),
    ]
    prompts = [[at, 20, 30] for at in range(40, 52)]
    for one, many in kinds:
        outputs = [appended(slm, torch.tensor(prompt), slm.new_cache()) for prompt in prompts]
        logits, hidden = (torch.stack(each) for each in zip(*outputs, strict=True))
        found = LogitSelection(head, many, K)(hidden, logits)
        steps = [here(slm, head, prompt, one)[0] for prompt in prompts]
        assert found.argmax(-1).tolist() == [step.token_id for step in steps]
        assert 0 < sum(step.triggered for step in steps) <= len(steps)
        for row, step, before in zip(found, steps, logits, strict=True):
            if not step.triggered:
                assert torch.equal(row, before)


def test_what_a_server_reports_tells_triggers_and_flips(
    slm: LanguageModel, head: HeadSelector, served: CompletionServer
) -> None:
    engine = build(far(served)).engine
    flips = 0
    for first in (40, 41, 42, 43):
        alone = here(slm, head, [first, 20, 30], entropy(above=NATS))
        steps = list(engine.steps([first, 20, 30], Sampling(max_tokens=20)))
        for name in ("token_id", "triggered", "wanted_id", "picked_by"):
            assert [getattr(step, name) for step in steps] == [getattr(step, name) for step in alone], name
        flips += sum(step.flipped for step in steps)
    assert flips


def test_a_grammar_that_forbids_all_the_servers_candidates_leaves_the_choice_to_the_slm() -> None:
    slm = tiny_model(seed=3, max_position_embeddings=2048)
    four: dict[str, Any] = {name: {"enum": ["qa", "zb", "xc", "jd"]} for name in ("one", "two", "three", "four")}
    tool = {"name": "pick", "parameters": {"type": "object", "properties": four, "required": list(four)}}
    with serving(selecting(slm, LogitSelection(random_head(slm), EntropyAbove(0.0), K))) as server:
        far = ChatS2T(
            model=f"vllm://127.0.0.1:{server.server_port}/{server.model.name}",
            model_kwargs={"tokenizer": server.model.tokenizer},
            selector="server",
            k=K,
            max_tokens=96,
        )
        near = ChatS2T(model=slm, max_tokens=96)
        there, here = (
            each.bind_tools([tool], tool_choice="any").invoke("3 apples").tool_calls[0]["args"]  # type: ignore[attr-defined]
            for each in (far, near)
        )
        assert sum("allowed_token_ids" in body for body in server.asked) == 4
    assert there == here


def test_candidates_share_their_probability_by_the_scores(slm: LanguageModel, head: HeadSelector) -> None:
    out = appended(slm, torch.tensor([40, 20, 30]), slm.new_cache())
    found = LogitSelection(head, EntropyAbove(0.0), K)(out.hidden[None], out.logits[None])[0].log_softmax(-1)
    selection = read_back({token: float(found[token]) for token in found.topk(20).indices.tolist()})
    assert selection is not None
    assert len(selection.candidates) == K
    assert sum(torch.tensor(value).exp() for _, value in selection.candidates) == pytest.approx(1.0, abs=1e-4)
    assert selection.wanted == int(out.logits.argmax())


def test_log_probabilities_that_no_selector_touched_tell_nothing() -> None:
    assert read_back({5: -0.1, 7: -3.0, 9: -99.0}) is None
    assert read_back({}) is None


def test_a_server_without_the_plugin_is_told_once(
    slm: LanguageModel, served: CompletionServer, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(slm) as plain:
        for server, warnings in ((served, 0), (plain, 1)):
            caplog.clear()
            engine = build(far(server)).engine
            for first in range(40, 54):
                list(engine.steps([first, 20, 30], Sampling(max_tokens=20)))
            assert ["without the plugin" in record.getMessage() for record in caplog.records].count(True) == warnings


def test_only_a_server_selects_for_a_server_s_model(slm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="no server selects for it"):
        build(EngineSettings(slm, selector="server"))


def test_the_plugin_takes_from_this_package_what_it_has() -> None:
    """vLLM's own classes are not to be had here; examples/vllm/slm.sh runs the plugin in a real server."""
    file = Path(__file__).parent.parent / "integrations" / "vllm_models.py"
    own = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    assert len(own) > 5
    for node in own:
        module = importlib.import_module(f"s2t_agents.{node.module}")
        assert all(hasattr(module, name.name) for name in node.names), node.module


def test_the_documentation_s_agent_runs_on_a_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "vllm.md").read_text(encoding="utf-8")
    first, second, team = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    def get_stock(item: str) -> int:
        """Look up the stock of an item."""
        return 85

    with serving(LanguageModel.load("s2t-demo")) as server:
        address = f"vllm://127.0.0.1:{server.server_port}/s2t-demo"  # whose tokenizer is found by its name
        exec(re.sub(r"vllm://[^\"]+", address, first), {"get_stock": get_stock})
        assert capsys.readouterr().out.strip()
        scope: dict[str, Any] = {"ChatS2T": ChatS2T}
        exec(re.sub(r"vllm://[^\"]+", address, second), scope)
        assert scope["model"].invoke("Hello!").content
        monkeypatch.chdir(tmp_path)
        price = TokenPrice(Decimal("0.5"), Decimal("1.5"))
        scope |= {"RedisStore": lambda url: MemoryStore(), "Budget": Budget, "Ledger": Ledger, "price": price}
        scope |= {"Escalation": Escalation, "OpenAILLM": OpenAILLM}
        exec(re.sub(r"vllm://[^\"]+", address, team), scope)
        assert scope["model"].invoke("Hello!").content
        assert len(Ledger.reading(tmp_path / "team.db").records()) == 1
