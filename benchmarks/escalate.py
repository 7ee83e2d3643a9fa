"""What the large model has to do for the same answers: asked now and then, or stepped along on every token.

Both schemes generate the same held-out problems with the same trigger and let the LLM pick at every critical step.
*Ours* reads what is new in one go when it is asked. The *published* scheme (S2T, arXiv 2604.26940) feeds every token
to the LLM as it comes, since its trigger compares the two models' distributions. It is run twice: on this package's
engine, so that only the schemes differ, and *as published*, both models through transformers' own modules and cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from langchain_core.messages import convert_to_messages
from rich.console import Group
from rich.table import Table

from s2t_agents.backends.base import Backend, Output
from s2t_agents.backends.base import Work as WorkItem
from s2t_agents.backends.torch.backend import TorchBackend
from s2t_agents.bundled import LLM, SLM
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.demo.world import Split, generate
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError
from s2t_agents.escalation import Escalation
from s2t_agents.llms import LocalLLM
from s2t_agents.llms.local_llm import LocalSession
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.triggers import Trigger, entropy, when
from s2t_agents.types import Sampling

from .deepened import REAL_RATIO, deepened, parameters

RATE = 0.05
"""Share of the tokens at which the LLM is asked."""
CALIBRATED_ON = 20
"""Training problems from which the entropy threshold for that rate is read."""
MAX_TOKENS = 128


@dataclass
class Work:
    """What one scheme took, over all answers.

    Attributes:
        tokens: generated.
        escalations: questions to the LLM.
        llm_calls: forwards of the LLM.
        llm_tokens: tokens that it read.
        llm_s: seconds in its forwards.
        wall_s: seconds in all, the small model's forwards among them.
    """

    tokens: int = 0
    escalations: int = 0
    llm_calls: int = 0
    llm_tokens: int = 0
    llm_s: float = 0.0
    wall_s: float = 0.0
    picks: list[list[int]] = field(default_factory=list, repr=False)

    def per_answer(self) -> dict[str, float]:
        """Means per answer, in the units above."""
        numbers = {name: value for name, value in asdict(self).items() if name != "picks"}
        return {name: round(value / max(1, len(self.picks)), 6) for name, value in numbers.items()}

    def over(self, other: Work) -> dict[str, float | None]:
        """Ratios to another scheme's work; None where that did none."""
        names = ("llm_calls", "llm_tokens", "llm_s", "wall_s")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: round(mine / theirs, 2) if theirs else None for name, (mine, theirs) in pairs.items()}


class Counted(LanguageModel):
    """A model that writes down its forwards."""

    work: Work

    def _use(self, backend: Backend) -> None:
        super()._use(backend)
        forward = backend.forward

        def counted(batch: Sequence[WorkItem]) -> list[Output]:
            started = time.perf_counter()
            outputs = forward(batch)
            self.work.llm_s += time.perf_counter() - started
            self.work.llm_calls += 1
            self.work.llm_tokens += sum(len(item.ids) for item in batch)
            return outputs

        backend.forward = counted  # type: ignore[method-assign]


class PlainTransformers(TorchBackend):
    """transformers' modules and its own cache: no written-out decoder, no batching, no prefix cache."""

    @staticmethod
    def attention_only(model: Any) -> bool:
        """Treated as a model whose cache cannot be cut."""
        return False


class AsPublished(Counted):
    """A model as the published code reads it: through transformers' modules and cache, every prompt anew."""

    @classmethod
    def of(cls, model: LanguageModel) -> Self:
        """The same weights, read the published way."""
        other = cls.on(PlainTransformers(model.model, model.tokenizer, name=model.name))
        other.work = Work()
        return other


