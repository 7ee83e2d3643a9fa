"""A model on a server: the answers of the same model in this process, token for token, over a real HTTP server."""

import asyncio
import math
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import servers
import torch
from pydantic import SecretStr
from servers import CompletionServer, serving
from test_selectors import activated, adapted, head, published

from s2t_agents import Budget, ChatS2T, Engine, Escalation, LanguageModel, Ledger, LocalLLM
from s2t_agents.backends.completions.backend import CompletionsBackend, server_url
from s2t_agents.endpoints.spending import Spending
from s2t_agents.errors import (
    BudgetExceeded,
    ConfigError,
    EscalationFailed,
    ModelNotFound,
    ModelServerBusy,
    ModelServerDown,
    ModelServerError,
    ModelServerRefused,
    TokenizerMismatch,
)
from s2t_agents.grammar.allowed_tokens import AllowedTokens
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import Trigger, always, entropy, never, probe, when
from s2t_agents.types import Sampling, Step

PROMPT = [10, 20, 30, 40, 50]
KEY = "sk-do-not-tell-77ab"
WEATHER: dict[str, Any] = {
    "name": "lookup",
    "description": "Looks a thing up.",
    "parameters": {
        "type": "object",
        "properties": {"thing": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
        "required": ["thing", "count"],
    },
}
NOTE: dict[str, Any] = {
    "name": "note",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["text", "count", "tags"],
    },
}
RARE: dict[str, Any] = {
    "name": "pick",
    "parameters": {
        "type": "object",
        "properties": {name: {"enum": ["qa", "zb", "xc", "jd"]} for name in ("one", "two", "three", "four")},
        "required": ["one", "two", "three", "four"],
    },
}
"""Few tokens are legal: random weights seldom have one of them among their best 20."""


def address(server: CompletionServer) -> str:
    return f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"


def remote(server: CompletionServer, **options: Any) -> LanguageModel:
    return LanguageModel.load(address(server), tokenizer=server.model.tokenizer, **options)


def greedy(model: LanguageModel, prompt: list[int] = PROMPT, tokens: int = 24, **more: Any) -> list[Step]:
    engine = Engine(model, **more)
    return list(engine.steps(prompt, Sampling(max_tokens=tokens)))


def ids(steps: list[Step]) -> list[int]:
    return [step.token_id for step in steps]


@pytest.fixture(scope="module")
def demo() -> Iterator[CompletionServer]:
    """The bundled model on a server."""
    with serving(LanguageModel.load("s2t-demo")) as running:
        yield running


@pytest.fixture
def far(demo: CompletionServer) -> ChatS2T:
    return chat(demo)


def chat(server: CompletionServer, **more: Any) -> ChatS2T:
    kwargs = {"tokenizer": server.model.tokenizer, **more.pop("model_kwargs", {})}
    return ChatS2T(model=address(server), model_kwargs=kwargs, max_tokens=96, **more)


def near(server: CompletionServer, **more: Any) -> ChatS2T:
    return ChatS2T(model=server.model, max_tokens=96, **more)


# ------------------------------------------------------------- what it cannot do

PROBE = probe(torch.zeros(3), 0.0, above=0.5)


@pytest.mark.parametrize("trigger", [PROBE, PROBE | always(), entropy(above=1.0) & (never() | PROBE)], ids=repr)
def test_a_trigger_that_reads_hidden_states_is_refused_before_a_token_is_asked_for(
    server: CompletionServer, trigger: Trigger
) -> None:
    with pytest.raises(ConfigError, match="no hidden states"):
        Engine(remote(server), trigger=trigger)
    assert server.asked == []


@pytest.mark.parametrize("kind", [activated, adapted, head, published])
def test_a_selector_of_another_backend_is_refused_before_a_token_is_asked_for(
    server: CompletionServer, kind: Any
) -> None:
    with pytest.raises(ConfigError, match="CompletionsBackend"):
        Engine(remote(server), selector=kind(server.model, trained=False))
    assert server.asked == []


def test_what_a_condition_reads_of_hidden_states_is_an_error_that_names_the_backend(server: CompletionServer) -> None:
    with pytest.raises(ConfigError, match=r"no hidden states .*CompletionsBackend"):
        greedy(remote(server), trigger=when(lambda proposal: bool(proposal.hidden.sum() > 0)), selector=Agreeing())


