"""s2t-agents."""
