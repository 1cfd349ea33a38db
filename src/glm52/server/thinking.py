"""One contract of thinking for every dialect: a pure function from the fields of a body to how the model thinks.

Every dialect accepts all of these fields, since clients mix them. ``docs/thinking.md`` is the table of what they mean,
tested against ``read``:

    enabled   unless one field says off: thinking.type, reasoning.enabled, enable_thinking, an effort of none or
              minimal, a budget of 0
    effort    reasoning_effort, reasoning.effort, output_config.effort; low, medium and high are High, the rest is Max
    budget    thinking.budget_tokens, reasoning.max_tokens, thinking_budget; else that of the effort
    clear     clear_thinking, reasoning.context, context_management; else left to the template, which keeps the
              reasoning of a tool loop and drops that of earlier turns (interleaved thinking). False keeps all of it
              (preserved thinking)
    mode      coding: preserved, Max, and sampling for tools; anything said explicitly still wins
"""

from typing import Annotated, Any, Literal, TypeVar

from glm52.chat import BUDGETS, Thinking
from glm52.errors import RequestError
from glm52.server.request import Body, Known

OFF = ("none", "minimal")
HIGH = ("low", "medium", "high")
FORM = ("type", "schema")  # of an answer, as Anthropic's clients ask for it
_CONTEXTS = {"all_turns": False, "current_turn": True}  # names of OpenAI's; others leave it to the template
EFFORTS = (*OFF, *HIGH, "xhigh", "max")
_T = TypeVar("_T")


class _Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"] | None = None
    budget_tokens: int | None = None
    clear_thinking: bool | None = None
    display: str | None = None


class _Reasoning(Body):
    effort: str | None = None
    max_tokens: int | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    context: str | None = None
    summary: str | None = None


class _Output(Body):
    effort: str | None = None
    format: Annotated[dict[str, Any] | None, Known(*FORM)] = None


class _Template(Body):
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    clear_thinking: bool | None = None
    thinking_budget: int | None = None


class _Management(Body):
    edits: list[dict[str, Any]] | None = None


class ThinkingFields(Body):
    """Every field of every dialect that is about thinking."""

    thinking: _Thinking | None = None
    reasoning: _Reasoning | None = None
    reasoning_effort: str | None = None
    output_config: _Output | None = None
    chat_template_kwargs: _Template | None = None
    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    thinking_budget: int | None = None
    thinking_token_budget: int | None = None
    include_reasoning: bool | None = None
    context_management: _Management | list[Any] | None = None
    mode: Literal["coding", "chat"] | None = None


def read(body: ThinkingFields) -> Thinking:
    """RequestError names the field at fault."""
    t, r = body.thinking or _Thinking(), body.reasoning or _Reasoning()
    k, o = body.chat_template_kwargs or _Template(), body.output_config or _Output()
    efforts = _given({
        "reasoning_effort": body.reasoning_effort, "reasoning.effort": r.effort, "output_config.effort": o.effort,
        "chat_template_kwargs.reasoning_effort": k.reasoning_effort,
    })  # fmt: skip
    for name, said in efforts.items():
        if said not in EFFORTS:
            raise RequestError(f"{name}: expected {', '.join(EFFORTS[:-1])} or max, found {said!r}", param=name)
    budgets = _given({
        "thinking.budget_tokens": t.budget_tokens, "reasoning.max_tokens": r.max_tokens,
        "thinking_budget": body.thinking_budget, "thinking_token_budget": body.thinking_token_budget,
        "chat_template_kwargs.thinking_budget": k.thinking_budget,
    })  # fmt: skip
    for name, tokens in budgets.items():
        if tokens < -1:
            raise RequestError(f"{name}: expected a number of tokens from 0 up, or -1, found {tokens}", param=name)
    clears = [
        t.clear_thinking, body.clear_thinking, k.clear_thinking, _CONTEXTS.get(r.context or ""),
        _managed(body.context_management), False if body.mode == "coding" else None,
    ]  # fmt: skip
    effort, budget = next(iter(efforts.values()), None), next(iter(budgets.values()), None)
    clear = next((c for c in clears if c is not None), None)
    off = t.type in ("disabled", "between_tools") or any(e in OFF for e in efforts.values()) or 0 in budgets.values()
    off = off or False in (r.enabled, body.enable_thinking, k.enable_thinking)
    line: Literal["high", "max"] = "high" if effort in HIGH else "max"
    allowed = BUDGETS[line] if budget in (None, -1) else budget  # -1 is how some clients say 'as you see fit'
    return Thinking(enabled=not off, effort=line, clear=clear, budget=None if off else allowed)


def unmade_edits(body: ThinkingFields) -> list[str]:
    """Places and types of edits of the context that nobody makes here."""
    at, given = "context_management", body.context_management
    if isinstance(given, _Management):
        at, given = f"{at}.edits", given.edits
    kinds = [str(e.get("type")) if isinstance(e, dict) else "?" for e in given or []]
    return [f"{at}.{i} ({kind})" for i, kind in enumerate(kinds) if not kind.startswith("clear_thinking")]


def is_shown(body: ThinkingFields) -> bool:
    """Whether the client wants to see the reasoning."""
    excluded = body.reasoning is not None and body.reasoning.exclude
    omitted = body.thinking is not None and body.thinking.display == "omitted"
    return not excluded and not omitted and body.include_reasoning is not False


def _managed(management: _Management | list[Any] | None) -> bool | None:
    """False where Anthropic's clear_thinking edit keeps all reasoning, True where it keeps some number of turns."""
    if not isinstance(management, _Management):
        return None
    keeps = [e.get("keep") for e in management.edits or [] if str(e.get("type", "")).startswith("clear_thinking")]
    return keeps[0] not in ("all", {"type": "all"}) if keeps else None


def _given(named: dict[str, _T | None]) -> dict[str, _T]:
    """The fields that are given; where they say different things the first counts, but for what is off."""
    return {name: value for name, value in named.items() if value is not None}
