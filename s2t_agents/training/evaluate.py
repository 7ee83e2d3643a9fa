"""One table: the same problems for every row, in chunks whose answers run together.

Chunks go outside, rows inside, so that prompts stay in the prefix cache for all rows. Every row is settings of the
engine (``rows``), whose loop of steps answers all problems of a chunk at once (``waits.gather``). With a folder to
write to, every chunk of every row is kept as soon as it is done, and a run that was killed goes on there (``kept``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_write import sole_run, write_whole
from ..errors import ConfigError
from ..llms.local_llm import LocalLLM
from ..llms.token_map import side_of
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import gather
from ..types import Sampling
from .collect import row_seed, selector_digest
from .config import EvaluateConfig, EvaluationRows
from .crew import Crew
from .dialogue import AnsweredItem, Speaker, Trace, answering, check_prompts
from .kept import Kept
from .labels import along, under
from .plots import draw
from .progress import HIDDEN, Bar, bar, counted
from .report import EvalReport, RowReport, Tally
from .rows import Ready, Row, RowMaker
from .shards import ModelIdentity
from .tasks import Item, Task, prompts_hash
from .verdicts import of_table

PROMPT_BYTES = 3 * 2**29
"""Memory of each model for the KV of a chunk's prompts and answers, while an evaluation runs."""


def evaluate(config: EvaluateConfig, crew: Crew | None = None) -> EvalReport:
    """Answer all problems in every way and write ``report.json`` and plots where ``config.out`` says.

    Run again after it was killed, it goes on behind the answers that it finds there.

    Args:
        config: see ``EvaluateConfig``.
        crew: processes that share the chunks; their number changes nothing but the seconds.

    Raises:
        ConfigError: a selector that is not calibrated, or for another base; neither a selector nor
            ``llm_trigger_entropy``; no folder can be made where ``config.out`` says, or it holds the answers of another
            evaluation.
        TokenizerMismatch: tokenizers that differ, one of which cannot be followed byte by byte.
        FolderInUse: another run is at work there.
        InputError: prompts that cannot be used.
    """
    crew = crew or Crew()
    if config.out is None:
        return _evaluate(config, crew)
    _make(config.out)
    with sole_run(config.out):
        return _evaluate(config, crew)


