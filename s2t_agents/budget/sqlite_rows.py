"""The rows of meters and holds in a SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadLimit
from .meter import Meter
from .quantities import Counts, Limits, Quantities
from .store import Terms
from .window import Window

APPLICATION_ID = 0x5332_5442  # "S2TB"
SCHEMA = """
CREATE TABLE machine (boot TEXT NOT NULL, seen_us INTEGER NOT NULL);
CREATE TABLE meters (
    path TEXT PRIMARY KEY,
    terms_usd INTEGER, terms_escalations INTEGER, terms_tokens INTEGER,
    keep_usd INTEGER NOT NULL, keep_escalations INTEGER NOT NULL, keep_tokens INTEGER NOT NULL,
    terms_us INTEGER, window_s INTEGER, window_offset_s INTEGER,
    limit_usd INTEGER, limit_escalations INTEGER, limit_tokens INTEGER,
    deadline_us INTEGER, limit_us INTEGER, window INTEGER NOT NULL,
    spent_usd INTEGER NOT NULL, spent_escalations INTEGER NOT NULL,
    spent_tokens INTEGER NOT NULL, spent_unpriced INTEGER NOT NULL,
    held_usd INTEGER NOT NULL CHECK (held_usd >= 0),
    held_escalations INTEGER NOT NULL CHECK (held_escalations >= 0),
    held_tokens INTEGER NOT NULL CHECK (held_tokens >= 0),
    held_unpriced INTEGER NOT NULL CHECK (held_unpriced >= 0),
    over_usd INTEGER NOT NULL, over_escalations INTEGER NOT NULL,
    over_tokens INTEGER NOT NULL, over_unpriced INTEGER NOT NULL,
    deadline_wall REAL
) WITHOUT ROWID;
CREATE TABLE holds (
    id TEXT PRIMARY KEY, chain TEXT NOT NULL,
    usd INTEGER NOT NULL, escalations INTEGER NOT NULL, tokens INTEGER NOT NULL, unpriced INTEGER NOT NULL,
    expires_us INTEGER NOT NULL, lapsed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX holds_by_expiry ON holds (lapsed, expires_us);
"""

LATER = {
    "meters": (
        *(
            "terms_answers INTEGER",
            "terms_answer_tokens INTEGER",
            "limit_answers INTEGER",
            "limit_answer_tokens INTEGER",
        ),
        *(
            f"{part}_{unit} INTEGER NOT NULL DEFAULT 0 CHECK ({part}_{unit} >= 0)"
            for part in ("keep", "spent", "held", "over")
            for unit in ("answers", "answer_tokens")
        ),
    ),
    "holds": ("answers INTEGER NOT NULL DEFAULT 0", "answer_tokens INTEGER NOT NULL DEFAULT 0"),
}
"""Columns that files of earlier releases get when they are opened for work."""

_GRANTS = """
CREATE TABLE IF NOT EXISTS grants (path TEXT NOT NULL, once TEXT NOT NULL, PRIMARY KEY (path, once)) WITHOUT ROWID
"""
_UNITS = ("usd", "escalations", "tokens", "answers", "answer_tokens")
"""As columns name what ``COUNTED`` names; ``tokens`` are the LLM's."""
_AMOUNT = (*_UNITS, "unpriced")


def _columns(part: str, units: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{part}_{unit}" for unit in units)


_TERMS = (*_columns("terms", _UNITS), *_columns("keep", _UNITS), "terms_us", "window_s", "window_offset_s")
_COUNTERS = (
    *(*_columns("limit", _UNITS), "limit_us", "deadline_us", "window"),
    *(*_columns("spent", _AMOUNT), *_columns("held", _AMOUNT), *_columns("over", _AMOUNT)),
)
_NEVER_NULL = frozenset(
    {*_columns("keep", _UNITS), "window", *_columns("spent", _AMOUNT), *_columns("held", _AMOUNT)}
    | set(_columns("over", _AMOUNT))
)
_MAY_BE_NEGATIVE = frozenset({"window_s", "window_offset_s", "window", "deadline_us", "limit_us"})
_INSERT = f"""
INSERT INTO meters (path, {", ".join((*_TERMS, *_COUNTERS))}) VALUES (?{", ?" * len((*_TERMS, *_COUNTERS))})
"""
_UPDATE = f"UPDATE meters SET {', '.join(f'{name} = ?' for name in _COUNTERS)} WHERE path = ?"
_HOLD = ("id", "chain", "expires_us", "lapsed", *_AMOUNT)
_NEW_HOLD = f"INSERT INTO holds ({', '.join(_HOLD)}) VALUES (?{', ?' * (len(_HOLD) - 1)})"


def _named(found: sqlite3.Cursor, known: Collection[str]) -> list[dict[str, Any]]:
    """All rows by the names of their columns.

    Raises:
        ValueError: there are other columns: this release does not know what they limit.
    """
    names = [name for name, *_ in found.description]
    if set(names) != set(known):
        raise ValueError("a table has other columns than a budget's")
    return [dict(zip(names, row, strict=True)) for row in found]


def load_meter(rows: sqlite3.Connection, path: str) -> Meter | None:
    """One meter, or None.

    Raises:
        ValueError: the row holds something else than a meter.
    """
    found = _named(
        rows.execute("SELECT * FROM meters WHERE path = ?", (path,)), ("path", "deadline_wall", *_TERMS, *_COUNTERS)
    )
    if not found:
        return None
    row = {name: value for name, value in found[0].items() if name not in ("path", "deadline_wall")}
    if any(number is not None and not isinstance(number, int) for number in row.values()):
        raise ValueError("a meter holds something else than numbers")
    if any(row[name] is None for name in _NEVER_NULL):
        raise ValueError("a meter lacks a number")
    if any(number is not None and number < 0 for name, number in row.items() if name not in _MAY_BE_NEGATIVE):
        raise ValueError("a meter holds less than nothing")

    def of(part: str) -> list[Any]:
        return [row[name] for name in _columns(part, _UNITS)]

    def amount(part: str) -> Counts:
        return counts(row[name] for name in _columns(part, _AMOUNT))

    try:
        window = None if row["window_s"] is None else Window(row["window_s"], row["window_offset_s"])
    except BadLimit as bad:
        raise ValueError("a meter has a window that none can have") from bad
    terms = Terms.of(of("terms"), of("keep"), row["terms_us"], window)
    limits: Limits = Quantities._make((*of("limit"), row["limit_us"], None))
    return Meter(terms, limits, row["deadline_us"], row["window"], amount("spent"), amount("held"), amount("over"))


class StoredHold(NamedTuple):
    """A hold as the file has it.

    Attributes:
        id: its id.
        paths: of the meters that it was made on.
        lapsed: it was given back.
        want: what it holds.
    """

    id: str
    paths: list[str]
    lapsed: bool
    want: Counts


def load_holds(rows: sqlite3.Connection, where: str, *values: object) -> list[StoredHold]:
    """The holds that fulfil an SQL condition.

    Raises:
        ValueError: a row holds something else than a hold.
    """
    return [
        StoredHold(row["id"], hold_paths(row["chain"]), bool(row["lapsed"]), counts(row[unit] for unit in _AMOUNT))
        for row in _named(rows.execute(f"SELECT * FROM holds WHERE {where}", values), _HOLD)
    ]


def save_hold(rows: sqlite3.Connection, hold_id: str, paths: Sequence[str], want: Counts, expires_us: int) -> None:
    """Write a new hold."""
    rows.execute(_NEW_HOLD, (hold_id, json.dumps(paths), expires_us, 0, *columns(want)))


def counts(row: Iterable[int]) -> Counts:
    """From six columns: pico-dollars, escalations, LLM tokens, answers, their tokens, charges of unknown price."""
    *counted, unpriced = row
    return Quantities._make((*counted, 0, unpriced))


def columns(counted: Counts) -> tuple[int, ...]:
    """The inverse of :func:`counts`."""
    return (*counted[:5], counted.unpriced)


def hold_paths(chain: str) -> list[str]:
    """The paths that a hold was made on.

    Raises:
        ValueError: it is something else.
    """
    paths = json.loads(chain)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("a hold lists something else than paths")
    return paths


def save_meter(rows: sqlite3.Connection, path: str, meter: Meter, deadline_wall: float | None = None) -> None:
    """Write a meter's counters; make it if it is new. ``deadline_wall`` goes with a new deadline only."""
    limits = meter.limits
    counters = (
        *(*limits[:5], limits.seconds, meter.deadline_us, meter.window),
        *(*columns(meter.spent), *columns(meter.held), *columns(meter.over)),
    )
    if rows.execute(_UPDATE, (*counters, path)).rowcount == 0:
        given, keep, micros, window = meter.terms.parts()
        span = (None, None) if window is None else (window.seconds, window.offset_s)
        rows.execute(_INSERT, (path, *given, *keep, micros, *span, *counters))
    if deadline_wall is not None:
        rows.execute("UPDATE meters SET deadline_wall = ? WHERE path = ?", (deadline_wall, path))


def note_grant(rows: sqlite3.Connection, path: str, once: str) -> bool:
    """Note a grant; False if it was noted before. Files of earlier releases get the table with their first grant."""
    rows.execute(_GRANTS)
    return rows.execute("INSERT OR IGNORE INTO grants VALUES (?, ?)", (path, once)).rowcount == 1


def reset_after_reboot(rows: sqlite3.Connection, boot: str, now_us: int, wall_s: float) -> None:
    """If the machine was started again since: give every hold back, and put deadlines on the new clock."""
    before = rows.execute("SELECT boot, seen_us FROM machine").fetchone()
    if before is not None and before[0] == boot and now_us >= before[1]:
        rows.execute("UPDATE machine SET seen_us = ?", (now_us,))
        return
    rows.execute("DELETE FROM machine")
    rows.execute("INSERT INTO machine VALUES (?, ?)", (boot, now_us))
    if before is None:
        return
    rows.execute("UPDATE holds SET lapsed = 1, expires_us = ?", (now_us,))
    rows.execute(f"UPDATE meters SET {', '.join(f'{name} = 0' for name in _columns('held', _AMOUNT))}")
    rows.execute(
        "UPDATE meters SET deadline_us = ? + CAST((deadline_wall - ?) * 1000000 AS INTEGER)"
        " WHERE deadline_wall IS NOT NULL",
        (now_us, wall_s),
    )


def boot_id() -> str:
    """The id of this boot of the machine; empty where the system has none (then a clock that went back shows it)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
