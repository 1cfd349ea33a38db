"""The OpenAPI document, from the same classes that read the bodies."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from glm52.server.anthropic import MessagesBody
from glm52.server.completions import TextBody
from glm52.server.openai import ChatBody
from glm52.server.responses import ResponsesBody
from glm52.server.tokens import DetokenizeBody, TokenizeBody
from glm52.server.zai import ZaiBody

Json = dict[str, Any]
_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatBody, "OpenAI chat completions"),
    "/v1/completions": (TextBody, "OpenAI text completions"),
    "/v1/responses": (ResponsesBody, "OpenAI responses"),
    "/v1/messages": (MessagesBody, "Anthropic messages"),
    "/v1/messages/count_tokens": (MessagesBody, "Tokens of an Anthropic request"),
    "/api/paas/v4/chat/completions": (ZaiBody, "Z.ai chat completions"),
    "/tokenize": (TokenizeBody, "A text or a conversation to token ids"),
    "/detokenize": (DetokenizeBody, "Token ids to a text"),
}
_GETS = {"/": "The page", "/health": "Whether it is up", "/metrics": "Prometheus metrics", "/v1/models": "Models",
         "/v1/models/{name}": "A model", "/openapi.json": "This document"}  # fmt: skip
_ERRORS = {"400": "A field is wrong", "401": "No valid key", "404": "No such model", "408": "The body came too slowly",
           "413": "The body is too large", "429": "The queue is full", "503": "Shutting down",
           "504": "The deadline passed"}  # fmt: skip


def document(model: str, version: str) -> Json:
    """OpenAPI 3.1 of every route that is no alias and no file of the page."""
    kinds = list(dict.fromkeys(kind for kind, _ in _POSTS.values()))
    _, definitions = models_json_schema(
        [(k, "validation") for k in kinds], ref_template="#/components/schemas/{model}", by_alias=True
    )
    paths: Json = {path: {"get": _operation(summary)} for path, summary in _GETS.items()}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    for path, (kind, summary) in _POSTS.items():
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": _operation(summary) | {"requestBody": body}}
    return {
        "openapi": "3.1.0", "info": {"title": f"glm52: {model}", "version": version}, "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }  # fmt: skip


def _operation(summary: str) -> Json:
    answers = {"200": {"description": "Done"}} | {code: {"description": text} for code, text in _ERRORS.items()}
    return {"summary": summary, "responses": answers}
