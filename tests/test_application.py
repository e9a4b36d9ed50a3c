"""Tests of the sections *endpoints* and *application*: settings, first use, installed
files, the log and CGI."""

from __future__ import annotations

import ast
import collections
import contextlib
import hmac
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from wsgiref.validate import validator

import pytest
from conftest import (
    BODY,
    HARRY,
    HERE,
    TOKEN,
    call,
    copy_module,
    execute,
    ignores_fork_warning,
    in_a_fork,
    needs_fork,
    post,
    run_program,
)

import profiler

ELSEWHERE = {"HTTP_HOST": "accounts.example.com"}


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, ""])
def test_default_database_is_db_sqlite3(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("PROFILER_DATABASE", value)
    assert profiler.create_app().users.location == str(tmp_path / "db.sqlite3")


def test_database_of_create_app_overrides_the_environment(path, monkeypatch):
    monkeypatch.setenv("PROFILER_DATABASE", "/elsewhere")
    assert profiler.create_app().users.location == os.path.abspath("/elsewhere")
    assert profiler.create_app(path).users.location == str(path)


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path])
def test_database_may_be_str_bytes_or_a_path(path, kind):
    with contextlib.closing(profiler.create_app(kind(path))) as application:
        assert call(application).status == 200
    assert path.exists()


def test_iterations_come_from_the_argument_the_environment_or_the_default(path, monkeypatch):
    assert profiler.create_app(path).accounts.iterations == profiler.ITERATIONS
    monkeypatch.setenv("PROFILER_ITERATIONS", "7")
    assert profiler.create_app(path).accounts.iterations == 7
    assert profiler.create_app(path, iterations=8).accounts.iterations == 8


@pytest.mark.parametrize("iterations", [0, -1, profiler.MAX_ITERATIONS + 1, 1.5, True, "", "x"])
def test_invalid_iterations_raise_valueerror(path, iterations):
    with pytest.raises(ValueError, match="iterations"):
        profiler.create_app(path, iterations=iterations)


@pytest.mark.parametrize("value", ["0", "-1", "10000001", "1.5", "many", "9" * 5000, "\u0663"])
def test_invalid_iterations_in_the_environment_raise_valueerror(path, monkeypatch, value):
    monkeypatch.setenv("PROFILER_ITERATIONS", value)
    with pytest.raises(ValueError, match="iterations must be a number from 1 to"):
        profiler.create_app(path)


@pytest.mark.parametrize(
    "token",
    [
        "",
        " ",
        "\n",
        "short",
        TOKEN[:-1],
        f"{TOKEN}\u00e9",
        f"{TOKEN} short",
        f"short\n{TOKEN}",
        f"{TOKEN}\0",
    ],
)
def test_short_or_unsendable_token_raises_valueerror(path, monkeypatch, token):
    with pytest.raises(ValueError, match="must be at least 16"):
        profiler.create_app(path, token=token)
    if "\0" not in token:
        monkeypatch.setenv("PROFILER_TOKEN", token)
        with pytest.raises(ValueError, match="must be at least 16"):
            profiler.create_app(path)


@pytest.mark.parametrize("separator", [" ", "\n", "\r\n", "\t", "  \n "])
def test_environment_may_hold_several_tokens(path, monkeypatch, separator):
    tokens = [TOKEN, TOKEN[::-1]]
    monkeypatch.setenv("PROFILER_TOKEN", separator.join(tokens) + separator)
    with contextlib.closing(profiler.create_app(path)) as application:
        assert [
            call(application, HTTP_AUTHORIZATION=f"Bearer {token}").status for token in tokens
        ] == [200, 200]
        assert call(application).status == 401


def test_token_of_create_app_overrides_the_environment(path, monkeypatch):
    monkeypatch.setenv("PROFILER_TOKEN", TOKEN[::-1])
    with contextlib.closing(profiler.create_app(path, token=TOKEN)) as application:
        assert call(application, HTTP_AUTHORIZATION=f"Bearer {TOKEN}").status == 200
        assert call(application, HTTP_AUTHORIZATION=f"Bearer {TOKEN[::-1]}").status == 401


@pytest.mark.parametrize(
    ("variable", "argument", "status"),
    [
        ("", None, 421),
        ("0", None, 421),
        ("1", None, 200),
        ("1", False, 421),
        ("0", True, 200),
        ("", True, 200),
    ],
)
def test_anonymous_comes_from_the_argument_or_the_environment(
    path, monkeypatch, variable, argument, status
):
    monkeypatch.setenv("PROFILER_ANONYMOUS", variable)
    with contextlib.closing(profiler.create_app(path, anonymous=argument)) as application:
        assert call(application, **ELSEWHERE).status == status


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "on"])
def test_invalid_anonymous_in_the_environment_raises_valueerror(path, monkeypatch, value):
    monkeypatch.setenv("PROFILER_ANONYMOUS", value)
    with pytest.raises(ValueError, match="PROFILER_ANONYMOUS"):
        profiler.create_app(path)


