"""LLMs that pick among K candidates: local weights, an OpenAI-compatible server, a chat model as judge."""

from .base import LLMSelector, LLMSession
from .circuit_breaker import CircuitBreaker
from .judge import ChatJudge
from .local_llm import LocalLLM
from .openai_llm import OpenAILLM
from .question import Answer, Question

__all__ = ["Answer", "ChatJudge", "CircuitBreaker", "LLMSelector", "LLMSession", "LocalLLM", "OpenAILLM", "Question"]
