"""An audit's figures with their intervals, and what no log can say."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ..budget import TokenPrice, money
from ..chat.engine_settings import EngineSettings
from ..chat.runtime import build
from ..errors import ConfigError
from ..intervals import wilson
from .logs import Line, LoggedAnswer, NotAnAnswer, line_at, lines_of, price_of, read_answer, shown
from .replay import ReplayedAnswer, replay

AT_ONCE = 8
"""Answers whose forwards run together."""
RESAMPLES = 1000
FEWEST = 10
"""Answers from which an interval is given."""
SEED = 0

UNKNOWN = (
    "Whether another token is a worse one: agreement with the log is not correctness.",
    "What comes after the first token that differs: each answer is followed along the log to its end.",
    "What the LLM would pick: it is taken to pick the logged token where that is a candidate; a log that was sampled at"
    " a temperature, or has hidden reasoning, says less.",
    "Time: neither the wait for a question nor the small model's own speed under your load.",
    "The small model's own price: give ChatS2T a device_price and run it in shadow mode.",
    "What a question really costs: tokens are counted in the small model's vocabulary, one is written, and a judge (a"
    " chat API without log-probabilities) also reads previews. Cached prefixes are charged as the provider caches them:"
    " from not at all to always.",
    "Pacing and limits: every doubt is asked; a budget, or a calibrated margin, asks fewer.",
)
"""What is not in a log, for readers of the figures."""


@dataclass(frozen=True)
class Figure:
    """A mean with its 95% interval; None where nothing is known, or of an interval of too few answers.

    Shares of answers have Wilson's interval, all others that of resampled answers.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        lines: of the file.
        answers: that could be read, of all lines.
        left_out: lines by the reason why they were not; with the number of the first of each.
        replayed: answers that were replayed, a sample.
        not_replayed: of the sample, by reason.
        models: that gave the answers, as logged.
        logged_usd: what all readable answers cost together; None where one is unknown.
        unpriced: how many of them have no known cost.
        off_list: those of them that list prices do not hold for: batches, and service tiers by their names.
        figures: by name; rates are shares of tokens, costs USD an answer.
        unknown: what a log cannot say.
    """

    lines: int
    answers: int
    left_out: dict[str, tuple[int, int]]
    replayed: int
    not_replayed: dict[str, int]
    models: dict[str, int]
    logged_usd: Decimal | None
    unpriced: int
    off_list: dict[str, int]
    figures: dict[str, Figure]
    unknown: tuple[str, ...] = UNKNOWN

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        found = asdict(self)
        found["left_out"] = {why: {"lines": n, "first": at} for why, (n, at) in self.left_out.items()}
        found["logged_usd"] = None if self.logged_usd is None else f"{self.logged_usd:f}"
        return found


@dataclass
class _Log:
    """The file, read once: counts, and where the sampled answers are."""

    lines: int = 0
    answers: int = 0
    unpriced: int = 0
    usd: Decimal = Decimal(0)
    models: Counter[str] = field(default_factory=Counter)
    off_list: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)
    sample: list[int] = field(default_factory=list)
    prices: dict[str, TokenPrice | None] = field(default_factory=dict)

    def add(self, line: Line, size: int, dice: random.Random) -> None:
        self.lines += 1
        try:
            logged = read_answer(line.text)
        except NotAnAnswer as why:
            n, first = self.left_out.get(str(why), (0, line.number))
            self.left_out[str(why)] = (n + 1, first)
            return
        self.answers += 1
        if len(self.models) < MAX_MODELS or logged.model in self.models:
            self.models[shown(logged.model or "not named")] += 1
        usd = logged.cost(price_of(logged.model, self.prices))
        if usd is None:
            self.unpriced += 1
            if logged.tier is not None and (len(self.off_list) < MAX_MODELS or shown(logged.tier) in self.off_list):
                self.off_list[shown(logged.tier)] += 1
        else:
            self.usd = money.add(self.usd, usd)
        if len(self.sample) < size:  # a reservoir: every answer is as likely to be in it
            self.sample.append(line.offset)
        elif (at := dice.randrange(self.answers)) < size:
            self.sample[at] = line.offset


MAX_MODELS = 1000


def audit(
    path: str | Path,
    *,
    model: str = "s2t-demo",
    selector: str | None = None,
    asked: str | None = None,
    answers: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Replay a sample of a log's answers through a small model. Asks no LLM, and changes nothing.

    Args:
        path: JSON lines, see ``audit.logs``.
        model: the small model, as for ``ChatS2T``.
        selector: its selector; None has none.
        asked: name of the model whose price a question has; None takes the one that gave the answer.
        answers: how many are replayed, at most.
        on_progress: called with how many are done, and of how many.

    Raises:
        ConfigError: no such file, no answer in it that can be read, a model that cannot be loaded, no known price for
            ``asked``.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file.", hint="Give a log of JSON lines.")
    if answers < 1:
        raise ConfigError(f"answers is {answers}; at least 1 is replayed.")
    with path.open("rb") as file:
        if file.read(1) == b"[":
            raise ConfigError(f"{path} is one JSON array.", hint="Make it JSON lines: jq -c '.[]' FILE > lines.jsonl")
    log, dice = _Log(), random.Random(SEED)
    if asked is not None and price_of(asked, log.prices) is None:
        raise ConfigError(f"asked is {asked!r}, and its price is not known.", hint="Name a model that is listed.")
    for line in lines_of(path):
        log.add(line, answers, dice)
    if not log.answers:
        raise ConfigError(
            f"{path}: none of {log.lines} lines holds an answer ({_reasons(log.left_out)}).",
            hint="s2t audit --help shows the forms that are read.",
        )
    runtime = build(EngineSettings(model, selector=selector))
    replayed: list[tuple[LoggedAnswer, ReplayedAnswer]] = []
    not_replayed: Counter[str] = Counter()
    for at in range(0, len(log.sample), AT_ONCE):
        some = _read_again(path, sorted(log.sample)[at : at + AT_ONCE])
        for logged, found in zip(some, replay(runtime, some), strict=True):
            if isinstance(found, NotAnAnswer):
                not_replayed[str(found)] += 1
            else:
                replayed.append((logged, found))
        if on_progress is not None:
            on_progress(min(at + AT_ONCE, len(log.sample)), len(log.sample))
    return Audit(
        log.lines,
        log.answers,
        log.left_out,
        len(replayed),
        dict(not_replayed),
        dict(log.models.most_common(10)),
        None if log.unpriced else log.usd,
        log.unpriced,
        dict(log.off_list.most_common(10)),
        _figures(replayed, asked, log.prices) if replayed else {},
    )


def _read_again(path: Path, offsets: Sequence[int]) -> list[LoggedAnswer]:
    """The answers at these places of the file.

    Raises:
        ConfigError: it was changed meanwhile.
    """
    try:
        return [read_answer(line_at(path, offset)) for offset in offsets]
    except (NotAnAnswer, OSError):
        raise ConfigError(f"{path} was changed while it was read.", hint="Audit a copy.") from None


def _reasons(left_out: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{n} {why}" for why, (n, _) in sorted(left_out.items(), key=lambda item: -item[1][0])[:3])


_DOLLARS = ("logged_usd", "asking_usd_cached", "asking_usd_uncached", "saved_usd_cached", "saved_usd_uncached")


def _figures(
    replayed: Sequence[tuple[LoggedAnswer, ReplayedAnswer]], asked: str | None, prices: dict[str, TokenPrice | None]
) -> dict[str, Figure]:
    def of(each: Callable[[ReplayedAnswer], float]) -> list[float]:
        return [each(found) for _, found in replayed]

    tokens, ones = of(lambda found: found.tokens), [1.0] * len(replayed)
    figures = {
        "triggered": _ratio(of(lambda found: found.triggered), tokens),
        "asked": _ratio(of(lambda found: len(found.questions)), tokens),
        "as_logged_slm": _ratio(of(lambda found: found.slm), tokens),
        "as_logged_local": _ratio(of(lambda found: found.local), tokens),
        "as_logged_asked": _ratio(of(lambda found: found.asked), tokens),
        "same_answers_slm": _share(of(lambda found: found.slm == found.tokens)),
        "same_answers_local": _share(of(lambda found: found.local == found.tokens)),
        "same_answers_asked": _share(of(lambda found: found.asked == found.tokens)),
        "questions_an_answer": _ratio(of(lambda found: len(found.questions)), ones),
        "lost_questions": _ratio(of(lambda found: found.lost), of(lambda found: len(found.questions))),
    }
    priced = [
        (float(usd), _asking_usd(found, price, cached=True), _asking_usd(found, price, cached=False))
        for logged, found in replayed
        if (usd := logged.cost(price_of(logged.model, prices))) is not None
        and (price := price_of(asked or logged.model, prices)) is not None
    ]
    if len(priced) < len(replayed):  # unknown is not 0, and a part is not the whole
        return figures | dict.fromkeys(_DOLLARS, Figure(None))
    logged_usd, low, high = (list(column) for column in zip(*priced, strict=True))
    saved = ([usd - asking for usd, asking in zip(logged_usd, column, strict=True)] for column in (low, high))
    columns = (logged_usd, low, high, *saved)
    return figures | {name: _ratio(column, ones) for name, column in zip(_DOLLARS, columns, strict=True)}


def _asking_usd(found: ReplayedAnswer, price: TokenPrice, *, cached: bool) -> float:
    """USD of an answer's questions; the provider caches what each of them reads for those after it, or nothing."""
    return sum(
        float(
            price.cost(
                input_tokens=question.prefix_tokens,
                cached_tokens=question.prefix_tokens - question.new_tokens if cached else 0,
                cache_write_tokens=question.new_tokens if cached else 0,
                output_tokens=1,
            )
        )
        for question in found.questions
    )


def _share(hits: Sequence[float]) -> Figure:
    value = sum(hits) / len(hits)
    return Figure(value, *wilson(sum(hits), len(hits))) if len(hits) >= FEWEST else Figure(value)


def _ratio(over: Sequence[float], under: Sequence[float]) -> Figure:
    """sum / sum, with the 2.5 and 97.5 percent points over resampled answers."""
    a, b = np.asarray(over, float), np.asarray(under, float)
    if not b.sum():
        return Figure(None)
    if len(a) < FEWEST:
        return Figure(float(a.sum() / b.sum()))
    picks = np.random.default_rng(SEED).integers(0, len(a), (RESAMPLES, len(a)))
    sums = b[picks].sum(1)
    drawn = a[picks].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Figure(float(a.sum() / b.sum()), float(low), float(high))
