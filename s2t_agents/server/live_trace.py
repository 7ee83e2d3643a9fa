"""``/trace``: the page of ``s2t trace`` over the server's own ledger, made when it is asked for.

A browser sends no Authorization header of its own; where there are keys it asks for a name and a password, and the
password is the key. A key's page has the answers of its own agent alone.
"""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode
from collections.abc import Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..errors import LedgerError, UnknownKey
from ..ledger import Ledger
from ..trace import check_last, part_of, trace_of
from .tenants import Tenant, Tenants

RELOAD_S = 3.0
"""Seconds after which an open page loads itself again."""
LAST = 500
"""Answers that a page shows unless it is asked for others."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # beside the page's own, which a page cannot say of frames
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ASK = {"WWW-Authenticate": 'Basic realm="s2t trace: the password is the API key", charset="UTF-8"'}


class LiveTrace:
    """The page's endpoint.

    Args:
        ledger: the chat model's; it holds steps and text where it was told to record them.
        tenants: who may ask.
        name: of the model, above the page.
    """

    def __init__(self, ledger: Ledger, tenants: Tenants, name: str) -> None:
        self._ledger, self._tenants, self._name = ledger, tenants, name
        self._making = asyncio.Semaphore()  # a long ledger takes a while to read: one page at a time

    async def show(self, request: Request) -> Response:
        """``GET /trace?last=N``."""
        try:
            tenant = self._tenants.tenant_of(with_key(request.headers))
        except UnknownKey as error:
            raise HTTPException(401, str(error), _ASK) from None
        last = request.query_params.get("last", str(LAST))
        try:
            check_last(int(last) if last.isdecimal() and len(last) < 10 else 0)
        except LedgerError as error:
            raise HTTPException(400, str(error)) from None
        whose = self._whose(tenant)
        async with self._making:
            page = await asyncio.to_thread(
                trace_of, self._ledger, name=self._name, last=int(last), whose=whose, reload_s=RELOAD_S
            )
        return HTMLResponse(page.html, headers=_HEADERS)

    def _whose(self, tenant: Tenant) -> Callable[[str], bool] | None:
        """Whose answers a tenant sees: all without keys, else those of its own agent and of the parts of it."""
        if not self._tenants.with_keys:
            return None
        return part_of((tenant.agent or "").partition("/")[0])


def with_key(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers in which a browser's password stands as a key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return headers
    try:
        _, _, password = b64decode(given.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        password = ""
    return {"authorization": f"Bearer {password}"}
