"""Helpers and fixtures that the tests share. pyproject.toml puts this folder on the
path: `import conftest` works."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from typing import NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest

import profiler

HERE = pathlib.Path(__file__).resolve().parent.parent  # the repository
HARRY = {
    "first_name": "Harry",
    "last_name": "Potter",
    "email": "harry@example.com",
    "password": "1234",
}
RON = {"first_name": "Ron", "last_name": "Weasley", "email": "ron@example.com", "password": "abcd"}
BODY = json.dumps(HARRY).encode()
TOKEN = "0123456789abcdef"
ITERATIONS = 2  # of PBKDF2: these tests are not about its cost

# SQLite waits for the disk at each commit. In memory, the tests take half the time.
MEMORY = pathlib.Path("/dev/shm")
if os.name == "posix" and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # the parent of tmp_path

# The table that the tutorial's own schema.sql creates.
TUTORIAL_SCHEMA = """
CREATE TABLE user (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  first_name TEXT NOT NULL,
  last_name TEXT NOT NULL,
  email TEXT UNIQUE NOT NULL,
  password TEXT NOT NULL,
  created_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);
"""


def pytest_make_parametrize_id(val):
    """Shorten long ids. pytest puts them into an environment variable, which Windows limits."""
    is_long = isinstance(val, (str, bytes)) and len(val) > 1000
    return f"{val[:20]!r}..." if is_long else None


def feed(steps, received, pieces):
    """Run a function of the parser that takes bytes: when it needs more, give it a piece.

    Return what it returns, or None if the pieces do not suffice.
    """
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
        piece = next(pieces, None)
        if piece is None:
            return None
        received += piece


def not_on_windows(reason):
    """Skip a test on Windows, which does or lacks something."""
    return pytest.mark.skipif(os.name == "nt", reason=f"Windows {reason}")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
ignores_fork_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Answer(NamedTuple):
    """A response, and what the application wrote to wsgi.errors."""

    status: int
    headers: dict
    body: bytes
    errors: str = ""

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


def call(application, method="GET", path="/users/", body=b"", fields=None, **environ):
    """Call a WSGI application as a server would. `fields` become a JSON body. Return
    the Answer."""
    started, errors = [], environ.pop("wsgi.errors", io.StringIO())
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "wsgi.errors": errors,
        **environ,
    }
    if fields is not None:
        body = json.dumps(fields).encode()
    if body:
        environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), **environ}
    environ.setdefault("wsgi.input", io.BytesIO(body))
    setup_testing_defaults(environ)
    result = application(
        environ, lambda status, headers, exc_info=None: started.append((status, headers))
    )
    try:
        content = b"".join(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    [(status, headers)] = started
    return Answer(int(status[:3]), dict(headers), content, errors.getvalue())


def post(application, body=BODY, **environ):
    """Call a WSGI application with POST /users/ and a body."""
    return call(application, "POST", body=body, **environ)


def follow(client, url):
    """Return the ids on each page, following the links."""
    pages = []
    while url:
        answer = client.get(url, status=200)
        pages.append([user["id"] for user in answer.json])
        link = answer.headers.get("Link")
        assert link is None or re.fullmatch('<[^>]*>; rel="next"', link)
        url = link and link[1 : link.index(">")]
    return pages


def start(application, path="/users/", **environ):
    """Call a WSGI application with GET, and return the parts of its body to be read one by one."""
    environ = {"PATH_INFO": path, **environ}
    setup_testing_defaults(environ)
    return iter(application(environ, lambda status, headers: None))


def execute(path, statement, parameters=()):
    """Execute a statement in another connection and return its rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def fill(path, count):
    """Create an SQLite file in WAL mode with users 1 to count, without hashing."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript((HERE / "schema.sql").read_text("utf-8"))
        connection.executemany(
            'INSERT INTO "user" (first_name, last_name, email, password) VALUES (?, ?, ?, ?)',
            ((f"First{i}", f"Last{i}", f"user{i}@example.com", "x") for i in range(1, count + 1)),
        )


@contextlib.contextmanager
def locked(path, lock="BEGIN IMMEDIATE"):
    """Hold a lock of an SQLite file in another connection."""
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    ) as connection:
        connection.execute(lock)
        yield connection
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def in_a_fork(function):
    """Run a function in a child process. Return True if it returned something true."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def post_at_once(count, create_app, database):
    """Create a user in each of many child processes at the same moment. Return their
    exit statuses."""
    reader, writer = os.pipe()
    children = []
    for child in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                application, fields = (
                    create_app(database, iterations=1),
                    {**HARRY, "email": f"{child}@example.com"},
                )
                os.close(writer)
                os.read(reader, 1)  # ends when the parent closes its end
                os._exit(call(application, "POST", fields=fields).status != 201)
            finally:
                os._exit(2)
        children.append(pid)
    os.close(reader)
    os.close(writer)
    return [os.waitpid(pid, 0)[1] for pid in children]


def run_program(program, folder, **environ):
    """Run a Python program that may import profiler. Return the completed process."""
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(profiler.__file__), **environ}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def copy_module(folder, *more):
    """Copy the two files that are needed, and more from the repository, into a folder."""
    for name in ("profiler.py", "schema.sql", *more):
        shutil.copy(HERE / name, folder)


def until(condition):
    """Wait until a condition holds, where no event reports it. Return its value."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Hide the settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("PROFILER_") or name == "PORT":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch):
    """Let a server notice deadlines, and that it was stopped, ten times as fast as usual."""
    monkeypatch.setattr(profiler, "CHECK_INTERVAL", profiler.CHECK_INTERVAL / 10)


@pytest.fixture
def path(tmp_path):
    """The SQLite file, which does not exist yet."""
    return tmp_path / "db.sqlite3"


@pytest.fixture
def application(path):
    """An application on an empty database. The tests of other storages replace this fixture."""
    with contextlib.closing(profiler.create_app(path, iterations=ITERATIONS)) as application:
        yield application


@pytest.fixture
def accounts(application):
    return application.accounts


@pytest.fixture
def users(application):
    return application.users


@pytest.fixture
def client(application):
    """webtest's client; webtest's lint and wsgiref's validator check each request and response."""
    return webtest.TestApp(validator(application), lint=True)


@pytest.fixture
def guarded(accounts):
    """An application on the same users that requires TOKEN."""
    return profiler.Application(accounts, token=TOKEN)


@pytest.fixture
def advance(monkeypatch):
    """A function that advances time.monotonic by some seconds."""
    clock, offset = time.monotonic, [0.0]
    monkeypatch.setattr(profiler.time, "monotonic", lambda: clock() + sum(offset))
    return offset.append


@pytest.fixture
def short_timeouts(monkeypatch):
    """Give up on locks immediately."""
    for name in ("BUSY_TIMEOUT", "WAL_TIMEOUT"):
        monkeypatch.setattr(profiler, name, 0.01)


class SlowHash:
    """Replaces hash_password: releases `started` when it is called, and returns when
    `go_on` is set."""

    def __init__(self):
        self.started, self.go_on = threading.Semaphore(0), threading.Event()

    def __call__(self, password, iterations):
        self.started.release()
        assert self.go_on.wait(10)
        return "hash"


@pytest.fixture
def slow_hash(monkeypatch):
    slow_hash = SlowHash()
    monkeypatch.setattr(profiler, "hash_password", slow_hash)
    yield slow_hash
    slow_hash.go_on.set()
