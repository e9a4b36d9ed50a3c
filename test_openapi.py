"""Tests of openapi.json: that it says what profiler does. A name is a claim; a docstring says why, if it must."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import socket
import threading
import unicodedata
from http import HTTPStatus
from wsgiref.util import setup_testing_defaults

import pytest

import profiler

HERE = pathlib.Path(__file__).parent
DOCUMENT = json.loads((HERE / "openapi.json").read_bytes())
SCHEMAS = DOCUMENT["components"]["schemas"]
RESPONSES = DOCUMENT["components"]["responses"]
PARAMETERS = DOCUMENT["components"]["parameters"]
TOKEN = "0123456789abcdef"
HARRY = {"first_name": "Harry", "last_name": "Potter", "email": "harry@example.com", "password": "1234"}
UNDOCUMENTED = ("/", "/openapi.json")  # for browsers, and for whoever looks for the document


def resolve(value):
    """Return what a value of the document refers to, or the value."""
    while "$ref" in value:
        target = DOCUMENT
        for name in value["$ref"].lstrip("#/").split("/"):
            target = target[name]
        value = target
    return value


def walk(value, name=""):
    """Yield each object in a value, with the name that it has there."""
    if isinstance(value, dict):
        yield name, value
        for key, child in value.items():
            yield from walk(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from walk(child, name)


def operations():
    """Return all that can be asked: path, method, operation and its parameters."""
    return [
        (path, method.upper(), item[method], [*item.get("parameters", ()), *item[method].get("parameters", ())])
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method != "parameters"
    ]


def check(schema, value):
    """Assert that a value is as a schema says, as far as this document uses JSON Schema in responses."""
    schema = resolve(schema)
    assert value == schema.get("const", value)
    if "type" in schema:
        kinds = {"object": dict, "array": list, "string": str, "integer": int}
        assert type(value) is kinds[schema["type"]]
    if isinstance(value, dict):
        assert list(value) == list(schema["properties"])
        assert set(value) >= set(schema["required"])
        for name, child in value.items():
            check(schema["properties"][name], child)
    elif isinstance(value, list):
        for child in value:
            check(schema["items"], child)
    elif isinstance(value, str):
        assert re.search(schema.get("pattern", ""), value)
    else:
        assert schema["minimum"] <= value <= schema.get("maximum", value)


@pytest.fixture
def application(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", iterations=1)) as application:
        yield application


def call(application, method="GET", path="/users/", value=None, **environ):
    """Call the application as a server would; return status, headers and body."""
    body = b"" if value is None else json.dumps(value).encode()
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.errors": io.StringIO(), **environ}
    if value is not None:
        environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), **environ}
    environ["wsgi.input"] = io.BytesIO(body)
    setup_testing_defaults(environ)
    started = []
    content = b"".join(application(environ, lambda status, headers, exc_info=None: started.append((status, headers))))
    [(status, headers)] = started
    return int(status[:3]), dict(headers), content


def check_answer(response, answer):
    """Assert that an answer's headers and body are as a response of the document says."""
    response = resolve(response)
    _, headers, content = answer
    for name, header in response.get("headers", {}).items():
        header = resolve(header)
        if name != "Link":  # there alone where there is more
            kind = int if header["schema"].get("type") == "integer" else str
            check(header["schema"], kind(headers[name]))
    if "content" not in response:
        assert (content, "Content-Type" in headers) == (b"", False)
    else:
        [(media_type, media)] = response["content"].items()
        assert headers["Content-Type"] == media_type
        assert content.endswith(b"\n")
        check(media["schema"], json.loads(content))


# -- the document and the code ---------------------------------------------------------------------------------------


def test_it_is_of_this_version_of_the_module():
    assert DOCUMENT["info"]["version"] == profiler.__version__


def test_its_paths_and_methods_are_those_of_the_routes():
    documented = {}
    for path, method, operation, _ in operations():
        documented.setdefault(path.replace("{id}", "1"), {})[method] = operation["operationId"]
    routed = {}
    for pattern, handlers in [route[:2] for route in profiler.ROUTES]:
        [path] = [path for path in (*documented, *UNDOCUMENTED) if pattern.fullmatch(path)]
        routed[path] = {
            method: re.sub("_([a-z])", lambda match: match[1].upper(), handler.__name__)
            for method, handler in handlers.items()
        }
    assert {path: methods for path, methods in routed.items() if path not in UNDOCUMENTED} == documented


