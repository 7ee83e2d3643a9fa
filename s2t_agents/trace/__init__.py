"""``s2t trace``: a ledger as one HTML page, token by token."""

from .page import page_of, write_trace

__all__ = ["page_of", "write_trace"]
