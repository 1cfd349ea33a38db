"""One contract of thinking for every dialect: a pure function from the fields of a body to how the model thinks.

Every dialect accepts all of these fields, since clients mix them. ``docs/thinking.md`` is the table of what they mean,
tested against ``read``. What is said explicitly wins over what follows from something else:

    enabled   thinking.type, then reasoning.enabled, enable_thinking, then an effort of none or minimal, then a budget of 0;
              else on
    effort    reasoning_effort, reasoning.effort, output_config.effort; low, medium and high are High, the rest is Max
    budget    thinking.budget_tokens, reasoning.max_tokens, thinking_budget; else that of the effort
    clear     clear_thinking, context_management; else left to the template, which keeps the reasoning of a tool loop and
              drops that of earlier turns (interleaved thinking). False keeps all of it (preserved thinking)
    mode      coding: preserved, Max, and sampling for tools; anything said explicitly still wins
"""

from typing import Any, Literal

from glm52.chat import Thinking
from glm52.errors import RequestError
from glm52.server.request import Body

BUDGETS: dict[str, int] = {"high": 4096, "max": 32768}
OFF = ("none", "minimal")
HIGH = ("low", "medium", "high")
EFFORTS = (*OFF, *HIGH, "xhigh", "max")


class _Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"] | None = None
    budget_tokens: int | None = None
    clear_thinking: bool | None = None
    display: str | None = None


class _Reasoning(Body):
    effort: str | None = None
    max_tokens: int | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    summary: str | None = None


class _Output(Body):
    effort: str | None = None
    format: dict[str, Any] | None = None


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
    k = body.chat_template_kwargs or _Template()
    effort = _effort(body)
    budget = _budget(body)
    enabled = _first(
        None if t.type is None else t.type != "disabled", r.enabled, body.enable_thinking, k.enable_thinking,
        False if effort in OFF else None, False if budget == 0 else None,
    )  # fmt: skip
    line: Literal["high", "max"] = "high" if effort in HIGH else "max"
    clear = _first(t.clear_thinking, body.clear_thinking, k.clear_thinking, _managed(body.context_management),
                   False if body.mode == "coding" else None)  # fmt: skip
    return Thinking(
        enabled=enabled is not False, effort=line, clear=clear,
        budget=None if enabled is False else budget or BUDGETS[line],
    )  # fmt: skip


def is_shown(body: ThinkingFields) -> bool:
    """Whether the client wants to see the reasoning."""
    excluded = body.reasoning is not None and body.reasoning.exclude
    omitted = body.thinking is not None and body.thinking.display == "omitted"
    return not excluded and not omitted and body.include_reasoning is not False


def _effort(body: ThinkingFields) -> str | None:
    named = {
        "reasoning_effort": body.reasoning_effort,
        "reasoning.effort": body.reasoning and body.reasoning.effort,
        "output_config.effort": body.output_config and body.output_config.effort,
        "chat_template_kwargs.reasoning_effort": body.chat_template_kwargs
        and body.chat_template_kwargs.reasoning_effort,
    }
    name, value = next(((n, v) for n, v in named.items() if v is not None), (None, None))
    if value is not None and value not in EFFORTS:
        raise RequestError(f"{name}: expected {', '.join(EFFORTS[:-1])} or max, found {value!r}", param=name)
    return value


def _budget(body: ThinkingFields) -> int | None:
    """Reasoning tokens that are asked for; None: not said. -1 is how some clients say 'as you see fit'."""
    named = {
        "thinking.budget_tokens": body.thinking and body.thinking.budget_tokens,
        "reasoning.max_tokens": body.reasoning and body.reasoning.max_tokens,
        "thinking_budget": body.thinking_budget,
        "thinking_token_budget": body.thinking_token_budget,
        "chat_template_kwargs.thinking_budget": body.chat_template_kwargs and body.chat_template_kwargs.thinking_budget,
    }
    name, value = next(((n, v) for n, v in named.items() if v is not None), (None, None))
    if value is not None and value < -1:
        raise RequestError(f"{name}: expected a number of tokens from 0 up, found {value}", param=name)
    return None if value == -1 else value


def _managed(management: _Management | list[Any] | None) -> bool | None:
    """False where Anthropic's clear_thinking edit keeps all reasoning, True where it keeps some number of turns."""
    if not isinstance(management, _Management):
        return None
    keeps = [e.get("keep") for e in management.edits or [] if str(e.get("type", "")).startswith("clear_thinking")]
    return keeps[0] != "all" if keeps else None


def _first(*values: bool | None) -> bool | None:
    return next((v for v in values if v is not None), None)