def test_candidates_cannot_be_scored_on_a_server(server: CompletionServer) -> None:
    with pytest.raises(ConfigError, match="cannot score candidates"):
        finish(TokenSequence(remote(server)).scoring_candidates(torch.tensor([1, 2])))


class Agreeing:
    def scores(self, proposal: Proposal) -> torch.Tensor:
        return proposal.candidate_log_probs


# ------------------------------------------------------------- the same tokens


def test_greedy_tokens_are_those_of_the_same_model_here_and_come_by_one_request(server: CompletionServer) -> None:
    assert ids(greedy(remote(server))) == ids(greedy(server.model))
    assert len(server.asked) == 1


def test_a_long_answer_takes_a_request_for_every_stretch_that_is_read_ahead(server: CompletionServer) -> None:
    assert ids(greedy(remote(server, read_ahead=10))) == ids(greedy(server.model))
    assert [len(body["prompt"]) for body in server.asked] == [5, 15, 25]
    assert [body["max_tokens"] for body in server.asked] == [10, 10, 4]


def test_answers_tool_calls_and_structured_replies_are_those_of_the_same_model_here(demo: CompletionServer) -> None:
    for question in ("Hello!", "What is 12 + 30?", "Who has the most?"):
        assert chat(demo).invoke(question).content == near(demo).invoke(question).content
    for choice in ("auto", "any"):
        far, here = (each.bind_tools([WEATHER], tool_choice=choice) for each in (chat(demo), near(demo)))
        assert calls(far.invoke("Look up 3 apples.")) == calls(here.invoke("Look up 3 apples."))
    schema = {"title": "Answer", **WEATHER["parameters"]}
    far, here = (each.with_structured_output(schema) for each in (chat(demo), near(demo)))
    assert far.invoke("3 apples") == here.invoke("3 apples")


def calls(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def test_where_no_known_token_is_legal_the_legal_ones_are_asked_for() -> None:
    with serving(tiny_model(seed=3, max_position_embeddings=2048)) as server:  # random weights want anything but JSON
        far, here = (each.bind_tools([RARE], tool_choice="any") for each in (chat(server), near(server)))
        assert calls(far.invoke("3 apples")) == calls(here.invoke("3 apples"))
        assert any("allowed_token_ids" in body for body in server.asked)


@pytest.mark.parametrize("max_tokens", [34, 42, 54])
@pytest.mark.parametrize("tool", [WEATHER, NOTE], ids=["short text", "text, number, list"])
def test_near_the_token_limit_the_likeliest_legal_tokens_are_asked_for_first(
    demo: CompletionServer, tool: dict[str, Any], max_tokens: int
) -> None:
    far, here = (each.bind_tools([tool], tool_choice="any") for each in (chat(demo), near(demo)))
    demo.fault = lambda handler, body: handler.complete({**body, "logprobs": 1})  # mostly, its best is not legal
    try:
        for question in ("3 apples", "Look it up", "Tell me"):
            answers = [each.invoke(question, max_tokens=max_tokens) for each in (far, here)]
            assert calls(answers[0]) == calls(answers[1]) != []
    finally:
        demo.fault = None


def test_the_llm_picks_as_it_does_here_and_the_stream_goes_on_from_its_pick(server: CompletionServer) -> None:
    llm = LocalLLM(tiny_model(seed=9))
    asks = {"trigger": always(), "escalation": Escalation(llm, margin=1.0)}
    far, here = greedy(remote(server), **asks), greedy(server.model, **asks)
    assert ids(far) == ids(here)
    assert [each.picked_by for each in far] == [each.picked_by for each in here]
    flips = sum(step.flipped for step in far[:-1])
    assert flips
    assert len(server.asked) == 1 + flips


def test_a_budget_ends_the_questions_and_the_ledger_has_every_one(demo: CompletionServer) -> None:
    ledger, budget = Ledger(), Budget(escalations=2)
    model = chat(
        demo,
        trigger=entropy(above=0.0),
        escalation=Escalation(LocalLLM("s2t-demo-llm"), margin=1.0),
        budget=budget,
        ledger=ledger,
    )
    metadata = model.invoke("What is 12 + 30?").response_metadata["s2t"]
    assert metadata["escalations"] == 2
    assert metadata["refused"] > 0
    assert budget.state().spent["escalations"] == 2
    assert sum(receipt.outcome == "picked" for record in ledger.records() for receipt in record.receipts) == 2


def test_drawn_tokens_are_among_the_best_and_a_seed_repeats_them(server: CompletionServer) -> None:
    model = remote(server)
    draw = Sampling(max_tokens=12, temperature=1.0, seed=4)
    one, two = (ids(list(Engine(model).steps(PROMPT, draw))) for _ in range(2))
    assert one == two != ids(greedy(model, tokens=12))


def test_eight_at_once_each_get_their_own_answer(server: CompletionServer) -> None:
    model = remote(server)
    prompts = [[10 + at, 20, 30] for at in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: ids(greedy(model, prompt, 12)), prompts))
    assert found == [ids(greedy(server.model, prompt, 12)) for prompt in prompts]


