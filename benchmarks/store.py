"""Keep a result with the hardware, commit and date that made it.

``s2t eval --json | python -m benchmarks.store demo_eval``
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def made() -> dict[str, Any]:
    """Where and when."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def on_its_device(report: dict[str, Any]) -> dict[str, Any]:
    """``made``, for a result that names its own device."""
    return made() | ({"hardware": report["device"]} if "device" in report else {})


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    report = json.load(sys.stdin)
    stored = {"made": on_its_device(report), "report": report}
    (RESULTS / f"{sys.argv[1]}.json").write_text(json.dumps(stored, indent=1) + "\n")
