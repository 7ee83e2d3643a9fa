"""Formats in which models write tool calls and reasoning, with streaming parsers."""
