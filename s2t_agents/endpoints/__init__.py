"""Servers that speak HTTP: connections and secrets, a background event loop, circuit breakers."""
