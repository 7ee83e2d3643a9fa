"""Measurements of the checkout, and what made the bundled pair. Nothing of this is in the wheel.

``python -m benchmarks`` (or ``s2t bench``) lists what is measured; ``python -m benchmarks.NAME`` runs other scripts.
"""
