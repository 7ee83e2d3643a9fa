"""Names of what ships in the wheel: the demo pair and its selectors."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "demo" / "weights"

SLM, LLM = "s2t-demo", "s2t-demo-llm"

MODELS = {SLM: WEIGHTS / "slm", LLM: WEIGHTS / "llm"}
SELECTORS = {
    SLM: WEIGHTS / "head",  # better than activated on held-out problems
    "s2t-demo/activated": WEIGHTS / "activated",
    "s2t-demo/head": WEIGHTS / "head",
    "s2t-demo/published": WEIGHTS / "published",
}


def model_path(name: str) -> str:
    """Where a bundled model lies; any other name is a path or hub id already."""
    return str(MODELS.get(name, name))


def selector_path(name: str | Path) -> Path:
    """Where a bundled selector lies; any other name is a path already."""
    return SELECTORS.get(str(name), Path(name))
