"""The engine: greedy is transformers' greedy, selection stays among the candidates, nothing runs ahead."""

import gc
from collections.abc import Sequence
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import read, scored_after
from torch import Tensor

from s2t_agents.backends.base import Append
from s2t_agents.budget import Budget
from s2t_agents.engine.engine import Engine
from s2t_agents.engine.sampling import Draw, nucleus
from s2t_agents.errors import BudgetExceeded, ConfigError, ContextOverflow, EscalationFailed, InputError
from s2t_agents.escalation import Escalation
from s2t_agents.fork_safety import registered_locks
from s2t_agents.grammar.grammar import json_grammar, tool_grammar
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.llms import LocalLLM
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import HeadSelector
from s2t_agents.selectors.drift import DriftWatch
from s2t_agents.testing import ARCHITECTURES, RECURRENT, ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always, never
from s2t_agents.types import Sampling, Step

PROMPT = [10, 20, 30, 40, 50]


class Reversed:
    """A selector that likes the candidates in the opposite order."""

    def scores(self, proposal: Proposal) -> Tensor:
        return -proposal.candidate_log_probs


def tokens(steps: Sequence[Step]) -> list[int]:
    return [step.token_id for step in steps]


def test_a_trigger_and_a_selector_that_count_as_false_are_used() -> None:
    class EmptyTrigger(list[int]):
        def __call__(self, proposal: Proposal) -> bool:
            return True

    class EmptySelector(Reversed):
        def __len__(self) -> int:
            return 0

    [step] = Engine(tiny_model(), trigger=EmptyTrigger(), selector=EmptySelector()).steps(
        PROMPT, Sampling(max_tokens=1)
    )
    assert step.picked_by == "selector"


def reference(model: LanguageModel, prompt: list[int], n: int) -> list[int]:
    out = model.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_greedy_equals_transformers_generate(name: str) -> None:
    model = tiny_model(name)
    ours = list(Engine(model).steps(PROMPT, Sampling(max_tokens=40)))
    assert tokens(ours) == reference(model, PROMPT, 40)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_a_selector_that_agrees_with_the_slm_changes_nothing(name: str) -> None:
    class Agreeing:
        def scores(self, proposal: Proposal) -> Tensor:
            scored_after(proposal.prefix, proposal.candidates)
            return proposal.candidate_log_probs

    model = tiny_model(name)
    steps = list(Engine(model, trigger=always(), selector=Agreeing()).steps(PROMPT, Sampling(max_tokens=25)))
    assert tokens(steps) == reference(model, PROMPT, 25)
    assert all(step.triggered and step.picked_by == "selector" and not step.flipped for step in steps)


