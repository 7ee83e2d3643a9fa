"""Every selection that was paid for, recorded as a group to train on: a selector that learns from it asks less.

One JSON object a line; several threads and processes may append. The file holds what was asked about, as token ids,
and is readable by its owner alone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..atomic_write import lock_to_append
from ..backends.fingerprint import same_weights
from ..errors import ConfigError, InputError
from ..fork_safety import hold_while_forking
from ..llms.question import Answer, Question
from ..scheduling.language_model import LanguageModel
from ..selectors.config import BaseIdentity

_log = logging.getLogger(__name__)
_lock = threading.Lock()
hold_while_forking(sys.modules[__name__], "_lock")

WAIT_S = 1.0
"""Seconds that one generation waits for others that write its file, all its groups together."""
_BEGINNING = b'{"format":1,"slm_model":'
_LOOK_BYTES = 4096


class PaidGroup(BaseModel):
    """One step, its K candidates, and the scores that they were given.

    Attributes:
        slm_model: whose ids and scores these are.
        llm_model: the name of the LLM that was paid.
        ids: the prefix.
        candidates: ``[K]`` token ids, the SLM's best first.
        slm: ``[K]`` log-probabilities.
        selector: ``[K]`` scores of the selector of the time; None without one.
        llm: ``[K]`` log-probabilities; None where it gave none, 0 for the one that a judge named.
        then: tokens that the LLM settled together with its pick.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    format: Literal[1] = 1
    slm_model: BaseIdentity
    llm_model: str
    ids: tuple[int, ...]
    candidates: tuple[int, ...]
    slm: tuple[float, ...]
    selector: tuple[float, ...] | None
    llm: tuple[float | None, ...]
    then: tuple[int, ...] = ()

    @property
    def pick(self) -> int:
        """Place of the LLM's best candidate."""
        known = {at: score for at, score in enumerate(self.llm) if score is not None}
        return max(known, key=lambda at: known[at])

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Refuse lists that are not of the same candidates."""
        k = len(self.candidates)
        if not k or {len(self.slm), len(self.llm), len(self.selector or self.slm)} != {k}:
            raise ValueError(f"{k} candidates do not have as many scores")
        if not self.ids or all(score is None for score in self.llm):
            raise ValueError("no prefix, or no score of the LLM")
        return self


class PaidGroups:
    """Appends one generation's groups to a file; made at the first one.

    Args:
        path: the file.
        llm_model: the LLM's name.
    """

    def __init__(self, path: Path, llm_model: str) -> None:
        self.path, self._llm_model, self._patience_s = path, llm_model, WAIT_S

    def add(self, question: Question, answer: Answer) -> None:
        """Keep one paid selection. A file that does not take it costs a warning, never the answer."""
        if question.prefix is None:
            return
        try:
            group = PaidGroup(
                slm_model=BaseIdentity.of(question.prefix.model),
                llm_model=self._llm_model,
                ids=tuple(question.ids),
                candidates=tuple(question.candidates),
                slm=tuple(question.slm),
                selector=None if question.selector is None else tuple(question.selector),
                llm=answer.scores,
                then=answer.then,
            )
            self._append(group.model_dump_json().encode() + b"\n")
        except (OSError, ValueError) as error:
            _log.warning("a paid selection was not recorded in %s: %s", self.path, error)

    def _append(self, line: bytes) -> None:
        began = time.monotonic()
        if not _lock.acquire(timeout=self._patience_s):
            raise TimeoutError("other threads kept it")
        try:
            with open(self.path, "ab+", buffering=0, opener=_open_private) as file:
                lock_to_append(file, began + self._patience_s)
                if not _is_ours(file):
                    raise OSError("it holds something else now, and was left as it is")
                if _torn(file):
                    line = b"\n" + line
                written = file.write(line)
        finally:
            _lock.release()
            self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))
        if written != len(line):
            raise OSError("the disk took only part of it")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def check_appendable(path: Path) -> None:
    """Refuse what holds something else than groups; nothing at all, and the beginning of a group, pass.

    Raises:
        ConfigError: naming the file, which is left as it is.
    """
    other = "Choose another file for paid selections; this one was not changed."
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"record is {str(path)!r}, and there is no such folder.", hint="Make it first.")
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"record is {str(path)!r}, which is not a file.", hint=other)
    try:
        with path.open("rb") as file:
            ours = _is_ours(file)
    except OSError as error:
        raise ConfigError(f"record is {str(path)!r}, which cannot be read: {error.strerror}.", hint=other) from None
    if not ours:
        raise ConfigError(f"record is {str(path)!r}, which holds something else.", hint=other)


def _is_ours(file: IO[bytes]) -> bool:
    """Whether the first line that is not blank is a group or the beginning of one; so is an empty file."""
    file.seek(0)
    first, *_ = file.read(_LOOK_BYTES).lstrip().split(b"\n", 1)
    written = b"".join(first.split())
    return written.startswith(_BEGINNING) or _BEGINNING.startswith(written)


def _torn(file: IO[bytes]) -> bool:
    """Whether the last line was not finished: its writer was killed, or the disk was full."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)  # appending is always at the end
    return file.read(1) != b"\n"


def read_groups(path: str | Path, slm: LanguageModel | None = None) -> Iterator[PaidGroup]:
    """The groups of a file, in order; a line that was cut off by a crash or a full disk is passed over.

    Args:
        path: written by ``Escalation(record=...)``.
        slm: refuse groups of any other model.

    Raises:
        InputError: the file cannot be read, or a line is something else, or holds what the SLM cannot read.
        ConfigError: a group of another SLM.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from error
    ours = BaseIdentity.of(slm) if slm is not None else None
    for number, line in enumerate(lines, start=1):
        try:
            group = PaidGroup.model_validate_json(line)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            if not line.endswith(b"}") or "EOF while parsing" in said:  # cut off, perhaps after an inner brace
                continue
            raise InputError(f"{path}, line {number}, is no group: {said}.") from error
        theirs = group.slm_model
        if ours is not None and not (
            same_weights(ours.weights_fingerprint, theirs.weights_fingerprint)
            and ours.tokenizer_fingerprint == theirs.tokenizer_fingerprint
        ):
            raise ConfigError(
                f"{path}, line {number}, comes from {theirs.name!r} with other weights than {ours.name!r} has.",
                hint="Train that model, or record anew.",
            )
        if slm is not None and not _readable(group, slm):
            raise InputError(
                f"{path}, line {number}: {slm.name!r} has tokens 0 to {slm.vocab_size - 1} and a context of"
                f" {slm.context_window}, and the group does not keep to them.",
                hint="The line was changed after it was written; delete it.",
            )
        yield group


def _readable(group: PaidGroup, slm: LanguageModel) -> bool:
    tokens = (*group.ids, *group.candidates)
    return min(tokens) >= 0 and max(tokens) < slm.vocab_size and len(group.ids) < slm.context_window
