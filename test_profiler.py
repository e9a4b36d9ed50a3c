"""Tests of profiler, in the order of its sections. A name is a claim; a docstring says why, if it must."""

from __future__ import annotations

import contextlib
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
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest

import profiler

HERE = pathlib.Path(__file__).parent
HARRY = {"first_name": "Harry", "last_name": "Potter", "email": "harry@example.com", "password": "1234"}
RON = {"first_name": "Ron", "last_name": "Weasley", "email": "ron@example.com", "password": "abcd"}
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "db.sqlite3"


@pytest.fixture
def application(path):
    with contextlib.closing(profiler.create_app(path, iterations=ITERATIONS)) as application:
        yield application


@pytest.fixture
def client(application):
    """Calls the application, with webtest's lint and wsgiref's validator both looking on."""
    return webtest.TestApp(validator(application), lint=True)


def execute(path, statement, parameters=()):
    """Run one statement from outside and return its rows."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def fill(path, count):
    """Make users with the ids 1..count, from outside, in WAL mode as the service does."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(profiler.read_schema())
        connection.executemany(
            'INSERT INTO "user" (first_name, last_name, email, password) VALUES (?, ?, ?, ?)',
            ((f"First{i}", f"Last{i}", f"user{i}@example.com", "x") for i in range(1, count + 1)),
        )


def call(application, method="GET", path="/users/", body=b"", **environ):
    """Call a WSGI application as a server would; return status, headers, body and what it wrote to wsgi.errors."""
    started = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.errors": io.StringIO(), **environ}
    if body:
        environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), **environ}
    environ.setdefault("wsgi.input", io.BytesIO(body))
    setup_testing_defaults(environ)
    result = application(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
    content = b"".join(result)
    if hasattr(result, "close"):
        result.close()
    [(status, headers)] = started
    return int(status[:3]), dict(headers), content, environ["wsgi.errors"].getvalue()


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


def test_the_file_is_in_wal_mode_and_commits_are_synced(application, path):
    assert application.users.count() == 0
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    assert application.users.database.read("PRAGMA synchronous") == [(2,)]


def test_a_relative_path_is_settled_when_the_application_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(profiler.create_app("db.sqlite3")) as application:
        monkeypatch.chdir("/")
        assert call(application)[0] == 200
    assert (tmp_path / "db.sqlite3").exists()


def test_two_connections_serve_all_threads(application, monkeypatch):
    connects = []
    connect = application.users.database._connect
    monkeypatch.setattr(application.users.database, "_connect", lambda: connects.append(1) or connect())
    with ThreadPoolExecutor(8) as threads:
        assert {answer[0] for answer in threads.map(lambda _: call(application), range(40))} == {200}
        assert {answer[0] for answer in threads.map(lambda _: call(application, "DELETE", "/users/1/"), range(40))} == {
            204
        }
    assert len(connects) == 2


def test_a_transaction_that_can_neither_commit_nor_roll_back_is_not_the_next_ones(application, path):
    """Here by a connection that forgot how; else by a disk that failed."""
    database = application.users.database

    class Broken(sqlite3.Connection):
        def __exit__(self, *_):
            return False

    with contextlib.closing(sqlite3.connect(path, isolation_level=None, factory=Broken)) as broken:
        broken.executescript(profiler.read_schema())
        database._writers[os.getpid()].connection = broken
        assert call(application, "POST", body=json.dumps(HARRY).encode())[0] == 201
        with pytest.raises(sqlite3.ProgrammingError):
            broken.execute("SELECT 1")
    assert application.users.count() == 0
    assert call(application, "POST", body=json.dumps(HARRY).encode())[0] == 201


def test_a_failed_transaction_leaves_nothing_and_its_connection_is_as_new(application, path):
    database = application.users.database
    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO \"user\" (first_name, last_name, email, password) VALUES ('a', 'b', 'c', 'd')")
        raise ZeroDivisionError
    assert not connection.in_transaction
    assert application.users.count() == 0


def in_a_fork(function):
    """Run the function in a child process; tell whether it returned something true."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
ignores_fork_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@needs_fork
@ignores_fork_warning
def test_a_connection_from_before_a_fork_is_set_aside(application):
    application.users.create("Harry", "Potter", "harry@example.com", "1234")
    database = application.users.database
    inherited = [database._readers[os.getpid()], database._writers[os.getpid()]]

    def child():
        status = call(application, "POST", body=json.dumps(RON).encode())[0]
        seats = [database._readers[os.getpid()], database._writers[os.getpid()]]
        apart = not {id(seat.connection) for seat in seats} & {id(seat.connection) for seat in inherited}
        application.close()
        return apart and status == 201 and all(seat.connection.execute("SELECT 1").fetchall() for seat in inherited)

    assert in_a_fork(child)
    assert application.users.count() == 2


@needs_fork
@ignores_fork_warning
def test_a_fork_in_the_middle_of_a_transaction_leaves_the_child_free(application, path):
    """Nobody would release the parent's locks there."""
    assert application.users.count() == 0
    with application.users.database.transaction(), application.users.database._readers[os.getpid()].lock:
        assert in_a_fork(lambda: call(application)[0] == 200)


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
                    os._exit(call(application, "POST", body=json.dumps(user).encode())[0] != 201)
                finally:
                    os._exit(2)
            children.append(pid)
        os.close(start_reader)
        os.close(start_writer)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 12
        assert execute(path, 'SELECT count(*) FROM "user"') == [(12,)]


def run_program(program, folder, **environ):
    """Run a Python program that may import profiler."""
    environ = {**os.environ, "PYTHONPATH": str(HERE), **environ}
    return subprocess.run([sys.executable, "-c", program], env=environ, cwd=folder, capture_output=True, text=True)


