"""Inference engines behind one protocol (``base``): one package for each engine."""
