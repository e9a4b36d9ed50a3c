"""Tests of profiler, in the order of its sections. A name is a claim; a docstring says why, if it must."""

from __future__ import annotations

import ast
import base64
import contextlib
import getpass
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest

import profiler

HERE = pathlib.Path(__file__).parent
HARRY = {"first_name": "Harry", "last_name": "Potter", "email": "harry@example.com", "password": "1234"}
RON = {"first_name": "Ron", "last_name": "Weasley", "email": "ron@example.com", "password": "abcd"}
BODY = json.dumps(HARRY).encode()
TOKEN = "0123456789abcdef"
ITERATIONS = 2  # of PBKDF2: the tests are about other things than its cost

# The table that the tutorial's own schema.sql makes.
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

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
ignores_fork_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


# -- helpers -------------------------------------------------------------------


class Answer(NamedTuple):
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
    """Call a WSGI application as a server would; the answer has what it wrote to wsgi.errors, too."""
    started = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.errors": io.StringIO(), **environ}
    if fields is not None:
        body = json.dumps(fields).encode()
    if body:
        environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), **environ}
    environ.setdefault("wsgi.input", io.BytesIO(body))
    setup_testing_defaults(environ)
    result = application(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
    content = b"".join(result)
    if hasattr(result, "close"):
        result.close()
    [(status, headers)] = started
    return Answer(int(status[:3]), dict(headers), content, environ["wsgi.errors"].getvalue())


def post(application, body=BODY, **environ):
    return call(application, "POST", body=body, **environ)


def execute(path, statement, parameters=()):
    """Run one statement from outside and return its rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def fill(path, count):
    """Make users with the ids 1..count, from outside, in WAL mode as the service does."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript((HERE / "schema.sql").read_text("utf-8"))
        connection.executemany(
            'INSERT INTO "user" (first_name, last_name, email, password) VALUES (?, ?, ?, ?)',
            ((f"First{i}", f"Last{i}", f"user{i}@example.com", "x") for i in range(1, count + 1)),
        )


@contextlib.contextmanager
def locked(path, lock="BEGIN IMMEDIATE"):
    """Hold a lock of a database, from outside."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(lock)
        yield connection
        connection.execute("ROLLBACK")


def in_a_fork(function):
    """Run the function in a child process; tell whether it returned something true."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def run_program(program, folder, **environ):
    """Run a Python program that may import profiler."""
    environ = {**os.environ, "PYTHONPATH": str(HERE), **environ}
    return subprocess.run([sys.executable, "-c", program], env=environ, cwd=folder, capture_output=True, text=True)


def until(condition):
    """Wait for what no event tells."""
    deadline = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


@pytest.fixture
def path(tmp_path):
    return tmp_path / "db.sqlite3"


@pytest.fixture
def tutorial_path(path):
    """A file that the tutorial's service made."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(TUTORIAL_SCHEMA)
    return path


@pytest.fixture
def application(path):
    """The application that the claims are about. Another storage may take its place: its tests define this anew."""
    with contextlib.closing(profiler.create_app(path, iterations=ITERATIONS)) as application:
        yield application


@pytest.fixture
def users(application):
    return application.users


@pytest.fixture
def database(users):
    """What is below the storage, where that is SQLite's."""
    return users._database


@pytest.fixture
def client(application):
    """Calls the application, with webtest's lint and wsgiref's validator both looking on."""
    return webtest.TestApp(validator(application), lint=True)


@pytest.fixture
def impatient(monkeypatch):
    """Whoever waits for a lock gives up at once."""
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.01)


class SlowHash:
    """Takes the place of hash_password: tells when it is called, and returns when it is let go."""

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


# -- passwords -----------------------------------------------------------------


def test_pbkdf2_known_answer():
    """RFC 7914 11, of which a Werkzeug hash keeps the first 32 bytes."""
    digest = "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
    assert profiler.verify_password(f"pbkdf2:sha256:1$salt${digest}", "passwd")


def test_scrypt_known_answer():
    """RFC 7914 12."""
    digest = (
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
    )
    assert profiler.verify_password(f"scrypt:16384:8:1$SodiumChloride${digest}", "pleaseletmein")


def test_a_hash_describes_itself():
    method, salt, digest = profiler.hash_password("1234", 3).split("$")
    assert method == "pbkdf2:sha256:3"
    assert len(salt) >= 16
    assert len(digest) == 64


def test_the_default_cost_is_the_one_that_owasp_asks_for():
    assert profiler.hash_password("1234").startswith("pbkdf2:sha256:600000$")


def test_two_hashes_of_one_password_differ():
    assert profiler.hash_password("1234", 1) != profiler.hash_password("1234", 1)


def test_only_the_password_verifies():
    password_hash = profiler.hash_password("pässwörd", 1)
    assert profiler.verify_password(password_hash, "pässwörd")
    assert not profiler.verify_password(password_hash, "Pässwörd")
    assert not profiler.verify_password(password_hash, "")


def test_nul_neither_hashes_nor_verifies():
    """HMAC pads with NUL: without the check "a" would open the account of "a\\0"."""
    with pytest.raises(ValueError, match="NUL"):
        profiler.hash_password("a\0", 1)
    assert not profiler.verify_password(profiler.hash_password("a", 1), "a\0")


@pytest.mark.parametrize("iterations", [0, -1, 10**12])
def test_impossible_iterations_are_refused(iterations):
    with pytest.raises(ValueError, match="iterations"):
        profiler.hash_password("1234", iterations)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "password_hash",
    [
        "",
        "1234",
        "$$",
        "$$$",
        f"pbkdf2:sha256:1$salt${DIGEST}$",
        f"pbkdf2:sha256:0$salt${DIGEST}",
        f"pbkdf2:sha256:-1$salt${DIGEST}",
        f"pbkdf2:sha256:\u0661$salt${DIGEST}",
        f"pbkdf2:sha256$salt${DIGEST}",
        f"pbkdf2:md5:1$salt${DIGEST}",
        f"pbkdf2:sha256:1\n$salt${DIGEST}",
        "pbkdf2:sha256:1$salt$",
        "pbkdf2:sha256:1$salt$zz",
        "pbkdf2:sha256:1$salt$\u00e9",
        f"pbkdf2:sha256:1$\ud800${DIGEST}",
        f"pbkdf2:sha256:{10**12}$salt${DIGEST}",
        f"pbkdf2:sha256:{'9' * 5000}$salt${DIGEST}",
        f"scrypt:3:8:1$salt${DIGEST}",
        f"scrypt:{2**30}:8:1$salt${DIGEST}",
        f"scrypt:2:1:{2**30}$salt${DIGEST}",
        f"scrypt:32768:8$salt${DIGEST}",
        f"scrypt:0:0:0$salt${DIGEST}",
        f"plain$salt${DIGEST}",
        None,
    ],
)
def test_a_malformed_or_absurd_hash_is_nobodys(password_hash):
    assert profiler.verify_password(password_hash, "1234") is False


def test_a_password_that_is_no_unicode_is_nobodys():
    assert profiler.verify_password(profiler.hash_password("1234", 1), "\ud800") is False


@pytest.mark.parametrize(
    ("password_hash", "weak"),
    [
        ("pbkdf2:sha256:9$salt$00", True),
        ("pbkdf2:sha256:10$salt$00", False),
        ("scrypt:32768:8:1$salt$00", False),
        ("nonsense", False),
    ],
)
def test_a_hash_of_fewer_iterations_is_weak(password_hash, weak):
    assert profiler.is_weak(password_hash, 10) is weak


# -- database ------------------------------------------------------------------


def test_importing_opens_and_reads_nothing(tmp_path):
    program = (
        "import sys; opened = []\n"
        "watched = ('open', 'sqlite3.connect')\n"
        "sys.addaudithook(lambda event, args: opened.append(args[0]) if event in watched else None)\n"
        "import profiler\n"
        "print([name for name in opened if str(name).endswith(('sqlite3', '.sql'))])"
    )
    output = run_program(program, tmp_path, PROFILER_DATABASE="/no/such/folder/db.sqlite3")
    assert (output.stdout.strip(), output.stderr) == ("[]", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("database", [":memory:", ""])
def test_a_database_in_memory_is_refused(database):
    with pytest.raises(ValueError, match="must be a file"):
        profiler.create_app(database)


def test_a_new_file_is_its_owners_alone(client, path):
    client.post_json("/users/", HARRY, status=201)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_new_file_behind_a_link_is_its_owners_alone_too(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "db.sqlite3")
    with contextlib.closing(profiler.create_app(tmp_path / "link", iterations=1)) as application:
        assert post(application).status == 201
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "elsewhere").iterdir()} == {0o600}


def test_the_file_is_in_wal_mode_and_commits_are_synced(application, database, path):
    assert application.users.count() == 0
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    assert database.read("PRAGMA synchronous", {}) == [(2,)]


def test_a_relative_path_is_settled_when_the_application_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(profiler.create_app("db.sqlite3")) as application:
        monkeypatch.chdir("/")
        assert call(application).status == 200
    assert (tmp_path / "db.sqlite3").exists()


def test_two_connections_serve_all_threads(application, database, monkeypatch):
    connects = []
    connect = database._connect
    monkeypatch.setattr(database, "_connect", lambda *how, **options: connects.append(1) or connect(*how, **options))
    with ThreadPoolExecutor(8) as threads:
        assert {answer.status for answer in threads.map(lambda _: call(application), range(40))} == {200}
        deletes = threads.map(lambda _: call(application, "DELETE", "/users/1/"), range(40))
        assert {answer.status for answer in deletes} == {204}
    assert len(connects) == 2


class Broken:
    """A connection that can neither commit nor roll back, as on a disk that failed."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, statement, *parameters):
        if statement in ("COMMIT", "ROLLBACK"):
            raise sqlite3.OperationalError("disk I/O error")
        return self._connection.execute(statement, *parameters)


def test_a_transaction_that_can_neither_commit_nor_roll_back_is_not_the_next_ones(application, database):
    connection = database._connect(to_write=True)
    database._writer.connection = Broken(connection)
    assert post(application).status == 503
    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute("SELECT 1")
    assert application.users.count() == 0
    assert post(application).status == 201


def test_a_failed_transaction_leaves_nothing_and_its_connection_is_as_new(application, database):
    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO \"user\" (first_name, last_name, email, password) VALUES ('a', 'b', 'c', 'd')")
        raise ZeroDivisionError
    assert not connection.in_transaction
    assert application.users.count() == 0


@needs_fork
@ignores_fork_warning
def test_a_connection_from_before_a_fork_is_set_aside(application, database):
    application.users.create("Harry", "Potter", "harry@example.com", "1234")
    inherited = [database._reader, database._writer]

    def child():
        created = post(application, json.dumps(RON).encode()).status == 201
        own = [database._reader, database._writer]
        apart = not {id(seat.connection) for seat in own} & {id(seat.connection) for seat in inherited}
        application.close()
        return apart and created and all(seat.connection.execute("SELECT 1").fetchall() for seat in inherited)

    assert in_a_fork(child)
    assert application.users.count() == 2


@needs_fork
@ignores_fork_warning
def test_a_fork_in_the_middle_of_a_transaction_leaves_the_child_free(application, database):
    """Nobody would release the parent's locks there."""
    assert application.users.count() == 0
    with database.transaction(), database._reader.lock:
        assert in_a_fork(lambda: call(application).status == 200)


@needs_fork
@ignores_fork_warning
def test_a_fork_while_another_thread_opens_the_file_waits_for_it(application):
    """The child could not release that lock, and would never open the file."""
    opening = profiler._creating
    opening.acquire()
    releasing = threading.Timer(0.05, opening.release)
    releasing.start()
    assert in_a_fork(lambda: call(application).status == 200)
    releasing.join()


@needs_fork
@ignores_fork_warning
def test_a_fork_while_others_hash_leaves_the_child_its_cores(application, slow_hash, monkeypatch):
    monkeypatch.setattr(profiler, "HASH_TIMEOUT", 0.05)
    application.users._cores = threading.BoundedSemaphore(1)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, application)
        assert slow_hash.started.acquire(timeout=10)

        def child():
            monkeypatch.setattr(profiler, "hash_password", lambda *_: "hash")
            return post(application, json.dumps(RON).encode()).status == 201

        assert in_a_fork(child)
        slow_hash.go_on.set()
        assert answer.result().status == 201


@needs_fork
@ignores_fork_warning
def test_twelve_processes_may_start_at_once_on_no_file(tmp_path):
    for number in range(3):
        path = tmp_path / f"{number}.sqlite3"
        start_reader, start_writer = os.pipe()
        children = []
        for child in range(12):
            pid = os.fork()
            if pid == 0:
                try:
                    application = profiler.create_app(path, iterations=1)
                    user = {**HARRY, "email": f"{child}@example.com"}
                    os.close(start_writer)
                    os.read(start_reader, 1)  # ends when the parent closes its end: all at once
                    os._exit(call(application, "POST", fields=user).status != 201)
                finally:
                    os._exit(2)
            children.append(pid)
        os.close(start_reader)
        os.close(start_writer)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 12
        assert execute(path, 'SELECT count(*) FROM "user"') == [(12,)]


def test_a_locked_database_is_503_and_the_reason_is_logged_in_a_line(application, path, impatient):
    fill(path, 1)
    with locked(path):
        answer = call(application, "DELETE", "/users/1/")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json == {"error": "The service is busy: try again"}
    assert answer.errors.count("\n") == 1
    assert "database is locked" in answer.errors
    assert execute(path, 'SELECT count(*) FROM "user"') == [(1,)]


def test_a_writer_that_waits_too_long_for_another_thread_is_503(application, database, impatient):
    with database.transaction():
        answer = call(application, "DELETE", "/users/1/")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.errors.count("\n") == 1


def test_a_writer_asks_again_at_once_when_another_process_lets_go(application, database, path, monkeypatch):
    """SQLite's own pauses grow to a tenth of a second."""
    pauses = []
    assert call(application, "DELETE", "/users/1/").status == 204
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(path))
        monkeypatch.setattr(profiler.time, "sleep", lambda seconds: pauses.append(seconds) or stack.close())
        assert call(application, "DELETE", "/users/1/").status == 204
    assert pauses == [profiler.RETRY_INTERVAL]


@pytest.mark.parametrize("is_tutorials", [True, False])
def test_reads_go_on_while_a_writer_holds_the_lock(application, path, is_tutorials):
    """Also the first of a process, and in a file that the lock keeps from being turned to WAL mode."""
    if is_tutorials:
        execute(path, TUTORIAL_SCHEMA)
    else:
        fill(path, 0)
    with locked(path):
        assert call(application).json == []


def test_reads_go_on_where_nothing_can_be_made(application, path):
    """In WAL mode SQLite needs a file beside the database; a folder of its name keeps even root from making it."""
    fill(path, 2)
    os.mkdir(f"{path}-shm")
    assert len(call(application).json) == 2
    assert call(application, "GET", "/users/2/").status == 200
    answer = call(application, "DELETE", "/users/2/")
    assert (answer.status, answer.errors.count("\n")) == (503, 1)


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_a_file_with_a_log_or_a_journal_is_not_read_alone(tmp_path, suffix, is_linked):
    """That would be to pass over what was committed, or to see what was not."""
    real = path = tmp_path / "db.sqlite3"
    if is_linked:
        (tmp_path / "elsewhere").mkdir()
        real = tmp_path / "elsewhere" / "db.sqlite3"
        path.symlink_to(real)
    fill(real, 1)
    database = profiler.Database(str(path), lambda _: None)
    error = sqlite3.OperationalError("unable to open database file")
    error.sqlite_errorcode = profiler._CANTOPEN
    assert database._read_alone("SELECT 1", {}, error) == [(1,)]
    (real.parent / (real.name + suffix)).write_bytes(b"a page of somebody's account")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        database._read_alone("SELECT 1", {}, error)