@contextlib.contextmanager
def locked(path, lock="BEGIN IMMEDIATE"):
    """Hold the write lock of a database, from outside."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(lock)
        yield connection
        connection.execute("ROLLBACK")


def test_a_locked_database_is_503_and_the_reason_is_logged_in_a_line(path, monkeypatch):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.01)
    fill(path, 1)
    with contextlib.closing(profiler.create_app(path, iterations=1)) as application, locked(path):
        status, headers, body, errors = call(application, "DELETE", "/users/1/")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body) == {"error": "The service is busy: try again"}
    assert errors.count("\n") == 1
    assert "database is locked" in errors
    assert execute(path, 'SELECT count(*) FROM "user"') == [(1,)]


def test_a_writer_that_waits_too_long_for_another_thread_is_503(application, monkeypatch):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.01)
    with application.users.database.transaction():
        status, headers, _, errors = call(application, "DELETE", "/users/1/")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("schema", [None, TUTORIAL_SCHEMA])
def test_reads_go_on_while_a_writer_holds_the_lock(path, schema):
    """Also the first of a process, and in a file that the lock keeps from being turned to WAL mode."""
    if schema:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(schema)
    else:
        fill(path, 0)
    with locked(path), contextlib.closing(profiler.create_app(path)) as application:
        assert call(application)[::2] == (200, b"[]")


def test_reads_go_on_where_nothing_can_be_made(path):
    """In WAL mode SQLite needs a file beside the database; a folder of its name keeps even root from making it."""
    fill(path, 2)
    os.mkdir(f"{path}-shm")
    with contextlib.closing(profiler.create_app(path, iterations=1)) as application:
        assert len(json.loads(call(application)[2])) == 2
        assert call(application, "GET", "/users/2/")[0] == 200
        status, _, _, errors = call(application, "DELETE", "/users/2/")
    assert status == 503
    assert errors.count("\n") == 1


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_file_with_a_log_or_a_journal_is_not_read_alone(path, suffix):
    """That would be to pass over what was committed, or to see what was not."""
    fill(path, 1)
    database = profiler.Database(str(path))
    error = sqlite3.OperationalError("unable to open database file")
    assert database._read_immutable("SELECT 1", (), error) == [(1,)]
    (path.parent / (path.name + suffix)).write_bytes(b"a page of somebody's account")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        database._read_immutable("SELECT 1", (), error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier ones do not tell a lock from another trouble")
def test_a_database_locked_at_first_use_is_503_for_each_reader_in_time(path, monkeypatch):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(TUTORIAL_SCHEMA)
    with locked(path, "BEGIN EXCLUSIVE"), contextlib.closing(profiler.create_app(path)) as application:
        started = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            assert {answer[0] for answer in threads.map(lambda _: call(application), range(8))} == {503}
        assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier ones do not tell a lock from another trouble")
def test_what_keeps_the_table_from_being_made_is_what_is_told(path, monkeypatch):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.01)
    execute(path, "CREATE TABLE other (a)")
    with locked(path), contextlib.closing(profiler.create_app(path)) as application:
        status, _, _, errors = call(application)
    assert (status, "database is locked" in errors) == (503, True)


@needs_fork
@ignores_fork_warning
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become nobody")
def test_a_place_that_may_only_be_read_is_served(tmp_path):
    path = tmp_path / "db.sqlite3"
    fill(path, 1)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    for parent in (tmp_path.parent, tmp_path.parent.parent):  # pytest keeps them to its user
        parent.chmod(0o755)

    def child():
        os.setuid(65534)
        application = profiler.create_app(path, iterations=1)
        written = call(application, "POST", body=json.dumps(HARRY).encode())
        return call(application)[0] == 200 and written[0] == 503 and written[3].count("\n") == 1

    assert in_a_fork(child)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier ones do not tell a lock from another trouble")
def test_a_list_that_fails_for_another_reason_than_a_blob_is_not_tried_twice(application, monkeypatch):
    reads = []

    def read(statement, parameters):
        reads.append(statement)
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = profiler.SQLITE_BUSY
        raise error

    monkeypatch.setattr(application.users.database, "read", read)
    assert call(application)[0] == 503
    assert len(reads) == 1


def test_what_is_no_database_is_500_and_stays_as_it_is(path):
    path.write_bytes(b"The diary of a famous wizard. " * 100)
    with contextlib.closing(profiler.create_app(path)) as application:
        status, _, body, errors = call(application)
    assert (status, json.loads(body)) == (500, {"error": "Internal server error"})
    assert "file is not a database" in errors
    assert path.read_bytes() == b"The diary of a famous wizard. " * 100
    assert os.listdir(path.parent) == [path.name]


def test_a_few_bytes_are_no_database_either(path):
    path.write_bytes(b"h")
    with contextlib.closing(profiler.create_app(path)) as application:
        assert call(application)[0] == 500
    assert path.read_bytes() == b"h"


def test_no_such_folder_is_503(tmp_path):
    status, _, body, errors = call(profiler.create_app(tmp_path / "missing" / "db.sqlite3"))
    assert status == 503
    assert "error" in json.loads(body)
    assert "unable to open database file" in errors


def test_a_file_in_place_of_the_folder_is_503(path):
    path.touch()
    assert call(profiler.create_app(path / "db.sqlite3"))[0] == 503


def test_a_table_of_another_shape_is_500(path):
    execute(path, 'CREATE TABLE "user" (name TEXT)')
    with contextlib.closing(profiler.create_app(path)) as application:
        status, _, body, errors = call(application)
    if sys.version_info >= (3, 11):  # earlier ones do not tell the mistake from a lock
        assert (status, json.loads(body)) == (500, {"error": "Internal server error"})
    assert "no such column" in errors


def test_the_schema_is_the_tutorials_table_column_for_column(path):
    fill(path, 0)
    with contextlib.closing(sqlite3.connect(":memory:")) as tutorial:
        tutorial.executescript(TUTORIAL_SCHEMA)
        columns = tutorial.execute("PRAGMA table_info(user)").fetchall()
    assert execute(path, 'PRAGMA table_info("user")') == columns


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
        assert call(application)[0] == 200


# -- users ---------------------------------------------------------------------


def test_create_stores_the_fields_and_a_hash(client, path):
    assert client.post_json(
        "/users/", {**HARRY, "id": 7, "admin": True, "created_on": "1980-07-31"}, status=201
    ).json == {"id": 1}
    [(id_, first_name, last_name, email, password_hash, created_on)] = execute(path, 'SELECT * FROM "user"')
    assert (id_, first_name, last_name, email) == (1, "Harry", "Potter", "harry@example.com")
    assert profiler.verify_password(password_hash, "1234")
    assert re.fullmatch("20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}", created_on)


def test_ids_are_never_used_again(client):
    for id_ in (1, 2, 3):
        assert client.post_json("/users/", HARRY, status=201).json == {"id": id_}
        client.delete(f"/users/{id_}/", status=204)


@pytest.mark.parametrize("email", ["harry@example.com", "HARRY@Example.COM"])
def test_an_email_is_taken_in_whatever_case(client, path, email):
    client.post_json("/users/", HARRY, status=201)
    answer = client.post_json("/users/", {**RON, "email": email}, status=400)
    assert answer.json == {"error": "This email is already registered"}
    assert execute(path, 'SELECT count(*) FROM "user"') == [(1,)]


def test_an_email_of_other_letters_is_taken_in_whatever_case_too(client):
    """SQLite's NOCASE knows ASCII alone."""
    client.post_json("/users/", {**HARRY, "email": "ŻÓŁW@Example.com"}, status=201)
    client.post_json("/users/", {**HARRY, "email": "żółw@example.COM"}, status=400)
    assert client.get("/users/1/").json["email"] == "żółw@example.com"


@pytest.mark.parametrize(("email", "other"), [("ΑΣ@x.y", "ας@x.y"), ("ẞ@x.y", "ß@x.y"), ("ǅ@x.y", "ǆ@x.y")])
def test_letters_that_have_odd_cases_have_them_too(client, email, other):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    client.post_json("/users/", {**HARRY, "email": other}, status=400)
    assert len(client.get("/users/1/").json["email"]) == len(email)


@pytest.mark.parametrize("email", ["ß@x.y", "İ@x.y"])
def test_other_letters_are_other_emails(client, email):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    client.post_json("/users/", {**HARRY, "email": "ss@x.y"}, status=201)
    client.post_json("/users/", {**HARRY, "email": "i@x.y"}, status=201)


def test_an_email_from_outside_is_found_as_it_is(client, path):
    """The tutorial's service folds nothing."""
    fill(path, 1)
    execute(path, 'UPDATE "user" SET email = ?', ("Émile@x.y",))
    client.post_json("/users/", {**HARRY, "email": "Émile@X.y"}, status=400)
    assert len(client.get("/users/?email=%C3%89mile@x.Y").json) == 1
    client.put_json("/users/1/", {**HARRY, "email": "Émile@x.y"}, status=200)


def test_a_taken_email_is_refused_before_the_password_is_hashed(client, monkeypatch):
    client.post_json("/users/", HARRY, status=201)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: pytest.fail("hashed"))
    client.post_json("/users/", HARRY, status=400)


