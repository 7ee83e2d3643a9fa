"""How many schemas of a folder bind, how long that takes, what is given up.

A file is one JSON schema (``*.json``), or JSON lines whose ``function`` holds tools, as in BFCL. Each is made ready as
``bind_tools`` does, and its grammar is started over the demo pair's tokenizer.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_agents.backends.torch.loading import load_tokenizer
from s2t_agents.bundled import model_path
from s2t_agents.errors import ConfigError, S2TError
from s2t_agents.grammar.grammar import json_grammar, tool_grammar
from s2t_agents.grammar.relaxation import relax_schema
from s2t_agents.grammar.vocabulary import cached_vocabulary


def cases(folder: Path) -> Iterator[tuple[str, Any, bool]]:
    """Name, schema or list of tools, and whether it is the latter."""
    for file in sorted(folder.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        try:
            yield str(file.relative_to(folder)), json.loads(text), False
            continue
        except ValueError:
            pass
        for number, line in enumerate(text.splitlines(), 1):
            given = json.loads(line).get("function") if line.startswith("{") and line.endswith("}") else None
            if given:
                functions = given if isinstance(given, list) else [given]
                tools = [{"type": "function", "function": function} for function in functions]
                yield f"{file.relative_to(folder)}:{number}", tools, True


def run(folder: Path) -> dict[str, Any]:
    """How many bind and how fast, what is relaxed, slow or refused.

    Raises:
        ConfigError: there is no schema in the folder.
    """
    words = cached_vocabulary(load_tokenizer(model_path("s2t-demo")))
    seconds: list[float] = []
    refused: dict[str, str] = {}
    slow: dict[str, float] = {}
    exact, notes = 0, Counter[str]()
    for name, asked, is_tools in cases(folder):
        begun = time.perf_counter()
        try:
            if is_tools:
                tool_grammar(words, asked, "any").start()
            else:
                json_grammar(words, asked).start()
                told = relax_schema(asked, "the output schema").notes
                exact += not told
                notes.update({note.split(": ", 1)[-1].split(" ")[0] for note in told})
        except S2TError as error:
            refused[name] = str(error)[:300]
        seconds.append(time.perf_counter() - begun)
        if seconds[-1] > 1:
            slow[name] = round(seconds[-1], 2)
    if not seconds:
        raise ConfigError(f"There are no schemas in {folder}.", hint="Name a folder of *.json files.")
    ordered = sorted(seconds)
    return {
        "schemas": len(ordered),
        "bound": len(ordered) - len(refused),
        "bound_percent": round(100 * (1 - len(refused) / len(ordered)), 2),
        "exact": exact,
        "seconds": {
            "p50": round(ordered[len(ordered) // 2], 4),
            "p99": round(ordered[int(len(ordered) * 0.99)], 3),
            "max": round(ordered[-1], 2),
        },
        "over_1_s": slow,
        "relaxed": dict(notes.most_common()),
        "refused": refused,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(show_header=False)
    for key, value in result.items():
        shown.add_row(key, str(value))
    return shown
