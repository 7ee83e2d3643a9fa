"""The bundled pair: its world, how it was built, its weights. Importing this loads no torch."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""Where the pair is: ``WEIGHTS / "slm"`` and ``WEIGHTS / "llm"``, ordinary Hugging Face checkpoints."""
