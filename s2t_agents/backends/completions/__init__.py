"""The SLM on a server: tokens and their log-probabilities from OpenAI's completions API, as vLLM speaks it."""