async def test_async_streaming_gives_the_same_text(far: ChatS2T) -> None:
    text = "".join([str(chunk.content) async for chunk in far.astream("What is 12 + 30?")])
    assert text == far.invoke("What is 12 + 30?").content


def of_the_model(server: CompletionServer, steps: list[Step]) -> list[float]:
    """The model's own log-probabilities of what the steps tell."""
    found: list[float] = []
    for at, step in enumerate(steps):
        sequence = TokenSequence(server.model)
        sequence.append(PROMPT + ids(steps[:at]))
        found += sequence.logits.log_softmax(0)[[token for token, _ in step.logprobs]].tolist()
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 3, 20])
def test_log_probabilities_are_the_servers_own(server: CompletionServer, count: int, temperature: float) -> None:
    sampling = Sampling(max_tokens=8, logprobs=count, temperature=temperature, seed=2)
    steps = list(Engine(remote(server), trigger=never()).steps(PROMPT, sampling))
    assert [value for step in steps for _, value in step.logprobs] == pytest.approx(
        of_the_model(server, steps), abs=1e-4
    )


@pytest.mark.parametrize("legal", [[7, 9], list(range(100, 200))])
def test_log_probabilities_under_a_grammar_are_over_its_legal_tokens(
    server: CompletionServer, legal: list[int]
) -> None:
    model = remote(server)
    sampling = Sampling(max_tokens=3, logprobs=20)
    steps = list(Engine(model).steps(PROMPT, sampling, grammar=AllowedTokens(legal, model.vocab_size)))
    for step in steps:
        assert sum(math.exp(value) for _, value in step.logprobs[1:]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke"])
async def test_what_the_servers_cache_had_is_not_said(far: ChatS2T, way: str) -> None:
    for _ in range(2):
        if way == "stream":
            _, *rest = far.stream("Hello!")
            [answer] = [chunk for chunk in rest if chunk.usage_metadata]
        else:
            answer = far.invoke("Hello!") if way == "invoke" else await far.ainvoke("Hello!")
        assert answer.response_metadata["s2t"]["reused_tokens"] is None
        assert "input_token_details" not in answer.usage_metadata


# ------------------------------------------------------------- who leaves, and faults


def test_who_leaves_hangs_up(server: CompletionServer) -> None:
    server.token_s = 0.02
    steps = Engine(remote(server)).steps(PROMPT, Sampling(max_tokens=200))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert eventually(lambda: server.dropped == 1)
    assert server.streamed < 30


def test_a_sequence_that_is_dropped_in_the_middle_hangs_up_and_is_paid_for(server: CompletionServer) -> None:
    server.token_s = 0.02
    model, budget = remote(server), Budget(llm_tokens=1000)
    assert isinstance(model.backend, CompletionsBackend)
    model.backend.spending = Spending(budget)
    sequence = TokenSequence(model)
    sequence.append(PROMPT)
    assert budget.state().holds == 1
    del sequence
    assert eventually(lambda: not budget.state().holds)
    assert budget.state().spent["llm_tokens"] > len(PROMPT)
    assert eventually(lambda: server.dropped == 1)


async def test_a_cancelled_task_hangs_up(demo: CompletionServer) -> None:
    dropped, demo.token_s = demo.dropped, 0.02
    try:
        task = asyncio.create_task(chat(demo).ainvoke("Tell me a story."))
        while not demo.asked or "stream" not in demo.asked[-1]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(eventually, lambda: demo.dropped == dropped + 1)
    finally:
        demo.token_s = 0.0


def eventually(true: Any, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(true())


def test_a_server_that_declines_is_asked_again(server: CompletionServer) -> None:
    server.fault = servers.first(2, servers.status(503))
    assert ids(greedy(remote(server))) == ids(greedy(server.model))
    server.fault = servers.status(429, "full")
    with pytest.raises(ModelServerBusy, match="429: full"):
        greedy(remote(server, attempts=2))


def states(code: Any) -> servers.Fault:
    """Answer 200, and an error in the stream."""
    return lambda handler, body: handler.stream(iter([{"error": {"message": "overloaded", "code": code}}]))


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_that_declines_in_its_stream_is_asked_again_too(server: CompletionServer, code: int) -> None:
    server.fault = servers.first(2, states(code))
    assert ids(greedy(remote(server))) == ids(greedy(server.model))
    server.fault = states(code)
    with pytest.raises(ModelServerBusy, match=str(code)):
        greedy(remote(server, attempts=2))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(400, ModelServerRefused), (401, ModelServerRefused), (None, ModelServerError), ("x", ModelServerError)],
)
def test_other_errors_in_its_stream_are_of_their_kind(server: CompletionServer, code: Any, kind: type) -> None:
    server.fault = states(code)
    with pytest.raises(ModelServerError, match="an error of its own") as caught:
        greedy(remote(server))
    assert type(caught.value) is kind