def test_request_without_host_is_served(application):
    """HTTP/1.0. Browsers always send one."""
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/", "wsgi.errors": io.StringIO()}
    assert b"".join(application(environ, lambda *_: None)) == b"[]\n"


def test_rejected_requests_leave_no_memory_behind(guarded):
    """An exception that is raised again would keep the frames of each request."""
    for _ in range(10):
        call(guarded)
    tracemalloc.start()
    for _ in range(200):
        assert call(guarded, "POST", body=b"x" * 10_000).status == 401
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 200 * 10_000 / 2


# -- access ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127", "127.1", "127.0.1", "127.0.0.1.", "localhost.", "a.localhost", "0", "::1%lo"]
)
def test_other_spellings_of_loopback_return_421_without_token(application, host):
    """Browsers and libraries disagree about them."""
    assert call(application, HTTP_HOST=host).status == 421


@pytest.mark.parametrize("given", [TOKEN, TOKEN[::-1], "x" * len(TOKEN)])
def test_token_is_compared_with_each_valid_one_in_constant_time(path, monkeypatch, given):
    compared = []

    def compare_digest(a, b):
        compared.append({a, b})
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(profiler, "hmac", types.SimpleNamespace(compare_digest=compare_digest))
    tokens = [TOKEN, TOKEN[::-1], TOKEN * 2]
    with contextlib.closing(profiler.create_app(path, token=" ".join(tokens))) as application:
        answer = call(application, HTTP_AUTHORIZATION=f"Bearer {given}")
    assert answer.status == (200 if given in tokens else 401)
    assert compared == [{given.encode(), token.encode()} for token in tokens]


# -- endpoints -------------------------------------------------------------------------


def test_link_of_a_search_writes_a_space_as_percent_20(application, users):
    """RFC 3986. A plus sign means a space in HTML forms only."""
    for number in range(3):
        users.insert("Tom", "Marvolo Riddle", f"{number}@example.com", "x")
    link = call(application, QUERY_STRING="q=o%20R&limit=1").headers["Link"]
    assert link == '</users/?limit=1&after=1&q=o%20R>; rel="next"'
    query = link[1:].partition(">")[0].partition("?")[2]
    assert [user["id"] for user in call(application, QUERY_STRING=query).json] == [2]


@pytest.mark.parametrize(
    ("method", "path_info", "query", "expected"),
    [
        ("GET", "/users/1/", "", False),
        ("HEAD", "/users/1/", "", False),
        ("GET", "/users/", "", False),
        ("GET", "/users/", f"limit={profiler.SHORT_PAGE}", False),
        ("GET", "/users/", "limit=x", False),
        ("GET", "/users/", f"limit={profiler.SHORT_PAGE + 1}", True),
        ("GET", "/users/", "limit=1&q=a", True),
        ("GET", "/users/", "email=a@b", True),
        ("GET", "/users/", "%71=a", True),
        ("GET", "/users/", "q=&limit=1", False),
        ("GET", "/users/", "&" * 20, False),
        ("GET", "/users/1/", "q=a", False),
        ("GET", "/health/", "email=1", False),
        ("POST", "/users/", "", True),
        ("DELETE", "/users/1/", "", True),
    ],
)
def test_requests_that_may_wait_are_known_beforehand(
    application, method, path_info, query, expected
):
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path_info, "QUERY_STRING": query}
    assert application.may_wait(environ)  # to open the file
    call(application)
    assert application.may_wait(environ) is expected


def test_health_returns_503_for_a_table_without_a_column(application, path):
    execute(path, "CREATE TABLE user (id INTEGER, first_name, last_name, email, created_on)")
    answer = call(application, path="/health/")
    assert (answer.status, "no such column: password" in answer.errors) == (503, True)
    execute(path, "ALTER TABLE user ADD password")
    assert call(application, path="/health/").status == 200


# -- first use -------------------------------------------------------------------------


def test_app_and_application_are_the_same():
    assert profiler.app is profiler.application


def test_default_application_reads_the_environment_at_its_first_request(tmp_path):
    program = (
        "import profiler, os\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "os.environ['PROFILER_DATABASE'] = 'named.sqlite3'\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "print(b''.join(profiler.application(environ, lambda *_: None)).decode())"
    )
    output = run_program(program, tmp_path)
    assert output.stdout == "[]\n\n", output.stderr
    assert (tmp_path / "named.sqlite3").exists()


