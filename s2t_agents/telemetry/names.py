"""The names on spans and metrics, in one table.

``gen_ai.*`` and ``error.type`` are those of OpenTelemetry's GenAI conventions (github.com/open-telemetry/
semantic-conventions-genai, status: development) as of 2026-11-28. ``gen_ai.usage.cost`` is none of them: Langfuse and
others read the cost of an observation there. ``s2t.*`` are ours. USD, tokens, seconds.
"""

# ------------------------------------------------------------------ attributes of the conventions
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
SEED = "gen_ai.request.seed"
STOP_SEQUENCES = "gen_ai.request.stop_sequences"
STREAM = "gen_ai.request.stream"
OUTPUT_TYPE = "gen_ai.output.type"
AGENT = "gen_ai.agent.name"
CONVERSATION = "gen_ai.conversation.id"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
TOKEN_TYPE = "gen_ai.token.type"
ERROR_TYPE = "error.type"

# ------------------------------------------------------------------ attributes that others read
COST = "gen_ai.usage.cost"

# ------------------------------------------------------------------ attributes of our own
COST_LOCAL = "s2t.cost.local_usd"
COST_LLM = "s2t.cost.llm_usd"
COST_PART = "s2t.cost.part"
TRIGGERS = "s2t.triggers"
SELECTIONS = "s2t.selections"
FLIPS = "s2t.flips"
ESCALATIONS = "s2t.escalations"
REFUSED = "s2t.refused"
DEGRADED = "s2t.degraded"
SHADOW_FLIPS = "s2t.shadow.flips"
LLM = "s2t.llm"
STOPPED_BY_BUDGET = "s2t.stopped_by.budget"
STOPPED_BY_UNIT = "s2t.stopped_by.unit"
BUDGET = "s2t.budget.path"
BUDGET_UNIT = "s2t.budget.unit"
BUDGET_LIMIT = "s2t.budget.limit"
BUDGET_SPENT = "s2t.budget.spent"
BUDGET_LEFT = "s2t.budget.left"
"""On spans each with the unit behind it, as ``s2t.budget.left.usd``."""
ESCALATION_STEP = "s2t.escalation.step"
ESCALATION_OUTCOME = "s2t.escalation.outcome"
ESCALATION_TOKENS = "s2t.escalation.llm_tokens"
ESCALATION_USD = "s2t.escalation.usd"
ESCALATION_CANDIDATES = "s2t.escalation.candidates"
REFUSED_EVENT = "s2t.escalation.refused"

# ------------------------------------------------------------------ metrics: name, unit, description
TOKEN_USAGE = ("gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.")
DURATION = ("gen_ai.client.operation.duration", "s", "GenAI operation duration.")
FIRST_CHUNK = ("gen_ai.client.operation.time_to_first_chunk", "s", "Time to the first chunk of a stream.")
COUNT_TRIGGERS = ("s2t.triggers", "{token}", "Tokens at which the trigger fired.")
COUNT_FLIPS = ("s2t.flips", "{token}", "Tokens that differ from the small model's own.")
COUNT_ESCALATIONS = ("s2t.escalations", "{question}", "Questions to the large model, by outcome.")
COUNT_COST = ("s2t.cost", "USD", "Cost by part: local, llm.")
LEFT = ("s2t.budget.left", "1", "What is left of a budget, by unit.")

TOKEN_BUCKETS = (
    *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144),
    *(1048576, 4194304, 16777216, 67108864),
)
SECONDS_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)

SCOPE = "s2t_agents"
PROVIDER_NAME = "s2t"

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""The environment variable that GenAI instrumentations share; content is on spans with one of these values."""
CAPTURING = frozenset({"true", "1", "span_only", "span_and_event"})
