"""The rows of meters and holds in a SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from s2t_agents.budget.meter import Meter
from s2t_agents.budget.quantities import Counts, Quantities
from s2t_agents.budget.store import Terms
from s2t_agents.budget.window import Window

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

_GRANTS = """
CREATE TABLE IF NOT EXISTS grants (path TEXT NOT NULL, once TEXT NOT NULL, PRIMARY KEY (path, once)) WITHOUT ROWID
"""
_COLUMNS = 29
_INSERT = f"INSERT INTO meters VALUES ({', '.join('?' * _COLUMNS)})"
_UPDATE = """
UPDATE meters SET limit_usd = ?, limit_escalations = ?, limit_tokens = ?, deadline_us = ?, limit_us = ?, window = ?,
    spent_usd = ?, spent_escalations = ?, spent_tokens = ?, spent_unpriced = ?,
    held_usd = ?, held_escalations = ?, held_tokens = ?, held_unpriced = ?,
    over_usd = ?, over_escalations = ?, over_tokens = ?, over_unpriced = ?
WHERE path = ?
"""


def load_meter(rows: sqlite3.Connection, path: str) -> Meter | None:
    """One meter, or None.

    Raises:
        ValueError: the row holds something else than a meter.
    """
    row = rows.execute("SELECT * FROM meters WHERE path = ?", (path,)).fetchone()
    if row is None:
        return None
    (_, *numbers, _) = row
    if len(row) != _COLUMNS or not all(map(_whole, numbers)) or None in (*row[4:7], *row[15:28]):
        raise ValueError("a meter holds something else than numbers")
    if any(number is not None and number < 0 for number in (*row[1:8], *row[10:13], *row[16:28])):
        raise ValueError("a meter holds less than nothing")
    window = None if row[8] is None else Window(row[8], row[9])
    terms = Terms.of(row[1:4], row[4:7], row[7], window)
    usd, escalations, llm_tokens, deadline_us, micros, index = row[10:16]
    limits = Quantities(usd, escalations, llm_tokens, micros, None)
    return Meter(terms, limits, deadline_us, index, counts(row[16:20]), counts(row[20:24]), counts(row[24:28]))


def counts(row: Sequence[int]) -> Counts:
    """From four columns: pico-dollars, escalations, tokens, charges of unknown price."""
    usd, escalations, llm_tokens, unpriced = row
    return Quantities(usd, escalations, llm_tokens, 0, unpriced)


def columns(counted: Counts) -> tuple[int, int, int, int]:
    """The inverse of :func:`counts`."""
    return (counted.usd, counted.escalations, counted.llm_tokens, counted.unpriced)


def _whole(number: object) -> bool:
    return number is None or isinstance(number, int)


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
        *(*limits[:3], meter.deadline_us, limits.seconds, meter.window),
        *(*columns(meter.spent), *columns(meter.held), *columns(meter.over)),
    )
    if rows.execute(_UPDATE, (*counters, path)).rowcount == 0:
        given, keep, micros, window = meter.terms.parts()
        span = (None, None) if window is None else (window.seconds, window.offset_s)
        rows.execute(_INSERT, (path, *given, *keep, micros, *span, *counters, None))
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
    rows.execute("UPDATE meters SET held_usd = 0, held_escalations = 0, held_tokens = 0, held_unpriced = 0")
    rows.execute(
        "UPDATE meters SET deadline_us = ? + CAST(max(0, deadline_wall - ?) * 1000000 AS INTEGER)"
        " WHERE deadline_wall IS NOT NULL",
        (now_us, wall_s),
    )


def boot_id() -> str:
    """The id of this boot of the machine; empty where the system has none (then a clock that went back shows it)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
