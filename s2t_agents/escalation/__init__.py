"""When a selection goes up to the LLM, and what it may cost: hold, ask, settle.

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

from .desk import EscalationDesk
from .pacing import Pace, Pacing
from .paid_groups import PaidGroup, read_groups
from .settings import DEFAULT_MARGIN, Escalation
from .simulate import Simulation, margins_of, simulate

__all__ = [
    "DEFAULT_MARGIN",
    "Escalation",
    "EscalationDesk",
    "Pace",
    "Pacing",
    "PaidGroup",
    "Simulation",
    "margins_of",
    "read_groups",
    "simulate",
]
