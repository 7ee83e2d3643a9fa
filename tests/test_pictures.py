"""Pictures of what commands print, for README and docs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from benchmarks.demo_picture import RESULTS, draw_report
from s2t_agents import Ledger
from s2t_agents.ledger import GenerationRecord


def test_a_report_s_picture_is_what_the_command_prints_and_fetches_nothing(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.db")
    for agent in ("ann", "<bob>"):
        ledger.record(GenerationRecord(agent=agent, completion_tokens=123))
    drawn = ElementTree.fromstring(draw_report(tmp_path / "costs.db"))
    text = "".join(drawn.itertext()).replace("\u00a0", " ")
    for told in ("s2t report costs.db", "ann", "<bob>", "123", "246"):
        assert told in text, told


def test_stored_pictures_fetch_nothing() -> None:
    stored = sorted(RESULTS.glob("*.svg"))
    assert len(stored) >= 3
    for picture in stored:
        text = picture.read_text(encoding="utf-8")
        assert "http" not in text.replace("http://www.w3.org/", "")
        assert "url(" not in text.replace("url(#", "")