def test_its_limits_are_the_modules():
    assert SCHEMAS["Name"]["maxLength"] == profiler.MAX_NAME
    assert SCHEMAS["Email"]["maxLength"] == profiler.MAX_EMAIL
    assert SCHEMAS["Id"]["maximum"] == PARAMETERS["After"]["schema"]["maximum"] == profiler.MAX_ID
    assert PARAMETERS["Limit"]["schema"]["maximum"] == profiler.MAX_LIMIT
    assert f"{profiler.MAX_BODY // 1024} KiB" in RESPONSES["ContentTooLarge"]["description"]
    assert f"{profiler.MAX_REQUEST_LINE // 1024} KiB" in RESPONSES["UriTooLong"]["description"]
    assert f"{profiler.MAX_FIELDS} headers" in RESPONSES["HeaderTooLarge"]["description"]
    assert f"{profiler.MAX_HEAD // 1024} KiB" in RESPONSES["HeaderTooLarge"]["description"]
    assert DOCUMENT["components"]["headers"]["RetryAfter"]["example"] == profiler.RETRY_AFTER


CHARACTERS = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
STRANGE = [c for c in CHARACTERS if c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs")]


@pytest.mark.parametrize("form", ["{}", "a{}", "{}a", "a{}@b", "a@b{}", "@{}", "{0}@{0}", "a@{}@b"])
@pytest.mark.parametrize(("name", "schema"), [("first_name", "Name"), ("email", "Email"), ("new_password", "Password")])
def test_its_patterns_take_what_the_module_takes(application, name, schema, form):
    """White space, controls and what looks like either, alone and among others."""
    pattern = re.compile(SCHEMAS[schema]["pattern"].removesuffix("$") + r"\Z")  # Python's $ lets a newline follow
    path, fields = {
        "new_password": ("/users/1/password/", {"old_password": "1234"}),
    }.get(name, ("/users/1/", {"first_name": "a", "last_name": "b", "email": "a@b"}))
    for character in [*STRANGE, "@", "a", "ß", "\U0001f9d9"]:
        value = form.format(character)
        status, _, content = call(application, "PUT", path, {**fields, name: value})
        assert status in (400, 404), content  # nobody is there, and a body is looked at first
        assert (status == 404) == bool(pattern.search(value)), (value, content)


@pytest.mark.parametrize(
    ("name", "schema", "value"),
    [("last_name", "Name", "{}"), ("email", "Email", "{}@example.com")],
)
def test_its_longest_are_the_modules_longest(application, name, schema, value):
    fields = {"first_name": "a", "last_name": "b", "email": "a@b"}
    for length, status in ((SCHEMAS[schema]["maxLength"], 404), (SCHEMAS[schema]["maxLength"] + 1, 400)):
        text = value.format("x" * (length - len(value) + 2))
        assert len(text) == length
        assert call(application, "PUT", "/users/1/", {**fields, name: text})[0] == status


@pytest.mark.parametrize("name", ["Limit", "After"])
def test_its_numbers_are_the_modules(application, name):
    parameter = PARAMETERS[name]
    low, high = parameter["schema"]["minimum"], parameter["schema"]["maximum"]
    for number, status in ((low - 1, 400), (low, 200), (high, 200), (high + 1, 400)):
        assert call(application, QUERY_STRING=f"{parameter['name']}={number}")[0] == status


def test_its_orders_are_the_modules(application):
    for sort in PARAMETERS["Sort"]["schema"]["enum"]:
        assert call(application, QUERY_STRING=f"sort={sort}")[0] == 200
    assert call(application, QUERY_STRING="sort=email")[0] == 400


def test_every_id_from_0_on_is_one_that_may_be_deleted(application):
    schema = SCHEMAS["Id"]
    for user_id, status in ((schema["minimum"], 204), (schema["maximum"], 204), (schema["maximum"] + 1, 404)):
        assert call(application, "DELETE", f"/users/{user_id}/")[0] == status


def test_every_status_of_the_module_is_in_it():
    source = pathlib.Path(profiler.__file__).read_text("utf-8")
    statuses = {HTTPStatus[name].value for name in re.findall(r"HTTPStatus\.([A-Z_]+)", source) if name != "OK"}
    documented = {int(status) for _, _, operation, _ in operations() for status in operation["responses"]}
    told = set(map(int, re.findall("[45][0-9][0-9]", DOCUMENT["info"]["description"])))
    assert statuses - {HTTPStatus.PERMANENT_REDIRECT} <= documented | told
    assert not documented & told


@pytest.mark.parametrize(("path", "method", "operation"), [operation[:3] for operation in operations()])
def test_each_operation_has_the_statuses_that_all_of_its_kind_have(path, method, operation):
    statuses = {"400", "408", "414", "421", "431", "500", "503"}
    if operation.get("security") != []:
        statuses |= {"401"}
    if "requestBody" in operation:
        statuses |= {"411", "413", "415"}
    if "{id}" in path:
        statuses |= {"404"}
    assert set(operation["responses"]) >= statuses


def test_health_alone_asks_for_no_token(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", iterations=1, token=TOKEN)) as application:
        for path, method, operation, _ in operations():
            status = call(application, method, path.replace("{id}", "1"))[0]
            assert (status == 401) == (operation.get("security") != []) == ("401" in operation["responses"])


# -- its examples ----------------------------------------------------------------------------------------------------


def test_each_body_and_each_parameter_has_an_example():
    for name, value in walk(DOCUMENT):
        if name == "application/json" or {"name", "in"} <= set(value):
            assert "example" in value, value


def test_what_it_refers_to_is_there_and_what_is_there_is_referred_to():
    references = {value["$ref"] for _, value in walk(DOCUMENT) if "$ref" in value}
    assert all(resolve({"$ref": reference}) for reference in references)
    shared = {
        f"#/components/{kind}/{name}"
        for kind, values in DOCUMENT["components"].items()
        for name in values
        if kind != "securitySchemes"
    }
    assert shared == references


def test_its_links_lead_to_operations_of_it():
    names = {operation["operationId"] for _, _, operation, _ in operations()}
    for link in DOCUMENT["components"]["links"].values():
        assert link["operationId"] in names


@pytest.mark.parametrize(
    ("path", "method", "operation", "parameters"), operations(), ids=[o[2]["operationId"] for o in operations()]
)
def test_each_operation_answers_its_examples_as_it_says(application, path, method, operation, parameters):
    call(application, "POST", "/users/", HARRY if path != "/users/" or method != "POST" else {**HARRY, "email": "a@b"})
    environ, query = {}, []
    for parameter in map(resolve, parameters):
        name, example = parameter["name"], parameter["example"]
        if parameter["in"] == "path":
            path = path.replace("{id}", str(example))
        elif parameter["in"] == "query":
            query.append(f"{name}={example}")
        else:
            environ["HTTP_" + name.upper().replace("-", "_")] = example
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    answer = call(application, method, path, body, QUERY_STRING="&".join(query), **environ)
    success = min(operation["responses"])
    assert str(answer[0]) == success
    check_answer(operation["responses"][success], answer)
    content = resolve(operation["responses"][success]).get("content")
    if content:
        check(content["application/json"]["schema"], content["application/json"]["example"])


def test_the_header_of_a_page_is_as_it_says(application):
    for email in ("a@b", "b@c"):
        call(application, "POST", "/users/", {**HARRY, "email": email})
    header = DOCUMENT["components"]["headers"]["Link"]
    for mount_point in ("", "/accounts"):
        link = call(application, QUERY_STRING="limit=1&sort=-id", SCRIPT_NAME=mount_point)[1]["Link"]
        assert re.search(header["schema"]["pattern"], link)
    assert re.search(header["schema"]["pattern"], header["example"])


PROVOCATIONS = {  # by the response: what to ask of an application that has Harry alone
    "BadRequest": ("POST", "/users/", {}, {}),
    "BadQuery": ("GET", "/users/", None, {"QUERY_STRING": "limit=0"}),
    "WrongPassword": ("PUT", "/users/1/password/", {"old_password": "0", "new_password": "1"}, {}),
    "WrongCredentials": ("POST", "/users/verify/", {"email": "nobody@example.com", "password": "1234"}, {}),
    "NotFound": ("GET", "/users/2/", None, {}),
    "NotModified": ("GET", "/users/1/", None, {"HTTP_IF_NONE_MATCH": "*"}),
    "LengthRequired": ("POST", "/users/", {}, {"HTTP_TRANSFER_ENCODING": "chunked"}),
    "PreconditionFailed": ("PUT", "/users/1/", HARRY, {"HTTP_IF_MATCH": '"another"'}),
    "ContentTooLarge": ("POST", "/users/", {}, {"CONTENT_LENGTH": str(2**30)}),
    "UnsupportedMediaType": ("POST", "/users/", {}, {"CONTENT_TYPE": "text/plain"}),
}
ELSEWHERE = {  # those that the other tests provoke
    "Unauthorized", "InternalServerError", "ServiceUnavailable",
    "BadHttp", "RequestTimeout", "UriTooLong", "HeaderTooLarge", "MisdirectedRequest",
}  # fmt: skip


def test_every_error_of_it_is_provoked_here():
    assert set(RESPONSES) == {*PROVOCATIONS, *ELSEWHERE}


def check_error(name, answer):
    """Assert that an answer is a shared response of the document, its example, and of a status that refers to it."""
    references = {
        int(status)
        for _, _, operation, _ in operations()
        for status, response in operation["responses"].items()
        if response.get("$ref") == f"#/components/responses/{name}"
    }
    assert {answer[0]} == references
    check_answer(RESPONSES[name], answer)
    if "content" in RESPONSES[name]:
        assert json.loads(answer[2]) == RESPONSES[name]["content"]["application/json"]["example"]


@pytest.mark.parametrize("name", PROVOCATIONS)
def test_an_error_is_answered_as_it_says(application, name):
    call(application, "POST", "/users/", HARRY)
    method, path, value, environ = PROVOCATIONS[name]
    check_error(name, call(application, method, path, value, **environ))


def test_a_missing_token_is_answered_as_it_says(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", token=TOKEN)) as application:
        check_error("Unauthorized", call(application))


@pytest.mark.parametrize(
    ("name", "error"),
    [("InternalServerError", ZeroDivisionError()), ("ServiceUnavailable", profiler.Busy("somebody else is at it"))],
)
def test_what_goes_wrong_within_is_answered_as_it_says(application, monkeypatch, name, error):
    def get(*_):
        raise error

    monkeypatch.setattr(application.users, "get", get)
    check_error(name, call(application, "GET", "/users/1/"))


@pytest.fixture
def server(application, monkeypatch):
    monkeypatch.setattr(profiler, "HEAD_TIMEOUT", 0.2)
    with profiler.Server("127.0.0.1", 0, application, access_log=False, check_host=True) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, request):
    """Send bytes to a server; return status, headers and body of what it answers."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as stream:
            head, _, content = stream.read().partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    return int(status_line.split()[1]), dict(line.split(": ", 1) for line in lines), content


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("BadHttp", b"GET /users/ HTTP/1.1\r\n\r\n"),
        ("RequestTimeout", b"GET /users/ HTTP/1.1\r\n"),
        ("UriTooLong", b"GET /users/?%b HTTP/1.1\r\n\r\n" % (b"x" * profiler.MAX_REQUEST_LINE)),
        ("HeaderTooLarge", b"GET /users/ HTTP/1.1\r\n" + b"A: b\r\n" * (profiler.MAX_FIELDS + 1) + b"\r\n"),
        ("MisdirectedRequest", b"GET /users/ HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n"),
    ],
)
def test_what_the_server_itself_refuses_is_answered_as_it_says(server, name, request_):
    check_error(name, ask(server, request_))


# -- how it is served ------------------------------------------------------------------------------------------------


def test_it_is_served_as_it_is_to_whoever_asks(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", token=TOKEN)) as application:
        status, headers, content = call(application, "GET", "/openapi.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert content == (HERE / "openapi.json").read_bytes()


def test_it_is_served_for_reading_alone(application):
    assert call(application, "HEAD", "/openapi.json")[::2] == (200, b"")
    status, headers, _ = call(application, "PUT", "/openapi.json", {})
    assert (status, headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
