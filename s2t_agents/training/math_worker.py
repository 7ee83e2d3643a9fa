"""The process behind ``math_judge``: pairs of expressions come in as JSON lines, true or false goes out.

It is run as a script and imports nothing of the package. The caller keeps the time.
"""

from __future__ import annotations

import json
import logging
import os
import sys

MEMORY = 4 * 2**30
"""Bytes of address space: towers of powers end in an error, not in a machine without memory."""


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    logging.disable()
    _limit_memory()
    from math_verify import parse, verify

    def equal(gold: str, said: str) -> bool:
        return bool(verify(parse(gold, parsing_timeout=None), parse(said, parsing_timeout=None), timeout_seconds=None))

    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for line in sys.stdin:
        pair = json.loads(line)
        answers.write(f"{json.dumps(equal(*pair)) if pair else 'ready'}\n")
        answers.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