def test_an_email_taken_during_the_hashing_is_refused_as_well(application, path, monkeypatch):
    """The first look is for speed; the statement itself decides."""
    monkeypatch.setattr(application.users, "_hash", lambda password: fill(path, 1) or "hash")
    body = json.dumps({**HARRY, "email": "USER1@example.com"}).encode()
    status, _, content, _ = call(application, "POST", body=body)
    assert (status, json.loads(content)) == (400, {"error": "This email is already registered"})


def test_eight_threads_fight_for_25_emails_and_each_has_one_winner(application):
    def post(number):
        body = json.dumps({**HARRY, "email": f"{number % 25}@example.com"}).encode()
        status, _, content, _ = call(application, "POST", body=body)
        return status, json.loads(content).get("error")

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(post, range(200)))
    assert answers.count((201, None)) == 25
    assert answers.count((400, "This email is already registered")) == 175


def test_no_more_hashes_run_at_once_than_hashers(path, monkeypatch):
    """The third thread waits for a core while two hash; too long a wait is told."""
    monkeypatch.setattr(profiler, "HASH_TIMEOUT", 0.05)
    started, go_on = threading.Semaphore(0), threading.Event()

    def slow_hash(password, iterations):
        started.release()
        assert go_on.wait(10)
        return "hash"

    monkeypatch.setattr(profiler, "hash_password", slow_hash)
    application = profiler.Application(profiler.Users(profiler.Database(str(path)), ITERATIONS, hashers=2), None)

    def post(number):
        return call(application, "POST", body=json.dumps({**HARRY, "email": f"{number}@example.com"}).encode())

    with contextlib.closing(application), ThreadPoolExecutor(2) as threads:
        two = [threads.submit(post, number) for number in (1, 2)]
        assert started.acquire(timeout=10)
        assert started.acquire(timeout=10)
        status, headers, _, errors = post(3)
        go_on.set()
        assert [answer.result()[0] for answer in two] == [201, 201]
    assert (status, headers["Retry-After"]) == (503, "1")
    assert errors.count("\n") == 1


def test_the_list_is_every_user_in_the_order_of_ids(client, path):
    assert client.get("/users/").json == []
    fill(path, 3)
    execute(path, 'UPDATE "user" SET id = 100 WHERE id = 1')
    users = client.get("/users/").json
    assert [user["id"] for user in users] == [2, 3, 100]
    assert all(list(user) == ["id", "first_name", "last_name", "email", "created_on"] for user in users)


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


def test_a_name_that_looks_like_the_end_of_a_batch_is_none(client, path):
    fill(path, 2 * profiler.BATCH)
    execute(
        path, 'UPDATE "user" SET first_name = ? WHERE id IN (?, ?)', ('{"id":9,', profiler.BATCH, 2 * profiler.BATCH)
    )
    assert [user["id"] for user in client.get("/users/").json] == list(range(1, 2 * profiler.BATCH + 1))


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


def test_update_changes_names_and_email_and_nothing_else(client, path):
    client.post_json("/users/", HARRY)
    [before] = execute(path, 'SELECT id, password, created_on FROM "user"')
    assert client.put_json("/users/1/", {**RON, "password": ["ignored"]}, status=200).json == {"id": 1}
    assert execute(path, 'SELECT first_name, last_name, email FROM "user"') == [("Ron", "Weasley", "ron@example.com")]
    assert execute(path, 'SELECT id, password, created_on FROM "user"') == [before]


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


def test_delete_is_204_whether_there_was_a_user_or_not(client, path):
    client.post_json("/users/", HARRY)
    for _ in range(2):
        answer = client.delete("/users/1/", status=204)
        assert answer.body == b""
    assert execute(path, 'SELECT * FROM "user"') == []


def test_a_file_of_the_tutorials_service_is_served_as_it_is(client, path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(TUTORIAL_SCHEMA)
    row = ("Harry", "Potter", "harry@example.com", "pbkdf2:sha256:150000$salt$0", "2020-01-02 03:04:05")
    execute(path, "INSERT INTO user (first_name, last_name, email, password, created_on) VALUES (?, ?, ?, ?, ?)", row)
    assert client.get("/users/1/").json["created_on"] == "2020-01-02 03:04:05"
    client.post_json("/users/", {**RON, "email": "Harry@example.com"}, status=400)
    assert client.post_json("/users/", RON, status=201).json == {"id": 2}
    client.put_json("/users/2/", {**RON, "email": "HARRY@example.com"}, status=400)
    assert execute(path, "SELECT sql FROM sqlite_master WHERE name = 'user'")[0][0] == TUTORIAL_SCHEMA.strip()[:-1]


def test_users_of_such_a_file_whose_emails_differ_only_in_case_can_be_updated(client, path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(TUTORIAL_SCHEMA)
    for email in ("harry@example.com", "HARRY@example.com"):
        execute(path, "INSERT INTO user (first_name, last_name, email, password) VALUES ('H', 'P', ?, 'x')", (email,))
    client.put_json("/users/1/", {**HARRY, "first_name": "H."}, status=200)
    client.put_json("/users/1/", {**HARRY, "email": "Harry@example.com"}, status=400)


# -- HTTP ----------------------------------------------------------------------


def post(application, body, **environ):
    """POST a body as it is; return the status and the error."""
    status, _, content, _ = call(application, "POST", body=body, **environ)
    return status, json.loads(content).get("error")


BODY = json.dumps(HARRY).encode()


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
    assert post(application, BODY, CONTENT_TYPE=content_type)[0] == 201


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/jsonp", "application/x-www-form-urlencoded", "application/json; charset=latin-1"],
)
def test_another_content_type_is_415(application, content_type):
    status, error = post(application, BODY, CONTENT_TYPE=content_type)
    assert status == 415
    assert "application/json" in error


class Unreadable(io.BytesIO):
    def read(self, *_):
        pytest.fail("read")


def test_a_body_over_the_cap_is_413_before_it_is_read(application):
    length = str(profiler.MAX_BODY + 1)
    assert (
        post(application, b"", CONTENT_TYPE="application/json", CONTENT_LENGTH=length, **{"wsgi.input": Unreadable()})[
            0
        ]
        == 413
    )


def test_a_body_of_the_cap_is_taken(application):
    body = BODY + b" " * (profiler.MAX_BODY - len(BODY))
    assert post(application, body)[0] == 201
    assert post(application, body + b" ")[0] == 413


@pytest.mark.parametrize("length", ["+5", "-1", "5.0", "0x5", "5 ", "٣", "five", "5,5"])
def test_a_length_that_is_not_digits_is_400(application, length):
    status, error = post(application, BODY, CONTENT_LENGTH=length)
    assert status == 400
    assert "Content-Length" in error


def test_a_length_of_5000_digits_is_413(application):
    assert post(application, BODY, CONTENT_LENGTH="9" * 5000)[0] == 413


def test_no_more_is_read_than_the_length(application):
    stream = io.BytesIO(BODY + b"GET / HTTP/1.1")
    assert post(application, BODY, **{"wsgi.input": stream})[0] == 201
    assert stream.read() == b"GET / HTTP/1.1"


class Trickle(io.BytesIO):
    """Gives a byte at a time, and insists on being told how many are wanted."""

    def read(self, size):
        assert size > 0
        return super().read(1)


def test_a_body_may_arrive_in_pieces(application):
    assert post(application, BODY, **{"wsgi.input": Trickle(BODY)})[0] == 201


def test_a_body_shorter_than_its_length_is_400(application):
    status, error = post(application, BODY, CONTENT_LENGTH=str(len(BODY) + 1))
    assert status == 400
    assert "shorter" in error


def test_a_client_that_leaves_or_stalls_is_no_error_of_ours(application):
    class Broken(io.BytesIO):
        def read(self, size):
            raise self.error

    for error, expected in ((ConnectionResetError(), 400), (ValueError("bad chunk"), 400), (socket.timeout(), 408)):
        stream = Broken()
        stream.error = error
        status, _, _, errors = call(application, "POST", body=BODY, **{"wsgi.input": stream})
        assert (status, errors) == (expected, "")


def test_a_chunked_body_that_the_server_decodes_is_read_up_to_the_cap(application):
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    assert post(application, BODY, **chunked)[0] == 201
    assert post(application, b" " * (profiler.MAX_BODY + 1), **chunked)[0] == 413


def test_a_chunked_body_that_the_server_does_not_decode_is_411(application):
    for length in ("", str(len(BODY))):
        assert post(application, BODY, HTTP_TRANSFER_ENCODING="chunked", CONTENT_LENGTH=length)[0] == 411


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{'first_name': 1}", "must be JSON"),
        (b"\xef\xbb\xbf{}", "must be JSON"),
        (b'{"first_name": NaN}', "NaN"),
        (b'{"first_name": -Infinity}', "Infinity"),
        (b'{"age": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"first_name": "H\xe9"}', "UTF-8"),
        (BODY.decode().encode("utf-16"), "UTF-8"),
        (b"[" * 501, "nested"),
        (b"[" * 60_000, "nested"),
        (b'{"a":' * 12_000, "nested"),
        (b"[]", "object"),
        (b'"Harry"', "object"),
        (b"null", "object"),
        (b"1", "object"),
    ],
)
def test_a_body_that_is_no_json_object_is_400_and_told_why(application, body, says):
    status, error = post(application, body, CONTENT_TYPE="application/json", CONTENT_LENGTH=str(len(body)))
    assert status == 400
    assert says in error


