"""The rows of an evaluation: each is a way to decide tokens, as settings of the engine.

slm, llm                     one model alone, greedy
maj8                         eight samples of the SLM, the most frequent answer
random                       the selector at steps chosen by lot
head, activated, adapted, published   a selector at critical steps, no LLM
llm_select, takeover         the LLM picks among the candidates, or writes the token itself
hybrid_n                     the selector, and the LLM at its least sure steps, n times per answer
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engine.engine import Engine
from ..errors import ConfigError
from ..escalation import Escalation
from ..scheduling.language_model import LanguageModel
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import Calibration
from ..selectors.head import HeadSelector
from ..selectors.learned_trigger import load_probe
from ..selectors.published import PublishedSelector
from ..triggers import Trigger, at_random, entropy, probe
from .collect import row_seed
from .config import EvaluationRows, Kind
from .counted_llm import CountedLLM, TakeoverLLM
from .tasks import Item


@dataclass(frozen=True)
class Ready:
    """A calibrated selector with its trigger."""

    kind: Kind
    selector: LocalSelector
    config: SelectorConfig
    calibration: Calibration
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
            trigger: Trigger = probe(*load_probe(folder, config), above=calibration.probe_above)
        else:
            trigger = _at_entropy(calibration, rate)
        return cls(kind, selector, config, calibration, trigger)

    @property
    def forwards(self) -> int:
        """SLM forwards per selection."""
        return (
            0 if isinstance(self.selector, HeadSelector) else 2 if isinstance(self.selector, PublishedSelector) else 1
        )


def _at_entropy(calibration: Calibration, rate: float | None) -> Trigger:
    return entropy(above=calibration.trigger_entropy if rate is None else calibration.entropy_for(rate))


@dataclass(frozen=True)
class Row:
    """One way of answering.

    Attributes:
        name: of the row.
        engine: answers one item; LLM calls are counted item by item.
        k: candidates.
        forwards: SLM forwards per triggered step, besides the step itself.
        samples: answers per problem, the majority counts.
        temperature: of their tokens.
        llm_generates: the LLM is the model.
        escalations: per answer; None sets no limit.
        more: name of the row that differs from this one in its larger limit alone.
    """

    name: str
    engine: Callable[[Item], Engine]
    k: int
    forwards: int = 0
    samples: int = 1
    temperature: float = 0.0
    llm_generates: bool = False
    escalations: int | None = None
    more: str | None = None


class RowMaker:
    """Builds rows for one pair.

    Args:
        slm: the small model.
        llm: the large one.
        settings: see ``EvaluationRows``.
        seed: of lots and votes.

    Attributes:
        same_ids: whether the LLM's tokens are the SLM's; if not, it is asked by bytes.
    """

    def __init__(self, slm: LanguageModel, llm: LanguageModel, settings: EvaluationRows, seed: int) -> None:
        self._slm, self._llm, self._settings, self._seed = slm, llm, settings, seed
        self._compared = CountedLLM(llm)
        self.same_ids = self._compared.shares_tokens(slm)

    def alone(self) -> Row:
        """The SLM, greedy."""
        return Row("slm", lambda item: Engine(self._slm), self._settings.k)

    def llm(self) -> Row:
        """The LLM, greedy."""
        return Row("llm", lambda item: Engine(self._llm), self._settings.k, llm_generates=True)

    def majority(self) -> Row:
        """The most frequent of several sampled answers."""
        votes, temperature = self._settings.votes, self._settings.temperature
        name = f"maj{votes}"
        return Row(name, lambda item: Engine(self._slm), self._settings.k, samples=votes, temperature=temperature)

    def local(self, ready: Ready, *, name: str | None = None, k: int | None = None) -> Row:
        """A selector at critical steps."""
        k = k or ready.config.k

        def engine(item: Item) -> Engine:
            return Engine(self._slm, k=k, trigger=ready.trigger, selector=ready.selector)

        return Row(name or ready.kind, engine, k, forwards=ready.forwards)

    def random(self, ready: Ready) -> Row:
        """The selector at as many steps, chosen by lot, the same for an item whatever else is in the batch."""
        rate = self._settings.trigger_rate or ready.calibration.trigger_rate

        def engine(item: Item) -> Engine:
            trigger = at_random(rate, seed=row_seed(self._seed, item.id))
            return Engine(self._slm, k=ready.config.k, trigger=trigger, selector=ready.selector)

        return Row("random", engine, ready.config.k, forwards=ready.forwards)

    def selection(self, calibration: Calibration | None, *, name: str = "llm_select", k: int | None = None) -> Row:
        """The LLM picks among the SLM's candidates."""
        return self._asking(CountedLLM, calibration, name, k or self._settings.k)

    def by_llm(self, calibration: Calibration | None) -> list[Row]:
        """The LLM at critical steps: it picks, and it writes the token where its tokens are the SLM's."""
        picks = self.selection(calibration)
        if not self.same_ids:
            return [picks]
        return [picks, self._asking(TakeoverLLM, calibration, "takeover", self._settings.k)]

    def hybrid(self, ready: Ready, limit: int) -> Row:
        """The selector, with ``limit`` escalations per answer."""
        margin, k = ready.calibration.escalation_margin, ready.config.k
        larger = min((other for other in self._settings.budgets if other > limit), default=None)
        more = None if larger is None else f"hybrid_{larger}"

        def engine(item: Item) -> Engine:
            escalation = Escalation(CountedLLM(self._llm, self._compared), margin=margin)
            return Engine(self._slm, k=k, trigger=ready.trigger, selector=ready.selector, escalation=escalation)

        return Row(f"hybrid_{limit}", engine, k, forwards=ready.forwards, escalations=limit, more=more)

    def _asking(self, llm: type[CountedLLM], calibration: Calibration | None, name: str, k: int) -> Row:
        trigger = self._for_llm(calibration)

        def engine(item: Item) -> Engine:
            escalation = Escalation(llm(self._llm, self._compared), margin=1.0)
            return Engine(self._slm, k=k, trigger=trigger, escalation=escalation)

        return Row(name, engine, k)

    def _for_llm(self, calibration: Calibration | None) -> Trigger:
        """When the LLM is asked where no selector decides.

        Raises:
            ConfigError: neither a calibration nor the settings say.
        """
        nats = self._settings.llm_trigger_entropy
        if nats is not None:
            return entropy(above=nats)
        if calibration is None:
            raise ConfigError(
                "an evaluation needs a calibrated selector, or to know when the LLM is asked.",
                hint="Run `s2t train` and `s2t calibrate`, or `s2t collect --part heldout`, or set "
                "evaluate.llm_trigger_entropy (nats).",
            )
        return _at_entropy(calibration, self._settings.llm_trigger_rate)