@pytest.fixture
def default(path, monkeypatch):
    """An application like profiler.application, before its first request."""
    monkeypatch.setenv("PROFILER_DATABASE", str(path))
    created = []

    def create():
        created.append(profiler.create_app())
        return created[-1]

    yield profiler.create_on_first_use(create)
    for application in created:
        application.close()


def test_default_application_serves_loopback_hosts_only(default):
    assert call(default).status == 200
    assert call(default, **ELSEWHERE).status == 421


def test_default_application_serves_any_host_if_anonymous(default, monkeypatch):
    monkeypatch.setenv("PROFILER_ANONYMOUS", "1")
    assert call(default, **ELSEWHERE).status == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("PROFILER_TOKEN", "short"), ("PROFILER_ANONYMOUS", "yes"), ("PROFILER_ITERATIONS", "x")],
)
def test_default_application_with_invalid_setting_serves_nobody(
    default, path, monkeypatch, name, value
):
    """The server answers 500 and logs the exception."""
    monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be"):
            call(default)
    assert not path.exists()


def test_failed_first_use_is_tried_again(default, monkeypatch):
    monkeypatch.setenv("PROFILER_TOKEN", "short")
    with pytest.raises(ValueError, match="token"):
        call(default)
    monkeypatch.setenv("PROFILER_TOKEN", TOKEN)
    assert call(default).status == 401
    monkeypatch.delenv("PROFILER_TOKEN")
    assert call(default).status == 401  # it was created


def test_concurrent_first_requests_use_one_application():
    together, used = threading.Barrier(8), []

    def create():
        together.wait(10)
        created = object()

        def application(environ, start_response):
            used.append(created)
            start_response("204 No Content", [])
            return [b""]

        return application

    application = profiler.create_on_first_use(create)
    with ThreadPoolExecutor(8) as threads:
        assert {
            answer.status for answer in threads.map(lambda _: call(application), range(8))
        } == {204}
    assert (len(used), len(set(used))) == (8, 1)


def test_concurrent_first_requests_after_a_failure_use_one_application(default, path, monkeypatch):
    opened, connect = [], profiler.sqlite3.connect
    monkeypatch.setenv("PROFILER_TOKEN", "short")
    with pytest.raises(ValueError, match="token"):
        call(default)
    monkeypatch.delenv("PROFILER_TOKEN")
    monkeypatch.setattr(
        profiler.sqlite3, "connect", lambda *a, **k: opened.append(1) or connect(*a, **k)
    )
    with ThreadPoolExecutor(32) as threads:
        statuses = {
            answer.status
            for answer in threads.map(lambda _: call(default, "DELETE", "/users/1/"), range(64))
        }
    assert (statuses, len(opened)) == ({204}, 1)


@needs_fork
@ignores_fork_warning
def test_child_uses_the_application_of_its_parent(default):
    assert post(default).status == 201
    assert in_a_fork(lambda: len(call(default).json) == 1)


# -- the log ---------------------------------------------------------------------------