def test_brackets_within_a_string_nest_nothing(application):
    body = json.dumps({**HARRY, "password": '[{\\"' * 1000, "more": [[]] * 200}).encode()
    assert post(application, body) == (201, None)


def test_quotes_without_end_cost_no_time_to_look_through(application):
    """Each could be where a string begins, and the end of the body be looked for from there."""
    assert post(application, b'"' + b'\\"' * 32_000)[0] == 400


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


def test_a_password_may_hold_anything_but_nul(client, path):
    client.post_json("/users/", {**HARRY, "password": "a\0"}, status=400)
    client.post_json("/users/", {**HARRY, "password": " \n\x7f ż"}, status=201)
    [(password_hash,)] = execute(path, 'SELECT password FROM "user"')
    assert profiler.verify_password(password_hash, " \n\x7f ż")


@pytest.mark.parametrize("email", ["a@b", "a.b+c@d-e", "ż@ó.pl", "a" * 252 + "@b"])
def test_an_email_has_one_at_sign_with_something_on_both_sides(client, email):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    assert client.get("/users/1/").json["email"] == email


@pytest.mark.parametrize("email", ["harry", "@", "a@", "@b", "a@b@c", "a b@c", "a@b\u00a0", "a@b ", "a" * 253 + "@b"])
def test_another_email_is_400(client, email):
    assert "email must be" in client.post_json("/users/", {**HARRY, "email": email}, status=400).json["error"]


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
    assert call(application, "POST", body=BODY, SCRIPT_NAME=mount_point)[1]["Location"] == location


@pytest.mark.parametrize("slash", ["/", ""])
def test_the_last_slash_is_optional(client, slash):
    client.post_json(f"/users{slash}", HARRY, status=201)
    assert len(client.get(f"/users{slash}").json) == 1
    client.put_json(f"/users/1{slash}", RON, status=200)
    client.get(f"/users/1{slash}", status=200)
    client.delete(f"/users/1{slash}", status=204)


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
    fill_path = application.users.database.path
    fill(fill_path, 1)
    path_info = f"/users/{digits}/".encode().decode("latin-1")
    assert call(application, method, path_info, body=BODY)[0] == 404


@pytest.mark.parametrize(
    "path_info", ["", "/", "/users//", "/users/1//", "//users/", "/users/1/x", "/Users/", "/users/\n", "*"]
)
def test_another_path_is_404(application, path_info):
    status, _, body, _ = call(application, "GET", path_info)
    assert (status, list(json.loads(body))) == (404, ["error"])


@pytest.mark.parametrize(
    ("path_info", "allow"), [("/users/", "GET, HEAD, OPTIONS, POST"), ("/users/1/", "DELETE, GET, HEAD, OPTIONS, PUT")]
)
def test_another_method_is_405_and_options_tells_which(application, path_info, allow):
    for method in ("PATCH", "get", "PROPFIND", "TRACE"):
        status, headers, body, _ = call(application, method, path_info)
        assert (status, headers["Allow"], list(json.loads(body))) == (405, allow, ["error"])
    status, headers, body, _ = call(application, "OPTIONS", path_info)
    assert (status, headers["Allow"], body) == (204, allow, b"")


@pytest.mark.parametrize("path_info", ["/users/", "/users/1/", "/users/2/", "/nowhere/"])
def test_head_is_get_without_the_body(application, path_info):
    fill(application.users.database.path, 1)
    status, headers, body, _ = call(application, "GET", path_info)
    assert call(application, "HEAD", path_info) == (status, headers, b"", "")
    assert headers["Content-Length"] == str(len(body))


@pytest.fixture
def pages(client, path):
    fill(path, 250)
    return client


@pytest.mark.parametrize("form", ["/users/", "/users"])
def test_pages_are_all_the_users_once(pages, form):
    url, ids = f"{form}?limit=100", []
    for count, following in [
        (100, "</users/?limit=100&after=100>"),
        (100, "</users/?limit=100&after=200>"),
        (50, None),
    ]:
        answer = pages.get(url, status=200)
        assert len(answer.json) == count
        assert answer.headers.get("Link") == (following and f'{following}; rel="next"')
        ids += [user["id"] for user in answer.json]
        url = following and following[1:-1]
    assert ids == list(range(1, 251))


def test_the_last_page_may_be_full(pages):
    answer = pages.get("/users/?limit=50&after=200")
    assert len(answer.json) == 50
    assert "Link" not in answer.headers


def test_a_page_behind_the_last_user_is_empty(pages):
    assert pages.get("/users/?limit=1&after=250").json == []
    assert pages.get(f"/users/?after={profiler.MAX_ID}").json == []


def test_after_alone_goes_on_to_the_end(pages):
    assert [user["id"] for user in pages.get("/users/?after=240").json] == list(range(241, 251))
    assert len(pages.get("/users/?after=0").json) == 250


def test_link_carries_the_mount_point(application, path):
    fill(path, 2)
    headers = call(application, QUERY_STRING="limit=1", SCRIPT_NAME="/api")[1]
    assert headers["Link"] == '</api/users/?limit=1&after=1>; rel="next"'