def test_a_stream_that_breaks_off_goes_on_from_where_it_was(server: CompletionServer) -> None:
    def short(handler: servers.Handler, body: dict[str, Any]) -> None:
        handler.stream(event for event, _ in zip(handler.server.events(body), range(7), strict=False))

    def cut(handler: servers.Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        events = handler.server.events(body)
        for _ in range(5):
            handler.chunk(b"data: " + servers.json.dumps(next(events)).encode() + b"\n\n")
        servers.hangs_up(handler, body)

    for fault in (short, cut):
        server.fault, server.asked[:] = fault, []
        assert ids(greedy(remote(server))) == ids(greedy(server.model))
        assert len(server.asked) > 3


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_stream_that_stalls_has_its_time_once(server: CompletionServer, tokens: int) -> None:
    model = remote(server, timeout_s=0.4)
    server.fault, server.asked[:] = servers.stalls_after(tokens), []
    with pytest.raises(ModelServerError, match=r"no token within 0\.4 s"):
        greedy(model)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        servers.hangs,
        servers.hangs_before_headers,
        servers.drips,
        servers.hangs_up,
        servers.breaks_off,
        servers.breaks_off_a_chunk,
        servers.no_http,
        servers.compressed,
        servers.status(404),
        servers.status(401),
        servers.says(b"data: {\n\n"),
        servers.says(b"data: []\n\n"),
        servers.says(b'data: {"error": {"message": "out of memory"}}\n\n'),
        servers.says(b'data: {"choices": [{"logprobs": {"tokens": ["hi"], "top_logprobs": [{"hi": -1.0}]}}]}\n\n'),
        *(
            servers.says(b'data: {"choices": [{"logprobs": {"tokens": %s, "top_logprobs": [%s]}}]}\n\n' % each)
            for each in [
                (b'["token_id:3"]', b'{"token_id:4": -1.0}'),
                (b'["token_id:3"]', b'{"token_id:3": 0.5}'),
                (b'["token_id:3"]', b'{"token_id:3": NaN}'),
                (b'["token_id:3"]', b'{"token_id:3": -0.1, "token_id:4": -0.1}'),
                (b'["token_id:99999999"]', b'{"token_id:99999999": -0.1}'),
                (b'["token_id:-3"]', b'{"token_id:-3": -0.1}'),
                (b'["token_id:3", "token_id:4"]', b'{"token_id:3": -0.1}'),
            ]
        ),
        servers.says(b"data: " + b"x" * (1 << 21)),
    ],
)
def test_a_broken_server_is_one_named_error_and_never_a_token(server: CompletionServer, fault: servers.Fault) -> None:
    model = remote(server, timeout_s=0.4, attempts=1)
    server.fault = fault
    with pytest.raises(ModelServerError, match="server|127.0.0.1|answer"):
        greedy(model)


async def asked(model: ChatS2T, way: str) -> None:
    if way == "ainvoke":
        await model.ainvoke("Hello!")
    elif way == "stream":
        list(model.stream("Hello!"))
    elif way == "batch":
        model.batch(["Hello!"])
    else:
        model.invoke("Hello!")


