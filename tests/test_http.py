"""Tests of the section *HTTP*, and of fields: bodies, query parameters, preconditions."""

from __future__ import annotations

import hashlib
import io
import json
import socket

import pytest
from conftest import BODY, HARRY, call, post

import profiler

PROFILE = ["first_name", "last_name", "email"]
MISSING = {"error": "Required fields are missing"}


# -- bodies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=UTF8",
        'application/json;a=b; Charset="UTF-8"',
    ],
)
def test_json_media_type_is_accepted(application, content_type):
    assert post(application, CONTENT_TYPE=content_type).status == 201


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/jsonp",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "application/merge-patch+json",
        "application/json, text/plain",
        "application/json;charset=utf-8;charset=utf-16",
        "application/json;charset=",
        "multipart/form-data; boundary=application/json",
        "application/jsonutf8",
    ],
)
def test_other_media_type_returns_415(application, content_type):
    answer = post(application, CONTENT_TYPE=content_type)
    assert (answer.status, "application/json" in answer.error) == (415, True)


class Unreadable(io.BytesIO):
    def read(self, *_):
        pytest.fail("read")


def test_body_over_the_limit_returns_413_before_it_is_read(application):
    length = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(profiler.MAX_BODY + 1)}
    assert post(application, b"", **length, **{"wsgi.input": Unreadable()}).status == 413


def test_body_of_the_maximum_length_is_accepted(application):
    body = BODY + b" " * (profiler.MAX_BODY - len(BODY))
    assert post(application, body).status == 201
    assert post(application, body + b" ").status == 413


@pytest.mark.parametrize(
    "length", ["+5", "-1", "5.0", "0x5", "5 ", "٣", "five", "5,5", "9" * 5000]
)
def test_content_length_that_is_no_number_returns_400(application, length):
    answer = post(application, CONTENT_LENGTH=length)
    assert (answer.status, "Content-Length" in answer.error) == (400, True)


def test_no_more_than_content_length_is_read(application):
    stream = io.BytesIO(BODY + b"GET / HTTP/1.1")
    assert post(application, **{"wsgi.input": stream}).status == 201
    assert stream.read() == b"GET / HTTP/1.1"


class Trickle(io.BytesIO):
    """Returns one byte at a time, and requires a size."""

    def read(self, size):
        assert size > 0
        return super().read(1)


@pytest.mark.parametrize("length", [{}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}])
def test_without_a_content_length_nothing_is_read(application, length):
    """A read would wait for a client that sends no more."""
    environ = {"CONTENT_TYPE": "application/json", **length, "wsgi.input": Unreadable()}
    answer = call(application, "POST", **environ)
    assert (answer.status, "must be JSON" in answer.error) == (400, True)


def test_body_may_arrive_in_pieces(application):
    assert post(application, **{"wsgi.input": Trickle(BODY)}).status == 201


def test_body_shorter_than_content_length_returns_400(application):
    answer = post(application, CONTENT_LENGTH=str(len(BODY) + 1))
    assert (answer.status, "shorter" in answer.error) == (400, True)


class Failing(io.BytesIO):
    def __init__(self, error):
        self.error = error

    def read(self, size):
        raise self.error


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), ValueError("bad chunk"), socket.timeout()]
)
def test_body_that_breaks_off_or_stalls_is_the_clients_error(application, error):
    answer = post(application, **{"wsgi.input": Failing(error)})
    assert (answer.status, answer.errors) == (400, "")


# A chunked body that the server decodes.
CHUNKED = {
    "HTTP_TRANSFER_ENCODING": "chunked",
    "wsgi.input_terminated": True,
    "CONTENT_LENGTH": "",
}


def test_chunked_body_decoded_by_the_server_is_read_up_to_the_limit(application):
    assert post(application, **CHUNKED).status == 201
    assert post(application, b" " * (profiler.MAX_BODY + 1), **CHUNKED).status == 413


class BreakingOff(io.BytesIO):
    """Fails where another stream would end."""

    def read(self, size=-1):
        if part := super().read(size):
            return part
        raise ValueError("bad chunk")


def test_chunked_body_that_breaks_off_is_not_taken_for_complete(application, users):
    answer = post(application, **CHUNKED, **{"wsgi.input": BreakingOff(BODY)})
    assert (answer.status, "could not be read" in answer.error) == (400, True)
    assert users.count() == 0


