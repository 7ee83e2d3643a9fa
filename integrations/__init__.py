"""Adapters to things outside the package."""