def test_a_database_locked_at_first_use_is_503_for_each_reader_in_time(tutorial_path, application, monkeypatch):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.1)
    with locked(tutorial_path, "BEGIN EXCLUSIVE"), ThreadPoolExecutor(8) as threads:
        started = time.monotonic()
        assert {answer.status for answer in threads.map(lambda _: call(application), range(8))} == {503}
        assert time.monotonic() - started < 5


def test_what_keeps_the_table_from_being_made_is_what_is_told(application, path, impatient):
    execute(path, "CREATE TABLE other (a)")
    with locked(path):
        answer = call(application)
    assert (answer.status, "database is locked" in answer.errors) == (503, True)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("database is locked", profiler.Busy),
        ("database or disk is full", profiler.Unavailable),
        ("disk I/O error", profiler.Unavailable),
        ("attempt to write a readonly database", profiler.Unavailable),
        ("no such column: age", sqlite3.OperationalError),
    ],
)
def test_a_python_that_tells_no_result_code_tells_sqlites_words(database, words, error):
    """Before 3.11. sqlite3 sets the code on what it raises itself, and not on this one."""
    assert type(database._translate(sqlite3.OperationalError(words))) is error


@needs_fork
@ignores_fork_warning
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become nobody")
def test_a_place_that_may_only_be_read_is_served(tmp_path, monkeypatch):
    schema = profiler.read_file("schema.sql")
    monkeypatch.setattr(profiler, "read_file", lambda name: schema)  # the checkout may be root's alone
    path = tmp_path / "db.sqlite3"
    fill(path, 1)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    for parent in (tmp_path.parent, tmp_path.parent.parent):  # pytest keeps them to its user
        parent.chmod(0o755)

    def child():
        os.setuid(65534)
        application = profiler.create_app(path, iterations=1)
        written = post(application)
        return call(application).status == 200 and (written.status, written.errors.count("\n")) == (503, 1)

    assert in_a_fork(child)


def test_a_file_that_was_moved_is_503_until_it_is_back(application, path, tmp_path, monkeypatch):
    """A new one in its place would be empty."""
    monkeypatch.setattr(profiler, "MOVED_INTERVAL", 0)
    assert post(application).status == 201
    path.rename(tmp_path / "moved")
    for method in ("GET", "DELETE"):
        answer = call(application, method, "/users/1/")
        assert (answer.status, answer.errors.count("\n")) == (503, 1)
        assert "put it back" in answer.errors
    application.close()
    assert call(application).status == 503
    assert not path.exists()
    (tmp_path / "moved").rename(path)
    assert len(call(application).json) == 1


def test_another_file_in_its_place_is_503_too(application, path, tmp_path, monkeypatch):
    """The log beside it belongs to the first one."""
    monkeypatch.setattr(profiler, "MOVED_INTERVAL", 0)
    assert post(application).status == 201
    path.rename(tmp_path / "moved")
    fill(path, 3)
    assert call(application).status == 503


@needs_fork
@ignores_fork_warning
def test_a_child_of_who_had_the_file_never_makes_it_anew(application, path, tmp_path):
    assert post(application).status == 201
    application.close()
    path.rename(tmp_path / "moved")
    assert in_a_fork(lambda: call(application).status == 503)
    assert not path.exists()


def test_what_is_no_database_is_500_and_stays_as_it_is(application, path):
    path.write_bytes(b"The diary of a famous wizard. " * 100)
    answer = call(application)
    assert (answer.status, answer.json) == (500, {"error": "Internal server error"})
    assert "file is not a database" in answer.errors
    assert path.read_bytes() == b"The diary of a famous wizard. " * 100
    assert os.listdir(path.parent) == [path.name]


def test_a_few_bytes_are_no_database_either(application, path):
    path.write_bytes(b"h")
    assert call(application).status == 500
    assert path.read_bytes() == b"h"


def test_no_such_folder_is_503(tmp_path):
    answer = call(profiler.create_app(tmp_path / "missing" / "db.sqlite3"))
    assert (answer.status, list(answer.json)) == (503, ["error"])
    assert f"make the folder {tmp_path / 'missing'}" in answer.errors


def test_a_file_in_place_of_the_folder_is_503(path):
    path.touch()
    assert call(profiler.create_app(path / "db.sqlite3")).status == 503


def test_a_table_of_another_shape_is_500(application, path):
    execute(path, 'CREATE TABLE "user" (name TEXT)')
    answer = call(application)
    assert (answer.status, answer.json) == (500, {"error": "Internal server error"})
    assert "no such column" in answer.errors


def test_the_schema_is_the_tutorials_table_column_for_column(path):
    fill(path, 0)
    with contextlib.closing(sqlite3.connect(":memory:")) as tutorial:
        tutorial.executescript(TUTORIAL_SCHEMA)
        columns = tutorial.execute("PRAGMA table_info(user)").fetchall()
    assert execute(path, 'PRAGMA table_info("user")') == columns


def test_existing_table_is_used_without_reading_schema_sql(client, path, monkeypatch):
    client.post_json("/users/", HARRY)
    monkeypatch.setattr(profiler, "read_file", lambda name: b'DROP TABLE IF EXISTS "user"; CREATE TABLE "user" (id)')
    with contextlib.closing(profiler.create_app(path, iterations=1)) as application:
        assert json.loads(call(application).body)[0]["email"] == HARRY["email"]


def test_concurrent_first_requests_use_one_application(monkeypatch, path):
    made, together = [], threading.Barrier(8)

    def create():
        together.wait(10)
        made.append(profiler.Application(profiler.SQLiteUsers(path, 1, 1), None))
        return made[-1]

    monkeypatch.setattr(profiler, "_default", {})
    monkeypatch.setattr(profiler, "create_app", create)
    with ThreadPoolExecutor(8) as pool:
        used = list(pool.map(lambda _: profiler._default_app(), range(8)))
    assert len(made) == 8
    assert len(set(map(id, used))) == 1


def test_the_schema_is_found_in_a_zip_archive(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(HERE / "profiler.py", "profiler.py")
        archive.write(HERE / "schema.sql", "schema.sql")
    program = "import profiler; print(profiler.__file__, profiler.create_app('x.sqlite3').users.count())"
    output = run_program(program, tmp_path, PYTHONPATH=str(tmp_path / "app.zip"))
    assert output.stdout.split() == [str(tmp_path / "app.zip" / "profiler.py"), "0"], output.stderr


def test_the_schema_is_found_without_a_module_spec(path):
    """As mod_wsgi loads a script."""
    namespace = {"__file__": str(HERE / "profiler.py"), "__name__": "_mod_wsgi_"}
    exec(compile((HERE / "profiler.py").read_text("utf-8"), "profiler.py", "exec"), namespace)
    with contextlib.closing(namespace["create_app"](path)) as application:
        assert call(application).status == 200


def test_the_schema_of_a_wheel_goes_before_one_that_another_package_left_beside_the_module(tmp_path):
    shutil.copy(HERE / "profiler.py", tmp_path)
    (tmp_path / "profiler_users").mkdir()
    shutil.copy(HERE / "schema.sql", tmp_path / "profiler_users")
    (tmp_path / "schema.sql").write_text("DROP TABLE IF EXISTS user;")
    program = "import profiler; print(profiler.create_app('x.sqlite3').users.count())"
    assert run_program(program, tmp_path, PYTHONPATH=str(tmp_path)).stdout == "0\n"


def integrity(path):
    return execute(path, "PRAGMA integrity_check")


def test_a_copy_has_every_user_and_is_its_owners_alone(application, users, path, tmp_path):
    assert post(application).status == 201
    told = []
    users.backup(str(tmp_path / "copy"), lambda left, total: told.append((left, total)))
    assert told[-1][0] == 0
    assert told[-1][1] > 0
    assert integrity(tmp_path / "copy") == [("ok",)]
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir() if "copy" in file.name) == ["copy"]
    with contextlib.closing(profiler.create_app(tmp_path / "copy")) as copy:
        assert call(copy, "GET", "/users/1/").body == call(application, "GET", "/users/1/").body


def test_a_copy_never_goes_over_a_file_that_is_there(users, tmp_path, monkeypatch):
    assert users.count() == 0
    (tmp_path / "copy").write_text("mine")
    with pytest.raises(FileExistsError):
        users.backup(str(tmp_path / "copy"), lambda *_: None)
    with pytest.raises(FileExistsError):  # one that comes while the copy is made
        users.backup(str(tmp_path / "late"), lambda *_: (tmp_path / "late").write_text("mine"))
    assert {name: (tmp_path / name).read_text() for name in ("copy", "late")} == {"copy": "mine", "late": "mine"}
    assert not list(tmp_path.glob("*.part"))


def test_a_copy_that_fails_leaves_nothing(users, tmp_path):
    assert users.count() == 0
    with pytest.raises(ZeroDivisionError):
        users.backup(str(tmp_path / "copy"), lambda *_: 1 / 0)
    assert [file.name for file in tmp_path.iterdir() if "copy" in file.name] == []


def test_a_copy_beside_four_writers_is_whole_and_has_what_was_acknowledged_before(
    application, users, tmp_path, monkeypatch
):
    """And comes to its end: pages that change meanwhile do not make it begin again."""
    monkeypatch.setattr(profiler, "BACKUP_PAGES", 1)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: "hash" * 200)
    stop = threading.Event()

    def write(client):
        count = 0
        while not stop.is_set():
            count += 1
            assert call(application, "POST", fields={**HARRY, "email": f"{client}.{count}@b.c"}).status == 201

    with ThreadPoolExecutor(4) as threads:
        writers = [threads.submit(write, client) for client in range(4)]
        until(lambda: users.count() > 100)
        before = users.count()
        users.backup(str(tmp_path / "copy"), lambda *_: None)
        stop.set()
        for writer in writers:
            writer.result()
    assert integrity(tmp_path / "copy") == [("ok",)]
    [(count,)] = execute(tmp_path / "copy", 'SELECT max(id) FROM "user"')
    assert before <= count <= users.count()


# -- users ---------------------------------------------------------------------


def test_create_stores_the_fields_and_a_hash(client, users):
    fields = {**HARRY, "id": 7, "admin": True, "created_on": "1980-07-31"}
    assert client.post_json("/users/", fields, status=201).json == {"id": 1}
    user = client.get("/users/1/").json
    assert (user["id"], user["first_name"], user["last_name"], user["email"]) == (1, "Harry", "Potter", HARRY["email"])
    assert re.fullmatch("20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}", user["created_on"])
    assert profiler.verify_password(users.get_password(1), "1234")


def test_ids_are_never_used_again(client):
    for id_ in (1, 2, 3):
        assert client.post_json("/users/", HARRY, status=201).json == {"id": id_}
        client.delete(f"/users/{id_}/", status=204)


@pytest.mark.parametrize("email", ["harry@example.com", "HARRY@Example.COM"])
def test_an_email_is_taken_in_whatever_case(client, users, email):
    client.post_json("/users/", HARRY, status=201)
    answer = client.post_json("/users/", {**RON, "email": email}, status=400)
    assert answer.json == {"error": "This email is already registered"}
    assert users.count() == 1


@pytest.mark.parametrize(("email", "other"), [("é@x.y", "É@x.y"), ("ß@x.y", "ss@x.y"), ("İ@x.y", "i@x.y")])
def test_letters_outside_ascii_are_compared_as_they_are(client, email, other):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    client.post_json("/users/", {**HARRY, "email": other}, status=201)
    client.post_json("/users/", {**HARRY, "email": email.replace("x", "X")}, status=400)
    assert client.get("/users/1/").json["email"] == email


def test_an_email_is_told_as_it_was_given(client):
    client.post_json("/users/", {**HARRY, "email": "Harry@Example.com"}, status=201)
    assert client.get("/users/1/").json["email"] == "Harry@Example.com"


def test_a_taken_email_is_refused_before_the_password_is_hashed(client, monkeypatch):
    client.post_json("/users/", HARRY, status=201)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: pytest.fail("hashed"))
    client.post_json("/users/", HARRY, status=400)


def test_an_email_taken_during_the_hashing_is_refused_as_well(application, users, monkeypatch):
    """The first look is for speed; the statement itself decides."""
    insert = users.insert
    monkeypatch.setattr(profiler, "hash_password", lambda *_: insert("R", "W", HARRY["email"].upper(), "x") and "hash")
    answer = post(application)
    assert (answer.status, answer.json) == (400, {"error": "This email is already registered"})
    assert users.count() == 1


def test_eight_threads_fight_for_25_emails_and_each_has_one_winner(application):
    def create(number):
        answer = call(application, "POST", fields={**HARRY, "email": f"{number % 25}@example.com"})
        return answer.status, answer.json.get("error")

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(create, range(200)))
    assert answers.count((201, None)) == 25
    assert answers.count((400, "This email is already registered")) == 175


@pytest.mark.parametrize("path_info", ["/users/", "/users/verify/"])
def test_no_more_hashes_run_at_once_than_cores(application, users, slow_hash, monkeypatch, path_info):
    """The third thread waits for a core while two hash; too long a wait is told."""
    monkeypatch.setattr(profiler, "HASH_TIMEOUT", 0.05)
    users._cores = threading.BoundedSemaphore(2)

    def create(number):
        return call(application, "POST", path_info, fields={**HARRY, "email": f"{number}@example.com"})

    with ThreadPoolExecutor(2) as threads:
        two = [threads.submit(call, application, "POST", fields={**HARRY, "email": f"{n}@b.c"}) for n in (1, 2)]
        assert slow_hash.started.acquire(timeout=10)
        assert slow_hash.started.acquire(timeout=10)
        answer = create(3)
        slow_hash.go_on.set()
        assert [answer.result().status for answer in two] == [201, 201]
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.errors.count("\n") == 1


def test_the_list_is_every_user_in_the_order_of_ids(client, users):
    assert client.get("/users/").json == []
    for number in (1, 2, 3, 4):
        users.insert("F", "L", f"{number}@b.c", "x")
    users.delete(2)
    listed = client.get("/users/").json
    assert [user["id"] for user in listed] == [1, 3, 4]
    assert all(list(user) == ["id", "first_name", "last_name", "email", "created_on"] for user in listed)


def test_get_is_exactly_the_public_columns(client):
    client.post_json("/users/", HARRY)
    answer = client.get("/users/1/")
    assert list(answer.json) == ["id", "first_name", "last_name", "email", "created_on"]
    assert {**answer.json, "created_on": None} == {
        "id": 1, "first_name": "Harry", "last_name": "Potter", "email": "harry@example.com", "created_on": None
    }  # fmt: skip
    assert "pbkdf2" not in answer.text


def test_names_may_hold_any_letters(client):
    name = "Złośnica \"\\/' 🐍 \u2028"
    client.post_json("/users/", {**HARRY, "first_name": name})
    assert client.get("/users/1/").json["first_name"] == name
    assert client.get("/users/").json[0]["first_name"] == name


def test_update_changes_names_and_email_and_nothing_else(client, users):
    client.post_json("/users/", HARRY)
    password_hash, created_on = users.get_password(1), client.get("/users/1/").json["created_on"]
    assert client.put_json("/users/1/", {**RON, "password": ["ignored"]}, status=200).json == {"id": 1}
    assert client.get("/users/1/").json == {
        "id": 1, "first_name": "Ron", "last_name": "Weasley", "email": "ron@example.com", "created_on": created_on
    }  # fmt: skip
    assert users.get_password(1) == password_hash


