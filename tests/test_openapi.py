"""Tests that openapi.json describes what profiler does."""

from __future__ import annotations

import ast
import contextlib
import json
import pathlib
import re
import socket
import sqlite3
import threading
import unicodedata
import urllib.parse
from http import HTTPStatus

import pytest
from conftest import HERE, TOKEN, Answer, call

import profiler

PATH = HERE / "openapi.json"
DOCUMENT = json.loads(PATH.read_bytes())
SCHEMAS = DOCUMENT["components"]["schemas"]
RESPONSES = DOCUMENT["components"]["responses"]
PARAMETERS = DOCUMENT["components"]["parameters"]
HERMIONE = {
    "first_name": "Hermione",
    "last_name": "Granger",
    "email": "hermione@example.com",
    "password": "Wingardium Leviosa",
}
UNDOCUMENTED = ("/", "/openapi.json")  # not for API clients


def resolve(value):
    """Return the target of a reference, or the value itself."""
    while "$ref" in value:
        target = DOCUMENT
        for name in value["$ref"].lstrip("#/").split("/"):
            target = target[name]
        value = target
    return value


def walk(value, name=""):
    """Yield each object in a value, with its key."""
    if isinstance(value, dict):
        yield name, value
        for key, child in value.items():
            yield from walk(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from walk(child, name)


def operations():
    """Return the path, the method, the operation and the parameters of each operation."""
    return [
        (
            path,
            method.upper(),
            item[method],
            [*item.get("parameters", ()), *item[method].get("parameters", ())],
        )
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method != "parameters"
    ]


def check(schema, value):
    """Assert that a value is valid, for the keywords that this document uses in the
    schemas of responses."""
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


def check_response(documented, actual):
    """Assert that the headers and the body of a response are as documented."""
    documented = resolve(documented)
    headers, content = actual.headers, actual.body
    for name, header in documented.get("headers", {}).items():
        header = resolve(header)
        if name != "Link":  # optional
            kind = int if header["schema"].get("type") == "integer" else str
            check(header["schema"], kind(headers[name]))
    if "content" not in documented:
        assert (content, "Content-Type" in headers) == (b"", False)
    else:
        [(media_type, media)] = documented["content"].items()
        assert headers["Content-Type"] == media_type
        assert content.endswith(b"\n")
        check(media["schema"], json.loads(content))


# -- the document and the code ---------------------------------------------------------


def test_version_is_that_of_the_module():
    assert DOCUMENT["info"]["version"] == profiler.__version__


def test_paths_and_methods_are_those_of_the_routes():
    documented = {}
    for path, method, _, _ in operations():
        documented.setdefault(path.replace("{id}", "1"), set()).add(method)
    routed = {}
    for pattern, handlers in [route[:2] for route in profiler.ROUTES]:
        [path] = [path for path in (*documented, *UNDOCUMENTED) if pattern.fullmatch(path)]
        routed[path] = set(handlers)
    assert {
        path: methods for path, methods in routed.items() if path not in UNDOCUMENTED
    } == documented


def test_limits_are_those_of_the_module():
    query = PARAMETERS["Q"]["schema"]
    assert SCHEMAS["Name"]["maxLength"] == query["maxLength"] == profiler.MAX_NAME
    assert SCHEMAS["Email"]["maxLength"] == profiler.MAX_EMAIL
    assert SCHEMAS["Password"]["maxLength"] == profiler.MAX_PASSWORD
    assert SCHEMAS["Id"]["maximum"] == PARAMETERS["After"]["schema"]["maximum"] == profiler.MAX_ID
    assert PARAMETERS["Limit"]["schema"]["maximum"] == profiler.MAX_LIMIT
    assert f"pages of {profiler.BATCH} " in PARAMETERS["Limit"]["description"]
    assert f"{profiler.MAX_BODY // 1024} KiB" in RESPONSES["ContentTooLarge"]["description"]
    assert f"{profiler.MAX_REQUEST_LINE // 1024} KiB" in RESPONSES["UriTooLong"]["description"]
    assert f"{profiler.MAX_HEADER_FIELDS} headers" in RESPONSES["HeaderTooLarge"]["description"]
    assert f"{profiler.MAX_HEAD // 1024} KiB" in RESPONSES["HeaderTooLarge"]["description"]
    assert DOCUMENT["components"]["headers"]["RetryAfter"]["example"] == profiler.RETRY_AFTER
    assert (
        f"at most {profiler.MAX_ITERATIONS:,} iterations" in SCHEMAS["PasswordHash"]["description"]
    )
    assert f"at most {profiler.MAX_SCRYPT_COST:,}." in SCHEMAS["PasswordHash"]["description"]
    verify = DOCUMENT["paths"]["/users/verify/"]["post"]["description"]
    assert f"After {profiler.MAX_FAILURES} consecutive wrong passwords" in verify
    assert profiler.ATTEMPT_INTERVAL == 60
    assert "one attempt per minute" in verify


def test_headers_of_every_response_are_documented(application):
    headers = call(application, path="/health/").headers
    del headers["Content-Type"], headers["Content-Length"]
    documented = re.search(r"Every response has (.*?)\.\n", DOCUMENT["info"]["description"])[1]
    assert dict(re.findall("`([^:]+): ([^`]+)`", documented)) == headers


def compile_pattern(schema):
    """Return the pattern of a schema. In Python, $ also matches before a newline."""
    return re.compile(schema["pattern"].removesuffix("$") + r"\Z")


# White space, controls, format characters, and those that are invisible for other
# reasons, such as U+115F and U+FE0F.
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180f\u2065\u3164\ufe00\ufe0f\uffa0\ufff0\ufff8"
UP_TO_FFFF = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
STRANGE = {
    c
    for c in UP_TO_FFFF
    if c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs")
}
STRANGE |= {*INVISIBLE}
NEIGHBOURS = {
    c
    for c in UP_TO_FFFF
    if not STRANGE.isdisjoint((chr(ord(c) - 1 if ord(c) else 0), chr(ord(c) + 1)))
}
PROFILE = {"first_name": "a", "last_name": "b", "email": "a@b"}


# Fields of requests about a user who does not exist: the operation, the field's name, other
# fields, and the status if the value is valid.
FIELDS = [
    ("patchUser", "first_name", {}, 404),
    ("patchUser", "email", {}, 404),
    ("resetPassword", "new_password", {}, 404),
    ("changePassword", "old_password", {"new_password": "1234"}, 404),
    ("verifyUser", "email", {"password": "1234"}, 403),
    ("verifyUser", "password", {"email": "nobody@example.com"}, 403),
]


@pytest.mark.parametrize(
    "form", ["{}", "a{}", "{}a", "a{}@b", "a@b{}", "@{}", "{0}@{0}", "a@{}@b"]
)
@pytest.mark.parametrize(("operation_id", "name", "others", "status"), FIELDS)
def test_patterns_accept_what_the_module_accepts(
    application, monkeypatch, operation_id, name, others, status, form
):
    monkeypatch.setattr(profiler, "MAX_FAILURES", 1_000_000)
    [(path, method, operation)] = [
        each[:3] for each in operations() if each[2]["operationId"] == operation_id
    ]
    body = resolve(operation["requestBody"]["content"]["application/json"]["schema"])
    pattern = compile_pattern(resolve(body["properties"][name]))
    for character in {*STRANGE, *NEIGHBOURS, "@", "a", "\u00df", "\U0001f9d9"}:
        value = form.format(character)
        path = path.replace("{id}", "1")
        answer = call(application, method, path, fields={**others, name: value})
        assert answer.status in (400, status), answer
        assert (answer.status == status) == bool(pattern.search(value)), (value, answer)


@pytest.mark.parametrize("form", ["{}", "a{}", "{0}{0}"])
@pytest.mark.parametrize("name", ["Q", "EmailQuery"])
def test_patterns_of_parameters_accept_what_the_module_accepts(application, name, form):
    parameter = PARAMETERS[name]
    pattern = compile_pattern(parameter["schema"])
    for text in ["", *{*STRANGE, *NEIGHBOURS, "a", "%", "_"}]:
        value = form.format(text)
        query = f"{parameter['name']}={urllib.parse.quote(value)}"
        answer = call(application, QUERY_STRING=query)
        assert (answer.status == 200) == bool(pattern.search(value)), (value, answer)


PBKDF2 = "0" * 64
SCRYPT = "0" * 128


@pytest.mark.parametrize(
    "password_hash",
    [
        f"pbkdf2:sha256:1$${PBKDF2}",
        f"pbkdf2:sha256:10000000$salt${PBKDF2}",
        f"pbkdf2:sha256:10000001$salt${PBKDF2}",
        f"pbkdf2:sha256:0$salt${PBKDF2}",
        f"pbkdf2:sha256:1$salt${PBKDF2.replace('0', 'A')}",
        f"pbkdf2:sha256:1$salt$salt${PBKDF2}",
        f"pbkdf2:sha512:1$salt${SCRYPT}",
        f"pbkdf2:sha256$salt${PBKDF2}",
        f"scrypt:32768:8:1$salt${SCRYPT}",
        f"scrypt:32768:8:0$salt${SCRYPT}",
        f"scrypt:32768:8:1$salt${PBKDF2}",
        f"pbkdf2_sha256$870000$salt${'A' * 43}=",
        f"pbkdf2_sha256$870000$salt${'A' * 43}",
        f"scrypt$16384$salt$8$5${'/' * 86}==",
        f"scrypt$16384$salt$8$100${'/' * 86}==",
        f"$pbkdf2-sha256$29000$AAAA${'.' * 43}",
        f"$pbkdf2-sha256$29000$AAAAAA${'.' * 43}",
        f"$pbkdf2-sha256$29000$AAAAAAA${'.' * 43}",
        f"$pbkdf2-sha256$29000$AAAAA${'.' * 43}",
        f"$pbkdf2-sha256$29000$${'.' * 43}",
        f"$pbkdf2-sha256$29000$AAAA${'A' * 43}=",
        "$2b$12$" + "a" * 53,
        "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA",
        "{SSHA}AAAA",
        "1234",
    ],
)
def test_pattern_of_password_hash_accepts_what_the_module_accepts(application, password_hash):
    user = {**PROFILE, "password_hash": password_hash}
    answer = call(application, "POST", fields=user)
    assert (answer.status == 201) == bool(
        compile_pattern(SCHEMAS["PasswordHash"]).search(password_hash)
    ), answer


@pytest.mark.parametrize(("n", "r", "p"), [(2**17, 8, 2), (3, 8, 1), (1, 8, 1)])
def test_excessive_cost_of_scrypt_is_rejected_as_described(application, n, r, p):
    """A regular expression cannot express this limit."""
    user = {**PROFILE, "password_hash": f"scrypt:{n}:{r}:{p}$salt${SCRYPT}"}
    assert compile_pattern(SCHEMAS["PasswordHash"]).search(user["password_hash"])
    assert call(application, "POST", fields=user).status == 400


def test_a_new_user_has_a_password_or_a_hash_but_not_both(application):
    new, imported = SCHEMAS["NewUser"], SCHEMAS["ImportedUser"]
    assert {*new["required"]} ^ {*imported["required"]} == {"password", "password_hash"}
    assert (new["not"], imported["not"]) == (
        {"required": ["password_hash"]},
        {"required": ["password"]},
    )
    example = SCHEMAS["PasswordHash"]["examples"][0]
    both = {**HERMIONE, "password_hash": example}
    neither = {name: value for name, value in HERMIONE.items() if name != "password"}
    for user, status in (
        (both, 400),
        (neither, 400),
        ({**neither, "password_hash": example}, 201),
    ):
        assert call(application, "POST", fields=user).status == status


@pytest.mark.parametrize(
    ("method", "path_info", "name", "schema", "value"),
    [
        ("PATCH", "/users/1/", "last_name", "Name", "{}"),
        ("PATCH", "/users/1/", "email", "Email", "{}@example.com"),
        ("PUT", "/users/1/password/reset/", "new_password", "Password", "{}"),
    ],
)
def test_maximum_lengths_are_those_of_the_module(
    application, method, path_info, name, schema, value
):
    for length, status in (
        (SCHEMAS[schema]["maxLength"], 404),
        (SCHEMAS[schema]["maxLength"] + 1, 400),
    ):
        text = value.format("x" * (length - len(value) + 2))
        assert len(text) == length
        assert call(application, method, path_info, fields={name: text}).status == status


@pytest.mark.parametrize("name", ["Limit", "After"])
def test_ranges_of_numbers_are_those_of_the_module(application, name):
    parameter = PARAMETERS[name]
    low, high = parameter["schema"]["minimum"], parameter["schema"]["maximum"]
    for number, status in ((low - 1, 400), (low, 200), (high, 200), (high + 1, 400)):
        assert call(application, QUERY_STRING=f"{parameter['name']}={number}").status == status


def test_values_of_sort_are_those_of_the_module(application):
    for sort in PARAMETERS["Sort"]["schema"]["enum"]:
        assert call(application, QUERY_STRING=f"sort={sort}").status == 200
    assert call(application, QUERY_STRING="sort=email").status == 400


def test_range_of_ids_is_that_of_the_module(application):
    schema = SCHEMAS["Id"]
    for user_id, status in (
        (schema["minimum"], 204),
        (schema["maximum"], 204),
        (schema["maximum"] + 1, 404),
    ):
        assert call(application, "DELETE", f"/users/{user_id}/").status == status


def test_statuses_are_those_of_the_module():
    """Each number in the module that is a status from 200 on is taken for one."""
    tree = ast.parse(pathlib.Path(profiler.__file__).read_text("utf-8"))
    numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    statuses = {int(status) for status in HTTPStatus if status >= 200 and status in numbers}
    assert statuses >= {200, 308, 400, 404, 412, 429, 500, 505}
    documented = {
        int(status) for _, _, operation, _ in operations() for status in operation["responses"]
    }
    general = DOCUMENT["info"]["description"].partition("**Postman.**")[0]
    mentioned = set(map(int, re.findall(r"\b[2-5][0-9][0-9]\b", general)))
    assert documented | mentioned == statuses
    assert not documented & mentioned


@pytest.mark.parametrize(
    ("template", "method", "operation"), [operation[:3] for operation in operations()]
)
def test_operations_of_a_kind_document_the_same_statuses(template, method, operation):
    statuses = {"400", "408", "414", "421", "431", "500", "503"}
    if operation.get("security") != []:
        statuses |= {"401"}
    if "requestBody" in operation:
        statuses |= {"411", "413", "415"}
    if "{id}" in template:
        statuses |= {"404", "412"}
    if operation["operationId"] in ("verifyUser", "changePassword"):
        statuses |= {"403", "429"}
    assert set(operation["responses"]) >= statuses


def test_only_health_needs_no_token(path):
    with contextlib.closing(profiler.create_app(path, iterations=1, token=TOKEN)) as application:
        for path, method, operation, _ in operations():
            status = call(application, method, path.replace("{id}", "1")).status
            assert (
                (status == 401)
                == (operation.get("security") != [])
                == ("401" in operation["responses"])
            )


# -- examples --------------------------------------------------------------------------


def test_every_body_and_parameter_has_an_example():
    values = [
        value
        for name, value in walk(DOCUMENT)
        if name.startswith("application/") or {"name", "in"} <= set(value)
    ]
    assert len(values) > 30
    assert [value for value in values if "example" not in value] == []


def test_all_references_resolve_and_all_components_are_used():
    references = {value["$ref"] for _, value in walk(DOCUMENT) if "$ref" in value}
    assert len(references) > 40
    assert all(resolve({"$ref": reference}) for reference in references)
    shared = {
        f"#/components/{kind}/{name}"
        for kind, values in DOCUMENT["components"].items()
        for name in values
        if kind != "securitySchemes"
    }
    assert shared == references


def test_links_lead_to_operations():
    names = {operation["operationId"] for _, _, operation, _ in operations()}
    linked = {link["operationId"] for link in DOCUMENT["components"]["links"].values()}
    assert {"getUser", "deleteUser"} <= linked <= names


def send_example(application, path, method, operation, parameters, if_match):
    """Send an operation's examples, with a value for Postman's variable ifMatch. Yield
    the responses."""
    environ, query = {}, []
    for parameter in map(resolve, parameters):
        name, example = (
            parameter["name"],
            str(parameter["example"]).replace("{{ifMatch}}", if_match),
        )
        if parameter["in"] == "path":
            path = path.replace("{id}", example)
        elif parameter["in"] == "query":
            query.append(f"{name}={urllib.parse.quote(example)}")
        else:
            environ["HTTP_" + name.upper().replace("-", "_")] = example
    media_types = operation.get("requestBody", {}).get("content", {})
    bodies = [
        (media["example"], {"CONTENT_TYPE": media_type})
        for media_type, media in media_types.items()
    ]
    for body, content_type in bodies or [(None, {})]:
        yield call(
            application,
            method,
            path,
            fields=body,
            QUERY_STRING="&".join(query),
            **environ,
            **content_type,
        )


each_operation = pytest.mark.parametrize(
    ("template", "method", "operation", "parameters"),
    operations(),
    ids=[o[2]["operationId"] for o in operations()],
)


@each_operation
def test_examples_are_answered_with_the_documented_success(
    application, template, method, operation, parameters
):
    if operation["operationId"] != "createUser":
        call(application, "POST", fields=HERMIONE)
    success = min(operation["responses"])
    for response in send_example(application, template, method, operation, parameters, "*"):
        assert str(response.status) == success
        check_response(operation["responses"][success], response)
    content = resolve(operation["responses"][success]).get("content")
    if content:
        check(content["application/json"]["schema"], content["application/json"]["example"])


def read_rows(application):
    connection = sqlite3.connect(application.users.location)
    with contextlib.closing(connection):
        return connection.execute("SELECT * FROM user ORDER BY id").fetchall()


@pytest.mark.parametrize("if_match", ["*", None])
def test_all_examples_succeed_in_order_on_a_new_database(application, if_match):
    """As a Postman collection runs them, with its variable ifMatch set to `*`, or not set."""
    for path, method, operation, parameters in operations():
        guarded = {"$ref": "#/components/parameters/IfMatchToWrite"} in parameters
        expected = "412" if guarded and if_match is None else min(operation["responses"])
        for response in send_example(
            application, path, method, operation, parameters, if_match or "{{ifMatch}}"
        ):
            assert str(response.status) == expected, operation["operationId"]


def test_examples_do_not_harm_existing_users(application):
    """A Postman collection that is run on a database with users must not change them."""
    for number in range(3):
        user = {**HERMIONE, "email": f"{number}@example.com", "password": "1234"}
        assert call(application, "POST", fields=user).status == 201
    before = read_rows(application)
    for _ in range(2):
        for path, method, operation, parameters in operations():
            list(send_example(application, path, method, operation, parameters, "{{ifMatch}}"))
    [*existing, hermione] = read_rows(application)
    assert existing == before
    assert "hermione@example.com" in hermione


def test_every_request_that_harms_without_a_password_is_guarded():
    guarded = {
        operation["operationId"]
        for _, _, operation, parameters in operations()
        if {"$ref": "#/components/parameters/IfMatchToWrite"} in parameters
    }
    assert guarded == {"updateUser", "patchUser", "deleteUser", "resetPassword"}


def test_link_header_is_as_documented(application):
    for email in ("a@b", "b@c"):
        call(application, "POST", fields={**HERMIONE, "email": email})
    header = DOCUMENT["components"]["headers"]["Link"]
    for mount_point in ("", "/accounts"):
        link = call(application, QUERY_STRING="limit=1&sort=-id", SCRIPT_NAME=mount_point).headers[
            "Link"
        ]
        assert re.search(header["schema"]["pattern"], link)
    assert re.search(header["schema"]["pattern"], header["example"])


# How to get each error response from an application with one user.
ERRORS = {
    "BadRequest": ("POST", "/users/", {}, {}),
    "BadQuery": ("GET", "/users/", None, {"QUERY_STRING": "limit=0"}),
    "WrongPassword": (
        "POST",
        "/users/verify/",
        {"email": "nobody@example.com", "password": "1234"},
        {},
    ),
    "NotFound": ("GET", "/users/2/", None, {}),
    "NotModified": ("GET", "/users/1/", None, {"HTTP_IF_NONE_MATCH": "*"}),
    "LengthRequired": ("POST", "/users/", {}, {"HTTP_TRANSFER_ENCODING": "chunked"}),
    "PreconditionFailed": ("PUT", "/users/1/", HERMIONE, {"HTTP_IF_MATCH": '"another"'}),
    "ContentTooLarge": ("POST", "/users/", {}, {"CONTENT_LENGTH": str(2**30)}),
    "UnsupportedMediaType": ("POST", "/users/", {}, {"CONTENT_TYPE": "text/plain"}),
    "MisdirectedRequest": ("GET", "/users/", None, {"HTTP_HOST": "example.com"}),
}
TESTED_BELOW = {
    "Unauthorized", "TooManyRequests", "InternalServerError", "ServiceUnavailable",
    "BadHttp", "RequestTimeout", "UriTooLong", "HeaderTooLarge",
}  # fmt: skip


def test_every_error_response_is_tested():
    assert set(RESPONSES) == {*ERRORS, *TESTED_BELOW}


def check_error(name, actual):
    """Assert that a response has the documented status, headers and body, and is the example."""
    references = {
        int(status)
        for _, _, operation, _ in operations()
        for status, response in operation["responses"].items()
        if response.get("$ref") == f"#/components/responses/{name}"
    }
    assert {actual.status} == references
    check_response(RESPONSES[name], actual)
    if "content" in RESPONSES[name]:
        assert json.loads(actual.body) == RESPONSES[name]["content"]["application/json"]["example"]


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_as_documented(application, name):
    call(application, "POST", fields=HERMIONE)
    method, path, value, environ = ERRORS[name]
    check_error(name, call(application, method, path, fields=value, **environ))


def test_missing_token_is_as_documented(path):
    with contextlib.closing(profiler.create_app(path, token=TOKEN)) as application:
        check_error("Unauthorized", call(application))


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("POST", "/users/verify/", {"email": "hermione@example.com", "password": "1234"}),
        ("POST", "/users/verify/", {"email": "nobody@example.com", "password": "1234"}),
        ("PUT", "/users/1/password/", {"old_password": "1234", "new_password": "5678"}),
    ],
)
def test_rate_limit_is_as_documented(application, method, url, body):
    call(application, "POST", fields=HERMIONE)
    for _ in range(profiler.MAX_FAILURES):
        check_error("WrongPassword", call(application, method, url, fields=body))
    check_error("TooManyRequests", call(application, method, url, fields=body))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("InternalServerError", ZeroDivisionError()),
        ("ServiceUnavailable", profiler.Busy("for this test")),
    ],
)
def test_internal_error_is_as_documented(application, monkeypatch, name, error):
    def get(*_):
        raise error

    monkeypatch.setattr(application.users, "get", get)
    check_error(name, call(application, "GET", "/users/1/"))


