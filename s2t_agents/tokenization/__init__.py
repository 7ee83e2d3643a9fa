"""Text to token ids and back: chat templates, injection-safe encoding, incremental detokenization."""
