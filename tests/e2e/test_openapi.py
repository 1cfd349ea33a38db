"""The OpenAPI document is true enough to attack the server with: no request that it allows is answered with a 500."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from glm52.engine import AsyncEngine
from glm52.server.app import DIALECTS, create_app
from tests.scripted import ScriptedModel, always
from tests.serving import scripted_service

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
         "/api/paas/v4/chat/completions", "/tokenize", "/detokenize")  # fmt: skip
GETS = ("/", "/health", "/metrics", "/v1/models", "/v1/models/{name}", "/openapi.json")


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    backend = AsyncEngine(ScriptedModel(always("ok ")).engine(num_rows=192, max_seqs=8))
    app = create_app(scripted_service(backend, context_length=192))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    backend.close()


def test_the_document_has_every_route_that_is_no_alias(schema: Any) -> None:
    document = schema.raw_schema
    assert set(document["paths"]) == {*POSTS, *GETS}
    assert list(document["components"]["securitySchemes"]) == ["bearer", "x-api-key"]
    assert document["security"] == [{}, {"bearer": []}, {"x-api-key": []}], "either, or none without --api-key"


@pytest.mark.parametrize("path", POSTS)
def test_nothing_that_is_allowed_is_an_internal_error(schema: Any, path: str) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path]["POST"].as_strategy())
    def attack(case: Any) -> None:
        case.validate_response(case.call(), checks=[not_a_server_error])

    attack()


def test_the_documentation_names_every_path() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "server.md").read_text()
    for path in (*POSTS, *GETS, *DIALECTS):
        assert f"{path.replace('{name}', 'NAME')}`" in text, path
