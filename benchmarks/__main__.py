"""``python -m benchmarks``."""

import sys

from s2t_agents.errors import S2TError

from .commands import app

if __name__ == "__main__":
    try:
        app(prog_name="python -m benchmarks")
    except S2TError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise SystemExit(2) from error
