"""GSM8K or MATH files to prompt files: ``python prepare.py gsm8k.jsonl out.jsonl``.

Reads one JSON object per line, with ``question`` and ``answer`` (GSM8K: the number after ``####``) or ``problem`` and
``solution`` (MATH: what stands in ``\\boxed{}``). Writes ``{"id", "prompt", "answer"}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ASK = "\n\nWork step by step, and end with: The answer is <number>."
ASK_BOXED = "\n\nWork step by step, and put the final answer in \\boxed{}."


def boxed(solution: str) -> str:
    """What stands in the last ``\\boxed{...}``, its braces matched; empty without one."""
    start = solution.rfind("\\boxed{")
    depth, text = 0, ""
    for letter in solution[start + len("\\boxed") :] if start >= 0 else "":
        depth += {"{": 1, "}": -1}.get(letter, 0)
        text += letter
        if depth == 0:
            return text[1:-1]
    return ""


def prompt_of(row: dict[str, str]) -> tuple[str, str]:
    """The question, with how to end, and its answer."""
    if "question" in row:
        return row["question"] + ASK, row["answer"].rpartition("####")[2].strip()
    return row["problem"] + ASK_BOXED, row.get("answer") or boxed(row["solution"])


def prepare(source: Path, target: Path) -> int:
    """Convert a file; returns how many prompts were written. Problems without an answer are left out."""
    if target.exists() and target.samefile(source):
        raise SystemExit(f"{target} is the file that is read; give another one to write.")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [prompt_of(json.loads(line)) for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    lines = [
        json.dumps({"id": str(at), "prompt": prompt, "answer": answer}, ensure_ascii=False)
        for at, (prompt, answer) in enumerate(rows)
        if answer
    ]
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1]), Path(sys.argv[2])), "prompts")
