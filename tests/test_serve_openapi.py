"""The OpenAPI document: it is what the server takes and answers, and bodies made from it are answered."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx")
jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("starlette")

CHAT = "/v1/chat/completions"
PREFIX = "#/components/schemas/"
HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(max_tokens=8, pixels=100_000, images=3)


@pytest.fixture(scope="module")
def document(served: Any) -> Any:
    return httpx.get(served.url + "/openapi.json").json()


@pytest.fixture(scope="module")
def schemas(document: Any) -> Any:
    return document["components"]["schemas"]


@pytest.fixture(scope="module")
def fits(document: Any) -> Callable[[str, Any], list[str]]:
    """(a schema's name, a value) -> what is wrong with it."""

    def wrong(name: str, value: Any) -> list[str]:
        schema = {"$ref": f"{PREFIX}{name}", "components": document["components"]}
        return [error.message[:300] for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]

    return wrong


def test_it_names_what_the_server_knows(served: Any, document: Any, schemas: Any) -> None:
    from phisight.serve.app import PATHS
    from phisight.serve.parameters import CHANGES_NOTHING, HARMLESS, TAKEN

    assert set(schemas["ChatRequest"]["properties"]) == TAKEN | HARMLESS | set(CHANGES_NOTHING)
    assert set(document["paths"]) == {*PATHS, "/v1/models/{name}"} - {"/"}
    for path, methods in document["paths"].items():
        [method] = methods
        answer = httpx.request(method, served.url + path.replace("{name}", "demo"), headers=HEADERS, content="{}")
        assert str(answer.status_code) in methods[method]["responses"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "security" not in document


def test_a_server_with_keys_says_so(serve: Callable[..., Any]) -> None:
    url = serve(api_keys=("secret",)).url + "/openapi.json"
    assert httpx.get(url).status_code == 401
    told = httpx.get(url, headers={"Authorization": "Bearer secret"}).json()
    assert told["security"] == [{"key": []}]
    assert "secret" not in json.dumps(told)


def test_answers_have_their_forms(served: Any, fits: Callable[[str, Any], list[str]]) -> None:
    body = {"messages": [{"role": "user", "content": "How much is 2+2?"}], "logprobs": True, "top_logprobs": 2}
    answer = httpx.post(served.url + CHAT, json=body, timeout=60).json()
    assert answer["choices"][0]["logprobs"]["content"]
    assert fits("ChatCompletion", answer) == []
    answer["choices"][0]["finish_reason"] = "boredom"
    assert fits("ChatCompletion", answer)
    size = {"width": 90, "height": 40}
    assert fits("ImageSize", size) == []
    assert fits("ImageCost", httpx.post(served.url + "/v1/images/cost", json=size).json()) == []
    assert fits("ModelList", httpx.get(served.url + "/v1/models").json()) == []
    assert fits("Error", httpx.get(served.url + "/v1/models/none").json()) == []


# bodies from the document

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def values(schema: Any, schemas: Any) -> st.SearchStrategy[Any]:
    """Values that fit a schema, of the words that the document uses, and small."""
    if "$ref" in schema:
        return st.deferred(lambda: values(schemas[schema["$ref"].removeprefix(PREFIX)], schemas))
    for word in ("examples", "enum"):
        if word in schema:
            return st.sampled_from(schema[word]).map(copy.deepcopy)
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([values(choice, schemas) for choice in schema["anyOf"]])
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return st.one_of([values(schema | {"type": kind}, schemas) for kind in kinds])
    match kinds:
        case None:
            return ANYTHING
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            least = schema["minimum"]
            return st.integers(least, schema.get("maximum", least + 2**40)) | st.integers(least, least + 9)
        case "number":
            least, open_ = schema.get("exclusiveMinimum", schema.get("minimum")), "exclusiveMinimum" in schema
            return st.floats(least, schema.get("maximum", least + 3), exclude_min=open_)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=12)
        case "array":
            inner = values(schema["items"], schemas)
            return st.lists(inner, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 3), 3))
        case "object":
            return members(schema, schemas)
    raise AssertionError(schema)


@st.composite
def members(draw: st.DrawFn, schema: Any, schemas: Any) -> dict[str, Any]:
    """An object with all that it needs and a few of the rest."""
    needed = schema.get("required", [])
    rest = sorted(set(schema["properties"]) - set(needed))
    chosen = draw(st.lists(st.sampled_from(rest), unique=True, max_size=3)) if rest else []
    return {name: draw(values(schema["properties"][name], schemas)) for name in [*needed, *chosen]}


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


@st.composite
def spoiled(draw: st.DrawFn, sound: st.SearchStrategy[Any]) -> Any:
    """A sound body with one thing replaced, left out or added."""
    body = draw(sound)
    container, key = draw(st.sampled_from(places(body)))
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "replace":
            container[key] = draw(ANYTHING)
        case "remove":
            del container[key]
        case _ if isinstance(container, dict):
            container[draw(st.text(max_size=5))] = draw(ANYTHING)
        case _:
            container.append(draw(ANYTHING))
    return body


@pytest.mark.parametrize("seconds", [0, pytest.param(600, marks=pytest.mark.soak)])
def test_bodies_from_the_document(
    served: Any, schemas: Any, fits: Callable[[str, Any], list[str]], seconds: float
) -> None:
    """Nothing worse than a refusal; most sound bodies are answered; what is answered, the document allows."""
    sound = values(schemas["ChatRequest"], schemas)
    kinds = {"sound": sound, "spoiled": spoiled(sound)}
    statuses: dict[tuple[str, int], int] = {}
    with httpx.Client(base_url=served.url, timeout=60, headers=HEADERS) as client:

        @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.sampled_from(sorted(kinds)).flatmap(lambda kind: kinds[kind].map(lambda body: (kind, body))))
        def post(drawn: tuple[str, Any]) -> None:
            kind, body = drawn
            answer = client.post(CHAT, content=json.dumps(body))
            status = answer.status_code
            statuses[kind, status] = statuses.get((kind, status), 0) + 1
            assert status in (200, 400, 404), answer.text
            if kind == "sound":
                assert fits("ChatRequest", body) == []
            if status != 200:
                assert fits("Error", answer.json()) == []
                return
            assert fits("ChatRequest", body) == []
            if answer.headers["content-type"] == "application/json":
                assert fits("ChatCompletion", answer.json()) == []
                return
            *events, done, nothing = answer.text.split("\n\n")
            assert (done, nothing) == ("data: [DONE]", ""), answer.text
            for event in events:
                assert fits("ChatCompletionChunk", json.loads(event.removeprefix("data: "))) == []

        ends, rounds = time.monotonic() + seconds, 0
        while not rounds or time.monotonic() < ends:
            rounds += 1
            (
                seed(rounds)(post) if seconds else post
            )()  # a long run names its seeds, a short one draws others each time
    print(f"{rounds} rounds (in a long run seeds 1 to {rounds}): {statuses}")
    answered = statuses.get(("sound", 200), 0)
    assert answered > 0.3 * sum(count for (kind, _), count in statuses.items() if kind == "sound")
    assert served.server.service.places.taken == 0
