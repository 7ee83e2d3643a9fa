"""Programs whose interpreter takes a second to end: their other threads meet it as it does."""

from __future__ import annotations

import subprocess
import sys

END_SLOWLY = """
import gc, time

class Slow:
    def __del__(self):
        time.sleep(1)

def end_slowly():
    gc.disable()
    slow = Slow()
    slow.cycle = slow  # for the interpreter's own last collection
"""


def ended(program: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, to the interpreter's very end; it has ``end_slowly``."""
    return subprocess.run([sys.executable, "-c", END_SLOWLY + program], capture_output=True, text=True, timeout=120)
