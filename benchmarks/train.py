"""Labelled groups per second, one pass against the published way: ``python benchmarks/train.py``."""

from s2t_agents.bench.train import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    main()