class Recorder(io.StringIO):
    """Records each write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), profiler.Busy("no"), profiler.Unavailable("no")]
)
def test_each_error_is_logged_in_one_write(application, monkeypatch, error):
    """Otherwise the tracebacks of concurrent requests would interleave."""

    def get(user_id):
        raise error

    monkeypatch.setattr(application.users, "get", get)
    log = Recorder()
    assert call(application, path="/users/1/", **{"wsgi.errors": log}).status in (500, 503)
    assert len(log.writes) == 1
    assert log.writes[0].endswith("\n")


class Full(io.StringIO):
    def write(self, _):
        raise OSError


class Closed(io.StringIO):
    def write(self, _):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("log", [Full, Closed])
@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError(), 500), (profiler.Busy("no"), 503)]
)
def test_full_or_closed_log_does_not_prevent_the_response(
    application, monkeypatch, log, error, status
):
    def get(user_id):
        raise error

    monkeypatch.setattr(application.users, "get", get)
    assert call(application, path="/users/1/", **{"wsgi.errors": log()}).status == status


@pytest.mark.parametrize(
    ("method", "path_info", "fields"),
    [
        ("GET", "/users/9/", None),
        ("POST", "/users/", {}),
        ("POST", "/users/verify/", HARRY),
        ("GET", "/nowhere", None),
    ],
)
def test_errors_of_clients_are_not_logged(application, method, path_info, fields):
    assert call(application, method, path_info, fields=fields).errors == ""


# -- installed files -------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch):
    """The files that are installed with the module. A test can fill it."""
    files = {}

    def read_file(name):
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    monkeypatch.setattr(profiler, "read_installed_file", read_file)
    return files


def test_page_is_served_without_token(guarded, files):
    files["index.html"] = b"<html>"
    answer = call(guarded, path="/")
    assert (answer.status, answer.body) == (200, b"<html>")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert call(guarded, "HEAD", "/").headers == answer.headers


def test_mount_point_without_slash_redirects_to_the_page(guarded, files):
    """Otherwise its relative links would lead elsewhere."""
    files["index.html"] = b"<html>"
    answer = call(validator(guarded), path="", SCRIPT_NAME="/accounts")
    assert (answer.status, answer.headers["Location"], answer.body) == (308, "/accounts/", b"")
    assert (answer.headers["Content-Type"], answer.headers["Content-Length"]) == (
        "text/html; charset=utf-8",
        "0",
    )


def test_document_is_served_without_token(guarded, files):
    files["openapi.json"] = b"{}"
    answer = call(guarded, path="/openapi.json")
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (
        200,
        b"{}",
        "application/json",
    )


@pytest.mark.parametrize("path_info", ["", "/", "/openapi.json"])
def test_file_that_is_not_installed_returns_404_naming_the_users(guarded, files, path_info):
    answer = call(guarded, path=path_info)
    assert (answer.status, answer.json) == (
        404,
        {"error": "Nothing is here: the users are at /users/"},
    )


def test_page_and_document_are_found_next_to_the_module(application):
    assert call(application, path="/").body == (HERE / "index.html").read_bytes()
    assert call(application, path="/openapi.json").body == (HERE / "openapi.json").read_bytes()


# -- CGI -------------------------------------------------------------------------------

CGI = {
    "REQUEST_METHOD": "POST",
    "PATH_INFO": "/users/",
    "SCRIPT_NAME": "/cgi-bin/profiler.py",
    "CONTENT_TYPE": "application/json",
    "CONTENT_LENGTH": str(len(BODY)),
    "HTTP_HOST": "localhost",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "GATEWAY_INTERFACE": "CGI/1.1",
    "PROFILER_ITERATIONS": "1",
}


def run_cgi(folder, **environ):
    """Run a copy of the module as a CGI program. Its arguments are the client's: a
    query without "=" (RFC 3875 4.4)."""
    copy_module(folder)
    (folder / "profiler.py").chmod(0o755)
    environ = {
        **os.environ,
        **CGI,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **environ,
    }
    command = [str(folder / "profiler.py"), "--host", "0.0.0.0"]
    if os.name == "nt":  # where the server, not the system, reads the first line
        command.insert(0, sys.executable)
    return subprocess.run(command, env=environ, cwd=folder, input=BODY, capture_output=True)


def test_module_answers_as_a_cgi_program(tmp_path):
    output = run_cgi(tmp_path)
    head, _, body = output.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"Status: 201 Created"), output.stderr
    assert b"Location: /cgi-bin/profiler.py/users/1/" in head
    assert json.loads(body) == {"id": 1}


def test_cgi_program_serves_loopback_hosts_only(tmp_path):
    assert run_cgi(tmp_path, **ELSEWHERE).stdout.startswith(b"Status: 421 ")
    assert not (tmp_path / "db.sqlite3").exists()


# -- the module ------------------------------------------------------------------------


def test_module_exports_its_public_names():
    assert profiler.__all__ == [
        "Accounts",
        "Busy",
        "EmailTaken",
        "InvalidField",
        "NoSuchUser",
        "TooManyAttempts",
        "Unavailable",
        "Users",
        "WrongPassword",
        "app",
        "application",
        "create_app",
        "hash_password",
        "verify_password",
    ]


def test_private_names_are_used_in_their_own_section_only():
    source = (HERE / "profiler.py").read_text("utf-8")
    banners = [
        number for number, line in enumerate(source.splitlines(), 1) if line.startswith("# -- ")
    ]

    def section(node):
        return sum(banner <= node.lineno for banner in banners)

    tree = ast.parse(source)
    homes = {
        getattr(node, "name", getattr(node, "id", None)): section(node)
        for statement in tree.body
        for node in ([statement] if hasattr(statement, "name") else ast.walk(statement))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    }
    used = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and re.match("_[^_]", node.id)
    ]
    assert [node.id for node in used if homes.get(node.id, section(node)) != section(node)] == []
    assert "_normalise" in homes


# -- the tests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    sorted([HERE / "test_profiler.py", *HERE.glob("tests/*.py")]),
    ids=lambda file: file.name,
)
def test_no_test_file_defines_a_name_twice(file):
    """Only the second of two tests with the same name would run."""
    definitions = [
        node.name
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    assert definitions
    assert [name for name, count in collections.Counter(definitions).items() if count > 1] == []