def run(n: int = 100, seed: int = 0, *, slm: str = SLM, llm: str = LLM, rate: float = RATE) -> dict[str, Any]:
    """Both schemes on the same problems.

    Args:
        n: held-out problems.
        seed: of the first one.
        slm: directory or hub id of the small model.
        llm: and of the large one.
        rate: share of the tokens at which the LLM is asked, about.

    Returns:
        Means per answer of all three, ratios to ours, and whether all picks are the same. Seconds are this machine's,
        on one thread.

    Raises:
        ConfigError: no problems, or a rate outside (0, 1].
    """
    if n < 1 or not 0 < rate <= 1:
        raise ConfigError(f"n is {n} and rate {rate}; at least 1 problem and a rate in (0, 1] are needed.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, large = LanguageModel.load(slm), Counted.load(llm)
        assert isinstance(large, Counted)
        critical = entropy(above=_threshold(small, large, rate))
        as_it_is = _run(small, large, n, seed, critical)
        return {**as_it_is, "at_real_ratio": _at_real_ratio(small, large, n, seed, critical)}
    finally:
        torch.set_num_threads(threads)


def _at_real_ratio(small: LanguageModel, large: LanguageModel, n: int, seed: int, critical: Trigger) -> dict[str, Any]:
    """The same, the large model deepened to the size that it would have in a real pair."""
    wanted = int(REAL_RATIO * parameters(small))
    if wanted <= parameters(large):
        return {"skipped": "the pair is as far apart as a real one"}
    deep = deepened(large, wanted)
    return {"parameters": [parameters(small), parameters(deep)], **_run(small, deep, n, seed, critical)}


def _run(small: LanguageModel, large: LanguageModel, n: int, seed: int, critical: Trigger) -> dict[str, Any]:
    assert isinstance(large, Counted)
    prompts = _prompts(small, range(seed, seed + n), "heldout")
    their_small, their_large = map(AsPublished.of, (small, large))
    schemes = {
        "ours": Scheme(small, large, LocalLLM(large), critical),
        "published": read_along(small, large, critical),
        "as_published": read_along(their_small, their_large, critical),
    }
    for prompt in prompts:  # in turns, so that the machine's moods hit all
        for scheme in schemes.values():
            scheme.answer(prompt)
    ours = schemes["ours"].work
    return {
        "bench": "escalate",
        "problems": n,
        "seed": seed,
        "trigger": repr(critical),
        "escalation_rate": round(ours.escalations / ours.tokens, 4),
        **{name: scheme.work.per_answer() for name, scheme in schemes.items()},
        **{f"{name}_over_ours": scheme.work.over(ours) for name, scheme in schemes.items() if name != "ours"},
        "picks_identical": all(scheme.work.picks == ours.picks for scheme in schemes.values()),
    }


def table(result: dict[str, Any]) -> Group:
    """The result for people."""
    deep = result["at_real_ratio"]
    shown = [_table(result, "the pair as it is")]
    if "ours" in deep:
        small, large = deep["parameters"]
        shown.append(
            _table(deep, f"the LLM deepened with layers that add nothing, to {large / small:.0f} times the SLM")
        )
    return Group(*shown)


def _table(result: dict[str, Any], what: str) -> Table:
    title = (
        f"{what}: {result['problems']} held-out problems, LLM asked at {result['escalation_rate']:.1%} of the tokens"
    )
    shown = Table(title=title, title_justify="left")
    for column in ("per answer", "asked when needed", "read along (published)", "", "as published, transformers", ""):
        shown.add_column(column, justify="left" if column == "per answer" else "right")
    for name, value in result["ours"].items():
        cells = [f"{value:.4g}"]
        for other in ("published", "as_published"):
            ratio = result[f"{other}_over_ours"].get(name)
            cells += [f"{result[other][name]:.4g}", f"{ratio}x" if ratio else ""]
        shown.add_row(name, *cells)
    shown.caption = "the same picks" if result["picks_identical"] else "DIFFERENT PICKS"
    return shown


@dataclass
class Scheme:
    """A way to have the LLM pick at every critical step.

    Attributes:
        small: writes.
        large: picks; its forwards are counted.
        llm: how it is asked.
        trigger: where.
        work: what that took so far.
    """

    small: LanguageModel
    large: Counted
    llm: LocalLLM
    trigger: Trigger
    work: Work = field(default_factory=Work)

    def answer(self, prompt: list[int]) -> None:
        """One prompt answered; nothing of another answer is reused."""
        self.large.work = self.work
        self.small.prefix_cache.clear()
        engine = Engine(self.small, trigger=self.trigger, escalation=Escalation(self.llm, margin=1.0))
        started = time.perf_counter()
        steps = list(engine.steps(prompt, Sampling(max_tokens=MAX_TOKENS)))
        self.work.wall_s += time.perf_counter() - started
        self.work.picks.append([step.token_id for step in steps])
        self.work.tokens += len(steps)
        self.work.escalations += sum(step.picked_by == "llm" for step in steps)


def read_along(small: LanguageModel, large: Counted, critical: Trigger) -> Scheme:
    """The published scheme: the LLM is fed every token as it comes."""
    llm = ReadAlong(large)
    return Scheme(small, large, llm, llm.at_every_token(critical))


class ReadAlong(LocalLLM):
    """An LLM that is fed every token as it comes: the published scheme."""

    session: LocalSession

    def open(self) -> LocalSession:
        """The session that is read along."""
        self.session = super().open()
        return self.session

    def at_every_token(self, critical: Trigger) -> Trigger:
        """The same trigger, with the LLM's distribution at hand as the published one needs it."""

        def read_then_decide(proposal: Proposal) -> bool:
            self.session.scores(proposal.prefix.ids, ())
            return critical(proposal)

        return when(read_then_decide, repr(critical))


def _threshold(small: LanguageModel, large: Counted, rate: float) -> float:
    """The entropy, in nats, that a share ``rate`` of the greedy steps on training problems reaches."""
    seen: list[float] = []

    def remember(proposal: Proposal) -> bool:
        seen.append(proposal.entropy)
        return False

    large.work = Work()
    engine = Engine(small, trigger=when(remember), escalation=Escalation(LocalLLM(large)))
    for prompt in _prompts(small, range(CALIBRATED_ON), "train"):
        for _ in engine.steps(prompt, Sampling(max_tokens=MAX_TOKENS)):
            pass
    return sorted(seen, reverse=True)[max(0, round(rate * len(seen)) - 1)]


def _prompts(small: LanguageModel, seeds: Sequence[int], split: Split) -> list[list[int]]:
    encoder = PromptEncoder(small.tokenizer)
    conversations = [generate(seed, split, "word").prompt for seed in seeds]
    return [encoder.encode(convert_to_messages(list(turns)), ()) for turns in conversations]
