"""Tool schemas as LangChain makes them of an ordinary Python function with a docstring.

Built by hand in the key order of ``langchain_core.utils.function_calling.convert_to_openai_tool`` (a test holds the two
equal), so that a model which has only seen these also knows the tools an agent binds.
"""

from __future__ import annotations

from typing import Any, Literal

ParameterType = Literal["integer", "string"]


def function_tool(
    name: str,
    description: str,
    parameters: dict[str, ParameterType],
    told: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """An OpenAI tool; `told` holds what else the schema says of a parameter: a description, limits."""
    told = told or {}
    properties = {key: {**told.get(key, {}), "type": kind} for key, kind in parameters.items()}
    schema: dict[str, Any] = {"properties": properties}
    if properties:
        schema["required"] = list(properties)
    schema["type"] = "object"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
