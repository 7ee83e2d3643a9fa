"""``s2t trace``: a ledger as one HTML page, token by token."""

from .page import TracePage, check_last, page_of, part_of, trace_of, write_trace

__all__ = ["TracePage", "check_last", "page_of", "part_of", "trace_of", "write_trace"]