def test_update_may_keep_the_email_or_change_its_case(client):
    client.post_json("/users/", HARRY)
    client.put_json("/users/1/", {**HARRY, "first_name": "H."}, status=200)
    client.put_json("/users/1/", {**HARRY, "email": "Harry@Example.com"}, status=200)
    assert client.get("/users/1/").json["email"] == "Harry@Example.com"


def test_update_to_anothers_email_is_400(client):
    client.post_json("/users/", HARRY)
    client.post_json("/users/", RON)
    answer = client.put_json("/users/2/", {**RON, "email": "HARRY@example.com"}, status=400)
    assert answer.json == {"error": "This email is already registered"}
    assert client.get("/users/2/").json["email"] == "ron@example.com"


@pytest.mark.parametrize("fields", [HARRY, RON])
def test_update_of_nobody_is_404_whatever_the_email(client, fields):
    client.post_json("/users/", HARRY)
    assert client.put_json("/users/2/", fields, status=404).json == {"error": "Invalid user id"}


def test_delete_is_204_whether_there_was_a_user_or_not(client, users):
    client.post_json("/users/", HARRY)
    for _ in range(2):
        assert client.delete("/users/1/", status=204).body == b""
    assert users.count() == 0


def test_verify_tells_whose_email_and_password_these_are(client):
    client.post_json("/users/", HARRY)
    assert client.post_json("/users/verify/", {"email": "HARRY@example.com", "password": "1234"}).json == {"id": 1}


@pytest.mark.parametrize("fields", [{**HARRY, "password": "12345"}, RON])
def test_a_wrong_password_and_an_unknown_email_are_the_same_403(client, fields):
    client.post_json("/users/", HARRY)
    assert client.post_json("/users/verify/", fields, status=403).json == {"error": "Wrong email or password"}


def test_an_unknown_email_costs_the_same_hash(application, users, monkeypatch):
    hashed = []
    digest = profiler.hashlib.pbkdf2_hmac
    monkeypatch.setattr(profiler.hashlib, "pbkdf2_hmac", lambda *cost: hashed.append(cost) or digest(*cost))
    assert post(application).status == 201
    hashed.clear()
    for fields in (HARRY, {**HARRY, "password": "x"}, {**RON}):
        call(application, "POST", "/users/verify/", fields=fields)
    assert len(hashed) == 3
    assert {(name, len(salt), iterations) for name, _, salt, iterations in hashed} == {("sha256", 32, ITERATIONS)}


def test_nobodys_password_verifies_nobody(application, users, monkeypatch):
    monkeypatch.setattr(profiler, "verify_password", lambda *_: True)
    assert call(application, "POST", "/users/verify/", fields=RON).status == 403


def test_a_weak_hash_is_made_anew_when_its_password_is_right(client, users):
    users.insert("H", "P", "harry@example.com", profiler.hash_password("1234", 1))
    client.post_json("/users/verify/", {**HARRY, "password": "x"}, status=403)
    assert users.get_password(1).startswith("pbkdf2:sha256:1$")
    client.post_json("/users/verify/", HARRY, status=200)
    assert users.get_password(1).startswith(f"pbkdf2:sha256:{ITERATIONS}$")
    client.post_json("/users/verify/", HARRY, status=200)


def test_a_hash_of_scrypt_stays(client, users):
    """RFC 7914 12."""
    digest = (
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
    )
    users.insert("H", "P", "harry@example.com", stored := f"scrypt:16384:8:1$SodiumChloride${digest}")
    client.post_json("/users/verify/", {**HARRY, "password": "pleaseletmein"}, status=200)
    assert users.get_password(1) == stored


@pytest.mark.parametrize("stored", ["NULL", "x'ff'", "''", "17"])
def test_what_another_program_stored_as_a_password_is_nobodys_until_an_operator_sets_one(client, users, path, stored):
    execute(path, 'CREATE TABLE "user" (id INTEGER PRIMARY KEY, first_name, last_name, email, password, created_on)')
    execute(path, f"INSERT INTO \"user\" VALUES (1, 'H', 'P', 'harry@example.com', {stored}, '')")
    client.post_json("/users/verify/", HARRY, status=403)
    client.put_json("/users/1/password/", {"old_password": "1234", "new_password": "5678"}, status=403)
    users.set_password("harry@example.com", "5678")
    client.post_json("/users/verify/", {**HARRY, "password": "5678"}, status=200)


def test_a_hash_that_somebody_changes_meanwhile_is_not_made_anew(application, users, monkeypatch):
    users.insert("H", "P", "harry@example.com", weak := profiler.hash_password("1234", 1))
    replace = users.replace_password
    monkeypatch.setattr(profiler, "hash_password", lambda *_: replace(1, weak, "theirs") and "ours")
    assert call(application, "POST", "/users/verify/", fields=HARRY).status == 200
    assert users.get_password(1) == "theirs"


def test_verify_answers_even_where_the_new_hash_cannot_be_stored(application, users, monkeypatch):
    users.insert("H", "P", "harry@example.com", profiler.hash_password("1234", 1))

    def replace_password(*_):
        raise profiler.Unavailable("the disk is full")

    monkeypatch.setattr(users, "replace_password", replace_password)
    assert call(application, "POST", "/users/verify/", fields=HARRY).status == 200


def test_a_password_is_changed_by_who_knows_the_old_one(client):
    client.post_json("/users/", HARRY)
    client.put_json("/users/1/password/", {"old_password": "1234", "new_password": "5678"}, status=204)
    client.post_json("/users/verify/", HARRY, status=403)
    client.post_json("/users/verify/", {**HARRY, "password": "5678"}, status=200)


def test_a_password_is_not_changed_by_who_does_not(client):
    client.post_json("/users/", HARRY)
    answer = client.put_json("/users/1/password/", {"old_password": "4321", "new_password": "5678"}, status=403)
    assert answer.json == {"error": "Wrong password"}
    client.post_json("/users/verify/", HARRY, status=200)
    client.put_json("/users/2/password/", {"old_password": "1234", "new_password": "5678"}, status=404)


def test_of_eight_who_change_a_password_at_once_one_succeeds(application):
    assert post(application).status == 201

    def change(number):
        fields = {"old_password": "1234", "new_password": f"new {number}"}
        return call(application, "PUT", "/users/1/password/", fields=fields).status

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(change, range(8))) == [204] + [403] * 7


def test_an_operator_sets_a_password_without_the_old_one(client, users):
    client.post_json("/users/", HARRY)
    users.set_password("Harry@example.com", "5678")
    client.post_json("/users/verify/", {**HARRY, "password": "5678"}, status=200)
    with pytest.raises(profiler.NoSuchUser):
        users.set_password("ron@example.com", "5678")


def test_of_two_editors_the_second_is_told_and_loses_nothing(client):
    client.post_json("/users/", HARRY)
    first = second = client.get("/users/1/").headers["ETag"]
    client.put_json("/users/1/", {**HARRY, "first_name": "First"}, headers={"If-Match": first}, status=200)
    answer = client.put_json("/users/1/", {**HARRY, "first_name": "Second"}, headers={"If-Match": second}, status=412)
    assert "changed" in answer.json["error"]
    client.delete("/users/1/", headers={"If-Match": second}, status=412)
    assert client.get("/users/1/").json["first_name"] == "First"


def test_of_eight_editors_at_once_one_succeeds(application):
    """What If-Match asks is judged where nobody else can write."""
    assert post(application).status == 201
    entity_tag = call(application, "GET", "/users/1/").headers["ETag"]

    def edit(number):
        fields = {**HARRY, "first_name": f"Editor {number}"}
        return call(application, "PUT", "/users/1/", fields=fields, HTTP_IF_MATCH=entity_tag).status

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(edit, range(8))) == [200] + [412] * 7


# -- users: in SQLite ----------------------------------------------------------


@pytest.mark.parametrize("count", [profiler.BATCH - 1, profiler.BATCH, profiler.BATCH + 1, 3 * profiler.BATCH])
def test_a_list_of_batches_is_one_list(client, path, count):
    fill(path, count)
    assert [user["id"] for user in client.get("/users/").json] == list(range(1, count + 1))


def test_a_streamed_list_holds_no_lock_and_no_snapshot(application, path):
    """Between two batches the write-ahead log can be emptied: it does not grow behind a slow reader."""
    fill(path, 3 * profiler.BATCH)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/"}
    setup_testing_defaults(environ)
    reader = application(environ, lambda *_: None)
    next(iter(reader))
    execute(path, 'DELETE FROM "user" WHERE id = ?', (3 * profiler.BATCH,))
    [(busy, _, _)] = execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert busy == 0
    reader.close()


def test_the_memory_of_a_list_does_not_grow_with_the_users(application, path):
    def peak():
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/"}
        setup_testing_defaults(environ)
        tracemalloc.start()
        for _ in application(environ, lambda *_: None):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    fill(path, 2 * profiler.BATCH)
    small = peak()
    execute(path, 'DELETE FROM "user"')
    fill(path, 20 * profiler.BATCH)
    assert peak() < 1.5 * small


def test_a_list_whose_last_users_go_while_it_is_sent_is_still_a_list(application, path):
    fill(path, 2 * profiler.BATCH)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/"}
    setup_testing_defaults(environ)
    parts = iter(application(environ, lambda *_: None))
    first = next(parts)
    execute(path, 'DELETE FROM "user" WHERE id > ?', (profiler.BATCH,))
    assert len(json.loads(first + b"".join(parts))) == profiler.BATCH


@pytest.mark.parametrize("cell", ["CAST(X'ff41c3' AS TEXT)", "X'ff41c3'"])
def test_a_cell_that_is_not_utf8_breaks_nothing(client, path, cell):
    fill(path, 2)
    execute(path, f'UPDATE "user" SET first_name = {cell} WHERE id = 1')
    assert client.get("/users/1/").json["first_name"] == "\ufffdA\ufffd"
    assert [user["first_name"] for user in client.get("/users/").json] == ["\ufffdA\ufffd", "First2"]


@pytest.mark.parametrize("moment", [1700000000, 1.5, 9e999])
def test_a_moment_that_is_a_number_is_a_string_everywhere(client, path, moment):
    """The tutorial's column type lets another program write one."""
    fill(path, 1)
    execute(path, 'UPDATE "user" SET created_on = ?', (moment,))
    user = client.get("/users/1/").json
    assert isinstance(user["created_on"], str)
    assert client.get("/users/").json == client.get("/users/?limit=1").json == [user]


def test_an_id_below_1_is_nobodys_everywhere(application, client, path):
    """Another program may have given one; the list begins at 1."""
    fill(path, 3)
    execute(path, 'UPDATE "user" SET id = id - 2, password = ?', (profiler.hash_password("1234", 1),))
    assert [user["id"] for user in client.get("/users/").json] == [1]
    assert [user["id"] for user in client.get("/users/?limit=5&sort=-id").json] == [1]
    assert client.get("/users/?email=user2@example.com").json == []
    client.get("/users/0/", status=404)
    client.put_json("/users/0/", HARRY, status=404)
    client.delete("/users/0/", status=204)
    for nobody in ("user1@example.com", "user2@example.com"):
        client.post_json("/users/verify/", {"email": nobody, "password": "1234"}, status=403)
        with pytest.raises(profiler.NoSuchUser):
            application.users.set_password(nobody, "5678")
    client.post_json("/users/", {**HARRY, "email": "user2@example.com"}, status=400)
    assert execute(path, 'SELECT id FROM "user"') == [(-1,), (0,), (1,)]


def test_a_file_of_the_tutorials_service_is_served_as_it_is(client, tutorial_path):
    row = ("Harry", "Potter", "harry@example.com", profiler.hash_password("1234", 1), "2020-01-02 03:04:05")
    statement = "INSERT INTO user (first_name, last_name, email, password, created_on) VALUES (?, ?, ?, ?, ?)"
    execute(tutorial_path, statement, row)
    assert client.get("/users/1/").json["created_on"] == "2020-01-02 03:04:05"
    client.post_json("/users/", {**RON, "email": "Harry@example.com"}, status=400)
    assert client.post_json("/users/", RON, status=201).json == {"id": 2}
    client.put_json("/users/2/", {**RON, "email": "HARRY@example.com"}, status=400)
    client.post_json("/users/verify/", {**HARRY, "email": "HARRY@example.com"}, status=200)
    [(schema,)] = execute(tutorial_path, "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'user'")
    assert schema == TUTORIAL_SCHEMA.strip()[:-1]


def indexes(path):
    return {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'index'")}


def test_such_a_file_gets_at_its_first_write_an_index_for_emails_without_case(client, tutorial_path):
    client.get("/users/", status=200)
    assert indexes(tutorial_path) == {"sqlite_autoindex_user_1"}
    client.delete("/users/1/", status=204)
    assert indexes(tutorial_path) == {"sqlite_autoindex_user_1", "user_email"}
    [*_, (*_, step)] = execute(tutorial_path, f"EXPLAIN QUERY PLAN {profiler._FIND}", {"email": "a"})[:1]
    assert "user_email (email=?)" in step


def test_a_file_of_our_own_needs_no_other_index(client, path):
    client.delete("/users/1/", status=204)
    assert indexes(path) == {"sqlite_autoindex_user_1"}


@pytest.fixture
def twins(tutorial_path):
    """Two users whose emails differ in case alone, as such a file may hold them."""
    for number, email in enumerate(("harry@example.com", "HARRY@example.com"), 1):
        password_hash = profiler.hash_password(f"password {number}", 1)
        statement = "INSERT INTO user (first_name, last_name, email, password) VALUES ('H', 'P', ?, ?)"
        execute(tutorial_path, statement, (email, password_hash))
    return tutorial_path


def test_users_whose_emails_differ_only_in_case_can_be_updated_but_not_to_each_others(client, twins):
    client.put_json("/users/1/", {**HARRY, "first_name": "H."}, status=200)
    client.put_json("/users/1/", {**HARRY, "email": "Harry@example.com"}, status=400)
    client.put_json("/users/1/", {**HARRY, "email": "HARRY@example.com"}, status=400)


def test_of_such_users_the_one_whose_email_is_written_so_is_verified(client, twins):
    for user_id, email in enumerate(("harry@example.com", "HARRY@example.com"), 1):
        fields = {"email": email, "password": f"password {user_id}"}
        assert client.post_json("/users/verify/", fields, status=200).json == {"id": user_id}


def test_a_page_does_not_look_at_the_users_before_it(path):
    fill(path, 1)
    for statement in profiler._PAGES.values():
        parameters = {"after": 1, "limit": 1, "email": "a"}
        steps = [step for *_, step in execute(path, f"EXPLAIN QUERY PLAN {statement}", parameters)]
        searches = [step for step in steps if re.search(r" user\b", step)]
        assert len(searches) == 2
        for step in searches:
            assert re.search(r"SEARCH .*user.* (\(rowid[<>]\?|\(email=\?)", step)
            assert "rowid>? AND rowid>?" not in step


def test_a_page_begins_behind_its_id_and_not_at_the_first_user(path):
    """Two bounds on one side, of which SQLite would seek by one alone, would make a deep page dear."""
    fill(path, 2000)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        steps = []
        connection.set_progress_handler(lambda: steps.append(1) and None, 100)

        def cost(statement, after):
            steps.clear()
            connection.execute(statement, {"after": after, "limit": 10, "email": None}).fetchall()
            return len(steps)

        assert cost(profiler._PAGES[False, False], 1900) <= cost(profiler._PAGES[False, False], 0) + 1
        assert cost(profiler._PAGES[True, False], 100) <= cost(profiler._PAGES[True, False], 2001) + 1


# -- HTTP ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        'application/json;a=b; Charset="UTF-8"',
    ],
)
def test_json_is_taken_under_each_of_its_names(application, content_type):
    assert post(application, CONTENT_TYPE=content_type).status == 201


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/jsonp", "application/x-www-form-urlencoded", "application/json; charset=latin-1"],
)
def test_another_content_type_is_415(application, content_type):
    answer = post(application, CONTENT_TYPE=content_type)
    assert answer.status == 415
    assert "application/json" in answer.error