def test_link_carries_the_email(client, path):
    """In a file that the tutorial's service made two users may have it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(TUTORIAL_SCHEMA)
    for email in ("a+b@example.com", "A+B@example.com", "other@example.com"):
        execute(path, "INSERT INTO user (first_name, last_name, email, password) VALUES ('H', 'P', ?, 'x')", (email,))
    link = client.get("/users/?email=a%2Bb@example.com&limit=1").headers["Link"]
    assert link == '</users/?limit=1&after=1&email=a%2Bb%40example.com>; rel="next"'
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
    assert len(pages.get("/users/?email=user7@example.com&after=6&limit=1").json) == 1


@pytest.mark.parametrize("query", ["a+b@example.com", "a%2Bb@example.com"])
def test_a_plus_in_an_email_is_a_plus(client, query):
    client.post_json("/users/", {**HARRY, "email": "a+b@example.com"})
    assert len(client.get(f"/users/?email={query}").json) == 1


def test_an_email_may_be_asked_for_in_any_letters(application):
    call(application, "POST", body=json.dumps({**HARRY, "email": "żółw@example.com"}).encode())
    for query in ("email=%C5%BB%C3%93%C5%81W@example.com", "email=żółw@example.com".encode().decode("latin-1")):
        assert len(json.loads(call(application, QUERY_STRING=query)[2])) == 1


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
def test_another_parameter_is_ignored(application, path, query):
    fill(path, 2)
    status, headers, body, _ = call(application, QUERY_STRING=query)
    assert (status, len(json.loads(body)), "Link" in headers) == (200, 2, False)


def test_a_page_does_not_look_at_the_users_before_it(application, path):
    fill(path, 1)
    for statement, parameters in (
        (profiler._PAGE, (0, 1)),
        (profiler._LIST, (0, 1)),
        (profiler._FIND, ("a", "b", 0, 1)),
    ):
        plan = execute(path, f"EXPLAIN QUERY PLAN {statement}", parameters)
        steps = [step[-1] for step in plan]
        assert any(
            re.match(r"SEARCH .*user USING (INTEGER PRIMARY KEY \(rowid>\?\)|.*INDEX .*\(email=\?.*\))", step)
            for step in steps
        )
        assert statement == profiler._FIND or not any("TEMP B-TREE" in step for step in steps)


# -- application ---------------------------------------------------------------


def test_every_response_has_the_safe_headers(application):
    requests = [
        ("GET", "/users/"),
        ("GET", "/users/9/"),
        ("DELETE", "/users/9/"),
        ("PATCH", "/users/"),
        ("OPTIONS", "/users/"),
        ("GET", "/"),
    ]
    for method, path_info in requests:
        status, headers, _, _ = call(application, method, path_info)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert ("Content-Type" in headers, "Content-Length" in headers) == (status != 204,) * 2


def test_what_goes_wrong_is_500_with_a_traceback_for_the_operator_alone(application, monkeypatch):
    monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
    status, _, body, errors = call(application, "GET", "/users/1/")
    assert (status, json.loads(body)) == (500, {"error": "Internal server error"})
    assert "ZeroDivisionError" in errors


def test_a_log_that_cannot_be_written_to_keeps_no_answer_back(application, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError

    monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
    assert call(application, "GET", "/users/1/", **{"wsgi.errors": Full()})[0] == 500
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.01)
    with application.users.database.transaction():
        assert call(application, "DELETE", "/users/1/", **{"wsgi.errors": Full()})[0] == 503


def test_no_password_and_no_hash_is_in_a_response_or_a_log(application, path, monkeypatch):
    said = []
    for method, path_info, body in [
        ("POST", "/users/", BODY),
        ("POST", "/users/", BODY),
        ("GET", "/users/", b""),
        ("PUT", "/users/1/", BODY),
    ]:
        said.append(call(application, method, path_info, body))
    monkeypatch.setattr(application.users, "update", lambda *_: 1 / 0)
    said.append(call(application, "PUT", "/users/1/", BODY))
    [(password_hash,)] = execute(path, 'SELECT password FROM "user"')
    assert "1234" not in repr(said)
    assert password_hash.split("$")[2] not in repr(said)


def test_both_names_are_one_application():
    assert profiler.app is profiler.application


def test_the_application_is_configured_by_the_environment_at_its_first_request(tmp_path):
    program = (
        "import profiler, os, io\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "os.environ['PROFILER_DATABASE'] = 'named.sqlite3'\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "print(b''.join(profiler.application(environ, lambda *_: None)))"
    )
    output = run_program(program, tmp_path)
    assert output.stdout == "b'[]'\n", output.stderr
    assert (tmp_path / "named.sqlite3").exists()


@pytest.mark.parametrize("value", [None, ""])
def test_without_argument_or_environment_the_database_is_the_tutorials(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROFILER_DATABASE", raising=False)
    if value is not None:
        monkeypatch.setenv("PROFILER_DATABASE", value)
    assert profiler.create_app().users.database.path == str(tmp_path / "db.sqlite3")


def test_a_path_given_to_create_app_goes_before_the_environment(path, monkeypatch):
    monkeypatch.setenv("PROFILER_DATABASE", "/elsewhere")
    assert profiler.create_app(path).users.database.path == str(path)


@pytest.mark.parametrize("iterations", [0, -1, profiler.MAX_ITERATIONS + 1])
def test_create_app_refuses_impossible_iterations(path, iterations):
    with pytest.raises(ValueError, match="iterations"):
        profiler.create_app(path, iterations=iterations)


def test_it_runs_as_a_cgi_program(tmp_path):
    program = "from wsgiref.handlers import CGIHandler; from profiler import app; CGIHandler().run(app)"
    environ = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/users/",
        "SCRIPT_NAME": "/cgi-bin/users",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(BODY)),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "GATEWAY_INTERFACE": "CGI/1.1",
    }
    output = subprocess.run([sys.executable, "-c", program], env=environ, cwd=tmp_path, input=BODY, capture_output=True)
    head, _, body = output.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"Status: 201 Created")
    assert b"Location: /cgi-bin/users/users/1/" in head
    assert json.loads(body) == {"id": 1}


# -- server --------------------------------------------------------------------


@pytest.fixture
def server(application, capsys):
    """A server in a thread. A test may shorten its limits before it connects."""
    with profiler.Server("127.0.0.1", 0, application, access_log=False) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.drain()
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
    """Return the next responses of a connection: for each its status, headers and body."""
    with connection.makefile("rb", buffering=0) as raw:
        stream = Stream(raw)
        for method in methods:
            response = http.client.HTTPResponse(stream, method=method)
            response.begin()
            yield response.status, response.headers, response.read()


def answer(connection, method="GET"):
    """Return the next response of a connection, which must be the last that is on its way."""
    [response] = answers(connection, method)
    return response


GET = b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /users/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_one_connection_carries_many_requests(server):
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(GET)
            status, headers, body = answer(connection)
            assert (status, body, headers["Connection"]) == (200, b"[]", None)


def test_requests_may_be_pipelined(server):
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY + GET + GET.replace(b"Host", b"Connection: close\r\nHost"))
        received = receive(connection)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"201", b"200", b"200"]
    assert received.count(b'"Harry"') == 2


@pytest.mark.parametrize(
    "request_",
    [GET.replace(b"1.1", b"1.0"), GET.replace(b"Host", b"Connection: Close\r\nHost"), b"GET /users/ HTTP/1.0\r\n\r\n"],
)
def test_a_client_that_wants_one_answer_gets_one(server, request_):
    with connected(server) as connection:
        connection.sendall(request_ + GET)
        received = receive(connection)
    assert received.count(b"HTTP/1.1 200 OK") == 1
    assert b"\r\nConnection: close\r\n" in received


def test_a_204_and_a_head_leave_the_connection_in_step(server):
    with connected(server) as connection:
        for method, path, expected in [
            ("DELETE", "/users/1/", 204),
            ("HEAD", "/users/", 200),
            ("OPTIONS", "/users/", 204),
        ]:
            connection.sendall(GET.replace(b"GET", method.encode()).replace(b"/users/", path.encode()))
            status, headers, body = answer(connection, method)
            assert (status, body) == (expected, b"")
            assert ("Content-Length" in headers) == (status == 200)
            assert "Transfer-Encoding" not in headers
        connection.sendall(GET)
        assert answer(connection)[2] == b"[]"


def test_a_streamed_list_is_chunked_so_that_its_end_can_be_told(server, path):
    fill(path, 3 * profiler.BATCH)
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(GET)
            status, headers, body = answer(connection)
            assert (status, headers["Transfer-Encoding"], len(json.loads(body))) == (200, "chunked", 3 * profiler.BATCH)
        connection.sendall(GET.replace(b"GET", b"HEAD"))
        assert answer(connection, "HEAD")[2] == b""
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert len(json.loads(body)) == 3 * profiler.BATCH


def test_a_list_that_fails_midway_has_no_end(server, path, capsys):
    fill(path, 3 * profiler.BATCH)
    reads = iter(range(2))
    read = server.app.users.database.read
    server.app.users.database.read = lambda *parameters: next(reads) >= 0 and read(*parameters)
    with connected(server) as connection:
        connection.sendall(GET)
        received = receive(connection)
    assert not received.endswith(b"0\r\n\r\n")
    assert "StopIteration" in capsys.readouterr().err


def test_a_client_may_wait_to_be_told_to_go_on(server):
    with connected(server) as connection:
        connection.sendall((POST % len(BODY)).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert answer(connection)[0] == 201
        connection.sendall(GET)
        assert answer(connection)[0] == 200


def test_a_client_that_waits_in_vain_is_told_why_and_disconnected(server):
    with connected(server) as connection:
        connection.sendall((POST % 100_000).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413")
    assert b"\r\nConnection: close\r\n" in received


@pytest.mark.parametrize(
    ("request_", "status"),
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
        (b"GET /users/\r\n", 400),
        (b"\r\n\r\nGET /users/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /users/ HTTP/0.9\r\n\r\n", 505),
        (b"GET /users/ HTTP/1.2\r\nHost: a\r\n\r\n", 505),
        (b"GET /users/ HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0x2\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: \xb2\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (b"POST /users/ HTTP/1.0\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n", 501),
        (b"POST /users/ HTTP/1.1\r\nHost: a\r\nExpect: a miracle\r\nContent-Length: 2\r\n\r\n{}", 417),
        (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 32768 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 100 + b"\r\n", 431),
    ],
)
def test_what_two_readers_might_read_otherwise_is_refused_and_the_connection_closed(server, request_, status):
    with connected(server) as connection:
        connection.sendall(request_ + GET)
        received = receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert len(re.findall(rb"HTTP/1.1 \d", received)) == 1
    for header in (
        b"Content-Type: application/json",
        b"Connection: close",
        b"X-Content-Type-Options: nosniff",
        b"Cache-Control: no-store",
    ):
        assert header in head.split(b"\r\n")
    assert list(json.loads(body)) == ["error"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n" + GET,
        GET.replace(b"Host: localhost", b"hOST:\t localhost:80 \t"),
        GET.replace(b"/users/", b"http://localhost/users/"),
        GET.replace(b"/users/", b"/%75sers/?q#\xff"),
        GET.replace(b"\r\n\r\n", b"\r\n" + b"X: \xff\r\n" * 99 + b"\r\n"),
        GET.replace(b"Host", b"Content_Length: 5\r\nTransfer_Encoding: chunked\r\nHost"),
        GET.replace(b"Host", b"Content-Length: 000\r\nHost"),
    ],
)
def test_what_is_odd_but_plain_is_served(server, request_):
    with connected(server) as connection:
        connection.sendall(request_ + GET)
        assert [response[::2] for response in answers(connection, "GET", "GET")] == [(200, b"[]")] * 2


def test_a_head_that_ends_too_early_is_400(server):
    with connected(server) as connection:
        connection.sendall(GET[:-2])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_was_not_read_is_not_the_next_request(server):
    with connected(server) as connection:
        connection.sendall(
            GET.replace(b"Host", b"Content-Length: %d\r\nHost" % len(GET)) + GET + GET.replace(b"/users/", b"/x/")
        )
        assert [status for status, _, _ in answers(connection, "GET", "GET")] == [200, 404]


def test_a_large_body_that_is_refused_closes_the_connection_and_its_sender_sees_why(server):
    with connected(server) as connection:
        connection.sendall(POST % 5_000_000 + b"x" * 5_000_000)
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in received


def test_a_body_that_is_cut_off_creates_nobody(server, path):
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")
    assert execute(path, "SELECT count(*) FROM sqlite_master WHERE name = 'user'") in ([(0,)], [(1,)])
    assert server.app.users.count() == 0


def trickle(connection, message, pause=0.02):
    """Send a byte at a time until the server has had enough."""
    connection.setblocking(False)
    for byte in message:
        with contextlib.suppress(OSError):
            connection.send(bytes([byte]))
        if select.select([connection], [], [], pause)[0]:
            break
    connection.settimeout(10)


def test_a_head_has_a_deadline_however_steadily_it_trickles(server):
    server.head_timeout = 0.1
    with connected(server) as connection:
        trickle(connection, GET)
        assert receive(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_has_a_deadline_however_steadily_it_trickles(server):
    server.body_timeout = 0.1
    with connected(server) as connection:
        connection.sendall(POST % len(BODY))
        trickle(connection, BODY)
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in received


def test_an_idle_connection_is_closed_without_a_word(server):
    server.idle_timeout = 0.05
    with connected(server) as connection:
        assert receive(connection) == b""
    with connected(server) as connection:
        connection.sendall(GET)
        assert receive(connection).count(b"HTTP/1.1") == 1


def test_a_client_that_does_not_read_is_dropped(server, path):
    server.send_timeout = 0.1
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    fill(path, 60 * profiler.BATCH)
    with connected(server) as connection:
        connection.sendall(GET * 20)
        assert connection.recv(1) == b"H"
        with server._closed:
            assert server._closed.wait_for(lambda: not server.connections, 10)
        with contextlib.suppress(ConnectionResetError):
            assert receive(connection).count(b"\r\n0\r\n\r\n") < 20


def test_a_client_that_reads_slowly_but_does_read_is_served(server, path):
    server.send_timeout = 0.2
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    fill(path, 40 * profiler.BATCH)
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        received = b""
        while part := connection.recv(1 << 16):
            received += part
            time.sleep(0.01)
    assert len(json.loads(received.partition(b"\r\n\r\n")[2])) == 40 * profiler.BATCH


def test_a_client_that_resets_the_connection_makes_no_noise(server, path, capsys):
    fill(path, 20 * profiler.BATCH)
    for _ in range(3):
        with connected(server) as connection:
            connection.sendall(GET * 5)
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with server._closed:
        assert server._closed.wait_for(lambda: not server.connections, 10)
    assert capsys.readouterr().err == ""


def test_a_connection_too_many_is_told_503(server):
    server.max_connections = 2
    with connected(server) as first, connected(server) as second:
        for connection in (first, second):
            connection.sendall(GET)
            assert answer(connection)[0] == 200
        with connected(server) as third:
            received = receive(third)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in received
        first.close()
        with server._closed:
            assert server._closed.wait_for(lambda: len(server.connections) < 2, 10)
        with connected(server) as third:
            third.sendall(GET)
            assert answer(third)[0] == 200


def test_a_connection_too_many_is_told_503_even_if_it_sends_a_body(server):
    server.max_connections = 1
    with connected(server) as first:
        first.sendall(GET)
        assert answer(first)[0] == 200
        with connected(server) as second:
            second.sendall(POST % 60_000 + b"x" * 60_000)
            assert receive(second).startswith(b"HTTP/1.1 503 ")


def test_many_too_many_are_not_told(server, monkeypatch):
    monkeypatch.setattr(profiler, "MAX_REFUSALS", 0)
    server.max_connections = 0
    with connected(server) as connection:
        assert receive(connection) == b""


def test_many_half_heads_delay_nobody(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(server)).sendall(b"GET /users/ HT")
        with connected(server) as connection:
            connection.settimeout(1)
            connection.sendall(GET)
            assert answer(connection)[0] == 200


def test_responses_tell_the_date_and_the_server_but_no_python(server):
    with connected(server) as connection:
        connection.sendall(GET)
        _, headers, _ = answer(connection)
    assert headers["Server"] == f"profiler/{profiler.__version__}"
    assert abs(parsedate_to_datetime(headers["Date"]).timestamp() - time.time()) < 60


def test_a_small_response_is_one_send(server, monkeypatch):
    sends = []
    send = profiler.RequestHandler.send
    monkeypatch.setattr(
        profiler.RequestHandler, "send", lambda self, message: sends.append(message) or send(self, message)
    )
    with connected(server) as connection:
        connection.sendall(GET)
        answer(connection)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) in (0, 1)
    assert len([message for message in sends if message]) == 1


def test_the_access_log_is_in_common_log_format_with_nothing_to_control_a_terminal(application, capsys):
    with profiler.Server("127.0.0.1", 0, application) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with connected(server) as connection:
            connection.sendall(GET + GET.replace(b"/users/", b'/\xff"\\') + GET.replace(b"/users/", b"/\x1b[2J"))
            receive(connection)
        server.shutdown()
        thread.join()
        server.drain()
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}(:\d\d){3} [+-]\d{4}\] "GET /users/ HTTP/1\.1" 200 2', first
    )
    assert '"GET /\\xff\\"\\\\ HTTP/1.1" 404' in second
    assert '"GET /\\x1b[2J HTTP/1.1" 400' in third


def test_draining_answers_what_is_in_flight_and_closes_what_is_idle(server, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(server.app.users, "_hash", lambda password: started.set() or (go_on.wait(10) and "hash"))
    with connected(server) as idle, connected(server) as busy:
        idle.sendall(GET)
        assert answer(idle)[0] == 200
        busy.sendall(POST % len(BODY) + BODY)
        assert started.wait(10)
        server.shutdown()
        drain = threading.Thread(target=server.drain)
        drain.start()
        assert idle.recv(1) == b""
        assert drain.is_alive()
        go_on.set()
        received = receive(busy)
    drain.join()
    assert received.startswith(b"HTTP/1.1 201 ")
    assert b"\r\nConnection: close\r\n" in received


def test_draining_does_not_wait_for_a_connection_whose_response_had_begun(server, path):
    """Its head could not say that it would be the last."""
    fill(path, 100 * profiler.BATCH)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    with connected(server) as connection:
        connection.sendall(GET)
        received = connection.recv(1)
        server.shutdown()
        drain = threading.Thread(target=server.drain)
        drain.start()
        until(lambda: server.draining)
        received += receive(connection)
    drain.join(profiler.LINGER_TIMEOUT)
    assert not drain.is_alive()
    assert b"\r\nConnection: close\r\n" not in received
    assert received.endswith(b"\r\n0\r\n\r\n")


def test_draining_ends_in_time(server, monkeypatch):
    server.drain_timeout = 0.05
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(server.app.users, "_hash", lambda password: started.set() or (go_on.wait(10) and "hash"))
    with connected(server) as connection:
        connection.sendall(POST % len(BODY) + BODY)
        assert started.wait(10)
        server.shutdown()
        server.drain()
        assert server.connections
        go_on.set()
        receive(connection)


TOKEN = "0123456789abcdef"


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
        ("GET", "/"),
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
    status, headers, body, errors = call(guarded, method, path_info, **environ)
    assert (status, headers["WWW-Authenticate"], errors) == (401, "Bearer", "")
    assert body == b"" if method == "HEAD" else list(json.loads(body)) == ["error"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_with_the_token_all_is_as_without_one(guarded, scheme):
    assert call(guarded, HTTP_AUTHORIZATION=f"{scheme} {TOKEN}")[0] == 200


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
        assert call(application)[0] == 401
        assert call(application, HTTP_AUTHORIZATION=f"Bearer {TOKEN}")[0] == 200


def test_a_bad_environment_lets_nobody_in(tmp_path):
    program = (
        "import profiler, io\n"
        "from wsgiref.util import setup_testing_defaults\n"
        "environ = {'PATH_INFO': '/users/'}\n"
        "setup_testing_defaults(environ)\n"
        "environ['wsgi.errors'] = errors = io.StringIO()\n"
        "print(b''.join(profiler.application(environ, lambda status, headers: print(status))))\n"
        "print('token must be' in errors.getvalue())"
    )
    output = run_program(program, tmp_path, PROFILER_TOKEN="short")
    assert output.stdout.splitlines() == [
        "500 Internal Server Error",
        """b'{"error": "Internal server error"}'""",
        "True",
    ]


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
        return response.status, response.read()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_files_in_an_empty_folder_serve_until_a_signal(tmp_path, signum):
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert ask(address, "POST", fields=HARRY) == (201, b'{"id": 1}')
        assert ask(address)[0] == 200
        status, output, errors = command.end(signum)
    assert status == 0
    assert output == ""
    for word in (str(tmp_path / "db.sqlite3"), "0 users", "Ctrl-C"):
        assert word in command.banner
    assert [line.split('"')[1] for line in errors.splitlines()] == ["POST /users/ HTTP/1.1", "GET /users/ HTTP/1.1"]
    assert sorted(os.listdir(tmp_path)) == ["db.sqlite3", "profiler.py", "schema.sql"]  # the log is merged and gone
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(1,)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_right_after_the_banner_and_another_are_a_clean_end(tmp_path, workers):
    for _ in range(3):
        with Command(tmp_path, "--port", "0", "--workers", workers) as command:
            command.address()
            command.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            command.process.send_signal(signal.SIGINT)
            assert command.end(signal.SIGTERM) == (0, "", "")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_it_serves_without_a_log(tmp_path):
    for redirection in ("2>/dev/full", "2>&-"):
        command = ["sh", "-c", f"exec {sys.executable} profiler.py --port 0 {redirection}"]
        for name in ("profiler.py", "schema.sql"):
            shutil.copy(HERE / name, tmp_path)
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                for _ in range(2):
                    connection.request("GET", "/users/")
                    assert connection.getresponse().read() == b"[]"
            process.terminate()
        assert process.returncode == 0


def test_the_log_may_be_silent(tmp_path):
    with Command(tmp_path, "--port", "0", "--no-access-log") as command:
        ask(command.address())
        assert command.end(signal.SIGTERM)[2] == ""


def test_settings_are_flags_over_environment_over_defaults(tmp_path):
    with Command(tmp_path, "--database", "flag.sqlite3", PROFILER_DATABASE="environment.sqlite3", PORT="0") as command:
        command.address()
        assert "flag.sqlite3" in command.banner
    with Command(tmp_path, PROFILER_DATABASE="environment.sqlite3", PROFILER_PORT="0", PORT="bad") as command:
        command.address()
        assert "environment.sqlite3" in command.banner


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--port", "http"], {}, "--port: 'http'"),
        (["--port", "65536"], {}, "--port: '65536'"),
        (["--port", "-1"], {}, "--port"),
        (["--port", "\u0663"], {}, "--port"),
        ([], {"PROFILER_PORT": "http"}, "'http', from the flag, PROFILER_PORT or PORT,"),
        ([], {"PORT": "http"}, "'http', from the flag, PROFILER_PORT or PORT,"),
        (["--workers", "0"], {}, "--workers: '0'"),
        ([], {"PROFILER_WORKERS": "many"}, "'many', from the flag or PROFILER_WORKERS,"),
        (["--host", "no.such.host.invalid"], {}, "--host: 'no.such.host.invalid'"),
        (["--database", ":memory:"], {}, "must be a file"),
        (["--token-file", "missing"], {}, "'missing'"),
        ([], {"PROFILER_TOKEN": "short"}, "token must be at least 16"),
        (["--host", "0.0.0.0"], {}, "--anonymous"),
        (["--host", "::"], {}, "--anonymous"),
        (["--host", ""], {}, "--host"),
        (["--frobnicate"], {}, "--frobnicate"),
        (["--host", "::1234"], {}, "--anonymous"),
        (["--force"], {}, "initialise-database"),
    ],
)
def test_a_bad_value_is_exit_2_and_a_line_that_names_it(tmp_path, arguments, environ, named):
    status, output, errors = run(tmp_path, *arguments, **environ)
    assert (status, output) == (2, "")
    assert named in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_token_opens_other_addresses_and_is_asked_for(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", "--token-file", "token") as command:
        address = command.address()
        assert ask(address)[0] == 401
        assert ask(address, Authorization=f"Bearer {TOKEN}")[0] == 200
        _, output, errors = command.end(signal.SIGTERM)
    assert TOKEN not in output + errors


def test_a_token_on_the_command_line_is_no_abbreviation(tmp_path):
    """It would be in the process list."""
    assert run(tmp_path, "--token", TOKEN)[0] == 2


def test_anonymous_opens_other_addresses_to_all(tmp_path):
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", "--anonymous") as command:
        assert ask(command.address())[0] == 200


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


def test_version_and_help(tmp_path):
    assert run(tmp_path, "--version") == (0, f"profiler {profiler.__version__}\n", "")
    status, output, _ = run(tmp_path, "--help")
    assert status == 0
    for word in (
        "initialise-database",
        "--host",
        "--port",
        "--database",
        "--workers",
        "--token-file",
        "--anonymous",
        "PROFILER_PORT",
    ):
        assert word in output


def test_initialise_database_makes_the_table(tmp_path):
    assert run(tmp_path, "initialise-database", "--database", "a.sqlite3") == (
        0,
        "Successfully created database schema.\n",
        "",
    )
    assert run(tmp_path, "--database", "a.sqlite3", "initialise-database")[0] == 0
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


def test_initialise_database_minds_no_setting_of_the_server(tmp_path):
    assert run(tmp_path, "initialise-database", PROFILER_HOST="0.0.0.0")[0] == 0


def test_without_the_schema_it_says_so(tmp_path):
    with Command(tmp_path, "--port", "0") as command:
        command.end(signal.SIGKILL)
    (tmp_path / "schema.sql").unlink()
    output = subprocess.run([sys.executable, "profiler.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (output.returncode, output.stderr.count("\n")) == (1, 1)
    assert "schema.sql" in output.stderr


def children(pid):
    return {int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.fixture
def workers(tmp_path):
    if not pathlib.Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc")
    with Command(tmp_path, "--port", "0", "--workers", "2", "--no-access-log") as command:
        command.address()
        yield command


def until(condition):
    """Wait for what no event tells."""
    deadline = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_workers_share_the_port_and_end_together(workers, tmp_path):
    pids = until(lambda: len(pids := children(workers.process.pid)) == 2 and pids)
    for number in range(4):
        assert ask(workers.server_address, "POST", fields={**HARRY, "email": f"{number}@example.com"})[0] == 201
    status, _, errors = workers.end(signal.SIGTERM)
    assert (status, errors) == (0, "")
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
    assert sorted(os.listdir(tmp_path)) == ["db.sqlite3", "profiler.py", "schema.sql"]
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(4,)]


def test_a_worker_that_dies_is_replaced_and_the_log_says_so(workers):
    pids = until(lambda: len(pids := children(workers.process.pid)) == 2 and pids)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(now := children(workers.process.pid)) == 2 and victim not in now)
    assert ask(workers.server_address)[0] == 200
    status, _, errors = workers.end(signal.SIGINT)
    assert status == 0
    assert errors == f"profiler: worker {victim} ended with -9: another takes its place\n"


def test_a_child_that_is_no_worker_is_nothing_to_the_supervisor(tmp_path):
    """A shell may leave one behind; to process 1 of a container the system gives them."""
    if not pathlib.Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc")
    with Command(tmp_path) as command:
        command.end(signal.SIGKILL)
    shell = f"sleep 0.5 & exec {sys.executable} profiler.py --port 0 --workers 2 --no-access-log"
    process = subprocess.Popen(
        ["sh", "-c", shell], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    until(lambda: len(children(process.pid)) == 3)
    until(lambda: len(children(process.pid)) == 2)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_workers_do_not_outlive_a_supervisor_that_is_killed(workers):
    pids = until(lambda: len(pids := children(workers.process.pid)) == 2 and pids)
    workers.process.kill()
    until(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# -- documentation -------------------------------------------------------------

README = (HERE / "README.md").read_text("utf-8")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_session_in_the_readme_is_what_happens(tmp_path):
    session = README.split("## A session")[1].split("```console\n")[1].split("```")[0]
    steps = [step.split("\n", 1) for step in session.split("$ ")[1:]]
    assert len(steps) == 7

    def comparable(text):
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|Date: .*", "TIME", text.replace("\r", "")).strip()

    with Command(tmp_path, "--port", "0") as command:
        address = "{}:{}".format(*command.address())
        for line, expected in steps:
            arguments = shlex.split(line.replace("127.0.0.1:5000", address))
            output = subprocess.run([*arguments, "--silent"], capture_output=True, text=True).stdout
            assert comparable(output) == comparable(expected)


def test_the_readme_names_every_flag_and_variable(tmp_path):
    _, output, _ = run(tmp_path, "--help")
    names = set(re.findall(r"--[a-z-]+[a-z]|PROFILER_[A-Z]+", output)) - {"--help", "--version"}
    assert len(names) == 13
    assert not {name for name in names if f"`{name}`" not in README}


def test_the_readme_tells_the_limits_that_the_module_has():
    for limit in (
        f"of 1 to {profiler.MAX_LIMIT} users",
        f"over {profiler.MAX_BODY // 1024} KiB",
        f"at most {profiler.MAX_EMAIL} characters",
        f"up to {profiler.MAX_WORKERS}",
    ):
        assert limit in " ".join(README.split())
    assert f"at least {profiler.MIN_TOKEN} characters" in README
    assert f"profiler/{profiler.__version__}" in README


def test_the_changelog_tells_of_this_version():
    assert f"\n## {profiler.__version__}\n" in (HERE / "CHANGELOG.md").read_text("utf-8")