def test_chunked_body_not_decoded_by_the_server_returns_411(application):
    for length in ("", str(len(BODY))):
        assert (
            post(application, HTTP_TRANSFER_ENCODING="chunked", CONTENT_LENGTH=length).status
            == 411
        )


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "must be JSON"),
        (b"\xef\xbb\xbf", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{'first_name': 1}", "must be JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "must be JSON"),
        (b'{"first_name": "H\xe9"}', "UTF-8"),
        (BODY.decode().encode("utf-16"), "UTF-8"),
        (b"[" * 60_000, "brackets"),
        (b'{"a":' * 12_000, "brackets"),
        (b"[]", "object"),
        (b'"Harry"', "object"),
        (b"null", "object"),
        (b"1", "object"),
    ],
)
def test_body_that_is_no_json_object_returns_400_with_the_reason(application, body, problem):
    answer = post(
        application, body, CONTENT_TYPE="application/json", CONTENT_LENGTH=str(len(body))
    )
    assert (answer.status, problem in answer.error) == (400, True)


@pytest.mark.parametrize(
    "value", ["NaN", "-Infinity", "1", "1" * 10_000, "true", "null", "[]", "{}"]
)
def test_json_value_that_is_no_string_returns_400_naming_the_field(application, value):
    assert post(application).status == 201
    answer = call(
        application,
        "PATCH",
        "/users/1/",
        b'{"first_name": %b}' % value.encode(),
        CONTENT_TYPE="application/json",
    )
    assert (answer.status, answer.error) == (400, "first_name must be a string")


def test_json_body_may_begin_with_a_bom(application):
    """Windows PowerShell and Notepad write one."""
    assert post(application, b"\xef\xbb\xbf" + BODY).status == 201
    assert call(application, path="/users/1/").json["first_name"] == "Harry"


def test_bom_at_the_start_of_a_password_is_part_of_it(application):
    """Only that of the body is not."""
    assert call(application, "POST", fields={**HARRY, "password": "\ufeff1234"}).status == 201
    assert call(application, "POST", "/users/verify/", fields=HARRY).status == 403


def test_ignored_field_may_be_a_number_of_any_length(application):
    """int() takes quadratic time."""
    assert post(application, BODY[:-1] + b', "age": ' + b"9" * 60_000 + b"}").status == 201


