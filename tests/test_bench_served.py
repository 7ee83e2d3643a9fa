"""Beside a server: both answer the same prompts, and the speeds are of the time in which all go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import servers
from servers import CompletionServer

from benchmarks import readme, served
from s2t_agents.errors import ConfigError
from s2t_agents.testing import tiny_model


def test_both_are_measured_at_every_number_of_sequences(server: CompletionServer, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    model.given_tokenizer.save_pretrained(tmp_path)
    result = served.run(server.url, str(tmp_path), dtype="float32", at_once=(1, 3), prompt=12, tokens=6, repeats=1)
    assert {len(each["prompt"]) for each in server.asked} == {12}
    assert [len({tuple(each["prompt"]) for each in server.asked[:2]}), len(server.asked)] == [1, 2 * (1 + 3)]
    assert set(result["rows"]) == {"1", "3"}
    assert all(row["over_server"] == pytest.approx(row["ours"] / row["server"]) for row in result["rows"].values())
    assert served.table(result).row_count == 2
    made = {"hardware": "a machine", "commit": "abc", "date": "today"}
    assert served.markdown(result, made).count("\n") == 5


def test_tokens_count_while_all_sequences_go_on() -> None:
    assert served.tokens_per_s([[0.0, 1.0, 2.0, 3.0], [1.0, 1.5, 2.0]]) == 3.0


def test_sequences_that_never_go_on_together_have_no_speed() -> None:
    assert served.tokens_per_s([[0.0, 1.0, 2.0], [3.0, 4.0]]) is None


def test_a_server_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{servers.free_port()}/v1"
    with pytest.raises(ConfigError, match=url):
        served.Server(url, [[1]], 4)


def test_the_readmes_tables_know_it() -> None:
    assert "<!-- served: begin -->" in (readme.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
