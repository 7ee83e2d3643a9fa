"""``s2t serve``: an OpenAI-compatible HTTP server, a thin client of ``ChatS2T``."""

from .app import create_app
from .listening import serve
from .tenants import Tenants

__all__ = ["Tenants", "create_app", "serve"]
