"""What a chat template can render, found by rendering probes: system turns, lists of parts, Hermes tool calls."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ..formats.tool_calls import CLOSE, OPEN
from .hermes_tools import Turn
from .template_fallbacks import in_parts


class TemplateFeatures:
    """What one template can render; each is probed when it is first asked for.

    Args:
        render: turns and tools to a prompt; raises ``TemplateError`` where the template refuses them.
    """

    def __init__(self, render: Callable[[Sequence[Turn], Sequence[Any]], str]) -> None:
        self._render = render

    @cached_property
    def roles_read_as_parts(self) -> frozenset[str]:
        """The roles whose content the template reads only as a list of parts."""
        roles = ("user", "assistant", "system")
        best, shown_best = frozenset[str](), -1
        for count in range(len(roles) + 1):
            for chosen in map(frozenset, itertools.combinations(roles, count)):
                shown = max(self._count_rendered_roles(chosen, roles), self._count_rendered_roles(chosen, roles[:2]))
                if shown > shown_best:
                    best, shown_best = chosen, shown
        return best | {"tool"} if "user" in best else best

    def _count_rendered_roles(self, parts: frozenset[str], roles: Sequence[str]) -> int:
        """For how many of these roles the template renders the text."""
        order = [role for role in ("system", "user", "assistant", "user") if role in roles]
        turns = [{"role": role, "content": f"s2t-{role}"} for role in order]
        try:
            rendered = self._render(in_parts(turns, parts), ())
        except TemplateError:
            return 0
        if "'type'" in rendered or '"type"' in rendered:  # the list itself was rendered
            return 0
        return sum(f"s2t-{role}" in rendered for role in roles)

    @cached_property
    def supports_system(self) -> bool:
        """Whether the template renders a system turn."""
        turns = [{"role": "system", "content": "s2t-probe"}, {"role": "user", "content": "x"}]
        try:
            return "s2t-probe" in self._render(in_parts(turns, self.roles_read_as_parts), ())
        except TemplateError:
            return False

    @cached_property
    def supports_hermes_tools(self) -> bool:
        """Whether the template renders tools, and calls and results in the Hermes format."""
        function = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
        call = {"name": "probe_call", "arguments": {"x": 1}}
        turns: list[Turn] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [_probe_call(call)]},
            {"role": "tool", "content": "probe_result", "name": "probe_call", "tool_call_id": "call00001"},
        ]
        try:
            probe_turns = in_parts(turns, self.roles_read_as_parts)
            rendered = self._render(probe_turns, [{"type": "function", "function": function}])
            bodies = re.findall(f"{OPEN}\\s*(.*?)\\s*{CLOSE}", rendered, re.DOTALL)
            has_call = bool(bodies) and json.loads(bodies[-1]) == call
        except (TemplateError, json.JSONDecodeError):
            return False
        return has_call and "probe_tool" in rendered and "probe_result" in rendered


def _probe_call(function: Turn) -> Turn:
    return {"type": "function", "id": "call00001", "function": function}
