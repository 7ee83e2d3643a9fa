"""Rollouts of models on servers: the labels of the same models here, resumable, and paid for."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import servers
import torch
from servers import CompletionServer, serving
from test_collect import FIRST, OTHER, SECOND, files
from training_fixtures import QUICK, save_model, tiny_pair, training, write_prompts
from typer.testing import CliRunner

from s2t_agents.budget import SQLiteStore
from s2t_agents.endpoints.completions import TOP_LOGPROBS
from s2t_agents.errors import (
    BudgetExceeded,
    ConfigError,
    EscalationFailed,
    ModelServerBusy,
    ModelServerError,
    UnpricedModel,
)
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import SelectorConfig
from s2t_agents.testing import tiny_model
from s2t_agents.training import served_reading
from s2t_agents.training.collect import collect
from s2t_agents.training.commands import app
from s2t_agents.training.config import CollectConfig, Models
from s2t_agents.training.groups import read_for
from s2t_agents.training.labels import LocalTeacher, along, label
from s2t_agents.training.remote import RemoteTeacher
from s2t_agents.training.served_costs import spent_in
from s2t_agents.training.settings import ServedPrice
from s2t_agents.training.shards import Shard, read_shards
from s2t_agents.training.tasks import JsonlTaskConfig
from s2t_agents.training.train import train

SAID = [([5, 6, 7], [8, 9, 10]), ([40, 20], [30]), ([9] * 30, [1, 2])]
PRICE = ServedPrice(input=Decimal(2), output=Decimal(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for name, model in zip(("slm", "llm"), tiny_pair()[:2], strict=True):
        save_model(model, folder / name)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    slm, llm = (LanguageModel.load(str(folder / name)) for name in ("slm", "llm"))
    return slm, llm


@pytest.fixture
def slm(pair: tuple[LanguageModel, LanguageModel]) -> Iterator[CompletionServer]:
    with serving(pair[0]) as running:
        yield running


@pytest.fixture
def llm(pair: tuple[LanguageModel, LanguageModel]) -> Iterator[CompletionServer]:
    with serving(pair[1]) as running:
        yield running


def address(server: CompletionServer) -> str:
    return f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"


def config(folder: Path, out: Path, slm: CompletionServer | None, llm: CompletionServer | None, **more: Any) -> Any:
    served: dict[str, Any] = {}
    if slm is not None:
        served |= {"slm_server": address(slm), "slm_price": PRICE}
    if llm is not None:
        served |= {"llm_server": llm.url, "llm_price": PRICE, "llm_tokenizer": str(folder / "llm")}
    models = Models(slm=str(folder / "slm"), llm=str(folder / "llm"), **{**served, **more})
    out.mkdir(exist_ok=True)
    task = JsonlTaskConfig(task="jsonl", path=write_prompts(out / "prompts.jsonl"))
    return CollectConfig(models=models, task=task, out=out / "rollouts", rollouts=QUICK)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder / "rollouts").items() if name.startswith("shard-")}


def assert_alike(some: list[Shard], others: list[Shard]) -> None:
    """The same rollouts, as far as a server rounds alike whatever else it answers at the moment."""
    for one, other in zip(some, others, strict=True):
        for each in fields(Shard):
            torch.testing.assert_close(getattr(one, each.name), getattr(other, each.name), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------- reading


def test_an_slm_on_a_server_is_read_as_it_is_here(
    pair: tuple[LanguageModel, LanguageModel], slm: CompletionServer
) -> None:
    here, teacher = pair[0], LocalTeacher(pair[1])
    far = LanguageModel.load(address(slm), tokenizer=here.tokenizer)
    for theirs, ours, known in zip(
        label(far, teacher, SAID, 8), label(here, teacher, SAID, 8), along(here, SAID), strict=True
    ):
        assert torch.equal(theirs.candidates, ours.candidates)
        torch.testing.assert_close(theirs.slm, ours.slm, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.llm, ours.llm, atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs.llm_best, ours.llm_best)
        # what is not listed is spread as evenly as it can be, and adds up to what is missing
        listed = known.topk(TOP_LOGPROBS).values.exp()
        rest = 1 - listed.sum(-1)
        most = -(listed * listed.log()).sum(-1) - rest * (rest / (here.vocab_size - TOP_LOGPROBS)).log()
        torch.testing.assert_close(theirs.entropy, most, atol=1e-2, rtol=1e-2)
        assert (theirs.entropy >= ours.entropy - 1e-3).all()
    assert len(slm.asked) == len(SAID)


def test_without_prompt_logprobs_every_candidate_is_asked_by_its_id(
    pair: tuple[LanguageModel, LanguageModel], llm: CompletionServer, folder: Path
) -> None:
    here = pair[0]
    llm.lists_prompts = False
    far = label(here, RemoteTeacher(llm.url, llm.model.name, here, tokenizer=str(folder / "llm")), SAID, 8)
    for theirs, ours in zip(far, label(here, LocalTeacher(pair[1]), SAID, 8), strict=True):
        torch.testing.assert_close(theirs.llm, ours.llm, atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs.llm_best, ours.llm_best)
        assert (theirs.kl <= ours.kl + 1e-3).all()
    assert sum("prompt_logprobs" not in body for body in llm.asked) == sum(len(ids) for _, ids in SAID)


def test_a_server_that_refuses_the_fields_it_does_not_know_is_asked_for_its_best(
    pair: tuple[LanguageModel, LanguageModel], llm: CompletionServer, folder: Path
) -> None:
    def strict(handler: servers.Handler, body: dict[str, Any]) -> None:
        unknown = next((name for name in ("prompt_logprobs", "logprob_token_ids") if name in body), None)
        if unknown is None:
            handler.complete(body)
        else:
            handler.reply({"error": {"message": f"extra fields not permitted: {unknown}"}}, 400)

    llm.fault = strict
    here = pair[0]
    far = label(here, RemoteTeacher(llm.url, llm.model.name, here, tokenizer=str(folder / "llm")), SAID, 8)
    for theirs, ours, all_of in zip(
        far, label(here, LocalTeacher(pair[1]), SAID, 8), along(pair[1], SAID), strict=True
    ):
        listed = (theirs.candidates[:, :, None] == all_of.topk(TOP_LOGPROBS).indices[:, None]).any(-1)
        torch.testing.assert_close(theirs.llm[listed], ours.llm[listed], atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs.llm_best, ours.llm_best)


def test_a_dialogue_is_read_by_one_request(
    pair: tuple[LanguageModel, LanguageModel], llm: CompletionServer, folder: Path
) -> None:
    teacher = RemoteTeacher(llm.url, llm.model.name, pair[0], tokenizer=str(folder / "llm"))
    turns = [FIRST, SECOND, OTHER]
    together = label(pair[0], teacher, turns, 8)
    assert len(llm.asked) == 2
    for turn, found in zip(turns, together, strict=True):
        (alone,) = label(pair[0], teacher, [turn], 8)
        torch.testing.assert_close(found.llm, alone.llm)


BROKEN = [
    servers.status(404),
    servers.says(b"[]"),
    servers.says({"choices": [{"logprobs": {"top_logprobs": [{"token_id:3": -1.0}]}, "prompt_logprobs": [None]}]}),
    servers.says({"choices": [{"logprobs": {"top_logprobs": [{"token_id:3": 0.0, "token_id:4": 0.0}]}}]}),
    servers.says({"choices": [{"logprobs": {"top_logprobs": [{"token_id:999999": -1.0}]}}]}),
    servers.hangs_up,
    servers.breaks_off,
]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_server_is_one_named_error_of_the_right_kind(
    pair: tuple[LanguageModel, LanguageModel],
    slm: CompletionServer,
    llm: CompletionServer,
    folder: Path,
    fault: servers.Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_reading, "ATTEMPTS", 2)
    far = LanguageModel.load(address(slm), tokenizer=pair[0].tokenizer)
    teacher = RemoteTeacher(llm.url, llm.model.name, pair[0], tokenizer=str(folder / "llm"))
    slm.fault = llm.fault = fault
    with pytest.raises(EscalationFailed, match="127.0.0.1|server|more than 1"):
        label(pair[0], teacher, SAID, 8)
    with pytest.raises(ModelServerError, match="127.0.0.1"):
        label(far, LocalTeacher(pair[1]), SAID, 8)


# ------------------------------------------------------------- collecting


@pytest.mark.parametrize("served", ["slm", "llm", "both"])
def test_collecting_from_servers_makes_the_same_answers_and_counts_every_token(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path, served: str
) -> None:
    far = config(folder, tmp_path / "far", slm if served != "llm" else None, llm if served != "slm" else None)
    collect(far)
    collect(config(folder, tmp_path / "here", None, None))
    there, here = (read_shards(tmp_path / each / "rollouts") for each in ("far", "here"))
    for theirs, ours in zip(there, here, strict=True):
        for name in ("prompt_ids", "prompt_ends", "ids", "ends", "item", "right", "candidates"):
            assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
        torch.testing.assert_close(theirs.slm, ours.slm, atol=1e-4, rtol=1e-4)
        assert (theirs.llm >= ours.llm - 1e-3).all()  # of unlisted ones an upper bound is known
    read = sum(len(body["prompt"]) for server in (slm, llm) for body in server.asked)
    written = sum(1 for server in (slm, llm) for body in server.asked if not body.get("stream"))
    written += sum(len(shard.ids) for shard in there) if served != "llm" else 0
    state = spent_in(tmp_path / "far" / "rollouts")
    assert state is not None
    assert state.holds == 0
    # streams are left at an answer's end, when the server may have written on
    assert read + written <= state.spent["llm_tokens"] <= read + written + slm.streamed
    assert state.spent["usd"] == (2 * read + 10 * (Decimal(state.spent["llm_tokens"] or 0) - read)) / 10**6
    assert spent_in(tmp_path / "here" / "rollouts") is None


def test_what_a_server_writes_to_its_cache_is_paid_for_and_held_before(
    llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    def writes_all(handler: servers.Handler, body: dict[str, Any]) -> None:
        reply = llm.answer(body)
        reply["usage"]["prompt_tokens_details"] = {"cache_write_tokens": reply["usage"]["prompt_tokens"]}
        handler.reply(reply)

    llm.fault = writes_all
    price = ServedPrice(input=Decimal(2), output=Decimal(10), cache_write=Decimal(5))
    far = config(folder, tmp_path, None, llm, llm_price=price)
    collect(far, usd=Decimal(1))
    state = spent_in(far.out)
    assert state is not None
    assert state.spent["usd"] == sum(5 * len(body["prompt"]) + 10 for body in llm.asked) / Decimal(10**6)
    assert not any(state.overrun.values())


def test_no_event_loop_waits_for_the_budgets_store(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loops: dict[str, list[bool]] = {"reserve": [], "settle": [], "release": []}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any) -> Any:
            in_loops[name].append(asyncio._get_running_loop() is not None)
            return call(*arguments)

        return watching

    for name in in_loops:
        monkeypatch.setattr(SQLiteStore, name, watched(name, getattr(SQLiteStore, name)))
    slm.fault, llm.fault = servers.in_turn(None, servers.status(503)), servers.in_turn(None, servers.status(503))
    collect(config(folder, tmp_path, slm, llm))
    assert all(in_loops.values())
    assert not any(where for seen in in_loops.values() for where in seen)


def test_an_interrupted_collection_goes_on_where_it_was_and_pays_for_no_shard_twice(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_reading, "ATTEMPTS", 2)
    far = config(folder, tmp_path / "broken", slm, llm)
    answered = 0

    def dies_after_six(handler: servers.Handler, body: dict[str, Any]) -> None:
        nonlocal answered
        answered += 1
        handler.complete(body) if answered <= 6 else handler.reply({"error": {"message": "gone"}}, 503)

    llm.fault = dies_after_six
    with pytest.raises(EscalationFailed, match="503"):
        collect(far)
    whole = len(shards_of(tmp_path / "broken"))
    assert whole == 1
    llm.fault, slm.asked[:], llm.asked[:] = None, [], []
    collect(far)
    assert len(llm.asked) == 8  # items of the two shards that were missing
    assert {tuple(body["prompt"]) for body in slm.asked}.isdisjoint(
        tuple(prompt) for prompt, _, _ in read_shards(tmp_path / "broken" / "rollouts")[0].trajectories()
    )
    collect(config(folder, tmp_path / "whole", slm, llm))
    assert_alike(read_shards(tmp_path / "broken" / "rollouts"), read_shards(tmp_path / "whole" / "rollouts"))


def test_a_server_that_declines_now_and_then_is_asked_again(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    collect(config(folder, tmp_path / "calm", slm, llm))
    busy, full = servers.status(503), servers.status(429, Retry_After="0")
    llm.fault = servers.in_turn(busy, None, full, None, servers.breaks_off, None, busy)
    slm.fault = servers.in_turn(None, full, None, busy)
    collect(config(folder, tmp_path / "busy", slm, llm))
    assert_alike(read_shards(tmp_path / "calm" / "rollouts"), read_shards(tmp_path / "busy" / "rollouts"))


def test_a_limit_is_never_passed_and_the_next_run_goes_on(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    far = config(folder, tmp_path, slm, llm)
    limit = Decimal("0.003")
    with pytest.raises(BudgetExceeded, match="usd"):
        collect(far, usd=limit)
    state = spent_in(far.out)
    assert state is not None
    assert 0 < state.spent["usd"] <= limit
    assert state.holds == 0
    assert not any(state.overrun.values())
    kept = shards_of(tmp_path)
    assert len(kept) < 3
    collect(far)
    assert len(shards_of(tmp_path)) == 3
    assert kept.items() <= shards_of(tmp_path).items()
    after = spent_in(far.out)
    assert after is not None
    assert after.spent["usd"] > state.spent["usd"]


def test_a_limit_that_means_nothing_is_refused_before_anything_is_asked(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="both models are on this machine"):
        collect(config(folder, tmp_path, None, None), usd=Decimal(1))
    with pytest.raises(UnpricedModel, match="slm_price"):
        collect(config(folder, tmp_path, slm, llm, slm_price=None), usd=Decimal(1))
    assert not slm.asked
    assert not llm.asked


def test_the_keys_go_to_their_servers(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2T_TEST_SLM", "sk-small")
    monkeypatch.setenv("S2T_TEST_LLM", "sk-large")
    collect(config(folder, tmp_path, slm, llm, slm_key_env="S2T_TEST_SLM", llm_key_env="S2T_TEST_LLM"))
    assert set(slm.keys) == {"Bearer sk-small"}
    assert set(llm.keys) == {"Bearer sk-large"}


def test_a_server_that_is_down_is_told_as_the_slms(slm: CompletionServer, folder: Path, tmp_path: Path) -> None:
    slm.listing_fault = servers.status(503)
    with pytest.raises(ModelServerBusy, match="503"):
        collect(config(folder, tmp_path, slm, None))


def test_a_selector_is_trained_on_a_servers_rollouts_by_the_checkpoint_that_it_serves_alone(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    far = config(folder, tmp_path, slm, llm)
    collect(far)
    fit = training("head", far.out, tmp_path / "head").model_copy(update={"models": far.models})
    train(fit)
    assert SelectorConfig.load(tmp_path / "head").kind == "head"
    with pytest.raises(ConfigError, match="rank the same candidate first at"):
        read_for(tiny_model("qwen3", seed=77), [far.out], 4)


def test_the_command_shows_what_was_spent(
    slm: CompletionServer, llm: CompletionServer, folder: Path, tmp_path: Path
) -> None:
    toml = tmp_path / "pair.toml"
    train, heldout, test = (
        f'task = "jsonl"\npath = "{write_prompts(tmp_path / f"{first}.jsonl", first=first)}"' for first in (0, 100, 200)
    )
    toml.write_text(
        f"""
out = "{tmp_path / "runs"}"
[models]
slm = "{folder / "slm"}"
slm_server = "{address(slm)}"
slm_price = {{ input = 0.02, output = 0.04 }}
llm = "{llm.model.name}"
llm_tokenizer = "{folder / "llm"}"
llm_server = "{llm.url}"
llm_price = {{ input = 0.5, output = 1.5, cached = 0.05 }}
[tasks.train]
{train}
[tasks.heldout]
{heldout}
[tasks.test]
{test}
[collect]
k = 8
max_tokens = 12
shard_items = 4
[train.head]
"""
    )
    told = CliRunner().invoke(app, ["collect", str(toml), "--part", "train", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert Decimal(found["served_usd"]) > 0
    assert found["served_tokens"] > 0
    shown = CliRunner().invoke(app, ["collect", str(toml), "--part", "train"])
    assert f"{Decimal(found['served_usd']):f}" in shown.stdout
    late = CliRunner().invoke(app, ["collect", str(toml), "--part", "heldout", "--usd", "0.0000001"])
    assert late.exit_code == 2
    assert "0.0000001" in late.stderr
