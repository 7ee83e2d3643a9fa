"""The rows of an evaluation: each is a way to decide tokens, and knows its live counterpart where there is one.

slm, llm                     one model alone, greedy
maj8                         eight samples of the SLM, the most frequent answer
random                       the selector at steps chosen by lot
head, activated, adapted, published   a selector at critical steps, no LLM
llm_select, takeover         the LLM picks among the candidates, or writes the token itself
hybrid_n                     the selector, and the LLM at its least sure steps, n times per answer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..scheduling.language_model import LanguageModel
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import Calibration
from ..selectors.learned_trigger import load_probe
from ..triggers import Trigger, entropy, probe
from .batch_prefix import BatchPrefix, PromptReader
from .collect import row_seed
from .config import EvaluationRows, Kind
from .deciders import (
    Condition,
    Corrected,
    Greedy,
    Hybrid,
    LLMSelection,
    Local,
    Picker,
    Sampled,
    Takeover,
    at_random,
    entropy_above,
    probe_above,
)
from .dialogue import MakeDecider
from .lines import Line, LLMCallCounter
from .scorers import Scorer, scorer_for
from .served import Live
from .tasks import Item


@dataclass(frozen=True)
class Ready:
    """A calibrated selector with its trigger, for bulk and live."""

    kind: Kind
    selector: LocalSelector
    config: SelectorConfig
    calibration: Calibration
    condition: Condition
    trigger: Trigger

    @classmethod
    def load(cls, kind: Kind, folder: Path, slm: LanguageModel, rate: float | None) -> Ready:
        """Read a directory; ``rate`` asks for another trigger rate than the calibrated one.

        Raises:
            ConfigError: not calibrated, or of another kind.
        """
        selector, config = load_selector(folder, slm)
        if config.kind != kind:
            raise ConfigError(f"{folder} holds a {config.kind} selector, not {kind}.")
        calibration = config.calibration
        if calibration is None:
            raise ConfigError(f"the selector at {folder} has no thresholds.", hint="Run `s2t calibrate` first.")
        if rate is None and calibration.probe_above is not None:
            weight, bias = load_probe(folder, config)
            above = calibration.probe_above
            condition, trigger = probe_above(weight, bias, above), probe(weight, bias, above=above)
            return cls(kind, selector, config, calibration, condition, trigger)
        return cls(kind, selector, config, calibration, *_at_entropy(calibration, rate))


def _at_entropy(calibration: Calibration, rate: float | None) -> tuple[Condition, Trigger]:
    nats = calibration.trigger_entropy if rate is None else calibration.entropy_for(rate)
    return entropy_above(nats), entropy(above=nats)


@dataclass(frozen=True)
class Row:
    """One way of answering.

    Attributes:
        name: of the row.
        make: deciders for a chunk of items, given the meter that counts its LLM calls.
        forwards: SLM forwards per triggered step, besides the step itself.
        samples: answers per problem, the majority counts.
        llm_generates: the LLM is the model.
        live: the engine that does the same; None where there is none.
        more: name of the row that differs from this one in its larger ``live.limit`` alone.
    """

    name: str
    make: Callable[[Sequence[Item], LLMCallCounter], MakeDecider]
    forwards: int = 0
    samples: int = 1
    llm_generates: bool = False
    live: Live | None = None
    more: str | None = None


class RowMaker:
    """Builds rows for one pair.

    Args:
        read_llm: reads prompts with the LLM; memoised by the caller.
        settings: see ``EvaluationRows``.
        seed: of lots and votes.
    """

    def __init__(self, read_llm: Callable[[list[list[int]]], BatchPrefix], settings: EvaluationRows, seed: int) -> None:
        self._read_llm, self._settings, self._seed = read_llm, settings, seed
        self._readers: dict[int, PromptReader] = {}  # by selector: what it has read with its adapter on

    def forget(self) -> None:
        """Other prompts come."""
        for reader in self._readers.values():
            reader.forget()

    def _scorer(self, ready: Ready, prompts: list[list[int]]) -> Scorer:
        reader = self._readers.setdefault(id(ready.selector), PromptReader(ready.selector.base))
        return scorer_for(ready.selector, prompts, reader)

    def alone(self) -> Row:
        """The SLM, greedy."""
        return Row("slm", _greedy, live=Live())

    def llm(self) -> Row:
        """The LLM, greedy."""
        return Row("llm", _greedy, llm_generates=True, live=Live(llm_generates=True))

    def majority(self) -> Row:
        """The most frequent of several sampled answers."""
        settings = self._settings

        def make(items: Sequence[Item], meter: LLMCallCounter) -> MakeDecider:
            def decider(prompts: list[list[int]], rows: list[int]) -> Sampled:
                seeds = [
                    row_seed(self._seed, items[row].id, row % settings.votes, len(prompt))
                    for row, prompt in zip(rows, prompts, strict=True)
                ]
                return Sampled(settings.temperature, seeds, settings.max_tokens)

            return decider

        return Row(f"maj{settings.votes}", make, samples=settings.votes)

    def local(self, ready: Ready, *, name: str | None = None, k: int | None = None) -> Row:
        """A selector at critical steps."""
        k = k or ready.config.k
        live = Live(k=k, trigger=ready.trigger, selector=ready.selector)
        make = self._corrected(ready.condition, k, lambda prompts, meter: Local(self._scorer(ready, prompts)))
        return Row(name or ready.kind, make, forwards=scorer_for(ready.selector, [[0]]).forwards, live=live)

    def random(self, ready: Ready) -> Row:
        """The selector at as many steps, chosen by lot."""
        settings, k = self._settings, ready.config.k
        rate = settings.trigger_rate or ready.calibration.trigger_rate

        def make(items: Sequence[Item], meter: LLMCallCounter) -> MakeDecider:
            def decider(prompts: list[list[int]], rows: list[int]) -> Corrected:
                seeds = [row_seed(self._seed, items[row].id, len(p)) for row, p in zip(rows, prompts, strict=True)]
                condition = at_random(rate, seeds, settings.max_tokens)
                return Corrected(condition, Local(self._scorer(ready, prompts)), k)

            return decider

        return Row("random", make, forwards=scorer_for(ready.selector, [[0]]).forwards)

    def selection(self, calibration: Calibration | None, *, name: str = "llm_select", k: int | None = None) -> Row:
        """The LLM picks among the SLM's candidates."""
        condition, trigger = self._for_llm(calibration)
        k = k or self._settings.k
        make = self._corrected(condition, k, lambda prompts, meter: LLMSelection(self._line(prompts), meter))
        return Row(name, make, live=Live(k=k, trigger=trigger, escalates=True, margin=1.0))

    def takeover(self, calibration: Calibration | None) -> Row:
        """The LLM writes the token."""
        condition, _ = self._for_llm(calibration)
        make = self._corrected(condition, self._settings.k, lambda prompts, meter: Takeover(self._line(prompts), meter))
        return Row("takeover", make)

    def hybrid(self, ready: Ready, limit: int) -> Row:
        """The selector, with ``limit`` escalations per answer."""
        more = min((other for other in self._settings.budgets if other > limit), default=None)
        margin, k = ready.calibration.escalation_margin, ready.config.k

        def picker(prompts: list[list[int]], meter: LLMCallCounter) -> Hybrid:
            scorer = self._scorer(ready, prompts)
            return Hybrid(scorer, self._line(prompts), meter, margin=margin, limit=limit)

        live = Live(k=k, trigger=ready.trigger, selector=ready.selector, escalates=True, margin=margin, limit=limit)
        forwards = scorer_for(ready.selector, [[0]]).forwards
        make = self._corrected(ready.condition, k, picker)
        return Row(
            f"hybrid_{limit}", make, forwards=forwards, live=live, more=None if more is None else f"hybrid_{more}"
        )

    def _for_llm(self, calibration: Calibration | None) -> tuple[Condition, Trigger]:
        """When the LLM is asked where no selector decides.

        Raises:
            ConfigError: neither a calibration nor the settings say.
        """
        nats = self._settings.llm_trigger_entropy
        if nats is not None:
            return entropy_above(nats), entropy(above=nats)
        if calibration is None:
            raise ConfigError(
                "an evaluation needs a calibrated selector, or to know when the LLM is asked.",
                hint="Run `s2t train` and `s2t calibrate`, or `s2t collect --part heldout`, or set "
                "evaluate.llm_trigger_entropy (nats).",
            )
        return _at_entropy(calibration, self._settings.llm_trigger_rate)

    def _line(self, prompts: list[list[int]]) -> Line:
        return Line(lambda: self._read_llm(prompts).fork())

    def _corrected(
        self, condition: Condition, k: int, picker: Callable[[list[list[int]], LLMCallCounter], Picker]
    ) -> Callable[[Sequence[Item], LLMCallCounter], MakeDecider]:
        def make(items: Sequence[Item], meter: LLMCallCounter) -> MakeDecider:
            def decider(prompts: list[list[int]], rows: list[int]) -> Corrected:
                meter.turn(prompts, rows)
                return Corrected(condition, picker(prompts, meter), k)

            return decider

        return make


def _greedy(items: Sequence[Item], meter: LLMCallCounter) -> MakeDecider:
    return lambda prompts, rows: Greedy()
