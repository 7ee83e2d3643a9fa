"""Names and paths of the bundled models and selectors."""

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
    """The path of a bundled model; any other name is returned as it is."""
    return str(MODELS.get(name, name))


def selector_path(name: str | Path) -> Path:
    """The path of a bundled selector; any other name is a path."""
    return SELECTORS.get(str(name), Path(name))