class Unreadable(io.BytesIO):
    def read(self, *_):
        pytest.fail("read")


def test_a_body_over_the_cap_is_413_before_it_is_read(application):
    length = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(profiler.MAX_BODY + 1)}
    assert post(application, b"", **length, **{"wsgi.input": Unreadable()}).status == 413


def test_a_body_of_the_cap_is_taken(application):
    body = BODY + b" " * (profiler.MAX_BODY - len(BODY))
    assert post(application, body).status == 201
    assert post(application, body + b" ").status == 413


@pytest.mark.parametrize("length", ["+5", "-1", "5.0", "0x5", "5 ", "٣", "five", "5,5", "9" * 5000])
def test_a_length_that_is_not_digits_is_400(application, length):
    answer = post(application, CONTENT_LENGTH=length)
    assert answer.status == 400
    assert "Content-Length" in answer.error


def test_no_more_is_read_than_the_length(application):
    stream = io.BytesIO(BODY + b"GET / HTTP/1.1")
    assert post(application, **{"wsgi.input": stream}).status == 201
    assert stream.read() == b"GET / HTTP/1.1"


class Trickle(io.BytesIO):
    """Gives a byte at a time, and insists on being told how many are wanted."""

    def read(self, size):
        assert size > 0
        return super().read(1)


def test_a_body_may_arrive_in_pieces(application):
    assert post(application, **{"wsgi.input": Trickle(BODY)}).status == 201


def test_a_body_shorter_than_its_length_is_400(application):
    answer = post(application, CONTENT_LENGTH=str(len(BODY) + 1))
    assert answer.status == 400
    assert "shorter" in answer.error


class Failing(io.BytesIO):
    def __init__(self, error):
        self.error = error

    def read(self, size):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(ConnectionResetError(), 400), (ValueError("bad chunk"), 400), (socket.timeout(), 408)]
)
def test_a_client_that_leaves_or_stalls_is_no_error_of_ours(application, error, status):
    answer = post(application, **{"wsgi.input": Failing(error)})
    assert (answer.status, answer.errors) == (status, "")


def test_a_chunked_body_that_the_server_decodes_is_read_up_to_the_cap(application):
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    assert post(application, **chunked).status == 201
    assert post(application, b" " * (profiler.MAX_BODY + 1), **chunked).status == 413


def test_a_chunked_body_that_the_server_does_not_decode_is_411(application):
    for length in ("", str(len(BODY))):
        assert post(application, HTTP_TRANSFER_ENCODING="chunked", CONTENT_LENGTH=length).status == 411


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{'first_name': 1}", "must be JSON"),
        (b"\xef\xbb\xbf{}", "must be JSON"),
        (b'{"first_name": NaN}', "NaN"),
        (b'{"first_name": -Infinity}', "Infinity"),
        (b'{"first_name": "H\xe9"}', "UTF-8"),
        (BODY.decode().encode("utf-16"), "UTF-8"),
        (b"[" * 60_000, "nested"),
        (b'{"a":' * 12_000, "nested"),
        (b"[]", "object"),
        (b'"Harry"', "object"),
        (b"null", "object"),
        (b"1", "object"),
    ],
)
def test_a_body_that_is_no_json_object_is_400_and_told_why(application, body, says):
    answer = post(application, body, CONTENT_TYPE="application/json", CONTENT_LENGTH=str(len(body)))
    assert answer.status == 400
    assert says in answer.error


def test_a_field_that_is_ignored_may_be_a_number_of_any_length(application):
    assert post(application, BODY[:-1] + b', "age": ' + b"9" * 60_000 + b"}").status == 201


def test_brackets_within_a_string_nest_nothing(application):
    fields = {**HARRY, "password": '[{\\"' * 1000, "more": [[]] * 200}
    assert call(application, "POST", fields=fields).status == 201


def test_quotes_without_end_cost_no_time_to_look_through(application):
    """Each could be where a string begins, and the end of the body be looked for from there."""
    assert post(application, b'"' + b'\\"' * 32_000).status == 400


def test_brackets_are_counted_before_the_parser_runs_out_of_stack(application, monkeypatch):
    monkeypatch.setattr(profiler.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert post(application, b"[" * (profiler.MAX_BRACKETS + 1)).status == 400


@pytest.mark.parametrize("name", HARRY)
@pytest.mark.parametrize("value", [..., "", " \t\n", None, False])
def test_a_field_that_is_missing_or_blank_is_400(client, name, value):
    fields = {key: value for key, value in {**HARRY, name: value}.items() if value is not ...}
    assert client.post_json("/users/", fields, status=400).json == {"error": "Required fields are missing"}
    if name != "password":
        assert client.put_json("/users/1/", fields, status=400).json == {"error": "Required fields are missing"}


@pytest.mark.parametrize("name", HARRY)
@pytest.mark.parametrize("value", [1, 1.5, True, ["Harry"], {"a": 1}])
def test_a_field_that_is_no_string_is_400_and_named(client, name, value):
    assert client.post_json("/users/", {**HARRY, name: value}, status=400).json == {"error": f"{name} must be a string"}


@pytest.mark.parametrize("name", HARRY)
def test_a_lone_surrogate_is_400_and_its_field_named(client, name):
    answer = client.post_json("/users/", {**HARRY, name: "\ud800@example.com"}, status=400)
    assert answer.json == {"error": f"{name} must not contain a lone surrogate"}


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f", "\x85"])
@pytest.mark.parametrize("name", ["first_name", "last_name", "email"])
def test_a_control_character_is_400_and_its_field_named(client, name, character):
    answer = client.post_json("/users/", {**HARRY, name: f"a{character}@b"}, status=400)
    assert answer.json == {"error": f"{name} must not contain control characters"}


def test_a_password_may_hold_anything_but_nul(client, users):
    answer = client.post_json("/users/", {**HARRY, "password": "a\0"}, status=400)
    assert answer.json == {"error": "password must not contain the NUL character"}
    client.post_json("/users/", {**HARRY, "password": " \n\x7f ż"}, status=201)
    assert profiler.verify_password(users.get_password(1), " \n\x7f ż")


@pytest.mark.parametrize("name", ["old_password", "new_password"])
@pytest.mark.parametrize("value", [None, " ", 1, "a\0", "\ud800"])
def test_a_changed_password_has_the_rules_of_a_new_one(client, name, value):
    client.post_json("/users/", HARRY)
    fields = {"old_password": "1234", "new_password": "5678", name: value}
    error = client.put_json("/users/1/password/", fields, status=400).json["error"]
    assert error.startswith(f"{name} must") or error == "Required fields are missing"


@pytest.mark.parametrize("name", ["first_name", "last_name"])
def test_a_name_has_at_most_255_characters(client, name):
    answer = client.post_json("/users/", {**HARRY, name: "é" * 256}, status=400)
    assert answer.json == {"error": f"{name} must have at most 255 characters"}
    client.post_json("/users/", {**HARRY, name: "🐍" * 255}, status=201)
    assert client.get("/users/1/").json[name] == "🐍" * 255


@pytest.mark.parametrize("email", ["a@b", "a.b+c@d-e", "ż@ó.pl", "a" * 252 + "@b"])
def test_an_email_has_one_at_sign_with_something_on_both_sides(client, email):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    assert client.get("/users/1/").json["email"] == email


@pytest.mark.parametrize("email", ["harry", "@", "a@", "@b", "a@b@c", "a b@c", "a@b\u00a0", "a@b ", "a" * 253 + "@b"])
def test_another_email_is_400(client, email):
    assert "email must be" in client.post_json("/users/", {**HARRY, "email": email}, status=400).json["error"]


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("{tag}", 200),
        ('"a", {tag} ,"b"', 200),
        ('"a,b", {tag}', 200),
        ("*", 200),
        (" * ", 200),
        ("W/{tag}", 412),
        ('"other"', 412),
        ("", 412),
        ("nonsense", 412),
        ('"{tag}', 412),
        ("x{tag}", 412),
        ("{tag}b", 412),
        ('"a, {tag}"', 412),
        ("W/ {tag}", 412),
        (", {tag},,", 200),
    ],
)
def test_if_match_compares_strongly(client, field, status):
    """RFC 9110 13.1.1."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    headers = {"If-Match": field.format(tag=tag)}
    client.get("/users/1/", headers=headers, status=status)
    client.put_json("/users/1/", HARRY, headers=headers, status=status)


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"a", W/{tag}', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
        ("nonsense", 200),
    ],
)
def test_if_none_match_compares_weakly(client, field, status):
    """RFC 9110 13.1.2."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    headers = {"If-None-Match": field.format(tag=tag)}
    for request in (client.get, client.head):
        answer = request("/users/1/", headers=headers, status=status)
        assert answer.headers["ETag"] == tag
        assert ("Content-Type" in answer.headers, "Content-Length" in answer.headers) == (status == 200,) * 2
    client.put_json("/users/1/", HARRY, headers=headers, status=412 if status == 304 else 200)
    client.delete("/users/1/", headers=headers, status=412 if status == 304 else 204)


def test_if_match_goes_before_if_none_match(client):
    """RFC 9110 13.2.2."""
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    client.get("/users/1/", headers={"If-Match": '"other"', "If-None-Match": tag}, status=412)
    client.get("/users/1/", headers={"If-Match": tag, "If-None-Match": tag}, status=304)


def test_what_would_be_an_error_anyhow_is_that_error(client):
    """RFC 9110 13.2.1. Only a delete of nobody would have succeeded."""
    headers = {"If-Match": "*"}
    client.get("/users/1/", headers=headers, status=404)
    client.put_json("/users/1/", HARRY, headers=headers, status=404)
    client.put("/users/1/", "{}", headers={**headers, "Content-Type": "text/plain"}, status=415)
    client.delete("/users/1/", headers=headers, status=412)
    client.delete("/users/1/", headers={"If-None-Match": "*"}, status=204)


def test_an_etag_changes_with_the_user_and_with_nothing_else(client):
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    assert re.fullmatch('"[0-9a-f]{32}"', tag)
    assert client.get("/users/1/").headers["ETag"] == client.head("/users/1/").headers["ETag"] == tag
    client.put_json("/users/1/password/", {"old_password": "1234", "new_password": "5"}, status=204)
    assert client.get("/users/1/").headers["ETag"] == tag
    assert "ETag" not in client.put_json("/users/1/", {**HARRY, "last_name": "Evans"}).headers
    assert client.get("/users/1/").headers["ETag"] != tag


# -- endpoints -----------------------------------------------------------------


def test_created_says_where(client):
    answer = client.post_json("/users/", HARRY, status=201)
    assert answer.headers["Location"] == "/users/1/"


@pytest.mark.parametrize(
    ("mount_point", "location"),
    [
        ("/api", "/api/users/1/"),
        ("//evil.com", "/evil.com/users/1/"),
        ("/a b\u00c3\u00a9\n", "/a%20b%C3%A9%0A/users/1/"),
    ],
)
def test_location_carries_the_mount_point_and_stays_on_the_host(application, mount_point, location):
    assert post(application, SCRIPT_NAME=mount_point).headers["Location"] == location


@pytest.mark.parametrize("slash", ["/", ""])
def test_the_last_slash_is_optional(client, slash):
    client.post_json(f"/users{slash}", HARRY, status=201)
    assert len(client.get(f"/users{slash}").json) == 1
    client.put_json(f"/users/1{slash}", HARRY, status=200)
    client.put_json(f"/users/1/password{slash}", {"old_password": "1234", "new_password": "1234"}, status=204)
    client.post_json(f"/users/verify{slash}", HARRY, status=200)
    client.get(f"/users/1{slash}", status=200)
    client.get(f"/health{slash}", status=200)
    client.delete(f"/users/1{slash}", status=204)


@pytest.mark.parametrize("path_info", ["/users/", "/users/1/", "/users/9/", "/health/"])
def test_an_answer_is_one_line_of_compact_json(application, path_info):
    assert post(application).body == b'{"id":1}\n'
    body = call(application, "GET", path_info).body
    assert body.endswith(b"\n")
    assert body == json.dumps(json.loads(body), separators=(",", ":")).encode() + b"\n"


def test_get_of_nobody_is_404(client):
    assert client.get("/users/1/", status=404).json == {"error": "Invalid user id"}


