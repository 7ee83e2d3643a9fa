"""How models write tool calls and reasoning: tags, and streaming parsers for them."""
