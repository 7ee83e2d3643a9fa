"""One scheduler per model: admission, sequences, continuous batching, prefix cache."""
