"""Decoding on a GPU: a KV pool of fixed capacity, captured graphs, Triton kernels."""
