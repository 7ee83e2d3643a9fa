"""What an evaluation has done so far, on disk: killed, it goes on behind the last row of the last chunk.

runs/demo/evaluation/answers/
  manifest.json                 the pair, the problems, the settings, the selectors
  00002-llm_select.json         one chunk in one way: every answer, and what it took
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic_write import write_whole
from ..errors import ConfigError, InputError
from .dialogue import AnsweredItem
from .differences import differences
from .report import Tally
from .shards import MANIFEST


class Kept:
    """A folder of answers.

    Args:
        folder: made where it is missing.
        manifest: all that decides the answers.

    Raises:
        ConfigError: the folder holds answers of another evaluation.
        S2TError: it cannot be written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder = folder
        file, wanted = folder / MANIFEST, json.loads(json.dumps(manifest))
        if not any(folder.glob("[0-9]*-*.json")):
            write_whole(file, (json.dumps(wanted, indent=2) + "\n").encode())
        elif differing := differences(_read(file), wanted):
            raise ConfigError(
                f"{folder} holds answers of an evaluation with other settings: {differing}.",
                hint="Put them back, or give another folder: --out.",
            )

    def get(self, chunk: int, row: str) -> Tally | None:
        """What this chunk of this row gave; None when it has not been done.

        Raises:
            InputError: a file that is no such thing.
        """
        file = self._file(chunk, row)
        if not file.exists():
            return None
        try:
            tally = _read(file)["tally"]
            return Tally(**{**tally, "count": Counter(tally["count"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} holds no answers: {error!r}.", hint="Delete it to make them again.") from error

    def put(self, chunk: int, row: str, tally: Tally, answers: Sequence[AnsweredItem]) -> None:
        """Keep a chunk of a row, with its answers for later inspection.

        Raises:
            S2TError: it cannot be written.
        """
        kept = {"tally": {**vars(tally), "count": dict(tally.count)}, "answers": [_shown(answer) for answer in answers]}
        write_whole(self._file(chunk, row), (json.dumps(kept, ensure_ascii=False) + "\n").encode())

    def _file(self, chunk: int, row: str) -> Path:
        return self._folder / f"{chunk:05d}-{re.sub(r'[^a-zA-Z0-9.]+', '_', row)}.json"


def _shown(answer: AnsweredItem) -> dict[str, Any]:
    """An answer for people and programs; places of tokens are those in ``ids``, turn by turn."""
    turns = [
        {"ids": trace.ids, "triggered": trace.triggered, "flipped": trace.flipped, "by_llm": trace.by_llm}
        for trace in answer.traces
    ]
    return {"item": answer.item.id, "text": answer.text, "turns": turns}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}.", hint="Delete it to go on without it.") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no object.", hint="Delete it to go on without it.")
    return found
