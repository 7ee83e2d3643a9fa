"""Many rows at once take the very decisions that the engine takes one by one."""

from types import SimpleNamespace

import pytest
import torch
from jsonschema import validate
from s2t_agents.training.deciders import (
    Corrected,
    Greedy,
    Hybrid,
    LLMSelection,
    Local,
    Sampled,
    Takeover,
    entropy_above,
    probe_above,
)
from s2t_agents.training.lines import Line, LLMCallCounter
from s2t_agents.training.lockstep import generate
from s2t_agents.training.scorers import scorer_for
from training_fixtures import tiny_pair

from s2t_agents.budget import Budget
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.engine.engine import Engine
from s2t_agents.escalation import Escalation
from s2t_agents.grammar.grammar import cached_vocabulary
from s2t_agents.llms import LocalLLM
from s2t_agents.training.batch_prefix import BatchPrefix
from s2t_agents.training.config import Adapter, Fit
from s2t_agents.training.dialogue import Speaker
from s2t_agents.training.objectives import fresh_selector
from s2t_agents.triggers import entropy
from s2t_agents.types import Sampling

PROMPTS = [[5, 6, 7], list(range(40, 60)), [65] * 9, list(b"hello there"), [66, 67]]
NATS = 2.0
TOKENS = 24


@pytest.fixture(scope="module")
def pair():
    slm, llm, _ = tiny_pair()
    return slm, llm


def opinionated(slm, kind):
    """A selector with random weights: it changes many picks."""
    selector = fresh_selector(slm, kind, Fit(width=16, adapter=Adapter(rank=2)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in selector.parameters():
            parameter.data.normal_(0, 0.3)
    return selector.requires_grad_(False)


def one_by_one(engine, **budget):
    found = []
    for prompt in PROMPTS:
        limits = Budget(**budget) if budget else None
        found.append([*engine.steps(prompt, Sampling(max_tokens=TOKENS), budget=limits)])
    return found


def ids(runs):
    return [[step.token_id for step in steps] for steps in runs]


def at_once(slm, decider):
    return generate(BatchPrefix(slm, PROMPTS), decider, TOKENS)


def test_greedy(pair):
    slm, _ = pair
    assert [trace.ids for trace in at_once(slm, Greedy())] == ids(one_by_one(Engine(slm)))


@pytest.mark.parametrize("kind", ["head", "activated", "adapted", "published"])
def test_a_local_selector(pair, kind):
    slm, _ = pair
    selector = opinionated(slm, kind)
    live = one_by_one(Engine(slm, k=4, trigger=entropy(above=NATS), selector=selector))
    traces = at_once(slm, Corrected(entropy_above(NATS), Local(scorer_for(selector, PROMPTS)), 4))
    assert [trace.ids for trace in traces] == ids(live)
    assert [trace.triggered for trace in traces] == [[s.index for s in steps if s.triggered] for steps in live]
    assert [trace.flipped for trace in traces] == [[s.index for s in steps if s.flipped] for steps in live]
    assert sum(len(trace.flipped) for trace in traces) > 5


def test_the_llm_selects_and_is_charged_the_same(pair):
    slm, llm = pair
    live = one_by_one(Engine(slm, k=4, trigger=entropy(above=NATS), escalation=Escalation(LocalLLM(llm), margin=1.0)))
    meter = LLMCallCounter(len(PROMPTS))
    meter.turn(PROMPTS, list(range(len(PROMPTS))))
    line = Line(lambda: BatchPrefix(llm, PROMPTS))
    traces = at_once(slm, Corrected(entropy_above(NATS), LLMSelection(line, meter), 4))
    assert [trace.ids for trace in traces] == ids(live)
    reports = [[s.escalation for s in steps if s.escalation] for steps in live]
    assert meter.calls.tolist() == [len(each) for each in reports]
    first, *_ = reports  # later conversations share the KV of earlier ones, in the engine
    assert int(meter.tokens[0]) == sum(report.actual.llm_tokens for report in first)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_selector_with_a_few_escalations(pair, limit):
    slm, llm = pair
    selector = opinionated(slm, "activated")
    escalation = Escalation(LocalLLM(llm), margin=0.5)
    live = one_by_one(
        Engine(slm, k=4, trigger=entropy(above=NATS), selector=selector, escalation=escalation), escalations=limit
    )
    meter = LLMCallCounter(len(PROMPTS))
    meter.turn(PROMPTS, list(range(len(PROMPTS))))
    picker = Hybrid(
        scorer_for(selector, PROMPTS), Line(lambda: BatchPrefix(llm, PROMPTS)), meter, margin=0.5, limit=limit
    )
    traces = at_once(slm, Corrected(entropy_above(NATS), picker, 4))
    assert [trace.ids for trace in traces] == ids(live)
    assert meter.calls.tolist() == [sum(s.picked_by == "llm" for s in steps) for steps in live]
    assert int(meter.calls.max()) <= limit


def test_takeover_writes_tokens_that_are_no_candidates(pair):
    slm, llm = pair
    meter = LLMCallCounter(len(PROMPTS))
    meter.turn(PROMPTS, list(range(len(PROMPTS))))
    line = Line(lambda: BatchPrefix(llm, PROMPTS))
    everywhere = at_once(slm, Corrected(entropy_above(0.0), Takeover(line, meter), 1))
    assert [trace.ids for trace in everywhere] == ids(one_by_one(Engine(llm)))


def test_a_row_draws_the_same_in_any_company(pair):
    slm, _ = pair
    seeds = [11, 12, 13, 14, 15]
    together = at_once(slm, Sampled(0.8, seeds, TOKENS))
    alone = generate(BatchPrefix(slm, [PROMPTS[3]]), Sampled(0.8, [seeds[3]], TOKENS), TOKENS)
    assert alone[0].ids == together[3].ids
    other = generate(BatchPrefix(slm, [PROMPTS[3]]), Sampled(0.8, [99], TOKENS), TOKENS)
    assert other[0].ids != alone[0].ids


def test_draws_follow_the_distribution(pair):
    slm, _ = pair
    start = BatchPrefix(slm, [PROMPTS[0]] * 2000)
    drawn = [trace.ids[0] for trace in generate(start, Sampled(0.5, list(range(2000)), 1), 1)]
    wanted = (start.logits[0] / 0.5).softmax(0)
    for token in wanted.topk(3).indices.tolist():
        assert abs(drawn.count(token) / 2000 - float(wanted[token])) < 0.04


def test_a_full_context_ends_a_row(pair):
    slm, _ = pair
    long = [65] * (slm.context_window - 3)
    traces = generate(BatchPrefix(slm, [long, PROMPTS[0]]), Greedy(), 8)
    assert len(traces[0].ids) == len([*Engine(slm).steps(long, Sampling(max_tokens=8))]) <= 3


def test_the_probe_runs_where_the_model_is_wherever_its_weights_were_read():
    there = torch.device("meta")
    view = SimpleNamespace(
        prefix=SimpleNamespace(hidden=torch.zeros(2, 3, device=there)), entropy=torch.zeros(2, device=there)
    )
    assert probe_above(torch.zeros(4), 0.0, 0.5)(view).device == there


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }
    for name, properties in {
        "add": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "find": {"what": {"enum": ["cats", "dogs", "cattle"]}, "near": {"type": "boolean"}},
    }.items()
]
ROOM = 400