@pytest.mark.parametrize(
    "digits",
    [
        "0",
        "9223372036854775807",
        "9223372036854775808",
        "9" * 5000,
        "+1",
        "-1",
        "1.0",
        "\u0663",
        "1/\n",
        "1\n",
        "\n",
        " 1",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_an_id_that_nobody_can_have_is_404(application, digits, method):
    application.users.insert("H", "P", "h@b.c", "x")
    path_info = f"/users/{digits}/".encode().decode("latin-1")
    assert call(application, method, path_info, body=BODY).status == 404


@pytest.mark.parametrize(
    "path_info", ["/users//", "/users/1//", "//users/", "/users/1/x", "/Users/", "/users/\n", "*", "/health/x"]
)
def test_another_path_is_404(application, path_info):
    answer = call(application, "GET", path_info)
    assert (answer.status, list(answer.json)) == (404, ["error"])


@pytest.mark.parametrize(
    ("path_info", "allow"),
    [
        ("/users/", "GET, HEAD, OPTIONS, POST"),
        ("/users/1/", "DELETE, GET, HEAD, OPTIONS, PUT"),
        ("/users/1/password/", "OPTIONS, PUT"),
        ("/users/verify/", "OPTIONS, POST"),
        ("/health/", "GET, HEAD, OPTIONS"),
    ],
)
def test_another_method_is_405_and_options_tells_which(application, path_info, allow):
    for method in ("PATCH", "get", "PROPFIND", "TRACE"):
        answer = call(application, method, path_info)
        assert (answer.status, answer.headers["Allow"], list(answer.json)) == (405, allow, ["error"])
    answer = call(application, "OPTIONS", path_info)
    assert (answer.status, answer.headers["Allow"], answer.body) == (204, allow, b"")


def test_options_of_the_server_as_a_whole_is_204(application):
    """RFC 9110 9.3.7."""
    answer = call(application, "OPTIONS", "*")
    assert (answer.status, answer.body) == (204, b"")


@pytest.mark.parametrize("path_info", ["/users/", "/users/1/", "/users/2/", "/nowhere/", "/health/"])
def test_head_is_get_without_the_body(application, path_info):
    assert post(application).status == 201
    answer = call(application, "GET", path_info)
    assert call(application, "HEAD", path_info) == answer._replace(body=b"")
    assert answer.headers["Content-Length"] == str(len(answer.body))


@pytest.fixture
def pages(client, users):
    """25 users, whose ids are 1 to 25."""
    for number in range(1, 26):
        users.insert(f"First{number}", f"Last{number}", f"user{number}@example.com", "x")
    return client


@pytest.mark.parametrize("form", ["/users/", "/users"])
def test_pages_are_all_the_users_once(pages, form):
    url, ids = f"{form}?limit=10", []
    for count, following in [(10, "</users/?limit=10&after=10>"), (10, "</users/?limit=10&after=20>"), (5, None)]:
        answer = pages.get(url, status=200)
        assert len(answer.json) == count
        assert answer.headers.get("Link") == (following and f'{following}; rel="next"')
        ids += [user["id"] for user in answer.json]
        url = following and following[1:-1]
    assert ids == list(range(1, 26))


def test_the_newest_first_is_all_the_users_the_other_way_round(pages):
    assert [user["id"] for user in pages.get("/users/?sort=-id").json] == list(range(25, 0, -1))
    url, ids = "/users/?limit=10&sort=-id", []
    for following in ("</users/?limit=10&after=16&sort=-id>", "</users/?limit=10&after=6&sort=-id>", None):
        answer = pages.get(url)
        assert answer.headers.get("Link") == (following and f'{following}; rel="next"')
        ids += [user["id"] for user in answer.json]
        url = following and following[1:-1]
    assert ids == list(range(25, 0, -1))


def test_the_order_may_be_named_and_no_other_one(pages):
    assert pages.get("/users/?sort=id").json == pages.get("/users/").json
    for sort in ("", "email", "-Id", "id,-id"):
        assert pages.get(f"/users/?sort={sort}", status=400).json == {"error": "sort must be id or -id"}


def test_the_last_page_may_be_full(pages):
    answer = pages.get("/users/?limit=5&after=20")
    assert len(answer.json) == 5
    assert "Link" not in answer.headers
    assert "Link" not in pages.get("/users/?limit=5&after=6&sort=-id").headers


def test_a_page_behind_the_last_user_is_empty(pages):
    assert pages.get("/users/?limit=1&after=25").json == []
    assert pages.get("/users/?limit=1&after=1&sort=-id").json == []
    assert pages.get(f"/users/?after={profiler.MAX_ID}").json == []
    assert pages.get("/users/?after=0&sort=-id").json == []


def test_after_alone_goes_on_to_the_end(pages):
    assert [user["id"] for user in pages.get("/users/?after=20").json] == list(range(21, 26))
    assert [user["id"] for user in pages.get("/users/?after=4&sort=-id").json] == [3, 2, 1]
    assert len(pages.get("/users/?after=0").json) == 25


def test_link_carries_the_mount_point(application, users):
    for number in (1, 2):
        users.insert("F", "L", f"{number}@b.c", "x")
    answer = call(application, QUERY_STRING="limit=1", SCRIPT_NAME="/api")
    assert answer.headers["Link"] == '</api/users/?limit=1&after=1>; rel="next"'


def test_link_carries_the_email(client, twins):
    """In a file that the tutorial's service made two users may have it."""
    link = client.get("/users/?email=h%61rry%40example.com&limit=1").headers["Link"]
    assert link == '</users/?limit=1&after=1&email=harry%40example.com>; rel="next"'
    answer = client.get(link[1 : link.index(">")])
    assert [user["id"] for user in answer.json] == [2]
    assert "Link" not in answer.headers


@pytest.mark.parametrize("email", ["user7@example.com", "USER7@Example.com", "user7%40example.com"])
def test_email_gives_the_one_who_has_it(pages, email):
    assert [user["id"] for user in pages.get(f"/users/?email={email}").json] == [7]
    assert "Link" not in pages.get(f"/users/?email={email}&limit=1").headers


def test_email_gives_none_if_nobody_has_it_or_not_behind_that_id(pages):
    assert pages.get("/users/?email=nobody@example.com").json == []
    assert pages.get("/users/?email=user7@example.com&after=7").json == []
    assert pages.get("/users/?email=user7@example.com&after=7&sort=-id").json == []
    assert len(pages.get("/users/?email=user7@example.com&after=6&limit=1").json) == 1
    assert len(pages.get("/users/?email=user7@example.com&after=8&sort=-id").json) == 1


@pytest.mark.parametrize("query", ["a+b@example.com", "a%2Bb@example.com"])
def test_a_plus_in_an_email_is_a_plus(client, query):
    client.post_json("/users/", {**HARRY, "email": "a+b@example.com"})
    assert len(client.get(f"/users/?email={query}").json) == 1


def test_an_email_may_be_asked_for_in_any_letters(application):
    assert call(application, "POST", fields={**HARRY, "email": "żółw@example.com"}).status == 201
    for query in ("email=%C5%BC%C3%B3%C5%82w@EXAMPLE.com", "email=żółw@example.com".encode().decode("latin-1")):
        assert len(call(application, QUERY_STRING=query).json) == 1


@pytest.mark.parametrize(
    ("query", "name"),
    [
        *(
            (f"limit={value}", "limit")
            for value in ("", "0", "-1", "1001", "1.0", "ten", "+1", "%D9%A3", "9" * 5000, "1%0A", "1,2")
        ),
        *((f"after={value}", "after") for value in ("", "-1", "9223372036854775808", "0x1", "0" * 5000, "x")),
        *((f"email={value}", "email") for value in ("", "harry", "a@b@c", "a%20b@c", "%00@b", "%FF@%0A")),
        ("limit=5&after=x", "after"),
    ],
)
def test_a_parameter_that_is_malformed_or_out_of_range_is_400_and_named(client, query, name):
    assert client.get(f"/users/?{query}", status=400).json["error"].startswith(f"{name} must")


@pytest.mark.parametrize("query", ["", "page=2", "Limit=1", "&&=&a", "first_name=Harry", "%", "\u00ff"])
def test_another_parameter_is_ignored(application, users, query):
    for number in (1, 2):
        users.insert("F", "L", f"{number}@b.c", "x")
    answer = call(application, QUERY_STRING=query)
    assert (answer.status, len(answer.json), "Link" in answer.headers) == (200, 2, False)


def test_health_is_whether_users_can_be_read(application, users, monkeypatch):
    assert call(application, "GET", "/health/").json == {"status": "ok"}
    monkeypatch.setattr(users, "check", lambda: 1 / 0)
    answer = call(application, "GET", "/health/")
    assert (answer.status, list(answer.json)) == (503, ["error"])
    assert "division" in answer.errors
    assert "division" not in answer.error


def test_the_health_of_a_table_of_another_shape_is_503(application, path):
    execute(path, 'CREATE TABLE "user" (name TEXT)')
    assert call(application, "GET", "/health/").status == 503


PAGE = b"<html><style>p{}</style><script>let a</script></html>"


@pytest.fixture
def beside(tmp_path):
    """Answers a request to a copy of the module, with these files beside it."""

    def answer(path_info, mount_point="", **files):
        for name in ("profiler.py", "schema.sql"):
            shutil.copy(HERE / name, tmp_path)
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_bytes(content)
        program = (
            "import profiler, json; from wsgiref.util import setup_testing_defaults\n"
            f"environ = {{'PATH_INFO': {path_info!r}, 'SCRIPT_NAME': {mount_point!r}}}\n"
            "setup_testing_defaults(environ); environ['PATH_INFO'] = " + repr(path_info) + "\n"
            f"application = profiler.create_app('db.sqlite3', token={TOKEN!r})\n"
            "body = b''.join(application(environ, lambda status, headers: print(json.dumps([status, headers]))))\n"
            "print(body.decode())"
        )
        output = run_program(program, tmp_path, PYTHONPATH=str(tmp_path))
        head, body = output.stdout.split("\n", 1)
        status, headers = json.loads(head)
        return Answer(int(status[:3]), dict(headers), body[:-1].encode())

    return answer


def sha256(text):
    return base64.b64encode(hashlib.sha256(text).digest()).decode()


def test_a_page_beside_the_module_is_served_to_all_and_may_run_nothing_but_its_own(beside):
    answer = beside("/", index_html=PAGE)
    assert (answer.status, answer.body) == (200, PAGE)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == (
        f"default-src 'none'; script-src 'sha256-{sha256(b'let a')}'; "
        f"style-src 'sha256-{sha256(b'p{}')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def test_the_mount_point_without_its_slash_leads_to_the_page(beside):
    """Its relative links would lead elsewhere."""
    answer = beside("", "/accounts", index_html=PAGE)
    assert (answer.status, answer.headers["Location"]) == (308, "/accounts/")


def test_a_page_of_somebody_else_may_run_nothing(beside):
    answer = beside("/", index_html=b"<html>hello</html>")
    assert (answer.status, answer.body) == (200, b"<html>hello</html>")
    assert "script-src 'none'; style-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_document_beside_the_module_is_served_to_all(beside):
    answer = beside("/openapi.json", openapi_json=b"{}")
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (200, b"{}", "application/json")


@pytest.mark.parametrize("path_info", ["", "/", "/openapi.json"])
def test_without_them_it_is_told_where_the_users_are(beside, path_info):
    answer = beside(path_info)
    assert (answer.status, answer.json) == (404, {"error": "Nothing is here: the users are at /users/"})


# -- application ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path_info"),
    [
        ("GET", "/users/"),
        ("GET", "/users/9/"),
        ("DELETE", "/users/9/"),
        ("PATCH", "/users/"),
        ("OPTIONS", "/users/"),
        ("GET", "/health/"),
        ("GET", "/nowhere"),
    ],
)
def test_every_response_has_the_safe_headers(application, method, path_info):
    answer = call(application, method, path_info)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert ("Content-Type" in answer.headers, "Content-Length" in answer.headers) == (answer.status != 204,) * 2


def test_an_answer_without_a_body_has_something_to_begin_with(application):
    """Hypercorn's WSGI mode answers 500 where nothing is yielded."""
    environ = {"REQUEST_METHOD": "DELETE", "PATH_INFO": "/users/1/"}
    setup_testing_defaults(environ)
    assert list(application(environ, lambda *_: None)) == [b""]


def test_what_goes_wrong_is_500_with_a_traceback_for_the_operator_alone(application, monkeypatch):
    monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
    answer = call(application, "GET", "/users/1/")
    assert (answer.status, answer.json) == (500, {"error": "Internal server error"})
    assert "ZeroDivisionError" in answer.errors


class Full(io.StringIO):
    def write(self, _):
        raise OSError


def test_a_log_that_cannot_be_written_to_keeps_no_answer_back(application, monkeypatch):
    for error, status in ((ZeroDivisionError(), 500), (profiler.Busy("no"), 503)):

        def get(user_id, error=error):
            raise error

        monkeypatch.setattr(application.users, "get", get)
        assert call(application, "GET", "/users/1/", **{"wsgi.errors": Full()}).status == status


def test_no_password_and_no_hash_is_in_a_response_or_a_log(application, users, monkeypatch):
    harry = {**HARRY, "password": "swordfish"}
    change = {"old_password": "swordfish", "new_password": "tuna fish"}
    said = [
        call(application, method, path_info, fields=fields)
        for method, path_info, fields in [
            ("POST", "/users/", harry),
            ("POST", "/users/", harry),
            ("GET", "/users/", None),
            ("PUT", "/users/1/", harry),
            ("POST", "/users/verify/", harry),
            ("PUT", "/users/1/password/", change),
            ("PUT", "/users/1/password/", change),
        ]
    ]
    stored = users.get_password(1)
    for name in ("update", "verify", "change_password"):
        monkeypatch.setattr(users, name, lambda *_: 1 / 0)
    said.append(call(application, "PUT", "/users/1/", fields=harry))
    said.append(call(application, "POST", "/users/verify/", fields=harry))
    said.append(call(application, "PUT", "/users/1/password/", fields=change))
    assert {answer.status for answer in said[-3:]} == {500}
    for secret in ("swordfish", "tuna fish", stored.split("$")[2]):
        assert secret not in repr(said)


def test_both_names_are_one_application():
    assert profiler.app is profiler.application


def test_the_application_is_configured_by_the_environment_at_its_first_request(tmp_path):
    program = (
        "import profiler, os, io\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "os.environ['PROFILER_DATABASE'] = 'named.sqlite3'\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "print(b''.join(profiler.application(environ, lambda *_: None)).decode())"
    )
    output = run_program(program, tmp_path)
    assert output.stdout == "[]\n\n", output.stderr
    assert (tmp_path / "named.sqlite3").exists()


@pytest.mark.parametrize("value", [None, ""])
def test_without_argument_or_environment_the_database_is_the_tutorials(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROFILER_DATABASE", raising=False)
    if value is not None:
        monkeypatch.setenv("PROFILER_DATABASE", value)
    assert profiler.create_app().users.place == str(tmp_path / "db.sqlite3")


def test_a_path_given_to_create_app_goes_before_the_environment(path, monkeypatch):
    monkeypatch.setenv("PROFILER_DATABASE", "/elsewhere")
    assert profiler.create_app(path).users.place == str(path)


@pytest.mark.parametrize("iterations", [0, -1, profiler.MAX_ITERATIONS + 1, 1.5, True, "1"])
def test_create_app_refuses_impossible_iterations(path, iterations):
    with pytest.raises(ValueError, match="iterations"):
        profiler.create_app(path, iterations=iterations)


def test_a_url_needs_what_can_read_it_and_a_path_does_not(tmp_path):
    program = (
        "import sys; sys.modules['sqlalchemy'] = sys.modules['profiler_sqlalchemy'] = None; import profiler\n"
        "profiler.create_app('db.sqlite3').users.count()\n"
        "for url in ('postgresql://app:secret@localhost/app', 'mysql://app:secret@localhost/app'):\n"
        "    try: profiler.create_app(url)\n"
        "    except ValueError as error: print(error)"
    )
    output = run_program(program, tmp_path)
    first, second = output.stdout.splitlines()
    assert "pip install 'profiler-users[postgresql]'" in first
    assert "pip install 'profiler-users[mysql]'" in second
    assert "secret" not in output.stdout + output.stderr


def test_an_application_in_a_folder_that_is_gone_answers_503(tmp_path):
    program = (
        "import profiler, os, sys\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "environ['wsgi.errors'] = sys.stderr\n"
        "profiler.application(environ, lambda status, headers: print(status))"
    )
    output = run_program(program, tmp_path)
    assert output.stdout == "503 Service Unavailable\n", output.stderr
    assert "the current folder is gone" in output.stderr


CGI = {
    "REQUEST_METHOD": "POST",
    "PATH_INFO": "/users/",
    "SCRIPT_NAME": "/cgi-bin/profiler.py",
    "CONTENT_TYPE": "application/json",
    "CONTENT_LENGTH": str(len(BODY)),
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "GATEWAY_INTERFACE": "CGI/1.1",
}


def test_it_answers_by_itself_as_a_cgi_program(tmp_path):
    """RFC 3875. A query without = comes as arguments, which are the client's and not the operator's."""
    for name in ("profiler.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "profiler.py").chmod(0o755)
    environ = {**os.environ, **CGI, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(tmp_path / "profiler.py"), "--host", "0.0.0.0"]
    output = subprocess.run(command, env=environ, cwd=tmp_path, input=BODY, capture_output=True)
    head, _, body = output.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"Status: 201 Created"), output.stderr
    assert b"Location: /cgi-bin/profiler.py/users/1/" in head
    assert json.loads(body) == {"id": 1}


@pytest.fixture
def guarded(path):
    with contextlib.closing(profiler.create_app(path, iterations=ITERATIONS, token=TOKEN)) as application:
        yield application


@pytest.mark.parametrize(
    ("method", "path_info"),
    [
        ("GET", "/users/"),
        ("POST", "/users/"),
        ("OPTIONS", "/users/"),
        ("GET", "/nowhere"),
        ("POST", "/users/verify/"),
        ("PUT", "/users/1/password/"),
        ("OPTIONS", "*"),
        ("PATCH", "/users/1/"),
        ("HEAD", "/users/"),
    ],
)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        TOKEN,
        "Bearer \u00ff\ud800",
    ],
)
def test_without_the_token_everything_is_401(guarded, method, path_info, authorization):
    environ = {} if authorization is None else {"HTTP_AUTHORIZATION": authorization}
    answer = call(guarded, method, path_info, **environ)
    assert (answer.status, answer.headers["WWW-Authenticate"], answer.errors) == (401, "Bearer", "")
    assert answer.body == b"" if method == "HEAD" else list(answer.json) == ["error"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_with_the_token_all_is_as_without_one(guarded, scheme):
    assert call(guarded, HTTP_AUTHORIZATION=f"{scheme} {TOKEN}").status == 200


def test_a_thousand_who_are_not_let_in_leave_nothing_behind(guarded):
    """An exception that is raised again keeps the frames, and so the requests, of every time."""
    for _ in range(10):
        call(guarded)
    tracemalloc.start()
    for _ in range(200):
        assert call(guarded, "POST", body=b"x" * 10_000).status == 401
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 200 * 10_000 / 2


def test_health_asks_for_no_token(guarded):
    assert call(guarded, "GET", "/health/").json == {"status": "ok"}


@pytest.mark.parametrize("token", ["", "short", TOKEN[:-1], f"{TOKEN} {TOKEN}", f"{TOKEN}\n", f"{TOKEN}\u00e9"])
def test_a_token_that_is_too_short_or_cannot_be_sent_is_refused(path, monkeypatch, token):
    with pytest.raises(ValueError, match="token must be at least 16"):
        profiler.create_app(path, token=token)
    monkeypatch.setenv("PROFILER_TOKEN", token)
    with pytest.raises(ValueError, match="token must be at least 16"):
        profiler.create_app(path)


def test_the_token_may_come_from_the_environment(path, monkeypatch):
    monkeypatch.setenv("PROFILER_TOKEN", TOKEN)
    with contextlib.closing(profiler.create_app(path)) as application:
        assert call(application).status == 401
        assert call(application, HTTP_AUTHORIZATION=f"Bearer {TOKEN}").status == 200


def test_a_bad_environment_lets_nobody_in(tmp_path):
    program = (
        "import profiler, io\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "environ['wsgi.errors'] = errors = io.StringIO()\n"
        "print(b''.join(profiler.application(environ, lambda status, headers: print(status))).decode().strip())\n"
        "print('token must be' in errors.getvalue())"
    )
    output = run_program(program, tmp_path, PROFILER_TOKEN="short")
    assert output.stdout.splitlines() == [
        "500 Internal Server Error",
        '{"error":"Internal server error"}',
        "True",
    ]


# -- server: parsing -----------------------------------------------------------


GET = b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /users/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_a_head_becomes_an_environ():
    """PEP 3333."""
    head = (
        b"PUT /%75sers/1/?a=b%20c HTTP/1.1\r\nHost: localhost:80\r\nX-Two: a\r\nx-two:\tb \r\nContent-Length: 2\r\n\r\n"
    )
    assert profiler.parse_head(head) == {
        "REQUEST_METHOD": "PUT",
        "PATH_INFO": "/users/1/",
        "QUERY_STRING": "a=b%20c",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost:80",
        "HTTP_X_TWO": "a, b",
        "CONTENT_TYPE": "",
        "CONTENT_LENGTH": "2",
    }


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /users/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\n Host: a\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX@Y: x\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\r\nX: a\x7f\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1\nHost: a\n\n", 400),
        (b"GET /users/ HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET /users/\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /users/\r HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET  /users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /users/ HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        (b"G@T /users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /users/\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET http://a@b/users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http:///users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /users/ HTTP/0.9\r\n\r\n", 505),
        (b"GET /users/ HTTP/1.2\r\nHost: a\r\n\r\n", 505),
        (b"GET /users/ HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0x2\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST /users/ HTTP/1.0\r\nTransfer-Encoding: Chunked\r\n\r\n", 411),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nExpect: a miracle\r\nContent-Length: 2\r\n\r\n", 417),
        (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 32768 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 100 + b"\r\n", 431),
    ],
)
def test_what_two_readers_might_read_otherwise_is_refused(head, status):
    with pytest.raises(profiler.HTTPError) as refusal:
        profiler.parse_head(head)
    assert refusal.value.status == status


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n" + GET,
        GET.replace(b"Host: localhost", b"hOST:\t localhost:80 \t"),
        GET.replace(b"/users/", b"http://localhost/users/"),
        GET.replace(b"/users/", b"/%75sers/?q#\xff"),
        GET.replace(b"\r\n\r\n", b"\r\n" + b"X: \xff\r\n" * 99 + b"\r\n"),
        GET.replace(b"Host", b"Content_Length: 5\r\nTransfer_Encoding: chunked\r\nHost"),
        GET.replace(b"Host", b"Content-Length: 000\r\nHost"),
        GET.replace(b"Host: localhost", b"Host:"),
        b"GET /users/ HTTP/1.0\r\n\r\n",
    ],
)
def test_what_is_odd_but_plain_is_understood(head):
    environ = profiler.parse_head(head)
    assert (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("GET", "/users/")
    assert "HTTP_TRANSFER_ENCODING" not in environ
    assert environ["CONTENT_LENGTH"] in ("", "000")


def test_the_authority_of_an_absolute_target_goes_before_the_host():
    """RFC 9112 3.2.2."""
    head = GET.replace(b"/users/", b"http://evil.example/users/")
    assert profiler.parse_head(head)["HTTP_HOST"] == "evil.example"


@pytest.mark.parametrize(
    ("connection", "closes"),
    [
        (b"", False),
        (b"Connection: keep-alive\r\n", False),
        (b"Connection: Close\r\n", True),
        (b"Connection: keep-alive,\tclose\r\n", True),
        (b"Connection: keep-alive\r\nConnection: close\r\n", True),
        (b"Connection: closed\r\n", False),
    ],
)
def test_a_client_may_ask_for_the_connections_end(connection, closes):
    assert profiler.wants_close(profiler.parse_head(GET.replace(b"Host", connection + b"Host"))) is closes
    assert profiler.wants_close(profiler.parse_head(GET.replace(b"1.1", b"1.0")))


LOCAL_HOSTS = ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.0.0.1:5000", "127.8.9.1", "[::1]", "[::1]:80", None]
OTHER_HOSTS = ["evil.example", "evil.example:5000", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""]


@pytest.mark.parametrize("host", LOCAL_HOSTS)
def test_a_name_of_the_loopback_is_local(host):
    profiler.check_local_host({} if host is None else {"HTTP_HOST": host})


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_another_name_is_421(host):
    """RFC 9110 15.5.20."""
    with pytest.raises(profiler.HTTPError) as refusal:
        profiler.check_local_host({"HTTP_HOST": host})
    assert refusal.value.status == 421


# -- server: connections -------------------------------------------------------


@contextlib.contextmanager
def serving(application, **options):
    """Run a server in a thread. A test may shorten its limits before it connects."""
    with profiler.Server("127.0.0.1", 0, application, **options) as server:
        server.timeout = 0.01
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


@pytest.fixture
def server(application, capsys):
    with serving(application, access_log=False) as server:
        yield server
    assert "Traceback" not in capsys.readouterr().err


@contextlib.contextmanager
def connected(server):
    with contextlib.closing(socket.create_connection(server.server_address, timeout=10)) as connection:
        yield connection


def receive(connection):
    """Return all that comes until the server closes."""
    with connection.makefile("rb") as stream:
        return stream.read()


class Stream(io.BufferedReader):
    """Outlives the responses that http.client reads from it."""

    def makefile(self, *_):
        return self

    def close(self):
        pass


def answers(connection, *methods):
    """Return the next responses of a connection: Answers."""
    with connection.makefile("rb", buffering=0) as raw:
        stream = Stream(raw)
        for method in methods:
            response = http.client.HTTPResponse(stream, method=method)
            response.begin()
            yield Answer(response.status, response.headers, response.read())


def answer(connection, method="GET"):
    """Return the next response of a connection, which must be the last that is on its way."""
    [response] = answers(connection, method)
    return response


def closed(server):
    """Wait until the server has no connection left."""
    with server._closed:
        assert server._closed.wait_for(lambda: not server.connections, 10)


def test_one_connection_carries_many_requests(server):
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(GET)
            received = answer(connection)
            assert (received.status, received.json, received.headers["Connection"]) == (200, [], None)


def test_requests_may_be_pipelined(server):
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY + GET + GET.replace(b"Host", b"Connection: close\r\nHost"))
        received = receive(connection)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"201", b"200", b"200"]
    assert received.count(b'"Harry"') == 2


