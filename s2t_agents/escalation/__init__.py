"""When a selection is put to the LLM, and what that may cost: quote, reserve, ask, settle.

selector unsure? ──no──> its pick stands
     │yes
pacing: worth it, with what is left? ──no──> its pick stands
     │yes
do the candidates differ, to the LLM? ──no──> its pick stands
     │yes
budget holds the reservation? ──no──> refused: its pick stands (or BudgetExceeded, as the budget says)
     │yes
LLM answers? ──no──> settle what is owed all the same, or release; failed: its pick stands
     │yes
settle what it really cost; the LLM's pick stands, and is recorded for training
"""

from .pacing import Pace, Pacing, margins_of
from .paid_groups import PaidGroup, read_groups
from .session import EscalationSession
from .settings import DEFAULT_MARGIN, Escalation

__all__ = [
    "DEFAULT_MARGIN",
    "Escalation",
    "EscalationSession",
    "Pace",
    "Pacing",
    "PaidGroup",
    "margins_of",
    "read_groups",
]