def ruled(slm, choices=("any", "any", "auto", "any", "auto")):
    """A grammar for each of the prompts, just started; "auto" may say anything before it calls."""
    words = cached_vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))
    compiled = {
        choice: ResponseOptions(tools=tuple(TOOLS), tool_choice=choice, parallel=False).compile(words)
        for choice in set(choices)
    }
    return [compiled[choice].start(ROOM) for choice in choices]


def under_rules(engine):
    sampling = Sampling(max_tokens=ROOM)
    pairs = zip(PROMPTS, ruled(engine.slm), strict=True)
    return [[*engine.steps(prompt, sampling, grammar=grammar)] for prompt, grammar in pairs]


def test_greedy_under_a_grammar(pair):
    slm, _ = pair
    live = under_rules(Engine(slm))
    traces = generate(BatchPrefix(slm, PROMPTS), Greedy(), ROOM, ruled(slm))
    assert [trace.ids for trace in traces] == ids(live)
    assert len({step.picked_by for steps in live for step in steps}) == 2  # forced tokens are among them


@pytest.mark.parametrize("picker", ["selector", "llm"])
def test_a_second_look_under_a_grammar(pair, picker):
    slm, llm = pair
    selector = opinionated(slm, "head") if picker == "selector" else None
    escalation = Escalation(LocalLLM(llm), margin=1.0) if picker == "llm" else None
    engine = Engine(slm, k=4, trigger=entropy(above=0.5), selector=selector, escalation=escalation)
    live = under_rules(engine)
    meter = LLMCallCounter(len(PROMPTS))
    meter.turn(PROMPTS, list(range(len(PROMPTS))))
    chosen = (
        Local(scorer_for(selector, PROMPTS))
        if selector
        else LLMSelection(Line(lambda: BatchPrefix(llm, PROMPTS)), meter)
    )
    traces = generate(BatchPrefix(slm, PROMPTS), Corrected(entropy_above(0.5), chosen, 4), ROOM, ruled(slm))
    assert [trace.ids for trace in traces] == ids(live)
    assert [trace.triggered for trace in traces] == [[s.index for s in steps if s.triggered] for steps in live]
    assert meter.calls.tolist() == [sum(s.escalation is not None for s in steps) for steps in live]
    assert sum(len(trace.flipped) for trace in traces) > 5


def test_draws_and_takeovers_stay_within_the_grammar(pair):
    slm, llm = pair
    meter = LLMCallCounter(len(PROMPTS))
    meter.turn(PROMPTS, list(range(len(PROMPTS))))
    takeover = Corrected(entropy_above(0.0), Takeover(Line(lambda: BatchPrefix(llm, PROMPTS)), meter), 4)
    for decider in (Sampled(1.5, [1, 2, 3, 4, 5], ROOM), takeover):
        for trace in generate(BatchPrefix(slm, PROMPTS), decider, ROOM, ruled(slm, ["any"] * 5)):
            reply = Speaker(slm).read(trace.ids)
            assert [name for name, _ in reply.calls] in (["add"], ["find"])
            validate(
                reply.calls[0][1],
                next(t for t in TOOLS if t["function"]["name"] == reply.calls[0][0])["function"]["parameters"],
            )
