"""Texts and conversations to token ids and back, in the fields vLLM's clients know."""

from collections.abc import Sequence
from typing import Any

from glm52.engine import check_vocabulary
from glm52.server import openai
from glm52.server.request import Body, Json, unknown_fields, validated
from glm52.server.service import Service


class TokenizeBody(Body):
    """Either a text, or the fields of a chat request."""

    model: str | None = None
    prompt: str | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


def tokenize(service: Service, client: str, body: Any) -> tuple[Json, Sequence[str]]:
    """What is answered, and the fields that mean nothing here."""
    given = validated(TokenizeBody, body)
    service.check_model(given.model or "")
    if given.prompt is not None:
        ids, ignored = service.tokenizer.encode(given.prompt), unknown_fields(given)
    else:
        own = TokenizeBody.model_fields.keys() - {"model"}
        request = openai.read({k: v for k, v in body.items() if k not in own}, service.defaults)
        generate, ignored = given.add_generation_prompt is not False, list(request.ignored)
        ids = service.render(request, client, add_generation_prompt=generate)[1][0]
    out: Json = {"count": len(ids), "max_model_len": service.context_length, "tokens": ids}
    strings = {"token_strs": [service.tokenizer.piece(i) for i in ids]} if given.return_token_strs else {}
    return out | strings, ignored


def detokenize(service: Service, body: Any) -> tuple[Json, Sequence[str]]:
    given = validated(DetokenizeBody, body)
    service.check_model(given.model or "")
    check_vocabulary(given.tokens, service.tokenizer.vocab_size, "tokens")
    return {"prompt": service.tokenizer.decode(given.tokens)}, unknown_fields(given)