@pytest.mark.parametrize(
    "request_",
    [GET.replace(b"1.1", b"1.0"), GET.replace(b"Host", b"Connection: keep-alive,\tclose\r\nHost")],
)
def test_a_client_that_wants_one_answer_gets_one(server, request_):
    with connected(server) as connection:
        connection.sendall(request_ + GET)
        received = receive(connection)
    assert received.count(b"HTTP/1.1 200 OK") == 1
    assert b"\r\nConnection: close\r\n" in received


def test_an_answer_without_a_body_leaves_the_connection_in_step(server):
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY)
        assert answer(connection).status == 201
        for method, path_info, field, expected in [
            ("DELETE", "/users/9/", b"", 204),
            ("HEAD", "/users/", b"", 200),
            ("OPTIONS", "/users/", b"", 204),
            ("OPTIONS", "*", b"", 204),
            ("GET", "/users/1/", b"If-None-Match: *\r\n", 304),
            ("HEAD", "/users/1/", b"If-None-Match: *\r\n", 304),
        ]:
            request = GET.replace(b"GET", method.encode()).replace(b"/users/", path_info.encode(), 1)
            connection.sendall(request.replace(b"Host", field + b"Host"))
            received = answer(connection, method)
            assert (received.status, received.body) == (expected, b"")
            assert ("Content-Length" in received.headers) == (expected == 200)
            assert "Transfer-Encoding" not in received.headers
        connection.sendall(GET)
        assert len(answer(connection).json) == 1


def test_a_streamed_list_is_chunked_so_that_its_end_can_be_told(server, path):
    fill(path, 3 * profiler.BATCH)
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(GET)
            received = answer(connection)
            assert (received.status, received.headers["Transfer-Encoding"]) == (200, "chunked")
            assert len(received.json) == 3 * profiler.BATCH
        connection.sendall(GET.replace(b"GET", b"HEAD"))
        assert answer(connection, "HEAD").body == b""
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert len(json.loads(body)) == 3 * profiler.BATCH


