"""Constrained decoding: tools and JSON schemas to llguidance grammars, and finished answers against their schemas."""
