"""Reserve + settle pairs per second: ``python benchmarks/budget.py``, the same as ``s2t bench budget``."""

from s2t_agents.bench.budget import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    main()
