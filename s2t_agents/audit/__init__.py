"""``s2t audit``: what this would have triggered, asked, cost and saved on a log that exists already. Nothing is spent.

log (logs) ──> sample ──> the small model reads each answer along the log (replay) ──> figures, intervals (report)
"""

from .report import Audit, audit

__all__ = ["Audit", "audit"]