def test_brackets_are_counted_before_parsing(application, monkeypatch):
    """The parser recurses."""
    nested = (
        b'{"a":' + b"[" * (profiler.MAX_BRACKETS - 1) + b"]" * (profiler.MAX_BRACKETS - 1) + b"}"
    )
    assert post(application, nested).json == MISSING
    monkeypatch.setattr(profiler.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert b"brackets" in post(application, b"[" + nested + b"]").body


def test_last_of_repeated_fields_is_used(application):
    assert post(application, BODY[:-1] + b', "first_name": "H."}').status == 201
    assert call(application, path="/users/1/").json["first_name"] == "H."


# -- fields ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARRY)
@pytest.mark.parametrize(
    "value", [..., "", " \t\n", None, False, "\u200b", "\u00ad\u2060 \ufeff", "\u3164"]
)
def test_missing_or_blank_field_returns_400(client, name, value):
    fields = {key: value for key, value in {**HARRY, name: value}.items() if value is not ...}
    assert client.post_json("/users/", fields, status=400).json == MISSING
    if name != "password":
        assert client.put_json("/users/1/", fields, status=400).json == MISSING


@pytest.mark.parametrize("name", HARRY)
@pytest.mark.parametrize("value", [1, 1.5, True, ["Harry"], {"a": 1}])
def test_field_that_is_no_string_returns_400_naming_it(client, name, value):
    assert client.post_json("/users/", {**HARRY, name: value}, status=400).json == {
        "error": f"{name} must be a string"
    }


@pytest.mark.parametrize("name", HARRY)
def test_lone_surrogate_returns_400_naming_the_field(client, name):
    answer = client.post_json("/users/", {**HARRY, name: "\ud800@example.com"}, status=400)
    assert answer.json == {"error": f"{name} must not contain a lone surrogate"}


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f", "\x85"])
@pytest.mark.parametrize("name", PROFILE)
def test_control_character_returns_400_naming_the_field(client, name, character):
    answer = client.post_json("/users/", {**HARRY, name: f"a{character}@b"}, status=400)
    assert answer.json == {"error": f"{name} must not contain control characters"}


@pytest.mark.parametrize("name", ["first_name", "last_name"])
def test_name_has_at_most_255_characters(client, name):
    answer = client.post_json("/users/", {**HARRY, name: "é" * 256}, status=400)
    assert answer.json == {"error": f"{name} must have at most 255 characters"}
    client.post_json("/users/", {**HARRY, name: "🐍" * 255}, status=201)
    assert client.get("/users/1/").json[name] == "🐍" * 255


@pytest.mark.parametrize(
    "name",
    ["👩\u200d💻", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "❤\ufe0f", "a\u202eb"],
)
def test_name_may_contain_invisible_characters_next_to_visible_ones(client, name):
    """Emoji, Persian and others need them."""
    client.post_json("/users/", {**HARRY, "first_name": name}, status=201)
    assert client.get("/users/1/").json["first_name"] == name


@pytest.mark.parametrize("email", ["a@b", "a.b+c@d-e", "ż@ó.pl", "a" * 252 + "@b", "*@*", "'@\""])
def test_email_with_one_at_sign_and_text_on_both_sides_is_accepted(client, email):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    assert client.get("/users/1/").json["email"] == email


@pytest.mark.parametrize(
    "email", ["harry", "@", "a@", "@b", "a@b@c", "a b@c", "a@b\u00a0", "a@b ", "a" * 253 + "@b"]
)
def test_malformed_email_returns_400(client, email):
    assert (
        "email must be"
        in client.post_json("/users/", {**HARRY, "email": email}, status=400).json["error"]
    )


@pytest.mark.parametrize(
    "character",
    [
        "\u200b",
        "\ufeff",
        "\u00ad",
        "\u2060",
        "\u200d",
        "\u200e",
        "\u202a",
        "\u202e",
        "\u2066",
        "\u2069",
        "\u034f",
        "\u061c",
        "\u180e",
        "\ufe0f",
        "\u3164",
        "\uffa0",
        "\U000e0061",
        "\U0001d173",
    ],
)
@pytest.mark.parametrize(
    "email", ["{}harry@example.com", "har{}ry@example.com", "harry@example.com{}"]
)
def test_invisible_character_in_an_email_returns_400(application, character, email):
    """Two emails that look the same would be two users."""
    for method, path_info in [("POST", "/users/"), ("PUT", "/users/1/"), ("PATCH", "/users/1/")]:
        answer = call(
            application, method, path_info, fields={**HARRY, "email": email.format(character)}
        )
        assert (answer.status, answer.error.startswith("email must")) == (400, True)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("first_name", None, "must be a string"),
        ("last_name", "a\n", "must not contain control characters"),
        ("email", "harry", "must be an address"),
        ("password", "\ud800", "must not contain a lone surrogate"),
        ("password", " ", "must not be blank"),
        ("password", "x" * 1025, "must have at most 1024 characters"),
    ],
)
def test_invalid_field_is_refused_without_http(accounts, name, value, problem):
    with pytest.raises(profiler.InvalidField, match=f"^{name} {problem}"):
        accounts.create(**{**HARRY, name: value})
    assert accounts.users.count() == 0


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("import_user", ("H", "P", "h@example.com", "1234"), "password_hash must be a PBKDF2"),
        ("update", (1, {"first_name": ""}), "first_name must not be blank"),
        (
            "update",
            (1, {"id": 7}),
            "id cannot be updated: allowed are first_name, last_name, email",
        ),
        ("verify", ("harry@example.com", None), "password must be a string"),
        ("verify", ("\0", "1234"), "email must not contain control characters"),
        ("change_password", (1, 1234, "5678"), "old_password must be a string"),
        ("change_password", (1, "1234", ""), "new_password must not be blank"),
        ("reset_password", (1, "a\0"), "new_password must not contain the NUL character"),
    ],
)
def test_each_rule_of_accounts_checks_its_fields(accounts, method, arguments, message):
    assert accounts.create(**HARRY) == 1
    user, password_hash = accounts.users.get(1), accounts.users.find_credentials(1)[1]
    with pytest.raises(profiler.InvalidField, match=f"^{message}"):
        getattr(accounts, method)(*arguments)
    assert accounts.users.count() == 1
    assert (accounts.users.get(1), accounts.users.find_credentials(1)[1]) == (user, password_hash)