def test_a_list_that_fails_midway_has_no_end_and_is_one_line_in_the_log(application, users, path, capsys, monkeypatch):
    fill(path, 4 * profiler.BATCH)
    pages = iter(range(2))
    page = users.page

    def failing(*arguments, **options):
        if next(pages, None) is None:
            raise profiler.Unavailable("disk I/O error")
        return page(*arguments, **options)

    monkeypatch.setattr(users, "page", failing)
    with serving(application) as server, connected(server) as connection:
        connection.sendall(GET + GET)
        received = receive(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert not received.endswith(b"0\r\n\r\n")
    [line] = capsys.readouterr().err.splitlines()
    assert "disk I/O error" in line
    assert "200" not in line


def test_a_client_may_wait_to_be_told_to_go_on(server):
    with connected(server) as connection:
        connection.sendall((POST % len(BODY)).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert answer(connection).status == 201
        connection.sendall(GET)
        assert answer(connection).status == 200


def test_a_client_that_waits_in_vain_is_told_why_and_disconnected(server):
    with connected(server) as connection:
        connection.sendall((POST % 100_000).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413")
    assert b"\r\nConnection: close\r\n" in received


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_what_is_refused_is_told_why_in_json_and_the_connection_closed(server, method):
    with connected(server) as connection:
        connection.sendall(GET.replace(b"GET", method).replace(b"Host", b"Content-Length: x\r\nHost") + GET)
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    for field in (
        b"Content-Type: application/json",
        b"Connection: close",
        b"X-Content-Type-Options: nosniff",
        b"Cache-Control: no-store",
    ):
        assert field in head.split(b"\r\n")
    assert b"HTTP/1.1" not in body
    assert body == b"" if method == b"HEAD" else list(json.loads(body)) == ["error"]


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (b"GET /users/ HTTP/1.1\n\n", 400),
        (b"GET /" + b"a" * 8192, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 32768, 431),
    ],
)
def test_a_head_that_cannot_become_one_is_refused_before_it_ends(server, beginning, status):
    with connected(server) as connection:
        connection.sendall(beginning)
        assert receive(connection).startswith(b"HTTP/1.1 %d " % status)


def test_a_head_that_ends_too_early_is_400(server):
    with connected(server) as connection:
        connection.sendall(GET[:-2])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")


def test_another_host_is_421_where_the_server_is_told_to_look(application):
    with serving(application, access_log=False, check_host=True) as server, connected(server) as connection:
        connection.sendall(GET)
        assert answer(connection).status == 200
        connection.sendall(GET.replace(b"localhost", b"evil.example"))
        assert receive(connection).startswith(b"HTTP/1.1 421 ")


def test_a_body_that_was_not_read_is_not_the_next_request(server):
    with connected(server) as connection:
        length = b"Content-Length: %d\r\nHost" % len(GET)
        connection.sendall(GET.replace(b"Host", length) + GET + GET.replace(b"/users/", b"/x/"))
        assert [received.status for received in answers(connection, "GET", "GET")] == [200, 404]


def test_a_large_body_that_is_refused_closes_the_connection_and_its_sender_sees_why(server):
    with connected(server) as connection:
        connection.sendall(POST % 5_000_000 + b"x" * 5_000_000)
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in received


def test_a_body_that_is_cut_off_creates_nobody(server):
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")
    assert server.application.users.count() == 0


def trickle(connection, message, pause=0.02):
    """Send a byte at a time until the server has had enough."""
    connection.setblocking(False)
    for byte in message:
        with contextlib.suppress(OSError):
            connection.send(bytes([byte]))
        if select.select([connection], [], [], pause)[0]:
            break
    connection.settimeout(10)


def test_a_head_has_a_deadline_however_steadily_it_trickles(server, monkeypatch):
    monkeypatch.setattr(profiler, "HEAD_TIMEOUT", 0.1)
    with connected(server) as connection:
        trickle(connection, GET)
        assert receive(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_has_a_deadline_however_steadily_it_trickles(server, monkeypatch):
    monkeypatch.setattr(profiler, "BODY_TIMEOUT", 0.1)
    with connected(server) as connection:
        connection.sendall(POST % len(BODY))
        trickle(connection, BODY)
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in received


def test_a_body_that_never_begins_is_408_too(server, monkeypatch):
    monkeypatch.setattr(profiler, "BODY_TIMEOUT", 0.05)
    with connected(server) as connection:
        connection.sendall(POST % len(BODY))
        assert receive(connection).startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed_without_a_word(server, monkeypatch):
    monkeypatch.setattr(profiler, "IDLE_TIMEOUT", 0.05)
    with connected(server) as connection:
        assert receive(connection) == b""
    with connected(server) as connection:
        connection.sendall(GET)
        assert receive(connection).count(b"HTTP/1.1") == 1


def test_a_connection_that_its_client_ends_is_closed_at_once(server):
    """There is nothing unread, so nothing to wait for; a thousand of them would keep others out."""
    with connected(server) as connection:
        connection.sendall(GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert receive(connection).startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        closed(server)
    assert time.monotonic() - started < profiler.LINGER_TIMEOUT / 2


def test_a_client_that_does_not_read_is_dropped(server, path, monkeypatch):
    monkeypatch.setattr(profiler, "SEND_TIMEOUT", 0.1)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    fill(path, 60 * profiler.BATCH)
    with connected(server) as connection:
        connection.sendall(GET * 20)
        assert connection.recv(1) == b"H"
        closed(server)
        with contextlib.suppress(ConnectionResetError):
            assert receive(connection).count(b"\r\n0\r\n\r\n") < 20


def test_a_client_that_does_not_read_keeps_no_other_from_reading(server, path):
    """Readers take turns, but what the socket does not take at once is sent outside of the turn."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    fill(path, 60 * profiler.BATCH)
    with connected(server) as slow, connected(server) as other:
        slow.sendall(GET * 20)
        assert slow.recv(1) == b"H"
        for _ in range(3):
            other.sendall(GET.replace(b"/users/", b"/users/1/"))
            assert answer(other).status == 200


def test_no_write_waits_in_the_readers_turn(server, slow_hash):
    with connected(server) as writer, connected(server) as reader:
        writer.sendall(POST % len(BODY) + BODY)
        assert slow_hash.started.acquire(timeout=10)
        reader.sendall(GET)
        assert answer(reader).status == 200
        slow_hash.go_on.set()
        assert answer(writer).status == 201


def test_a_read_that_waits_for_its_database_keeps_no_other_request_waiting_for_long(server, users, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(users, "get", lambda user_id: started.set() or (go_on.wait(10) and b"{}"))
    with connected(server) as stuck, connected(server) as other:
        stuck.sendall(GET.replace(b"/users/", b"/users/1/"))
        assert started.wait(10)
        other.sendall(GET)
        assert answer(other).status == 200
        go_on.set()
        assert answer(stuck).status == 200


def test_a_client_that_reads_slowly_but_does_read_is_served(server, path, monkeypatch):
    """Longer in all than it may be without reading anything."""
    monkeypatch.setattr(profiler, "SEND_TIMEOUT", 2)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    fill(path, 20 * profiler.BATCH)
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        received, pauses = b"", 24
        while part := connection.recv(1 << 14):
            received += part
            if pauses:
                pauses -= 1
                select.select([], [], [], 0.1)
    assert len(json.loads(received.partition(b"\r\n\r\n")[2])) == 20 * profiler.BATCH


def test_a_client_that_resets_the_connection_makes_no_noise(server, path, capsys):
    fill(path, 20 * profiler.BATCH)
    for _ in range(3):
        with connected(server) as connection:
            connection.sendall(GET * 5)
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    closed(server)
    assert capsys.readouterr().err == ""


def test_a_connection_too_many_is_told_503(server):
    server.max_connections = 2
    with connected(server) as first, connected(server) as second:
        for connection in (first, second):
            connection.sendall(GET)
            assert answer(connection).status == 200
        with connected(server) as third:
            received = receive(third)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in received
        first.close()
        with server._closed:
            assert server._closed.wait_for(lambda: len(server.connections) < 2, 10)
        with connected(server) as third:
            third.sendall(GET)
            assert answer(third).status == 200


def test_a_connection_too_many_is_told_503_even_if_it_sends_a_body(server):
    server.max_connections = 1
    with connected(server) as first:
        first.sendall(GET)
        assert answer(first).status == 200
        with connected(server) as second:
            second.sendall(POST % 60_000 + b"x" * 60_000)
            assert receive(second).startswith(b"HTTP/1.1 503 ")


def test_many_too_many_are_not_told(server):
    server.max_refusals = 0
    server.max_connections = 0
    with connected(server) as connection:
        assert receive(connection) == b""


def test_a_connection_without_a_thread_is_closed_and_the_server_goes_on(server, monkeypatch):
    start = threading.Thread.start

    def fail(thread):
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with connected(server) as connection:
        assert receive(connection) == b""
    with connected(server) as connection:
        connection.sendall(GET)
        assert answer(connection).status == 200


def test_many_half_heads_delay_nobody(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(server)).sendall(b"GET /users/ HT")
        with connected(server) as connection:
            connection.sendall(GET)
            assert (
                answer(connection).status == 200
            )  # within the 10 s of a test's connection, and so before HEAD_TIMEOUT


def test_responses_tell_the_date_and_the_server_but_no_python(server):
    with connected(server) as connection:
        connection.sendall(GET)
        headers = answer(connection).headers
    assert headers["Server"] == f"profiler/{profiler.__version__}"
    assert abs(parsedate_to_datetime(headers["Date"]).timestamp() - time.time()) < 60


def test_a_small_response_is_one_send_that_waits_for_no_other(server, monkeypatch):
    sent, options = [], []

    class Handler(profiler.RequestHandler):
        def setup(self):
            super().setup()
            options.append(self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        def _send_at_once(self, message):
            sent.append(message)
            return super()._send_at_once(message)

        def _send(self, message):
            pytest.fail("sent again")

    monkeypatch.setattr(server, "RequestHandlerClass", Handler)
    with connected(server) as connection:
        connection.sendall(GET)
        assert answer(connection).status == 200
    assert len(sent) == 1
    assert options[0] != 0


def test_the_access_log_is_in_common_log_format_with_nothing_to_control_a_terminal(application, capsys):
    with serving(application) as server, connected(server) as connection:
        connection.sendall(GET + GET.replace(b"/users/", b'/\xff"\\') + GET.replace(b"/users/", b"/\x1b[2J"))
        receive(connection)
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}(:\d\d){3} [+-]\d{4}\] "GET /users/ HTTP/1\.1" 200 3', first
    )
    assert '"GET /\\xff\\"\\\\ HTTP/1.1" 404' in second
    assert '"GET /\\x1b[2J HTTP/1.1" 400' in third


@pytest.mark.parametrize("error", [OSError(), ValueError("I/O operation on closed file")])
def test_a_log_that_cannot_be_written_to_ends_nothing(application, monkeypatch, error):
    class Closed(io.StringIO):
        def write(self, _):
            raise error

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
    with serving(application) as server, connected(server) as connection:
        for path_info, status in ((b"/users/", 200), (b"/users/1/", 500), (b"/users/", 200)):
            connection.sendall(GET.replace(b"/users/", path_info))
            assert answer(connection).status == status


def test_a_log_that_nobody_reads_keeps_no_answer_back(application, monkeypatch):
    """A full pipe would hold every thread in its write."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "w", buffering=1) as log:
        monkeypatch.setattr(sys, "stderr", log)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
        with serving(application) as server, connected(server) as connection:
            for path_info, status in ((b"/users/", 200), (b"/users/1/", 500)):
                connection.sendall(GET.replace(b"/users/", path_info))
                assert answer(connection).status == status


def test_a_long_request_line_is_logged_in_part(application, capsys):
    with serving(application) as server, connected(server) as connection:
        connection.sendall(GET.replace(b"/users/", b"/" + b"a" * 7000))
        assert answer(connection).status == 404
    assert 500 < len(capsys.readouterr().err) < 700


def test_stopping_answers_what_is_in_flight_and_closes_what_is_idle(application, slow_hash):
    with serving(application, access_log=False) as server, connected(server) as idle, connected(server) as busy:
        idle.sendall(GET)
        assert answer(idle).status == 200
        busy.sendall(POST % len(BODY) + BODY)
        assert slow_hash.started.acquire(timeout=10)
        server.stop()
        assert idle.recv(1) == b""
        assert server.connections
        slow_hash.go_on.set()
        received = receive(busy)
    assert received.startswith(b"HTTP/1.1 201 ")
    assert b"\r\nConnection: close\r\n" in received


def test_stopping_does_not_wait_for_a_connection_whose_response_had_begun(application, path):
    """Its head could not say that it would be the last."""
    fill(path, 100 * profiler.BATCH)
    with serving(application, access_log=False) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        with connected(server) as connection:
            connection.sendall(GET)
            received = connection.recv(1)
            server.stop()
            until(lambda: server.socket.fileno() < 0)
            received += receive(connection)
            started = time.monotonic()
            closed(server)
    assert time.monotonic() - started < profiler.LINGER_TIMEOUT
    assert b"\r\nConnection: close\r\n" not in received
    assert received.endswith(b"\r\n0\r\n\r\n")


def test_stopping_ends_in_time(application, slow_hash, monkeypatch):
    monkeypatch.setattr(profiler, "DRAIN_TIMEOUT", 0.05)
    with profiler.Server("127.0.0.1", 0, application, access_log=False) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        with connected(server) as connection:
            connection.sendall(POST % len(BODY) + BODY)
            assert slow_hash.started.acquire(timeout=10)
            server.stop()
            thread.join()
            assert server.connections
            slow_hash.go_on.set()
            receive(connection)


# -- command line --------------------------------------------------------------


class Command:
    """The command in a process of its own, in an empty folder that holds the two files alone."""

    def __init__(self, folder, *arguments, **environ):
        for name in ("profiler.py", "schema.sql"):
            shutil.copy(HERE / name, folder)
        clean = {
            name: value for name, value in os.environ.items() if name != "PORT" and not name.startswith("PROFILER_")
        }
        self.process = subprocess.Popen(
            [sys.executable, "profiler.py", *arguments],
            cwd=folder, env={**clean, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def address(self):
        """Wait for the banner and return where it says that the server is."""
        url, self.banner = self.process.stdout.readline(), self.process.stdout.readline()
        self.server_address = ("127.0.0.1", int(re.fullmatch(r"http://[0-9.]+:(\d+)/users/\n", url)[1]))
        return self.server_address

    def end(self, signum=None):
        """Return the exit status and what was written to stdout and stderr."""
        if signum is not None:
            self.process.send_signal(signum)
        output, errors = self.process.communicate(timeout=20)
        return self.process.returncode, output, errors


def run(folder, *arguments, **environ):
    with Command(folder, *arguments, **environ) as command:
        return command.end()


def ask(address, method="GET", path="/users/", fields=None, **headers):
    connection = http.client.HTTPConnection(*address, timeout=10)
    with contextlib.closing(connection):
        if fields is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, None if fields is None else json.dumps(fields), headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("signum", SIGNALS)
def test_two_files_in_an_empty_folder_serve_until_a_signal(tmp_path, signum):
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert ask(address, "POST", fields=HARRY).json == {"id": 1}
        assert ask(address).status == 200
        status, output, errors = command.end(signum)
    assert (status, output) == (0, "")
    for word in (str(tmp_path / "db.sqlite3"), "0 users", "Ctrl-C"):
        assert word in command.banner
    # Each line is written after its answer, by a thread of its own.
    assert {line.split('"')[1] for line in errors.splitlines()} == {"POST /users/ HTTP/1.1", "GET /users/ HTTP/1.1"}
    assert sorted(os.listdir(tmp_path)) == ["db.sqlite3", "profiler.py", "schema.sql"]  # the log is merged and gone
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(1,)]


def test_a_signal_right_after_the_banner_and_another_are_a_clean_end(tmp_path):
    for _ in range(3):
        with Command(tmp_path, "--port", "0") as command:
            command.address()
            command.process.send_signal(signal.SIGTERM)
            command.process.send_signal(signal.SIGINT)
            assert command.end(signal.SIGTERM) == (0, "", "")


def test_one_user_is_one_user(tmp_path):
    fill(tmp_path / "db.sqlite3", 1)
    with Command(tmp_path, "--port", "0") as command:
        command.address()
        assert "it holds 1 user." in command.banner
    assert "the table holds 1 user:" in run(tmp_path, "initialise-database")[2]


def with_files(folder):
    for name in ("profiler.py", "schema.sql"):
        shutil.copy(HERE / name, folder)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_it_serves_without_a_log(tmp_path, redirection):
    """And ends well: what a buffer holds that cannot be written is no failure."""
    with_files(tmp_path)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["sh", "-c", f"exec {sys.executable} profiler.py --port 0 {redirection}"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as process:
        address = ("127.0.0.1", int(re.search(r":(\d+)/", process.stdout.readline())[1]))
        for _ in range(2):
            assert ask(address).json == []
        process.terminate()
    assert process.returncode == 0


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_stdout_that_cannot_be_written_to_is_named(tmp_path):
    with_files(tmp_path)
    for unbuffered in ("", "1"):
        output = subprocess.run(
            ["sh", "-c", f"exec {sys.executable} profiler.py --port 0 >/dev/full"],
            cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert (output.returncode, output.stderr.count("\n")) == (1, 1)
        assert "stdout" in output.stderr


def test_the_log_may_be_silent(tmp_path):
    with Command(tmp_path, "--port", "0", "--no-access-log") as command:
        ask(command.address())
        assert command.end(signal.SIGTERM)[2] == ""


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_an_idle_server_uses_no_processor(tmp_path):
    def ticks(pid):
        return sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    with Command(tmp_path, "--port", "0") as command:
        command.address()
        before = ticks(command.process.pid)
        select.select([], [], [], 1)
        assert ticks(command.process.pid) - before <= os.sysconf("SC_CLK_TCK") / 20


@pytest.mark.skipif(not pathlib.Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
def test_it_takes_the_means_that_it_may_have_and_keeps_some_for_the_database(tmp_path):
    with_files(tmp_path)
    limits = "ulimit -S -n 40; ulimit -H -n 130; ulimit -v 200000"
    command = ["sh", "-c", f"{limits}; exec {sys.executable} profiler.py --port 0 --no-access-log"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        address = ("127.0.0.1", int(re.search(r":(\d+)/", process.stdout.readline())[1]))

        def connect():
            return stack.enter_context(contextlib.closing(socket.create_connection(address, timeout=10)))

        connections = [connect() for _ in range(85)]
        for connection in connections:
            connection.sendall(GET)
            assert answer(connection).status == 200
        assert re.search(r"Max open files +130 +130", pathlib.Path(f"/proc/{process.pid}/limits").read_text())
        others = [connect() for _ in range(100)]
        assert receive(others[8]).startswith(b"HTTP/1.1 503 ")  # 130, less what is kept, and less a tenth of the rest
        connections[0].sendall(POST % len(BODY) + BODY)
        assert answer(connections[0]).status == 201
        process.terminate()
        assert process.wait(20) == 0


def test_settings_are_flags_over_environment_over_defaults(tmp_path):
    with Command(tmp_path, "--database", "flag.sqlite3", PROFILER_DATABASE="environment.sqlite3", PORT="0") as command:
        command.address()
        assert "flag.sqlite3" in command.banner
    with Command(tmp_path, PROFILER_DATABASE="environment.sqlite3", PROFILER_PORT="0", PORT="bad") as command:
        command.address()
        assert "environment.sqlite3" in command.banner


def test_a_port_that_kubernetes_sets_for_a_service_of_this_name_is_none(tmp_path):
    with Command(tmp_path, PROFILER_PORT="tcp://10.0.0.1:5000", PORT="0") as command:
        command.address()


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--port", "http"], {}, "--port: 'http'"),
        (["--port", "65536"], {}, "--port: '65536'"),
        (["--port", "-1"], {}, "--port"),
        (["--port", "\u0663"], {}, "--port"),
        ([], {"PROFILER_PORT": "http"}, "'http', from the flag, PROFILER_PORT or PORT,"),
        ([], {"PORT": "http"}, "'http', from the flag, PROFILER_PORT or PORT,"),
        (["--host", "no.such.host.invalid"], {}, "--host: 'no.such.host.invalid'"),
        (["--database", ":memory:"], {}, "must be a file"),
        (["--token-file", "missing"], {}, "'missing'"),
        ([], {"PROFILER_TOKEN": "short"}, "token must be at least 16"),
        (["--token-file", "."], {}, "'.' cannot be read"),
        ([], {"PROFILER_TOKEN": ""}, "token must be at least 16"),
        (["--host", "0.0.0.0"], {}, "--anonymous"),
        (["--host", "::"], {}, "--anonymous"),
        (["--host", ""], {}, "--host"),
        (["--frobnicate"], {}, "--frobnicate"),
        (["--host", "::1234"], {}, "--anonymous"),
        (["--force"], {}, "--force"),
        (["initialise-database", "--f"], {}, "--f"),
        (["backup"], {}, "PATH"),
        (["set-password"], {}, "EMAIL"),
        (["frobnicate"], {}, "frobnicate"),
    ],
)
def test_a_bad_value_is_exit_2_and_a_line_that_names_it(tmp_path, arguments, environ, named):
    status, output, errors = run(tmp_path, *arguments, **environ)
    assert (status, output) == (2, "")
    assert named in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_token_opens_other_addresses_and_names_and_is_asked_for(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", "--token-file", "token") as command:
        address = command.address()
        assert ask(address).status == 401
        assert ask(address, Authorization=f"Bearer {TOKEN}", Host="accounts.example").status == 200
        _, output, errors = command.end(signal.SIGTERM)
    assert TOKEN not in output + errors


def test_a_token_on_the_command_line_is_no_abbreviation(tmp_path):
    """It would be in the process list."""
    assert run(tmp_path, "--token", TOKEN)[0] == 2


def test_without_a_token_only_names_of_the_loopback_are_served(tmp_path):
    """A web page whose name was made to lead here would read every account."""
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert ask(address, Host="evil.example").status == 421
        assert ask(address, Host="localhost").status == 200


def test_anonymous_opens_other_addresses_and_names_to_all(tmp_path):
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", "--anonymous") as command:
        assert ask(command.address(), Host="evil.example").status == 200


def test_a_port_in_use_is_one_line_and_exit_1(tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        status, output, errors = run(tmp_path, "--port", str(other.getsockname()[1]))
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "--port" in errors


@pytest.mark.parametrize("arguments", [[], ["initialise-database"]])
def test_no_such_folder_is_one_line_and_exit_1(tmp_path, arguments):
    status, output, errors = run(tmp_path, "--port", "0", "--database", "missing/db.sqlite3", *arguments)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert f"make the folder {tmp_path / 'missing'}" in errors
    assert "--database" in errors


def test_a_file_that_is_no_database_is_one_line_and_exit_1(tmp_path):
    (tmp_path / "diary").write_bytes(b"I am Tom Riddle. " * 100)
    for command in ([], ["initialise-database", "--force"]):
        status, _, errors = run(tmp_path, "--port", "0", "--database", "diary", *command)
        assert (status, errors.count("\n")) == (1, 1)
        assert "not a database" in errors
    assert (tmp_path / "diary").read_bytes() == b"I am Tom Riddle. " * 100


def test_a_file_moved_before_the_first_request_is_not_made_anew(tmp_path):
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        (tmp_path / "db.sqlite3").rename(tmp_path / "moved")
        assert ask(address).status == 503
        assert not (tmp_path / "db.sqlite3").exists()
        (tmp_path / "moved").rename(tmp_path / "db.sqlite3")
        assert ask(address).status == 200


def test_a_file_of_the_tutorials_service_gets_its_index_at_the_start(tutorial_path, tmp_path):
    with Command(tmp_path, "--port", "0") as command:
        command.address()
        assert indexes(tutorial_path) == {"sqlite_autoindex_user_1", "user_email"}


def test_version_and_help(tmp_path):
    assert run(tmp_path, "--version") == (0, f"profiler {profiler.__version__}\n", "")
    status, output, _ = run(tmp_path, "--help")
    assert status == 0
    for word in (
        "initialise-database", "set-password", "backup", "--host", "--port", "--database", "--token-file",
        "--anonymous", "PROFILER_PORT",
    ):  # fmt: skip
        assert word in output


def test_initialise_database_makes_the_table(tmp_path):
    done = (0, "Successfully created database schema.\n", "")
    assert run(tmp_path, "initialise-database", "--database", "a.sqlite3") == done
    assert run(tmp_path, "--database", "a.sqlite3", "initialise-database") == done
    assert execute(tmp_path / "a.sqlite3", 'SELECT count(*) FROM "user"') == [(0,)]
    assert not (tmp_path / "db.sqlite3").exists()


def test_initialise_database_drops_users_only_by_force(tmp_path):
    fill(tmp_path / "db.sqlite3", 3)
    status, output, errors = run(tmp_path, "initialise-database")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "3 users" in errors
    assert "--force" in errors
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(3,)]
    assert run(tmp_path, "initialise-database", "--force")[0] == 0
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(0,)]


def test_initialise_database_of_an_empty_table_forgets_no_ids(tmp_path):
    fill(tmp_path / "db.sqlite3", 3)
    execute(tmp_path / "db.sqlite3", 'DELETE FROM "user"')
    assert run(tmp_path, "initialise-database")[0] == 0
    fill(tmp_path / "db.sqlite3", 1)
    assert execute(tmp_path / "db.sqlite3", 'SELECT id FROM "user"') == [(4,)]


@pytest.mark.parametrize("setting", ["PROFILER_PORT", "PROFILER_HOST", "PORT"])
def test_what_only_the_server_needs_is_looked_at_by_the_server_alone(harrys, setting):
    assert run(harrys, "backup", "copy", **{setting: "no.such.thing.invalid"})[0] == 0


def test_initialise_database_minds_no_setting_of_the_server(tmp_path):
    assert run(tmp_path, "initialise-database", PROFILER_HOST="0.0.0.0", PROFILER_TOKEN="short")[0] == 0


def test_without_the_schema_it_says_so_and_leaves_nothing(tmp_path):
    shutil.copy(HERE / "profiler.py", tmp_path)
    output = subprocess.run([sys.executable, "profiler.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (output.returncode, output.stderr.count("\n")) == (1, 1)
    assert "schema.sql" in output.stderr
    assert "db.sqlite3" not in os.listdir(tmp_path)


@pytest.fixture
def harrys(tmp_path):
    """A folder whose database has Harry."""
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", iterations=1)) as application:
        assert post(application).status == 201
    with_files(tmp_path)
    return tmp_path


def set_password(folder, email, line):
    command = [sys.executable, "profiler.py", "set-password", email]
    return subprocess.run(command, cwd=folder, input=line, capture_output=True)


def verifies(folder, password):
    with contextlib.closing(profiler.create_app(folder / "db.sqlite3", iterations=1)) as application:
        answer = call(application, "POST", "/users/verify/", fields={**HARRY, "password": password})
    return answer.status == 200


@pytest.mark.parametrize("line", ["pässwörd\n", "pässwörd", "pässwörd\r\nmore\n"])
def test_set_password_reads_a_line_of_stdin(harrys, line):
    output = set_password(harrys, "HARRY@example.com", line.encode())
    assert (output.returncode, output.stderr) == (0, b"")
    assert b"HARRY@example.com" in output.stdout
    assert verifies(harrys, "pässwörd")


@pytest.mark.parametrize(
    ("email", "line", "named"),
    [
        ("ron@example.com", b"5678\n", "ron@example.com"),
        (b"\xff@example.com", b"5678\n", "email must not contain a lone surrogate"),
        ("harry@example.com", b"", "password"),
        ("harry@example.com", b" \n", "blank"),
        ("harry@example.com", b"5\0\n", "NUL"),
        ("harry@example.com", b"\xff\n", "UTF-8"),
    ],
)
def test_set_password_that_cannot_be_is_one_line_and_exit_1(harrys, email, line, named):
    output = set_password(harrys, email, line)
    assert (output.returncode, output.stdout, output.stderr.count(b"\n")) == (1, b"", 1)
    assert named in output.stderr.decode()
    assert verifies(harrys, "1234")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def typed(monkeypatch, *passwords):
    monkeypatch.setattr(sys, "stdin", Terminal())
    answers = iter(passwords)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(answers))


def test_set_password_asks_twice_on_a_terminal(harrys, monkeypatch, capsys):
    monkeypatch.setattr(profiler, "ITERATIONS", 1)
    command = ["set-password", "--database", str(harrys / "db.sqlite3"), "harry@example.com"]
    typed(monkeypatch, "5678", "5679")
    assert profiler.main(command) == 1
    assert "differ" in capsys.readouterr().err
    assert verifies(harrys, "1234")
    typed(monkeypatch, "5678", "5678")
    assert profiler.main(command) == 0
    assert verifies(harrys, "5678")


@pytest.mark.parametrize("command", [["set-password", "harry@example.com"], ["backup", "copy"]])
def test_a_command_for_a_database_that_is_not_there_makes_none(tmp_path, command):
    status, output, errors = run(tmp_path, *command)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert str(tmp_path / "db.sqlite3") in errors
    assert sorted(os.listdir(tmp_path)) == ["profiler.py", "schema.sql"]


def test_backup_writes_a_copy_that_can_be_served(harrys):
    assert run(harrys, "backup", "copy.sqlite3") == (0, "The copy is copy.sqlite3.\n", "")
    with Command(harrys, "--port", "0", "--database", "copy.sqlite3") as command:
        assert len(ask(command.address()).json) == 1


@pytest.mark.parametrize("target", ["db.sqlite3", "missing/copy", "db.sqlite3-wal"])
def test_a_backup_that_cannot_be_is_one_line_and_exit_1(harrys, target):
    before = (harrys / "db.sqlite3").read_bytes()
    status, output, errors = run(harrys, "backup", target)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert target in errors
    assert (harrys / "db.sqlite3").read_bytes() == before


def test_a_backup_tells_a_terminal_how_far_it_is(harrys, monkeypatch):
    monkeypatch.setattr(profiler, "BACKUP_PAGES", 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert profiler.main(["backup", "--database", str(harrys / "db.sqlite3"), str(harrys / "copy")]) == 0
    assert re.fullmatch(r"(\r[0-9]+ %)+\n", sys.stderr.getvalue())
    assert sys.stderr.getvalue().endswith("\r100 %\n")


@needs_fork
@ignores_fork_warning
def test_a_backup_that_is_killed_leaves_nothing_that_looks_whole(harrys, monkeypatch):
    monkeypatch.setattr(profiler, "BACKUP_PAGES", 1)
    users = profiler.open_users(str(harrys / "db.sqlite3"), 1)
    assert not in_a_fork(lambda: users.backup(str(harrys / "copy"), lambda *_: os.kill(os.getpid(), signal.SIGKILL)))
    assert not (harrys / "copy").exists()
    assert [name for name in os.listdir(harrys) if name.startswith("copy.") and name.endswith(".part")]
    users.backup(str(harrys / "copy"), lambda *_: None)
    assert integrity(harrys / "copy") == [("ok",)]


# -- the module ----------------------------------------------------------------


def test_an_underscore_stays_in_its_section():
    """And nothing is used above the section that it stands in, but at call time."""
    source = (HERE / "profiler.py").read_text("utf-8")
    banners = [number for number, line in enumerate(source.splitlines(), 1) if line.startswith("# -- ")]
    assert len(banners) == 10

    def section(line):
        return sum(banner <= line for banner in banners)

    tree = ast.parse(source)
    homes = {}
    for node in tree.body:
        named = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for name in (name for target in named for name in (ast.walk(target) if target is not node else [target])):
            known = getattr(name, "name", None) or getattr(name, "id", None)
            if known and known.startswith("_") and not known.startswith("__"):
                homes[known] = section(node.lineno)
    assert len(homes) > 50
    strangers = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in homes and section(node.lineno) != homes[node.id]
    }
    assert strangers == set()


def test_what_the_readme_promises_is_what_the_module_exports():
    assert profiler.__all__ == ["app", "application", "create_app", "hash_password", "verify_password"]
    assert not {name for name in profiler.__all__ if name not in README}


# -- documentation -------------------------------------------------------------


README = (HERE / "README.md").read_text("utf-8")


def transcript(title):
    """Return the steps of a chapter's console: each a command line and what it prints."""
    console = README.split(f"## {title}\n")[1].split("```console\n")[1].split("```")[0]
    return [step.split("\n", 1) for step in console.split("$ ")[1:]]


def comparable(text):
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|Date: .*", "TIME", text.replace("\r", ""))
    return re.sub(r'"[0-9a-f]{32}"', "TAG", text).strip()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    ("title", "count"), [("A session", 7), ("Check a password", 4), ("Two people edit one user", 5), ("Health", 1)]
)
def test_the_transcripts_in_the_readme_are_what_happens(tmp_path, title, count):
    steps = transcript(title)
    assert len(steps) == count
    with Command(tmp_path, "--port", "0", "--no-access-log") as command:
        address = "{}:{}".format(*command.address())
        if title != "A session":
            assert ask(command.server_address, "POST", fields=HARRY).status == 201
        tag = ask(command.server_address, "GET", "/users/1/").headers["ETag"]
        for line, expected in steps:
            line = re.sub(r'"[0-9a-f]{32}"', str(tag), line.replace("127.0.0.1:5000", address))
            output = subprocess.run([*shlex.split(line), "--silent"], capture_output=True, text=True).stdout
            assert comparable(output) == comparable(expected), line


def test_the_commands_of_an_operator_in_the_readme_are_what_happens(harrys):
    for line, expected in transcript("Keep it"):
        command = line.replace("python3", sys.executable)
        output = subprocess.run(command, shell=True, cwd=harrys, capture_output=True, text=True)
        assert (output.stdout, output.stderr, output.returncode) == (expected.strip("\n") + "\n", "", 0)
    assert verifies(harrys, "correct horse battery staple")
    assert integrity(harrys / "copy.sqlite3") == [("ok",)]


def test_the_python_in_the_readme_runs(tmp_path):
    example = README.split("## Use it from Python\n")[1].split("```python\n")[1].split("```")[0]
    program = f"{example}\nassert verify_password(password_hash, '1234')\nassert application.users.count() == 0"
    output = run_program(program, tmp_path)
    assert (output.returncode, output.stderr) == (0, "")


def test_the_readme_names_every_flag_and_variable(tmp_path):
    _, output, _ = run(tmp_path, "--help")
    names = set(re.findall(r"--[a-z-]+[a-z]|PROFILER_[A-Z]+", output)) - {"--help", "--version"}
    assert len(names) == 10
    assert not {name for name in names if f"`{name}`" not in README}


def test_the_readme_names_every_endpoint():
    for pattern, handlers in profiler.ROUTES:
        path_info = pattern.pattern.replace("([0-9]{1,19})", "1").replace("/?", "/").replace("[.]", ".")
        assert not {method for method in handlers if f"`{method} {path_info}`" not in README}


def test_the_readme_tells_the_limits_that_the_module_has():
    for limit in (
        f"of 1 to {profiler.MAX_LIMIT} users",
        f"over {profiler.MAX_BODY // 1024} KiB",
        f"at most {profiler.MAX_EMAIL} characters",
        f"at most {profiler.MAX_NAME} characters",
        f"at least {profiler.MIN_TOKEN} characters",
    ):
        assert limit in " ".join(README.split())
    assert f"profiler/{profiler.__version__}" in README


def test_the_changelog_tells_of_this_version():
    assert f"\n## {profiler.__version__}\n" in (HERE / "CHANGELOG.md").read_text("utf-8")