KINDS: list[tuple[servers.Fault, type[ModelServerError]]] = [
    (servers.status(429, "full", Retry_After="0"), ModelServerBusy),
    *((servers.status(code), ModelServerBusy) for code in (500, 502, 503, 504)),
    *((servers.status(code), ModelServerRefused) for code in (400, 401, 403, 404, 413, 422)),
    (servers.hangs_before_headers, ModelServerError),
    (servers.breaks_off_a_chunk, ModelServerError),
    (servers.says(b'data: {"error": {"message": "out of memory"}}\n\n'), ModelServerError),
]


@pytest.mark.parametrize(("fault", "kind"), KINDS)
async def test_a_fault_of_the_models_own_server_is_no_failed_escalation(
    server: CompletionServer, fault: servers.Fault, kind: type[ModelServerError]
) -> None:
    llm = LocalLLM(tiny_model(seed=9))
    settings: dict[str, Any] = {"trigger": always(), "escalation": Escalation(llm, margin=1.0)}
    server.fault = fault
    for at, ask in enumerate(("invoke", "ainvoke", "stream", "batch")):
        options = {"timeout_s": 0.4, "attempts": 1, "connect_s": 5.0 + at}  # other options: a breaker of its own
        model = chat(server, model_kwargs=options, **settings)
        with pytest.raises(ModelServerError, match=f"127.0.0.1:{server.server_port}/{server.model.name}") as caught:
            await asked(model, ask)
        assert type(caught.value) is kind
        assert not isinstance(caught.value, EscalationFailed)
        assert caught.value.retryable is (kind is not ModelServerRefused)
        assert caught.value.hint


def test_a_fault_in_the_middle_of_an_answer_is_told_alike_and_the_spent_money_stays_counted(
    server: CompletionServer,
) -> None:
    ledger, budget, llm = Ledger(), Budget(escalations=1000), LocalLLM(tiny_model(seed=9))
    settings: dict[str, Any] = {"trigger": always(), "escalation": Escalation(llm, margin=1.0)}
    model = chat(server, budget=budget, ledger=ledger, model_kwargs={"attempts": 1}, **settings)
    whole = str(model.invoke("Hello!").content)
    spent = budget.state().spent["escalations"]
    server.fault = servers.in_turn(None, None, None, servers.status(503, Retry_After="7"))
    begun: list[str] = []
    with pytest.raises(ModelServerBusy, match="answered 503") as caught:
        begun.extend(str(chunk.content) for chunk in model.stream("Hello!"))
    assert caught.value.wait_s == 7
    assert whole.startswith("".join(begun))
    assert budget.state().spent["escalations"] > spent
    assert budget.state().spent["escalations"] == sum(len(record.receipts) for record in ledger.records())
    assert budget.state().held["escalations"] == 0


def test_a_server_that_cannot_be_loaded_from_tells_why(server: CompletionServer) -> None:
    def load(**options: Any) -> None:
        LanguageModel.load(address(server), tokenizer=server.model.tokenizer, **options)

    for fault, kind in [
        (servers.status(503), ModelServerBusy),
        (servers.status(429, "full"), ModelServerBusy),
        (servers.status(401, "no such key"), ModelServerRefused),
        (servers.keeps_waiting, ModelServerError),
    ]:
        server.listing_fault = fault
        with pytest.raises(ModelServerError, match="127.0.0.1") as caught:
            load(connect_s=0.2)
        assert type(caught.value) is kind
    server.listing_fault = servers.status(404)  # a server that lists nothing
    load(context_window=512)


def test_a_server_that_is_gone_is_not_waited_for_again_and_again(server: CompletionServer) -> None:
    model = remote(server)
    port, server.fault = server.server_port, servers.hangs_up
    server.shutdown()
    server.server_close()
    for _ in range(3):
        with pytest.raises(ModelServerError, match="127.0.0.1|left alone"):
            greedy(model)
    with pytest.raises(ModelServerError, match="left alone"):
        greedy(model)
    with pytest.raises(ModelServerDown):
        LanguageModel.load(f"vllm://127.0.0.1:{port}/x", tokenizer=server.model.tokenizer)