def _evaluate(config: EvaluateConfig, crew: Crew) -> EvalReport:
    evaluation = _open(config)
    report = evaluation.report() if crew.count == 1 else evaluation.report(partial(crew.each, partial(_fill, config)))
    if config.out is not None:
        write_whole(config.out / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
        draw(report, config.out)
    return report


def evaluate_with(slm: LanguageModel, llm: LanguageModel, task: Task, config: EvaluateConfig) -> EvalReport:
    """``evaluate`` on models that are loaded already; writes no report, but keeps answers where ``config.out`` says."""
    return Evaluation(slm, llm, task, config).report()


Tallies = dict[str, Tally]
"""One for each row, by name."""


class Evaluation:
    """All rows on one task, chunk by chunk.

    An LLM whose tokens are not the SLM's is asked by bytes; it cannot write the SLM's tokens (no row ``takeover``), nor
    tell which of them is its best at every step (no agreement).

    Raises:
        ConfigError, TokenizerMismatch: as ``evaluate`` does.
    """

    def __init__(self, slm: LanguageModel, llm: LanguageModel, task: Task, config: EvaluateConfig) -> None:
        self._slm, self._llm, self._task, self._config = slm, llm, task, config
        LocalLLM(llm).check(slm)
        ready = _ready(slm, config)
        self._chosen = _chosen(ready, config.rows)
        maker = RowMaker(slm, llm, config.rows, config.seed)
        agreement = config.rows.agreement if maker.same_ids else 0
        template = None if maker.same_ids else side_of(llm, None).template  # as it reads questions
        self._run = _Run(Speaker(slm), Speaker(llm, template), task, config.rows, config.seed, agreement)
        self._rows = _rows(maker, ready, self._chosen, config.rows)
        self._sweeps = _sweeps(maker, slm, config, self._chosen)
        self._kept = None if config.out is None else Kept(config.out / "answers", self._manifest())

    def _manifest(self) -> dict[str, Any]:
        """All that decides the answers."""
        config = self._config
        return {
            "slm": ModelIdentity.of(self._slm).model_dump(),
            "llm": ModelIdentity.of(self._llm).model_dump(),
            "task": self._task.name,
            "prompts_hash": prompts_hash(self._task),
            "settings": config.rows.model_dump(mode="json", exclude=_not_deciding(config.rows)),
            "selectors": {kind: selector_digest(folder) for kind, folder in config.selectors.items()},
            "seed": config.seed,
        }

    @property
    def _everything(self) -> list[Row]:
        return [*self._rows, *(row for part in self._sweeps.values() for row in part)]

    def fill(self, number: int, progress: Bar = HIDDEN) -> Tallies:
        """One chunk, in every way."""
        size = self._config.rows.batch
        self._run.forget()
        tallies = {}
        for row in sorted(self._everything, key=_limit, reverse=True):
            progress.say(f"eval {row.name}")
            tally = self._kept.get(number, row.name) if self._kept else None
            if tally is None:
                chunk = self._task.items[number * size : (number + 1) * size]
                tally, answers = self._run.fill(row, chunk, not number, progress)
                if self._kept:
                    self._kept.put(number, row.name, tally, answers)
            else:
                progress.advance(len(tally.right) * row.samples)
            tallies[row.name] = tally
        return tallies

    def report(self, each: Callable[[Sequence[int]], Iterable[Tallies]] | None = None) -> EvalReport:
        """The table.

        Args:
            each: fills the chunks of these numbers elsewhere and gives each as it is done; None fills them here.
        """
        self._run.check(self._task.items)
        started, rows = time.perf_counter(), self._everything
        numbers = range(-(-len(self._task.items) // self._config.rows.batch))
        tallies = {row.name: Tally(row.name) for row in rows}
        each_item = sum(row.samples for row in rows)
        with bar(f"eval {self._task.name}", len(self._task.items) * each_item) as progress:
            for part in each(numbers) if each else (self.fill(number, progress) for number in numbers):
                for name, tally in part.items():
                    tallies[name].add(tally)
                progress.advance(len(part["slm"].right) * each_item if each else 0)
        return self._reported(tallies, time.perf_counter() - started)

    def _reported(self, tallies: Tallies, seconds: float) -> EvalReport:
        settings = self._config.rows
        price = None if settings.llm_usd_per_million is None else settings.llm_usd_per_million / 1e6
        slm, llm = (tallies[name].right for name in ("slm", "llm"))
        reports = {name: tally.report(slm, llm, price) for name, tally in tallies.items()}
        return EvalReport(
            task=self._task.name,
            n=len(self._task.items),
            seed=self._config.seed,
            slm=ModelIdentity.of(self._slm).model_dump(),
            llm=ModelIdentity.of(self._llm).model_dump(),
            hybrid=self._chosen.kind if self._chosen else None,
            selectors={kind: str(folder) for kind, folder in self._config.selectors.items()},
            settings=settings.model_dump(mode="json"),
            rows={row.name: reports[row.name] for row in self._rows},
            verdict=of_table({row.name: reports[row.name] for row in self._rows}),
            sweeps={what: {row.name: reports[row.name] for row in part} for what, part in self._sweeps.items()},
            seconds=seconds,
        )


def _not_deciding(rows: EvaluationRows) -> set[str]:
    """Settings that change no answer; one that was not set is left out, as in older folders."""
    return {"llm_usd_per_million"} | ({"llm_trigger_entropy"} if rows.llm_trigger_entropy is None else set())


def _make(folder: Path) -> None:
    """Now, not when hours of work are to be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the report's folder {folder} cannot be made: {error.strerror}.", hint="Name another one."
        ) from error


def _open(config: EvaluateConfig) -> Evaluation:
    task = config.task.open()
    return Evaluation(config.models.load_slm(), config.models.load_llm(), task, config)


_opened = lru_cache(maxsize=1)(_open)
"""Once per process of a crew, however many chunks it fills; a process that lives on would miss changed files."""


def _fill(config: EvaluateConfig, number: int) -> Tallies:
    """One chunk, in a crew's process."""
    return _opened(config).fill(number)


def _ready(slm: LanguageModel, config: EvaluateConfig) -> list[Ready]:
    return [Ready.load(kind, Path(folder), slm, config.rows.trigger_rate) for kind, folder in config.selectors.items()]


def _chosen(ready: Sequence[Ready], settings: EvaluationRows) -> Ready | None:
    """The selector of the hybrid and random rows: as asked, or the one with the best held-out agreement; None where
    there is no selector at all."""
    if settings.hybrid is None:
        return max(ready, key=lambda each: each.calibration.agreement, default=None)
    found = [each for each in ready if each.kind == settings.hybrid]
    if not found:
        raise ConfigError(f"hybrid is {settings.hybrid!r}, but there is no such selector.")
    return found[0]


def _rows(maker: RowMaker, ready: Sequence[Ready], chosen: Ready | None, settings: EvaluationRows) -> list[Row]:
    """The main table; without a selector, those rows that need none."""
    majority = [maker.majority()] if settings.votes else []
    if chosen is None:
        return [maker.alone(), *majority, *maker.by_llm(None), maker.llm()]
    calibration = chosen.calibration
    return [
        maker.alone(),
        *majority,
        maker.random(chosen),
        *(maker.local(each) for each in ready),
        *maker.by_llm(calibration),
        *(maker.hybrid(chosen, limit) for limit in settings.budgets),
        maker.llm(),
    ]


def _sweeps(maker: RowMaker, slm: LanguageModel, config: EvaluateConfig, chosen: Ready | None) -> dict[str, list[Row]]:
    """Rows over K and over the trigger rate, for the chosen selector and for LLM selection (K only)."""
    if chosen is None:
        selections = [maker.selection(None, name=f"llm_select, K = {k}", k=k) for k in config.rows.ks]
        return {"k": selections} if selections else {}
    folder = Path(config.selectors[chosen.kind])
    by_rate = {rate: Ready.load(chosen.kind, folder, slm, rate) for rate in config.rows.rates}
    found = {
        "k": [
            row
            for k in config.rows.ks
            for row in (
                maker.local(chosen, name=f"{chosen.kind}, K = {k}", k=k),
                maker.selection(chosen.calibration, name=f"llm_select, K = {k}", k=k),
            )
        ],
        "rate": [maker.local(each, name=f"{chosen.kind}, rate = {rate:g}") for rate, each in by_rate.items()],
    }
    return {what: rows for what, rows in found.items() if rows}


@dataclass(frozen=True)
class _Done:
    """One problem answered in one way, and what that took; several answers where the most frequent one counts."""

    answers: Sequence[AnsweredItem]
    seconds: float

    @property
    def calls(self) -> int:
        """Of the LLM."""
        return sum(len(trace.by_llm) for answer in self.answers for trace in answer.traces)


def _limit(row: Row) -> int:
    """Escalations per answer."""
    return row.escalations or 0


class _Run:
    """Runs rows over chunks; remembers the prompts that several rows read.

    Args:
        slm: answers.
        llm: answers the row of its own.
        task: grades.
        settings: of the rows.
        seed: of samples.
        agreement: problems on which the agreement with the LLM is measured.
    """

    def __init__(
        self, slm: Speaker, llm: Speaker, task: Task, settings: EvaluationRows, seed: int, agreement: int
    ) -> None:
        self._slm, self._llm, self._task, self._settings, self._seed = slm, llm, task, settings, seed
        self._judged = agreement
        self._done: dict[str, list[_Done]] = {}  # by row, of the present chunk
        for speaker in (slm, llm):  # the prompts of a chunk are read once for all rows
            speaker.model.prefix_cache.limit_bytes = PROMPT_BYTES

    def forget(self) -> None:
        """A new chunk begins."""
        self._done.clear()
        for speaker in (self._slm, self._llm):
            speaker.model.prefix_cache.clear()

    def check(self, items: Sequence[Item]) -> None:
        """Refuse prompts that one of the models cannot read; see ``check_prompts``."""
        for speaker in (self._slm, self._llm):
            check_prompts(speaker, items)

    def fill(
        self, row: Row, chunk: Sequence[Item], first: bool, progress: Bar = HIDDEN
    ) -> tuple[Tally, Sequence[AnsweredItem]]:
        """One chunk of one row; on the first one, its answers are looked at more closely."""
        tally = Tally(row.name)
        done = self._same_as_with_more(row)
        asked = [at for at in range(len(chunk)) if at not in done]
        progress.advance(len(done) * row.samples)
        size = max(1, self._settings.batch // row.samples)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            for place, answer in zip(part, self._answered(row, [chunk[at] for at in part], progress), strict=True):
                done[place] = answer
        found = [done[at] for at in range(len(chunk))]
        self._done[row.name] = found
        answers = [answer for each in found for answer in each.answers]
        tally.seconds = sum(each.seconds for each in found)
        for at in range(0, len(answers), row.samples):
            tally.right.append(self._right(answers[at : at + row.samples]))
        _count(tally.count, row, answers)
        if first and row.samples == 1 and self._judged:
            tally.agreed, tally.judged = self._agreement(answers[: self._judged], row)
        return tally, answers

    def _answered(self, row: Row, items: Sequence[Item], progress: Bar) -> list[_Done]:
        """Each of these items answered, so many times as the row wants."""
        speaker, limit = self._llm if row.llm_generates else self._slm, row.escalations
        started = time.perf_counter()
        answers = gather(
            [
                counted(
                    answering(speaker, self._task, item, row.engine(item), self._sampling(row, item, sample), limit),
                    progress,
                )
                for item in items
                for sample in range(row.samples)
            ]
        )
        seconds = (time.perf_counter() - started) / len(items)
        return [_Done(answers[at : at + row.samples], seconds) for at in range(0, len(answers), row.samples)]

    def _same_as_with_more(self, row: Row) -> dict[int, _Done]:
        """By place: answers of the row with a larger limit that did not go beyond this one's."""
        if row.more is None:
            return {}
        return {at: each for at, each in enumerate(self._done.get(row.more, ())) if each.calls <= _limit(row)}

    def _sampling(self, row: Row, item: Item, sample: int) -> Callable[[Sequence[int]], Sampling]:
        """Of a turn, from its prompt: a seed of its own, whatever batch it is in."""

        def sampling(prompt: Sequence[int]) -> Sampling:
            seed = row_seed(self._seed, item.id, sample, len(prompt))
            return Sampling(max_tokens=self._settings.max_tokens, temperature=row.temperature, seed=seed)

        return sampling

    def _right(self, answers: Sequence[AnsweredItem]) -> bool:
        """Whether the (most frequent) answer is right; among equals the first counts."""
        votes = Counter(self._task.vote(answer.item, answer.text) for answer in answers)
        elected = votes.most_common(1)[0][0]
        winner = next(answer for answer in answers if self._task.vote(answer.item, answer.text) == elected)
        return self._task.grade(winner.item, winner.text)

    @torch.inference_mode()
    def _agreement(self, answers: Sequence[AnsweredItem], row: Row) -> tuple[int, int]:
        """Triggered steps whose token is the LLM's best candidate, and how many there are."""
        agreed = judged = 0
        for answer in answers:
            for prompt, trace in zip(answer.prompts, answer.traces, strict=True):
                if not trace.triggered:
                    continue
                at = torch.tensor(trace.triggered)
                slm, llm = (self._along(who, answer, prompt, trace)[at] for who in (self._slm, self._llm))
                candidates = slm.topk(row.k).indices
                best = candidates.gather(1, llm.gather(1, candidates).argmax(-1, keepdim=True))[:, 0]
                agreed += int((best == torch.tensor(trace.ids)[at]).sum())
                judged += len(at)
        return agreed, judged

    def _along(self, speaker: Speaker, answer: AnsweredItem, prompt: list[int], trace: Trace) -> Tensor:
        """``[n, V]``: a model's logits at each step of a completion."""
        said = along(speaker.model, [(prompt, trace.ids)])[0].cpu()
        return under(speaker.grammar(answer.item, prompt, self._settings.max_tokens), trace.ids, said)


def _count(count: Counter[str], row: Row, answers: Sequence[AnsweredItem]) -> None:
    """What the answers took."""
    for answer in answers:
        triggered = sum(len(trace.triggered) for trace in answer.traces)
        count["tokens"] += answer.tokens
        count["steps"] += answer.tokens
        count["triggered"] += triggered
        count["flipped"] += sum(len(trace.flipped) for trace in answer.traces)
        count["by_llm"] += sum(len(trace.by_llm) for trace in answer.traces)
        if row.llm_generates:
            count["llm_calls"] += answer.tokens
            count["llm_tokens"] += answer.tokens + sum(map(len, answer.prompts))
        else:
            count["slm_forwards"] += answer.tokens + triggered * row.forwards
            count["llm_calls"] += sum(len(trace.by_llm) for trace in answer.traces)
            count["llm_tokens"] += sum(trace.llm_tokens for trace in answer.traces)


__all__ = ["EvalReport", "RowReport", "evaluate", "evaluate_with"]
