"""LLMs that pick among K candidates: local weights, an OpenAI-compatible server, a chat model as judge."""

from ..endpoints.circuit_breaker import CircuitBreaker
from .base import LLMSelector, LLMSession
from .judge import ChatJudge
from .local_llm import LocalLLM
from .openai_llm import OpenAILLM
from .question import Answer, Question

__all__ = ["Answer", "ChatJudge", "CircuitBreaker", "LLMSelector", "LLMSession", "LocalLLM", "OpenAILLM", "Question"]
