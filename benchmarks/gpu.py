"""Correctness and speed on a GPU within eight minutes: ``python benchmarks/gpu.py [--json]``."""

import typer

from s2t_agents.bench.gpu import main

if __name__ == "__main__":
    typer.run(main)
