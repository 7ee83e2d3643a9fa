"""Photograph the page of ``s2t trace`` for the docs: ``PYTHONPATH=. python tests/trace_pictures.py``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from browser import browsing

from benchmarks import demo_ledger
from s2t_agents.trace import write_trace

DOCS = Path(__file__).parents[1] / "docs"
CHANGED = ".answer:has(.mark.flip):has(.mark.asked) > button"


def main() -> None:
    """Make a ledger, its page, and the three pictures."""
    with TemporaryDirectory() as folder, browsing() as browser:
        ledger, page = Path(folder) / "costs.db", Path(folder) / "costs.html"
        demo_ledger.write(ledger)
        write_trace(ledger, page)
        for name, width, height, top in (
            ("light", 1100, 680, False),
            ("dark", 1100, 680, True),
            ("narrow", 390, 760, False),
        ):
            browser.size(width, height)
            browser.theme("light" if name == "light" else "dark")
            browser.open(page)
            browser.click(CHANGED)
            browser.click(".token.llm.flipped")
            target = "document.body" if top else "document.querySelector('.answer:has(.inside)')"
            browser.run(f"{target}.scrollIntoView({{block: 'start'}})")
            (DOCS / f"trace-{name}.png").write_bytes(browser.shot())


if __name__ == "__main__":
    main()
