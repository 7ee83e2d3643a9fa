"""Hugging Face checkpoints on PyTorch: weights, KV cache, attention, candidate scoring, LoRA."""