def test_no_end_token_is_guessed_where_a_server_hides_several(server: CompletionServer) -> None:
    server.fault = lambda handler, body: handler.stream(iter([]))
    only = server.model.tokenizer.eos_token_id
    assert ids(greedy(remote(server))) == [only]
    with pytest.raises(ModelServerError, match="does not show"):
        greedy(remote(server, eos_token_ids=[only, 7]))


def test_a_server_without_allowed_token_ids_says_so_instead_of_writing_what_is_not_legal() -> None:
    with serving(tiny_model(seed=3, max_position_embeddings=2048)) as server:
        server.fault = lambda handler, body: handler.complete({**body, "allowed_token_ids": None})
        with pytest.raises(ModelServerRefused, match="knows no allowed_token_ids"):
            chat(server).bind_tools([RARE], tool_choice="any").invoke("3 apples")


def test_a_question_for_legal_tokens_is_asked_again_too() -> None:
    with serving(tiny_model(seed=3, max_position_embeddings=2048)) as server:
        refused: list[dict[str, Any]] = []

        def busy_once(handler: servers.Handler, body: dict[str, Any]) -> None:
            if "allowed_token_ids" in body and not refused:
                refused.append(body)
                handler.reply({"error": {"message": "full"}}, 503)
            else:
                handler.complete(body)

        server.fault = busy_once
        far, here = (each.bind_tools([RARE], tool_choice="any") for each in (chat(server), near(server)))
        assert calls(far.invoke("3 apples")) == calls(here.invoke("3 apples"))
        assert refused


# ------------------------------------------------------------- deadlines


def stalls_at_legal_tokens(handler: servers.Handler, body: dict[str, Any]) -> None:
    stalled = servers.hangs_before_headers if "allowed_token_ids" in body else servers.Handler.complete
    stalled(handler, body)


@pytest.mark.parametrize("mode", ["degrade", "raise", "ask"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "batch"])
@pytest.mark.parametrize(
    "fault",
    [servers.hangs_before_headers, servers.stalls_after(3), stalls_at_legal_tokens],
    ids=["before it answers", "in its answer", "asked for legal tokens"],
)
async def test_a_budgets_seconds_end_the_wait_for_a_server_that_stalls(
    fault: servers.Fault, way: str, mode: Any
) -> None:
    with serving(tiny_model(seed=3, max_position_embeddings=2048)) as server:
        model: Any = chat(server, ledger=(ledger := Ledger()))
        if fault is stalls_at_legal_tokens:
            model = model.bind_tools([RARE], tool_choice="any")
        await asked(model, "invoke")
        server.fault = fault
        budget = Budget(seconds=0.6, on_exhausted=mode, name="short")
        if mode == "degrade":
            await asked(model.bind(s2t_budget=budget), way)
            stopped = ledger.records()[-1].stopped_by
            assert stopped is not None
            assert (stopped.budget, stopped.unit, stopped.limit) == ("short", "seconds", 0.6)
            assert ledger.records()[-1].finish_reason == "length"
        else:
            with pytest.raises(BudgetExceeded, match=r"'short': its 0.6 seconds are over"):
                await asked(model.bind(s2t_budget=budget), way)
        assert budget.state().holds == 0
        server.fault = None
        await asked(model, "invoke")  # its breaker is not opened by it


@pytest.mark.parametrize("tokens", [0, 3])
def test_more_seconds_let_an_answer_go_on_waiting_for_its_server(server: CompletionServer, tokens: int) -> None:
    model = chat(server)
    whole, requests = model.invoke("Hello!").content, len(server.asked)
    budget = Budget(seconds=0.6)

    def extended(handler: servers.Handler, body: dict[str, Any]) -> None:
        def events() -> Iterator[dict[str, Any]]:
            for at, event in enumerate(handler.server.events(body)):
                if at == tokens:
                    budget.extend(seconds=600)
                    time.sleep(1)
                yield event

        handler.stream(events())

    server.fault, server.asked[:] = servers.in_turn(extended), []
    assert model.invoke("Hello!", s2t_budget=budget).content == whole
    assert len(server.asked) == requests


