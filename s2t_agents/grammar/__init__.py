"""Constrained decoding: tools and JSON schemas to llguidance grammars and token masks; validation of answers."""
