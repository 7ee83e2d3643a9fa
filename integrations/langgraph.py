"""Budgets of LangGraph agents: a middleware for ``create_agent``; what it tells the model of what is left.

::

    budget = Budget(usd="1.00", on_exhausted="ask", store=SQLiteStore("budget.db"))
    agent = create_agent(
        ChatS2T(...), tools, name="researcher", checkpointer=checkpointer,
        middleware=[BudgetMiddleware(budget, per_thread={"escalations": 20}, per_agent={"seconds": 60})],
    )

before_agent  opens budget > thread > agent, brings back what a resumed thread had spent
before_model  a refusal under "ask" interrupts here; nothing left: a last answer from the finalization reserve, or the
              end (``end_when_exhausted``)
model call    passes ``s2t_budget`` and ``s2t_agent`` to the model, tells it what is left (``tell_model``)
tool call     what a tool asks of a model without a budget, as a sub-agent does, counts against the agent's
after_model   puts cost and budget in the state; after a refusal under "ask" goes back to before_model

A refused try ends the model's node, so that the state keeps what it had paid for. LangChain then runs the hooks of the
middleware listed after this one: they find an empty message without tool calls, never the last answer a second time.

What an interrupted answer had paid for is in the state: it goes on where it stopped and pays for the rest alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, NotRequired, cast

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
    ToolCallRequest,
    hook_config,
)
from langchain_core.messages import AIMessage, RemoveMessage, SystemMessage
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.config import get_config
from langgraph.types import Command, interrupt

from s2t_agents.budget import Budget, Charge, money
from s2t_agents.budget.extension import extension_from
from s2t_agents.budget.names import meter_name
from s2t_agents.budget.quantities import COUNTED
from s2t_agents.budget.refusals import refusal_question, written_out
from s2t_agents.budget.terms import LimitsGiven
from s2t_agents.chat.call_arguments import within_budget
from s2t_agents.chat.unfinished_answers import Unfinished
from s2t_agents.errors import BadLimit, BudgetExceeded, StoreUnavailable
from s2t_agents.ledger import Cost

AGENTS_KEPT = 1024
"""Agents, each in its thread, whose unfinished answers this process remembers beyond what checkpoints hold."""

_log = logging.getLogger(__name__)
_UNANSWERED = "s2t_unanswered"  # the id of the empty message in the place of an answer that was refused
_PER_AGENT = 'Give limits for all, {"escalations": 5}, or of each agent, {"researcher": {"escalations": 5}}.'
_LAST = "The budget is nearly spent: give your final answer now."
_UNITS = {
    "escalations": "questions to the large model",
    "llm_tokens": "large-model tokens",
    "usd": "US dollars",
    "answers": "answers",
    "answer_tokens": "tokens of answers",
    "seconds": "seconds",
}


class BudgetAgentState(AgentState[Any]):
    """What the middleware adds to an agent's state: plain JSON, so any checkpointer keeps it.

    ``s2t_budget`` is the agent's budget (path, limit, held, spent, left, available), ``s2t_cost_usd`` the sum of what
    its model calls reported, those of interrupted answers too (local, llm, total; None once one was unknown). Private:
    the question under way, what the interrupted answer had paid for, and what was granted.
    """

    s2t_budget: NotRequired[dict[str, Any]]
    s2t_cost_usd: NotRequired[dict[str, str | None]]
    s2t_question: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr]]
    s2t_unfinished: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr]]
    s2t_grants: NotRequired[Annotated[list[dict[str, Any]], PrivateStateAttr]]
    s2t_declined: NotRequired[Annotated[bool, PrivateStateAttr]]
    s2t_final: NotRequired[Annotated[bool, PrivateStateAttr]]


class BudgetMiddleware(AgentMiddleware[BudgetAgentState, Any, Any]):
    """Gives every agent and thread a budget of its own under one budget, and acts when it is spent.

    What happens on exhaustion is the budget's ``on_exhausted``: ``"degrade"`` answers locally, ``"raise"`` lets
    BudgetExceeded out of the graph, ``"ask"`` interrupts; resume with ``Command(resume=...)`` holding a mapping
    (``{"escalations": 3}``), a number or a text with one ("yes, 3 more") of the unit that ran out, or a no
    (False, None, "no"), which lets the rest of the run degrade. The answer goes on where it stopped. A question's first
    grant counts, however often the same interrupt is resumed, and in however many processes.

    Under ``"ask"`` list it last, ``middleware=[..., BudgetMiddleware(...)]``. The ``after_model`` hooks of middleware
    listed after it run at every refused try, too, and find an empty AIMessage there: those of LangChain do nothing with
    it but for ModelCallLimitMiddleware, which counts the try.

    Args:
        budget: what all agents and threads share.
        per_thread: limits of each thread (keywords of Budget); kept over the thread's whole life.
        per_agent: limits of each agent within its thread: the same for all, or of each by its name,
            ``{"researcher": {"escalations": 8}, "writer": {"escalations": 2}}``; one without a name there has none.
        agent: the agent's name; by default what ``create_agent(name=...)`` was given.
        tell_model: add what is left to the system message of every call.
        end_when_exhausted: when a unit is used up, give one last answer, without tools, if a finalization
            reserve is left for it, and otherwise end the run with a message that says so.
    """

    state_schema = BudgetAgentState

    def __init__(
        self,
        budget: Budget,
        *,
        per_thread: LimitsGiven | None = None,
        per_agent: LimitsGiven | Mapping[str, LimitsGiven] | None = None,
        agent: str | None = None,
        tell_model: bool = False,
        end_when_exhausted: bool = False,
    ) -> None:
        super().__init__()
        self.budget, self.agent = budget, agent
        self.per_thread = per_thread or {}
        self.per_agent: Mapping[str, Any] = per_agent or {}
        if not isinstance(self.per_agent, Mapping) or not all(isinstance(name, str) for name in self.per_agent):
            raise BadLimit(f"per_agent is {per_agent!r:.200}.", hint=_PER_AGENT)
        self.tell_model, self.end_when_exhausted = tell_model, end_when_exhausted
        self._unfinished: dict[str, Unfinished] = {}
        trial = budget.fresh().child("thread", **self.per_thread)  # bad limits show here
        for name in self.per_agent:
            trial.child(meter_name(name), **self.limits_of(name))

    def limits_of(self, agent: str) -> LimitsGiven:
        """The limits of an agent within its thread.

        Raises:
            BadLimit: ``per_agent`` has agents and limits beside each other.
        """
        by_name = [isinstance(value, Mapping) for value in self.per_agent.values()]
        if not any(by_name):
            return cast(LimitsGiven, self.per_agent)
        if not all(by_name):
            raise BadLimit(
                f"per_agent has agents and limits side by side: {', '.join(self.per_agent)}.",
                hint=_PER_AGENT,
            )
        return cast(LimitsGiven, self.per_agent.get(agent, {}))

    def budget_of(self, thread_id: str | None, agent: str, *, final: bool = False) -> Budget:
        """The budget of one agent in one thread; outside a thread, of the agent alone.

        ``final`` is for a last answer: the finalization reserves of this middleware's budget, the thread and the
        agent may be used, those of budgets above stay kept back.
        """
        above = self.budget.final() if final else self.budget
        if thread_id is not None:
            above = above.child(meter_name(f"thread {thread_id}"), **self.per_thread)
            above = above.final() if final else above
        mine = above.child(meter_name(agent), **self.limits_of(agent))
        return mine.final() if final else mine

    # The hooks are synchronous inside; LangGraph's async names call them, since nothing in them waits.

    def before_agent(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """Open the budgets; a thread resumed in a new process gets back what it had spent."""
        mine, _ = self._mine()
        fresh = {"s2t_question": None, "s2t_unfinished": None, "s2t_declined": False, "s2t_final": False}
        return {"s2t_budget": _brought_back(mine, state), "messages": _withdrawn(state), **fresh}

    async def abefore_agent(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """As :meth:`before_agent`."""
        return self.before_agent(state, runtime)

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """Ask, if the last try was refused; end a run whose budget is gone, after one last answer where something was
        kept back for it.
        """
        told = self._asked(state)
        if not self.end_when_exhausted:
            return told
        mine, _ = self._mine()
        spent = _used_up(mine)
        if not spent:
            return told
        if not state.get("s2t_final") and not _used_up(self._mine(final=True)[0]):
            return {**told, "s2t_final": True}
        messages = [*_withdrawn(state), AIMessage(_ended(mine, spent))]
        return {**told, "jump_to": "end", "messages": messages, "s2t_budget": _brought_back(mine, state)}

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """As :meth:`before_model`."""
        return self.before_model(state, runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Pass the budget to the model; note the question if it refuses and is set to ask."""
        mine, prepared, unfinished, arguments = self._prepared(request)
        try:
            with _configured(arguments):
                return _answered(handler(prepared), request.state, unfinished)
        except BudgetExceeded as refused:
            return _question(mine, refused, request.state, unfinished)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """As :meth:`wrap_model_call`."""
        mine, prepared, unfinished, arguments = self._prepared(request)
        try:
            with _configured(arguments):
                return _answered(await handler(prepared), request.state, unfinished)
        except BudgetExceeded as refused:
            return _question(mine, refused, request.state, unfinished)

    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Any]) -> Any:
        """Run a tool within the agent's budget, by a context variable: what a tool calls has the node's own config."""
        with within_budget(self._of_tools()):
            return handler(request)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Any]]
    ) -> Any:
        """As :meth:`wrap_tool_call`."""
        with within_budget(self._of_tools()):
            return await handler(request)

    @hook_config(can_jump_to=["model"])
    def after_model(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """Report cost and budget; or, without an answer, go back to where more is asked for."""
        if state.get("s2t_question"):
            return {"messages": _withdrawn(state), "jump_to": "model"}
        cost = _reported_cost(_last_answer(state["messages"]))
        told: dict[str, Any] = {"s2t_unfinished": None}
        if cost is not None:
            told["s2t_cost_usd"] = _added_cost(state.get("s2t_cost_usd"), cost)
        try:
            told["s2t_budget"] = _brought_back(self._mine()[0], state)
        except StoreUnavailable as error:  # the answer is there, and worth more than the figures
            _log.warning("an agent's state keeps its last known budget: %s", error)
        return told

    @hook_config(can_jump_to=["model"])
    async def aafter_model(self, state: BudgetAgentState, runtime: Any) -> dict[str, Any]:
        """As :meth:`after_model`."""
        return self.after_model(state, runtime)

    def _asked(self, state: BudgetAgentState) -> dict[str, Any]:
        """Interrupt with the question under way, and note what was allowed; nothing where there is none."""
        question = state.get("s2t_question")
        if not question:
            return {}
        mine, _ = self._mine()
        _brought_back(mine, state)
        more, grants = _allowed_more(mine, question), state.get("s2t_grants") or []
        return {
            "messages": _withdrawn(state),  # still there where a hook jumped here
            "s2t_question": None,
            "s2t_declined": not more,
            "s2t_grants": [*grants, *([more] if more and more["counted"] else [])],
            "s2t_budget": _brought_back(mine, state),
        }

    def _of_tools(self) -> Budget:
        mine, _ = self._mine()
        return mine.view(on_exhausted="degrade") if mine.on_exhausted == "ask" else mine  # nobody can be asked there

    def _mine(self, *, final: bool = False) -> tuple[Budget, str]:
        """The budget and name of the agent that is running."""
        config = get_config()
        thread = config.get("configurable", {}).get("thread_id")
        agent = self.agent or str(config.get("metadata", {}).get("lc_agent_name") or "agent")
        return self.budget_of(None if thread is None else str(thread), agent, final=final), agent

    def _prepared(self, request: ModelRequest[Any]) -> tuple[Budget, ModelRequest[Any], Unfinished, Mapping[str, Any]]:
        last = bool(request.state.get("s2t_final"))
        mine, agent = self._mine(final=last)
        if request.state.get("s2t_declined"):
            mine = mine.view(on_exhausted="degrade")
        unfinished = self._tries(mine.path).resume(request.state.get("s2t_unfinished"))
        if last:
            request = _with_note(request.override(tools=[]), _LAST)
        elif self.tell_model:
            request = _with_note(request, _told(mine))
        arguments = {"s2t_budget": mine, "s2t_agent": agent, "s2t_unfinished": unfinished}
        return mine, request, unfinished, arguments

    def _tries(self, path: str) -> Unfinished:
        """This process's tokens of the answers that an agent did not finish in a thread."""
        found = self._unfinished.get(path)
        if found is None:
            others = dict(list(self._unfinished.items())[1 - AGENTS_KEPT :])
            self._unfinished = {**others, path: (found := Unfinished())}
        return found


@contextlib.contextmanager
def _configured(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Arguments of ``ChatS2T`` for calls in this block, in their config: models of other makers ignore them there."""
    config = get_config()
    known = {**config.get("configurable", {}), **arguments}
    token = var_child_runnable_config.set({**config, "configurable": known})
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _answered(
    response: ModelResponse[Any], state: Mapping[str, Any], unfinished: Unfinished
) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
    """The answer, with the costs of the tries before it that broke off."""
    costs = _with_tries(state, unfinished)
    return ExtendedModelResponse(response, Command(update=costs)) if costs else response


def _question(
    mine: Budget, refused: BudgetExceeded, state: Mapping[str, Any], unfinished: Unfinished
) -> ExtendedModelResponse[Any]:
    """No answer: an empty message, and a question in the state. A budget that does not ask lets the refusal out."""
    if state.get("s2t_declined"):  # no more was allowed, and nothing is left to answer with
        return ExtendedModelResponse(ModelResponse(result=[AIMessage(_ended(mine, (refused.unit,)))]))
    if mine.on_exhausted != "ask":
        raise refused
    told = ("unit", "limit", "spent", "held", "wanted", "budget")
    plain = _plain({name: value for name, value in vars(refused).items() if name in told})
    question = {"type": "s2t_budget", "question": refusal_question(refused), **plain}
    update = {
        "s2t_question": question,
        "s2t_unfinished": unfinished.as_dict() or None,
        "s2t_budget": _brought_back(mine, state),
        **_with_tries(state, unfinished),
    }
    return ExtendedModelResponse(ModelResponse(result=[AIMessage("", id=_UNANSWERED)]), Command(update=update))


def _withdrawn(state: Mapping[str, Any]) -> list[RemoveMessage]:
    """What takes the empty message of a refused try out of the state again."""
    return [RemoveMessage(_UNANSWERED) for message in state["messages"] if message.id == _UNANSWERED]


def _ended(mine: Budget, units: Sequence[str]) -> str:
    names = " and ".join(_UNITS[unit] for unit in units)
    return f"The budget {mine.path!r} is spent ({names}), so this run ends here."


def _allowed_more(mine: Budget, question: dict[str, Any]) -> dict[str, Any] | None:
    """Ask until the answer can be followed: the checkpoint keeps every answer, so an error would end the thread.

    Returns:
        What was granted to which budget, and whether it counted; None for a no.
    """
    refused = next((budget for budget in mine.chain if budget.path == question["budget"]), mine)
    once = _interrupt_name()
    asked = question
    while True:
        try:
            more = extension_from(interrupt(asked), question["unit"])
            if not more:
                return None
            counted = refused.extend(**more, once=once)
            if not counted:
                _log.warning("the question of budget %r was answered before: %s does not count", refused.path, more)
            return {"path": refused.path, "more": _plain(more), "once": once, "counted": counted}
        except BadLimit as unclear:
            asked = {**question, "question": f"{unclear} {question['question']}"}


def _interrupt_name() -> str:
    """The same whenever the interrupt of the running task is resumed, and for no other."""
    namespace = str(get_config().get("configurable", {}).get("checkpoint_ns") or "")
    return hashlib.sha256(namespace.encode(errors="surrogatepass")).hexdigest() if namespace else ""


def _plain(amounts: Mapping[str, Any]) -> dict[str, Any]:
    return {unit: f"{v:f}" if isinstance(v, Decimal) else v for unit, v in amounts.items()}


def _snapshot(mine: Budget) -> dict[str, Any]:
    return {"path": mine.path, **mine.state().as_dict(), "available": _plain(mine.available())}


def _brought_back(mine: Budget, state: Mapping[str, Any]) -> dict[str, Any]:
    """The budget now, with what a checkpoint says this agent was granted and spent: its meter may have died with its
    process.

    Past a deadline nothing can be booked; then the state keeps what it says, until more seconds let it be booked.
    """
    before: Mapping[str, Any] | None = state.get("s2t_budget")
    spent = _forgotten(mine, before)
    if spent is None or before is None:
        return _snapshot(mine)
    for grant in state.get("s2t_grants") or []:
        for budget in mine.chain:
            if budget.path == grant["path"]:
                with contextlib.suppress(BadLimit):  # it has no such limit any more
                    budget.extend(**grant["more"], once=grant["once"])
    try:
        mine.reserve(Charge(spent.usd if spent.usd is None else Decimal(0), escalations=0)).settle(spent)
    except BudgetExceeded:
        return {**_snapshot(mine), "spent": before["spent"]}
    return _snapshot(mine)


def _forgotten(mine: Budget, before: Mapping[str, Any] | None) -> Charge | None:
    """What is in a checkpoint and not in the meter; None where the meter has counted anything itself."""
    if not before or before.get("path") != mine.path or mine.windowed:
        return None
    now = mine.state()
    if now.unpriced or any(now.spent.get(unit) for unit in COUNTED):
        return None
    usd, *counts = (before["spent"].get(unit, 0) for unit in COUNTED)
    known = Decimal(0) if usd is None and mine.in_dollars else usd
    escalations, llm_tokens, answers, answer_tokens = map(int, counts)
    spent = Charge(None if known is None else Decimal(known), llm_tokens, escalations, answers, answer_tokens)
    return None if spent == Charge(Decimal(0), escalations=0) else spent


def _used_up(mine: Budget) -> list[str]:
    return [unit for unit, left in mine.available().items() if not left]


def _told(mine: Budget) -> str:
    amounts = {unit: round(left, 1) if unit == "seconds" else left for unit, left in mine.available().items()}
    left = ", ".join(f"{written_out(amount)} {_UNITS[unit]}" for unit, amount in amounts.items())
    return f"Budget left for this task: {left or 'no limit'}."


def _with_note(request: ModelRequest[Any], note: str) -> ModelRequest[Any]:
    system = request.system_message
    if system is None:
        return request.override(system_message=SystemMessage(note))
    if isinstance(system.content, str):
        return request.override(system_message=SystemMessage(f"{system.content}\n\n{note}"))
    return request.override(system_message=SystemMessage([*system.content, {"type": "text", "text": note}]))


def _last_answer(messages: Sequence[Any]) -> AIMessage | None:
    """The model's; with ``ToolStrategy`` the result of a tool stands behind it."""
    return next((message for message in reversed(messages) if isinstance(message, AIMessage)), None)


def _reported_cost(message: AIMessage | None) -> Mapping[str, Any] | None:
    """What an answer says that it cost; None where it says nothing."""
    cost = message.response_metadata.get("s2t", {}).get("cost_usd") if message else None
    return cost if isinstance(cost, Mapping) else None


def _with_tries(state: Mapping[str, Any], unfinished: Unfinished) -> dict[str, Any]:
    """The state's running cost with that of the tries that broke off; nothing where there were none."""
    total = state.get("s2t_cost_usd")
    costs: list[Cost] = unfinished.take_costs()
    for cost in costs:
        total = _added_cost(total, {"local": cost.local, "llm": cost.llm, "total": cost.total})
    return {"s2t_cost_usd": total} if costs else {}


def _added_cost(before: Mapping[str, str | None] | None, cost: Mapping[str, Any]) -> dict[str, str | None]:
    """The running cost with one more."""
    total: dict[str, str | None] = {}
    for part in ("local", "llm", "total"):
        old, new = (before or {}).get(part, "0"), cost.get(part)
        total[part] = None if old is None or new is None else f"{money.add(Decimal(old), Decimal(str(new))):f}"
    return total