# ------------------------------------------------------------- settings


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("options", [{}, {"context_window": 512}])
def test_a_key_that_the_environment_lacks_is_named_before_anything_is_asked(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("S2T_NO_SUCH_KEY", raising=False)
    else:
        monkeypatch.setenv("S2T_NO_SUCH_KEY", value)
    with pytest.raises(ModelServerRefused, match="the environment variable S2T_NO_SUCH_KEY holds no API key"):
        remote(server, api_key_env="S2T_NO_SUCH_KEY", **options)
    assert not server.seen


def test_the_wrong_model_or_tokenizer_is_told_before_anything_is_generated(server: CompletionServer) -> None:
    with pytest.raises(ModelNotFound, match="does not serve 'other'"):
        LanguageModel.load(f"vllm://127.0.0.1:{server.server_port}/other", tokenizer=server.model.tokenizer)
    with pytest.raises(TokenizerMismatch, match="do not spell"):
        LanguageModel.load(address(server), tokenizer=LanguageModel.load("s2t-demo").tokenizer)
    with pytest.raises(ModelNotFound, match="tokenizer of 'vllm://"):
        LanguageModel.load(address(server))
    assert not server.asked


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "vllm://"}, "vllm://host:port/name"),
        ({"model": "vllm://127.0.0.1:1"}, "vllm://host:port/name"),
        ({"model": "vllm://127.0.0.1:99999/x"}, "URL"),
        ({"dtype": "bfloat16"}, "dtype is set"),
        ({"device": "cpu"}, "device is set"),
        ({"selector": "s2t-demo-head"}, "."),
        ({"model_kwargs": {"timeout_s": 0}}, "timeout_s is 0"),
        ({"model_kwargs": {"read_ahead": 0}}, "read_ahead is 0"),
        ({"model_kwargs": {"n_ctx": 3}}, "takes no such option"),
    ],
)
def test_a_setting_that_cannot_be_is_one_config_error(
    server: CompletionServer, setting: dict[str, Any], message: str
) -> None:
    kwargs = {"tokenizer": server.model.tokenizer, **setting.pop("model_kwargs", {})}
    with pytest.raises(ConfigError, match=message):
        ChatS2T(**{"model": address(server), **setting}, model_kwargs=kwargs).invoke("Hello!")
    assert not server.asked


def test_a_call_that_names_another_model_gives_it_the_options_of_its_own_engine(server: CompletionServer) -> None:
    served = chat(server, model_kwargs={"timeout_s": 9.0, "attempts": 2})
    here = ChatS2T(max_tokens=4)
    assert served.invoke("Hello!", model="s2t-demo", max_tokens=4).content == here.invoke("Hello!").content
    options = {"tokenizer": server.model.tokenizer, "attn_implementation": "eager", "n_ctx": 64}
    other = ChatS2T(model="s2t-demo", max_tokens=96, model_kwargs=options)
    assert other.invoke("Hello!", model=address(server)).content == chat(server).invoke("Hello!").content


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("models.example:8000", "https://models.example:8000/v1"),
        ("10.0.0.7", "https://10.0.0.7/v1"),
        ("[2001:db8::1]:8000", "https://[2001:db8::1]:8000/v1"),
    ],
)
def test_other_machines_are_asked_by_https_unless_plain_http_is_permitted(host: str, url: str) -> None:
    assert server_url(host, allow_http=False) == url
    assert server_url(host, allow_http=True) == url.replace("https://", "http://")


def test_two_keys_are_two_connections(server: CompletionServer) -> None:
    models = {key: chat(server, model_kwargs={"api_key": SecretStr(key)}) for key in ("sk-one", "sk-two")}
    for key, model in models.items():
        model.invoke("Hello!")
        assert server.keys[-1] == f"Bearer {key}"


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    model = chat(server, model_kwargs={"api_key": KEY})
    model.invoke("Hello!")
    assert server.keys
    assert set(server.keys) == {f"Bearer {KEY}"}
    server.fault = servers.status(401, f"the key {KEY} is wrong")
    with pytest.raises(ModelServerRefused) as refused:
        model.invoke("Hello again!")
    shown = [str(refused.value), repr(model), str(model.model_dump()), str(model.lc_attributes), caplog.text]
    assert not any(KEY in text for text in shown)
    assert KEY.encode() not in pickle.dumps(model)
    other = chat(server, model_kwargs={"api_key_env": "S2T_TEST_KEY"})
    monkeypatch.setenv("S2T_TEST_KEY", "sk-another")
    server.fault = None
    other.invoke("Hello!")
    assert server.keys[-1] == "Bearer sk-another"