def test_an_untrained_selector_is_greedy_where_half_precision_lets_tokens_tie() -> None:
    model = tiny_model("qwen3", initializer_range=0.02)
    model.model.to(torch.bfloat16)
    corrected = Engine(model, selector=HeadSelector(model), trigger=always())
    for seed in range(8):
        prompt = torch.randint(0, 250, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
        greedy = tokens(list(Engine(model).steps(prompt, Sampling(max_tokens=30))))
        model.prefix_cache.clear()  # a prompt's last token read alone is rounded in another way
        steps = list(corrected.steps(prompt, Sampling(max_tokens=30)))
        assert tokens(steps) == greedy
        assert not any(step.flipped for step in steps)


def test_the_selectors_pick_is_taken_at_critical_steps_only() -> None:
    model = tiny_model()
    flipped = list(Engine(model, trigger=always(), selector=Reversed()).steps(PROMPT, Sampling(max_tokens=9)))
    assert all(step.token_id == step.candidates[-1].token_id for step in flipped)
    assert all(step.flipped for step in flipped)
    quiet = list(Engine(model, trigger=never(), selector=Reversed()).steps(PROMPT, Sampling(max_tokens=9)))
    assert tokens(quiet) == reference(model, PROMPT, 9)
    assert not any(step.triggered for step in quiet)


def test_every_pick_is_the_best_scored_of_its_k_candidates() -> None:
    model, llm = tiny_model(), LocalLLM(tiny_model(seed=5))
    engine = Engine(model, k=4, trigger=always(), escalation=Escalation(llm, margin=1.0))
    for step in engine.steps(PROMPT, Sampling(max_tokens=12)):
        assert len(step.candidates) == 4
        best = max(step.candidates, key=lambda c: c.llm if c.llm is not None else c.slm)
        assert step.token_id == best.token_id
        assert step.picked_by == "llm"


def test_an_llm_that_is_the_slm_never_disagrees() -> None:
    model = tiny_model()
    engine = Engine(model, trigger=always(), escalation=Escalation(LocalLLM(model), margin=1.0))
    assert tokens(list(engine.steps(PROMPT, Sampling(max_tokens=20)))) == reference(model, PROMPT, 20)


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(0, 6), seed=st.integers(0, 99), fails=st.booleans())
def test_escalations_never_pass_the_budget_and_the_answer_goes_on(limit: int, seed: int, fails: bool) -> None:
    def flaky(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        if fails and len(ids) % 2:
            raise EscalationFailed("down")
        return last_candidate(ids, candidates)

    budget, llm = Budget(escalations=limit), ScriptedLLM(flaky)
    engine = Engine(tiny_model(), trigger=always(), selector=Reversed(), escalation=Escalation(llm, margin=1.0))
    prompt = torch.randint(0, 250, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = list(engine.steps(prompt, Sampling(max_tokens=10), budget=budget))
    picked = sum(step.picked_by == "llm" for step in steps)
    assert picked == budget.state().spent["escalations"] <= limit
    assert budget.state().held["escalations"] == 0
    assert len(steps) == 10 or steps[-1].token_id in engine.slm.eos_ids
    assert all(
        step.picked_by == "selector" for step in steps if step.escalation and step.escalation.outcome != "picked"
    )


def test_a_sure_selection_is_not_escalated() -> None:
    class Sure:
        def scores(self, proposal: Proposal) -> Tensor:
            return torch.tensor([50.0] + [0.0] * (len(proposal.candidates) - 1))

    llm = ScriptedLLM(last_candidate)
    engine = Engine(tiny_model(), trigger=always(), selector=Sure(), escalation=Escalation(llm, margin=0.99))
    assert not any(step.escalation for step in engine.steps(PROMPT, Sampling(max_tokens=5)))
    assert llm.asked == []


def test_the_budget_may_say_raise_in_mid_answer() -> None:
    budget = Budget(escalations=2, on_exhausted="raise")
    llm = ScriptedLLM(last_candidate)
    engine = Engine(tiny_model(), trigger=always(), escalation=Escalation(llm, margin=1.0))
    seen = []
    with pytest.raises(BudgetExceeded):
        seen.extend(engine.steps(PROMPT, Sampling(max_tokens=10), budget=budget))
    assert (len(llm.asked), llm.closed) == (2, 1)


def test_nothing_is_computed_before_it_is_asked_for_and_closing_stops_the_model(monkeypatch: Any) -> None:
    model, llm = tiny_model(), ScriptedLLM(last_candidate)
    forwards: list[int] = []
    real = model.backend.forward

    def counted(batch: Sequence[Append]) -> Any:
        forwards.extend(len(work.ids) for work in batch)
        return real(batch)

    monkeypatch.setattr(model.backend, "forward", counted)
    steps = Engine(model, escalation=Escalation(llm)).steps(PROMPT, Sampling(max_tokens=50))
    assert forwards == []
    next(steps)
    assert forwards == [5]
    next(steps)
    assert forwards == [5, 1]
    steps.close()
    assert (forwards, llm.closed) == ([5, 1], 1)


class Built:
    """An engine with all that it shares among generations, and the locks that were registered for it, by name."""

    def __init__(self) -> None:
        others = list(registered_locks())
        self.model = tiny_model()
        self.llm = LocalLLM(self.model)
        drift = DriftWatch(SimpleNamespace(trigger_rate_ci95=(0.0, 1.0), escalation_rate_ci95=(0.0, 1.0)))  # type: ignore[arg-type]
        self.engine = Engine(self.model, trigger=always(), escalation=Escalation(self.llm, margin=1.0), drift=drift)
        known = {(id(owner), name) for owner, name in others}
        own = [(owner, name) for owner, name in registered_locks() if (id(owner), name) not in known]
        self.locks = {f"{type(owner).__name__}.{name}": getattr(owner, name) for owner, name in own}


LOCKS = sorted(Built().locks)


def test_the_locks_of_an_engine_are_found() -> None:
    assert {name.partition(".")[0] for name in LOCKS} >= {"Scheduler", "PrefixCache", "IdleSequences", "DriftWatch"}


@pytest.mark.parametrize("name", LOCKS)
def test_an_abandoned_generation_may_be_collected_in_any_block_of_ours(name: str) -> None:
    """Garbage collection runs at any allocation, and closes the generator on the spot."""
    built = Built()
    engine, model, llm, lock = built.engine, built.model, built.llm, built.locks[name]
    gc.collect()
    abandoned: dict[str, Any] = {"steps": engine.steps(PROMPT, Sampling(max_tokens=5))}
    abandoned["itself"] = abandoned
    next(abandoned["steps"])
    del abandoned

    def collect() -> None:
        with lock:
            gc.collect()

    thread = Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert (engine.admission.running, len(model.running), len(llm.idle)) == (0, 0, 1)


def test_the_stop_token_is_the_last_step() -> None:
    model = tiny_model()
    stop = reference(model, PROMPT, 10)[4]
    model.backend.eos_ids = frozenset({stop})
    steps = list(Engine(model).steps(PROMPT, Sampling(max_tokens=50)))
    assert tokens(steps).index(stop) == len(steps) - 1


def test_a_stop_token_that_is_ignored_is_a_token_like_any_other() -> None:
    model = tiny_model()
    whole = reference(model, PROMPT, 10)
    model.backend.eos_ids = frozenset({whole[4]})
    assert tokens(list(Engine(model).steps(PROMPT, Sampling(max_tokens=10, ignore_eos=True)))) == whole


def test_banned_tokens_are_not_first_and_free_later() -> None:
    model = tiny_model()
    first = reference(model, PROMPT, 1)[0]
    steps = list(Engine(model).steps(PROMPT, Sampling(max_tokens=3, banned_first=[first])))
    assert steps[0].token_id != first
    assert steps[0].token_id == int(Proposal(_prefix(model), 2, banned=[first]).best)


def test_a_first_token_that_is_banned_gives_way_to_the_next_legal_one_whatever_the_grammar_permits() -> None:
    model = tiny_model()
    words = cached_vocabulary(model.tokenizer, model.vocab_size, sorted(model.eos_ids))
    for schema in ({"type": "integer"}, {"type": ["array", "boolean", "string"]}, {"enum": [1, 2, True]}, None):
        compiled = json_grammar(words, schema) if schema else tool_grammar(words, [])
        legal = _prefix(model).logits.masked_fill(~compiled.start(30).allowed(), -torch.inf)
        ranked = [int(i) for i in legal.argsort(descending=True, stable=True) if legal[i] > -torch.inf]
        for banned in (ranked[:1], ranked[1:2], ranked[:2], []):
            sampling = Sampling(max_tokens=1, banned_first=banned)
            (step,) = Engine(model).steps(PROMPT, sampling, grammar=compiled.start(30))
            assert step.token_id == next(token for token in ranked if token not in banned)


def _prefix(model: LanguageModel) -> Any:
    return read(model, PROMPT)


def test_sampling_repeats_with_its_seed_and_differs_without() -> None:
    engine = Engine(tiny_model())

    def run(seed: int | None) -> list[int]:
        return tokens(list(engine.steps(PROMPT, Sampling(temperature=1.0, seed=seed, max_tokens=20))))

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_top_p_draws_from_the_nucleus_only() -> None:
    model = tiny_model()
    probs = _prefix(model).logits.softmax(0).sort(descending=True)
    size = int((probs.values.cumsum(0) < 0.3).sum()) + 1
    nucleus = set(probs.indices[:size].tolist())
    engine = Engine(model)
    drawn = {next(engine.steps(PROMPT, Sampling(temperature=1.0, top_p=0.3, seed=seed))).token_id for seed in range(60)}
    assert drawn <= nucleus
    assert len(drawn) > 1


@pytest.mark.parametrize("by", ["selector", "llm"])
@pytest.mark.parametrize(("top_p", "size"), [(0.3, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_is_the_nucleus_of_new_scores_where_candidates_were_ranked_again(
    by: str, top_p: float, size: int
) -> None:
    probs = [0.1, 0.2, 0.3, 0.4]  # the best last

    class Fixed:
        def scores(self, proposal: Proposal) -> Tensor:
            return torch.tensor(probs).log()

    asks = Escalation(ScriptedLLM(lambda ids, candidates: torch.tensor(probs).log().tolist()), margin=1.0)
    ranks = {"selector": Fixed()} if by == "selector" else {"escalation": asks}
    engine = Engine(tiny_model(), k=4, trigger=always(), **ranks)  # type: ignore[arg-type]
    drawn = set()
    for seed in range(60):
        step = next(engine.steps(PROMPT, Sampling(temperature=1.0, top_p=top_p, seed=seed)))
        assert step.picked_by == by
        drawn.add([candidate.token_id for candidate in step.candidates].index(step.token_id))
    assert drawn == set(range(4)[-size:])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])  # from nearly even to a few tokens that hold nearly all
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_the_whole_vocabulary_in_order(spread: float, top_p: float) -> None:
    probs = (spread * torch.randn(5000, generator=torch.Generator().manual_seed(3))).softmax(0)
    ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(0) - ordered >= top_p
    assert torch.equal(nucleus(probs, top_p), probs.scatter(0, order[beyond], 0.0))


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-45, 1e-46, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    draw = Draw(Sampling(temperature=temperature, seed=1))
    logits = torch.tensor([-torch.inf, 3.0, 300.0, 299.99, -300.0])
    for scores in (logits, -logits[1:], logits.half().float() * 1e30):
        assert draw.one_of(scores) == int(scores.argmax())
    engine = Engine(tiny_model())
    cold = engine.steps(PROMPT, Sampling(temperature=temperature, max_tokens=5))
    assert tokens(list(cold)) == tokens(list(engine.steps(PROMPT, Sampling(max_tokens=5))))


@pytest.mark.parametrize("top_p", [1e-8, 1e-45, 1e-46, 5e-324])
def test_a_top_p_near_zero_is_greedy(top_p: float) -> None:
    draw = Draw(Sampling(temperature=2.0, top_p=top_p))
    for size in (5, 5000):
        logits = torch.arange(float(size)) / size
        assert draw.one_of(logits) == size - 1


def test_top_p_orders_the_whole_vocabulary_only_where_its_head_holds_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probs, sort, ordered = torch.randn(5000).softmax(0), Tensor.sort, []
    monkeypatch.setattr(Tensor, "sort", lambda self, **options: ordered.append(len(self)) or sort(self, **options))
    nucleus(probs, 0.2)
    assert not ordered
    nucleus(probs, 0.999)
    assert ordered == [5000]


class OneWay:
    """A grammar that forces ``spelled`` and then allows two tokens, once."""

    def __init__(self, spelled: list[int], then: list[int]) -> None:
        self.queue, self.then, self.finished, self.accepted = list(spelled), then, False, []

    def forced(self) -> list[int]:
        forced, self.queue = self.queue, []
        return forced

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        mask = torch.zeros(len(tiny_model().tokenizer), dtype=torch.bool)
        mask[self.then] = True
        return mask

    def takes(self, token_id: int) -> bool:
        return token_id in self.then

    def best(self, logits: Tensor, likeliest: int) -> int:
        return max(self.then, key=lambda token: float(logits[token]))

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        self.finished = token_id in self.then


def test_forced_tokens_need_no_choice_and_masks_come_before_candidates() -> None:
    grammar = OneWay([3, 4, 5], [77, 78])
    engine = Engine(tiny_model(), trigger=always(), selector=Reversed())
    steps = list(engine.steps(PROMPT, Sampling(max_tokens=20), grammar=grammar))
    assert tokens(steps)[:3] == [3, 4, 5]
    assert [step.picked_by for step in steps] == ["grammar"] * 3 + ["selector"]
    assert {c.token_id for c in steps[3].candidates} == {77, 78}
    assert grammar.accepted == tokens(steps)


@pytest.mark.parametrize(("first", "kept"), [(3, True), (4, False)])
def test_begun_tokens_are_kept_only_as_far_as_they_agree_with_what_is_forced(first: int, kept: bool) -> None:
    def written(begun: list[int]) -> list[int]:
        grammar = OneWay([3], [77, 78])
        return tokens(list(Engine(tiny_model()).steps(PROMPT, Sampling(max_tokens=9), grammar=grammar, begun=begun)))

    forced, own = written([])
    [other] = {77, 78} - {own}
    assert written([first, other]) == [forced, other if kept else own]


def test_forced_tokens_respect_max_tokens() -> None:
    assert len(list(Engine(tiny_model()).steps(PROMPT, Sampling(max_tokens=2), grammar=OneWay([3, 4, 5], [77])))) == 2


@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k is {k}; between 1 and 64"):
        Engine(tiny_model(), k=k)


def test_prompts_that_can_not_run_are_refused() -> None:
    engine = Engine(tiny_model())
    with pytest.raises(InputError, match="empty"):
        next(engine.steps([]))
    with pytest.raises(ContextOverflow, match=r"512 tokens, the context window of .* 512"):
        next(engine.steps([1] * 512))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_bad_sampling_is_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings_)