# -- preconditions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("{tag}", 200),
        ('"a", {tag} ,"b"', 200),
        ("W/{tag}", 200),
        ('"{hex}-gzip"', 200),
        ('W/"{hex}-br"', 200),
        ('"a", W/"{hex}-gzip"', 200),
        ("*", 200),
        (" * ", 200),
        (", {tag},,", 200),
        ('"other"', 412),
        ('W/"other"', 412),
        ('"{hex}-1"', 412),
        ('"{hex}gzip"', 412),
        ('"x{hex}"', 412),
        ("{hex}", 412),
        ("", 412),
        ("nonsense", 412),
        ('"{tag}', 412),
        ("x{tag}", 412),
        ("{tag}b", 412),
        ("W/ {tag}", 412),
        ("w/{tag}", 412),
        ('"*"', 412),
    ],
)
def test_if_match(client, field, status):
    """RFC 9110 13.1.1, but weakened tags match: proxies that compress change them in transit."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    headers = {"If-Match": field.format(tag=tag, hex=tag.strip('"'))}
    client.get("/users/1/", headers=headers, status=status)
    client.put_json("/users/1/", HARRY, headers=headers, status=status)


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('W/"{hex}-gzip"', 304),
        ('"a", W/{tag}', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
        ("nonsense", 200),
    ],
)
def test_if_none_match(client, field, status):
    """RFC 9110 13.1.2."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    headers = {"If-None-Match": field.format(tag=tag, hex=tag.strip('"'))}
    for request in (client.get, client.head):
        answer = request("/users/1/", headers=headers, status=status)
        assert answer.headers["ETag"] == tag
        assert ("Content-Type" in answer.headers, "Content-Length" in answer.headers) == (
            status == 200,
        ) * 2
    client.put_json("/users/1/", HARRY, headers=headers, status=412 if status == 304 else 200)
    client.delete("/users/1/", headers=headers, status=412 if status == 304 else 204)


def test_etag_is_a_sha256_of_the_body(application):
    """FIPS builds of OpenSSL have no BLAKE2."""
    post(application)
    answer = call(application, path="/users/1/")
    assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.body.rstrip()).hexdigest()[:32]}"'


def test_tag_of_an_earlier_version_does_not_match_even_if_weakened(client):
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    client.patch_json("/users/1/", {"first_name": "H."})
    for stale in (tag, f"W/{tag}", f'{tag[:-1]}-gzip"'):
        client.put_json("/users/1/", HARRY, headers={"If-Match": stale}, status=412)


def test_if_match_is_evaluated_before_if_none_match(client):
    """RFC 9110 13.2.2."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    client.get("/users/1/", headers={"If-Match": '"other"', "If-None-Match": tag}, status=412)
    client.get("/users/1/", headers={"If-Match": tag, "If-None-Match": tag}, status=304)


def test_invalid_body_is_reported_despite_a_false_precondition(client):
    """RFC 9110 13.2.1."""
    headers = {"If-Match": '"other"'}
    client.post_json("/users/", HARRY)
    client.put("/users/1/", "{}", headers={**headers, "Content-Type": "text/plain"}, status=415)
    client.put_json("/users/1/", {}, headers=headers, status=400)


def test_preconditions_do_not_apply_to_the_list(client):
    client.post_json("/users/", HARRY)
    client.get("/users/", headers={"If-None-Match": "*"}, status=200)
    client.get("/users/", headers={"If-Match": '"other"'}, status=200)


# -- responses -------------------------------------------------------------------------


def test_streamed_list_has_no_content_length(application, users, monkeypatch):
    monkeypatch.setattr(profiler, "SHORT_PAGE", 2)
    for number in (1, 2, 3):
        users.insert("F", "L", f"{number}@b.c", "x")
    answer = call(application)
    assert ("Content-Length" in answer.headers, len(answer.json)) == (False, 3)
    assert call(application, "HEAD").body == b""


def test_every_response_yields_at_least_one_part(application):
    """Hypercorn sends no head before the first part."""
    environ = {"REQUEST_METHOD": "DELETE", "PATH_INFO": "/users/1/", "HTTP_HOST": "localhost"}
    assert list(application(environ, lambda *_: None)) == [b""]


def test_error_is_a_json_object_with_a_message(application):
    answer = call(application, "POST", fields={**HARRY, "email": "harry"})
    assert (answer.headers["Content-Type"], list(json.loads(answer.body))) == (
        "application/json",
        ["error"],
    )


def test_only_a_hundred_entity_tags_are_compared(application, users, monkeypatch):
    """Thousands would take milliseconds, during which nobody else is served."""
    users.insert("F", "L", "a@b.c", "x")
    tag = call(application, path="/users/1/").headers["ETag"]
    for count, expected in ((99, 304), (100, 200)):
        field = '"x",' * count + tag
        assert call(application, path="/users/1/", HTTP_IF_NONE_MATCH=field).status == expected


@pytest.mark.parametrize(("count", "status"), [(20, 200), (21, 400)])
def test_query_has_at_most_twenty_parameters(application, count, status):
    assert call(application, QUERY_STRING="&".join(["a=b"] * count)).status == status
