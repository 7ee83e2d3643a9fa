"""An audit as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import Audit, Figure

_SHARES = {
    "triggered": "tokens at which the trigger fires",
    "asked": "tokens at which the LLM would be asked",
    "as_logged_slm": "tokens as logged: the small model alone",
    "as_logged_local": "tokens as logged: with the selector",
    "as_logged_asked": "tokens as logged: with the LLM asked",
    "same_answers_slm": "whole answers as logged: the small model alone",
    "same_answers_local": "whole answers as logged: with the selector",
    "same_answers_asked": "whole answers as logged: with the LLM asked",
    "lost_questions": "questions whose logged token is no candidate",
}
_DOLLARS = {
    "logged_usd": "an answer cost, as logged",
    "asking_usd_cached": "its questions would cost, prefixes cached",
    "asking_usd_uncached": "its questions would cost, nothing cached",
    "saved_usd_cached": "saved, prefixes cached",
    "saved_usd_uncached": "saved, nothing cached",
}


def show(audit: Audit, console: Console, model: str) -> None:
    """Print an audit."""
    named = ", ".join(f"{escape(name)} ({n:,})" for name, n in audit.models.items())
    console.print(f"{audit.answers:,} answers in {audit.lines:,} lines, by {named}")
    for why, (n, first) in sorted(audit.left_out.items(), key=lambda item: -item[1][0]):
        console.print(f"  left out: {n:,} lines, {why} (the first is line {first:,})", style="yellow")
    total = (
        f"${audit.logged_usd:f}" if audit.logged_usd is not None else f"unknown: {audit.unpriced:,} have no known price"
    )
    console.print(f"They cost, as logged: {total}")
    if audit.off_list:
        tiers = ", ".join(f"{escape(tier)} ({n:,})" for tier, n in audit.off_list.items())
        console.print(f"  no list says what a batch's or another service tier's answer costs: {tiers}", style="yellow")
    table = Table(title=f"{audit.replayed:,} of them, followed along the log by {escape(model)}", title_justify="left")
    for name in ("", "of all", "95% interval"):
        table.add_column(name, justify="left" if not name else "right")
    for key, text in _SHARES.items():
        table.add_row(text, *_cells(audit.figures.get(key), "{:.1%}"))
    table.add_row("questions an answer", *_cells(audit.figures.get("questions_an_answer"), "{:.2f}"))
    for key, text in _DOLLARS.items():
        table.add_row(text, *_cells(audit.figures.get(key), "${:.6f}"))
    console.print(table)
    for why, n in audit.not_replayed.items():
        console.print(f"  not replayed: {n:,} answers, {why}", style="yellow")
    console.print("\nWhat cannot be known from a log:")
    for line in audit.unknown:
        console.print(f"  * {line}")


def _cells(figure: Figure | None, form: str) -> tuple[str, str]:
    if figure is None or figure.value is None:
        return "unknown", ""
    if figure.low is None or figure.high is None:
        return form.format(figure.value), "too few answers"
    return form.format(figure.value), f"{form.format(figure.low)} to {form.format(figure.high)}"
