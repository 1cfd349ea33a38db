"""The Z.ai dialect (``/api/paas/v4``): OpenAI's with its own defaults, envelope and end of a stream. Pure.

Calls are streamed complete unless ``tool_stream`` asks for their arguments as they grow; usage comes with the last
chunk; ``do_sample`` false is greedy. On the coding plan's path reasoning is preserved by default.
"""

from dataclasses import replace
from typing import Any

from glm52.errors import ContextOverflow, RequestError
from glm52.server import openai
from glm52.server.request import Answer, ChatRequest, Defaults, Json, Usage, validated

# Z.ai's own numbers for what went wrong; the rest are HTTP's.
_CODES = {401: "1001", 404: "1211", 400: "1214", 413: "1214", 429: "1302", 503: "1305", 500: "1234"}


class ZaiBody(openai.ChatBody):
    do_sample: bool | None = None
    tool_stream: bool | None = None
    request_id: str | None = None
    user_id: str | None = None


def read(body: Any, defaults: Defaults) -> ChatRequest:
    chat = validated(ZaiBody, body)
    if chat.do_sample is False:
        chat.temperature = 0.0
    return replace(
        openai.translate(chat, defaults), whole_calls=not chat.tool_stream,
        request_id=chat.request_id or "",
    )  # fmt: skip


def read_coding(body: Any, defaults: Defaults) -> ChatRequest:
    request = read(body, defaults)
    clear = False if request.thinking.clear is None else request.thinking.clear
    return replace(request, thinking=replace(request.thinking, clear=clear))


class Writer(openai.Writer):
    usage_in_last_chunk = True

    def fail(self, error: RequestError) -> list[tuple[str | None, Json | str]]:
        return [(None, error_payload(error))]

    def _envelope(self, kind: str) -> Json:
        return super()._envelope(kind) | {"request_id": self.request.request_id}

    def finish_reason(self, answer: Answer) -> str:
        return "model_context_window_exceeded" if answer.reason == "context" else super().finish_reason(answer)

    def whole(self, answers: Any, usage: Usage) -> Json:
        payload = super().whole(answers, usage)
        for choice in payload["choices"]:
            if choice["logprobs"] is None:
                del choice["logprobs"]
        return payload


def error_payload(error: RequestError) -> Json:
    code = "1261" if isinstance(error, ContextOverflow) else _CODES.get(error.status, str(error.status))
    prefix = "Prompt exceeds max length. " if isinstance(error, ContextOverflow) else ""
    return {"error": {"code": code, "message": prefix + str(error), "param": error.param}}