@pytest.fixture
def server(application, monkeypatch):
    monkeypatch.setattr(profiler, "HEAD_TIMEOUT", 0.2)
    with profiler.Server(
        socket.AF_INET, ("127.0.0.1", 0), application, access_log=False
    ) as server:
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        yield server
        server.stop()
        thread.join()


def send(server, request):
    """Send bytes to a server. Return the response."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as stream:
            head, _, content = stream.read().partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    return Answer(
        int(status_line.split()[1]), dict(line.split(": ", 1) for line in lines), content
    )


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("BadHttp", b"GET /users/ HTTP/1.1\r\n\r\n"),
        ("RequestTimeout", b"GET /users/ HTTP/1.1\r\n"),
        ("UriTooLong", b"GET /users/?%b HTTP/1.1\r\n\r\n" % (b"x" * profiler.MAX_REQUEST_LINE)),
        (
            "HeaderTooLarge",
            b"GET /users/ HTTP/1.1\r\n" + b"A: b\r\n" * (profiler.MAX_HEADER_FIELDS + 1) + b"\r\n",
        ),
    ],
)
def test_error_of_the_server_is_as_documented(server, name, request_):
    check_error(name, send(server, request_))


# -- serving ---------------------------------------------------------------------------


def test_document_is_served_unchanged_without_a_token(path):
    with contextlib.closing(profiler.create_app(path, token=TOKEN)) as application:
        answer = call(application, path="/openapi.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.body == PATH.read_bytes()


def test_document_is_read_only(application):
    answer = call(application, "HEAD", "/openapi.json")
    assert (answer.status, answer.body) == (200, b"")
    answer = call(application, "PUT", "/openapi.json", fields={})
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
