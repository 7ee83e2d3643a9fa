"""OpenTelemetry spans and metrics of answers, by the GenAI conventions; nothing at all without OpenTelemetry's API."""

from .answers import AnswerRequest, AnswerTelemetry, begin

__all__ = ["AnswerRequest", "AnswerTelemetry", "begin"]
