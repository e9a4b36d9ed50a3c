"""Tests of profiler_sqlalchemy, on a PostgreSQL and a MariaDB that they start themselves. A name is a claim.

Where the programs of a server are not installed its tests are skipped. Those of clusters run with `-m cluster` alone.
"""

from __future__ import annotations

import contextlib
import http.client
import inspect
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

fcntl, pwd, termios = (pytest.importorskip(name, reason="needs a Unix") for name in ("fcntl", "pwd", "termios"))
sqlalchemy = pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
pymysql = pytest.importorskip("pymysql", reason="PyMySQL is not installed")

import profiler  # noqa: E402
import profiler_sqlalchemy  # noqa: E402
import test_profiler  # noqa: E402
from test_profiler import (  # noqa: E402, F401
    HARRY,
    HERE,
    ITERATIONS,
    RON,
    TUTORIAL_SCHEMA,
    call,
    client,
    execute,
    fill,
    ignores_fork_warning,
    in_a_fork,
    path,
    run_program,
    slow_hash,
    users,
)

SECRET = "h0rcrux"  # the password of every server


def until(condition, seconds=10):
    """Wait for what no event tells."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return value


# -- servers -------------------------------------------------------------------


def program(name, *folders):
    """Return the path of a server's program, or skip the test."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", *folders])
    return shutil.which(name, path=path) or pytest.skip(f"{name} is not installed")


def free_port():
    """Return a port that nobody has, below those that the system gives to clients meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """A database server in a folder of its own, on a free port of 127.0.0.1."""

    account = "nobody"  # who runs it if root must not

    def __init__(self):
        self.port, self.process, self.shared = free_port(), None, None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="profiler-"))
        self.folder.chmod(0o755)
        self.credentials = {}
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            account = names.get(self.account) or names["nobody"]
            self.credentials = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self.log = self.folder / "log"

    def run(self, *command):
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self.credentials)

    def start(self, *arguments):
        command = [*self.command(), *arguments]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True, **self.credentials
            )
        until(self.answers, 60)

    def answers(self):
        assert self.process.poll() is None, self.log.read_text("utf-8", "replace")[-6000:]
        with contextlib.suppress(psycopg.Error, pymysql.Error):
            self.execute("SELECT 1")
            return True

    def stop(self, signum=None):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signum or self.stop_signal)
            self.process.wait(timeout=60)

    def kill(self):
        """End it, and what it started, as a machine that loses its power does."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.stop(signal.SIGKILL)
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def close(self):
        self.stop(self.end_signal)
        shutil.rmtree(self.folder)

    def make_database(self, options=""):
        """Return the URL of a new, empty database."""
        name = f"test{random.randrange(10**9)}"
        self.execute(f"CREATE DATABASE {name} {options}")
        return self.url(name)


class PostgreSQL(Server):
    account = "postgres"
    table = '"user"'
    stop_signal, end_signal = signal.SIGINT, signal.SIGQUIT  # without waiting for clients; without saving anything

    def __init__(self, **settings):
        folders = sorted(map(str, pathlib.Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
        self.programs = pathlib.Path(program("postgres", *folders)).resolve().parent
        super().__init__()
        self.data = self.folder / "data"
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "log_line_prefix": "%d|",
            **settings,
        }

    def initialise(self):
        password = self.folder / "password"
        password.write_text(SECRET)
        password.chmod(0o644)
        self.run(
            self.programs / "initdb", "-D", self.data, "-U", "app", "-E", "UTF8", "--locale=C", "-A", "scram-sha-256",
            f"--pwfile={password}", "-N",
        )  # fmt: skip

    def allow(self, url):
        """Return the URL for an account that may change the rows of the table, and nothing else."""
        self.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {self.table} TO limited", database_of(url))
        return self.url(database_of(url), "limited")

    def command(self):
        settings = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        return [self.programs / "postgres", "-D", self.data, *settings]

    def execute(self, statement, database="postgres"):
        with self.connect(database) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else None

    def connect(self, database="postgres"):
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="app", password=SECRET, dbname=database, autocommit=True
        )

    def url(self, database, user="app"):
        return f"postgresql://{user}:{SECRET}@127.0.0.1:{self.port}/{database}"


class MariaDB(Server):
    account = "mysql"
    table = "user"
    stop_signal, end_signal = signal.SIGTERM, signal.SIGKILL

    def __init__(self, **settings):
        self.program, self.installer = program("mariadbd"), program("mariadb-install-db")
        super().__init__()
        self.data = self.folder / "data"
        self.settings = {
            "datadir": self.data,
            "port": self.port,
            "bind-address": "127.0.0.1",
            "skip-name-resolve": 1,  # or the anonymous account of localhost would go before ours
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
            "innodb-flush-log-at-trx-commit": 0,
            "character-set-server": "latin1",  # which the service must not mind
            "sql-mode": "",
            **settings,
        }

    def install(self):
        self.run(
            self.installer, "--no-defaults", f"--datadir={self.data}", "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )  # fmt: skip

    def initialise(self, *arguments):
        self.install()
        setup = self.folder / "setup.sql"
        setup.write_text(
            f"CREATE USER app IDENTIFIED BY '{SECRET}';\n"
            f"GRANT ALL ON *.* TO app WITH GRANT OPTION;\nCREATE USER limited IDENTIFIED BY '{SECRET}';\n"
        )
        self.settings["init-file"] = setup
        self.start(*arguments)
        del self.settings["init-file"]

    def allow(self, url):
        name = database_of(url)
        self.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.{self.table} TO limited")
        return self.url(name, "limited")

    def command(self):
        return [self.program, "--no-defaults", *(f"--{name}={value}" for name, value in self.settings.items())]

    def execute(self, statement, database=None):
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def connect(self, database=None):
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="app", password=SECRET, database=database, autocommit=True,
            ssl_disabled=True,
        )  # fmt: skip

    def url(self, database, user="app"):
        return f"mysql://{user}:{SECRET}@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="session")
def postgresql():
    with contextlib.closing(PostgreSQL()) as server:
        server.initialise()
        server.start()
        server.execute(f"CREATE ROLE limited LOGIN PASSWORD '{SECRET}'")
        yield server


@pytest.fixture(scope="session")
def mariadb():
    with contextlib.closing(MariaDB()) as server:
        server.initialise()
        yield server


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def url(server):
    """The URL of a database without a table, which costs less to make than a database does."""
    if server.shared is None:
        server.shared = server.make_database()
    server.execute(f"DROP TABLE IF EXISTS {server.table}", database_of(server.shared))
    return server.shared


def database_of(url):
    return url.rpartition("/")[2]


@contextlib.contextmanager
def make_app(database):
    with contextlib.closing(profiler.create_app(database, iterations=ITERATIONS)) as application:
        yield application


@pytest.fixture
def application(url):
    """An application on a server. PyMySQL takes 40 ms to make ready for TLS, at each connection: once will do."""
    with make_app(url + "?ssl_disabled=1" if url.startswith("mysql") else url) as application:
        yield application


def post(application, fields=HARRY):
    return call(application, "POST", fields=fields)


def fill_table(server, url, count, application):
    """Make users with the ids 1..count, from outside."""
    application.users.prepare()
    rows = ", ".join(
        f"({i}, 'First{i}', 'Last{i}', 'user{i}@example.com', 'user{i}@example.com', 'x', '2026-11-22 10:50:00')"
        for i in range(1, count + 1)
    )
    server.execute(f"INSERT INTO {server.table} VALUES {rows}", database_of(url))


# -- the claims of test_profiler -----------------------------------------------
# They are of every storage, if they are about users and take the application from the fixture, which is another here.

SECTIONS = {"users", "endpoints", "application"}
SQLITES = {"path", "tmp_path", "tutorial_path", "database", "twins"}  # fixtures that make or read a file


def is_claim_of_every_storage(test):
    names = set(inspect.signature(test).parameters)
    return not names.isdisjoint({"application", "client", "users"}) and names.isdisjoint(SQLITES)


_, *parts = re.split("^# -- ([^-]+) -+$", inspect.getsource(test_profiler), flags=re.MULTILINE)
for section, text in zip(parts[::2], parts[1::2]):
    for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE) if section in SECTIONS else ():
        if is_claim_of_every_storage(getattr(test_profiler, name)):
            globals()[name] = getattr(test_profiler, name)


# -- the same answers ----------------------------------------------------------


def user(**fields):
    return json.dumps({**HARRY, **fields}).encode()


def profile(**fields):
    return json.dumps({"first_name": "Ginny", "last_name": "Weasley", "email": "ginny@example.com", **fields}).encode()


def passwords(old, new):
    return json.dumps({"old_password": old, "new_password": new}).encode()


HOSTILE = [
    "", " ", "\t", None, 1, True, [], {}, "\0", "a\nb", "a\x1bb", "a\x7fb", "a\x85b", "\ud800", "x" * 255, "x" * 256,
    "\U0001f9d9" * 255, "\U0001f9d9" * 256,
    "\uffff", "\U0010ffff", " a ", "a ", "'; DROP TABLE user; --", '"\\/',
    "%s %(x)s :id ? {0} $1", "\u202e\u00e9e\u0301", "\ufeff",
]  # fmt: skip
EMAILS = [
    "HARRY@EXAMPLE.COM", "harry@example.com ", "harry@", "@example.com", "a@b@c", "a b@c", "\u00e9@x", "\u00c9@x",
    "e@x",
    "E@X", "\u0130@x", "i@x", "\u017f@x", "s@x", "\U0001f9d9@x", "\U0001f409@x", "\u00df@x", "ss@x", "%@x", "_@x",
    "a" * 252 + "@x", "a" * 253 + "@x", "\U0001f9d9" * 252 + "@x",
]  # fmt: skip
IDS = ["0", "00", "01", "1", "2", "9223372036854775807", "9223372036854775808", "9" * 5000, "-1", "1.0", "x", "\u0661"]
QUERIES = [
    "limit=1", "limit=2&after=1", "limit=3&sort=-id", "limit=2&sort=-id&after=9", "sort=-id", "sort=id&after=5",
    "limit=0", "limit=1001", "limit=x", "after=-1", "after=9223372036854775807", "after=9223372036854775808",
    "email=harry@example.com", "email=HARRY@example.com", "email=nobody@example.com", "email=", "email=%C3%89@x",
    "email=%C3%A9@x", "email=e@x&limit=1", "email=harry@example.com&after=1", "sort=name", "limit=1&limit=2",
    "email=%F0%9F%A7%99@x", "email=%25@x", "email=%FF@x",
]  # fmt: skip
REQUESTS = [
    ("GET", "/users/"),
    ("GET", "/health/"),
    ("GET", "/users/1/"),
    ("PUT", "/users/1/", profile()),
    ("POST", "/users/", user()),
    ("POST", "/users/", user()),
    ("POST", "/users/", user(email="Harry@Example.com")),
    ("POST", "/users/", json.dumps(RON).encode()),
    *(("POST", "/users/", user(first_name=value, email=f"f{i}@x")) for i, value in enumerate(HOSTILE)),
    *(("PUT", "/users/2/", profile(last_name=value)) for value in HOSTILE),
    *(("POST", "/users/", user(email=email)) for email in EMAILS),
    *(("PUT", "/users/2/", profile(email=email)) for email in EMAILS),
    *(("GET", f"/users/{user_id}/") for user_id in IDS),
    *(("PUT", f"/users/{user_id}/", profile(email="HARRY@example.com")) for user_id in IDS),
    *(("GET", "/users/", b"", {"QUERY_STRING": query}) for query in QUERIES),
    ("POST", "/users/", b"[" * 100),
    ("POST", "/users/", b'"' + b"x" * 70_000 + b'"'),
    ("POST", "/users/verify/", json.dumps({"email": "hARRY@example.com", "password": "1234"}).encode()),
    ("POST", "/users/verify/", json.dumps({"email": "harry@example.com", "password": "12345"}).encode()),
    ("POST", "/users/verify/", json.dumps({"email": "nobody@example.com", "password": "1234"}).encode()),
    ("PUT", "/users/1/password/", passwords("1234", "\U0001f9d9\n")),
    ("PUT", "/users/1/password/", passwords("1234", "5678")),
    ("PUT", "/users/1/password/", passwords("\U0001f9d9\n", "a\0")),
    ("PUT", "/users/99999/password/", passwords("1234", "5678")),
    ("POST", "/users/verify/", json.dumps({"email": "harry@example.com", "password": "\U0001f9d9\n"}).encode()),
    ("GET", "/users/1/"),
    ("GET", "/users/1/", b"", {"HTTP_IF_NONE_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(email="harry@example.com"), {"HTTP_IF_MATCH": '"stale"'}),
    ("PUT", "/users/1/", profile(email="ron@example.com"), {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(email="Harry@example.com"), {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(), {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/99999/", profile(), {"HTTP_IF_MATCH": "ETAG"}),
    ("GET", "/users/1/"),
    ("DELETE", "/users/1/", b"", {"HTTP_IF_MATCH": '"stale"'}),
    ("DELETE", "/users/99999/", b"", {"HTTP_IF_MATCH": "*"}),
    ("DELETE", "/users/99999/"),
    ("DELETE", "/users/0/"),
    ("DELETE", "/users/1/", b"", {"HTTP_IF_MATCH": "ETAG"}),
    ("DELETE", "/users/1/"),
    ("GET", "/users/1/"),
    ("POST", "/users/", user(email="harry@example.com")),
    ("GET", "/users/"),
]


def answer_all(application):
    """Return what it answers to all requests, but for times and what is made of them."""
    answers, etag = [], ""
    for method, path_info, *rest in REQUESTS:
        body, environ = (*rest, b"", {})[:2] if len(rest) < 2 else rest
        environ = {name: etag if value == "ETAG" else value for name, value in (environ or {}).items()}
        status, headers, content, errors = call(application, method, path_info, body, **environ)
        etag = headers.get("ETag", etag)
        headers = {name: "ETAG" if name == "ETag" else value for name, value in headers.items()}
        content = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", b"TIME", content)
        answers.append((status, headers, content, errors))
    return answers


def test_every_engine_answers_as_sqlite_does_byte_for_byte(application, tmp_path):
    with make_app(tmp_path / "db.sqlite3") as sqlite:
        expected = answer_all(sqlite)
    assert len(REQUESTS) >= 124
    assert {status for status, *_ in expected} == {200, 201, 204, 304, 400, 403, 404, 412, 413}
    for request, answer, its in zip(REQUESTS, answer_all(application), expected):
        assert answer == its, request


def test_json_is_as_sqlite_writes_it_whatever_is_stored(application, tmp_path):
    """The endpoints let no control character in, but another program may have stored one."""
    text = "".join(map(chr, range(1, 0x250))) + "\u2028\u2029\ufeff\ufffe\uffff\U0001f9d9\U0010ffff"
    texts = [text[start : start + 100] for start in range(0, len(text), 100)]
    with make_app(tmp_path / "db.sqlite3") as sqlite:
        for number, text in enumerate(texts, start=1):
            for users in (application.users, sqlite.users):
                assert users.insert(text, text, f"{number}@x", "x") == number
            one, other = application.users.get(number), sqlite.users.get(number)
            assert one.split(b',"created_on"')[0] == other.split(b',"created_on"')[0]


# -- table ---------------------------------------------------------------------


def test_the_table_is_made_at_the_first_request(server, url, application):
    assert call(application)[0] == 200
    assert server.execute(f"SELECT count(*) FROM {server.table}", database_of(url))[0][0] == 0


@ignores_fork_warning
def test_six_processes_may_start_at_once_on_no_table(server):
    for _ in range(3):
        url = server.make_database()
        reader, writer = os.pipe()
        children = []
        for child in range(6):
            pid = os.fork()
            if pid == 0:
                try:
                    application = profiler.create_app(url, iterations=1)
                    os.close(writer)
                    os.read(reader, 1)  # ends when the parent closes its end: all at once
                    os._exit(post(application, {**HARRY, "email": f"{child}@example.com"})[0] != 201)
                finally:
                    os._exit(2)
            children.append(pid)
        os.close(reader)
        os.close(writer)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
        assert server.execute(f"SELECT count(*) FROM {server.table}", database_of(url))[0][0] == 6


def test_an_account_that_may_not_make_the_table_works_on_one_that_is_there(server, url, application):
    assert post(application)[0] == 201
    with make_app(server.allow(url)) as limited:
        assert post(limited, RON)[0] == 201
        assert call(limited, "DELETE", "/users/1/")[0] == 204
    assert application.users.count() == 1


def test_an_account_that_may_not_make_a_table_is_503_without_one(server, url, application):
    application.users.prepare()
    limited_url = server.allow(url)
    server.execute(f"DROP TABLE {server.table}", database_of(url))
    with make_app(limited_url) as limited:
        assert_unavailable(call(limited), "denied")


def test_an_id_is_not_used_again_even_after_a_restart(server, application):
    assert post(application)[2] == b'{"id":1}\n'
    call(application, "DELETE", "/users/1/")
    server.stop()
    server.start()
    assert post(application)[2] == b'{"id":2}\n'


@pytest.fixture
def tokyo(monkeypatch):
    """Let this process live in another time zone."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_times_are_utc_whatever_the_zones_of_server_and_service_are(server, tokyo):
    url = server.make_database()
    if isinstance(server, PostgreSQL):
        server.execute(f"ALTER DATABASE {database_of(url)} SET timezone = 'America/New_York'")
    else:
        server.execute("SET GLOBAL time_zone = '+05:30'")
    before = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    with make_app(url) as application:
        post(application)
        created_on = json.loads(call(application, path="/users/1/")[2])["created_on"]
    assert before <= created_on <= time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def test_what_is_too_long_is_not_cut_in_silence(application):
    """As a MySQL server does that is not strict, which ours is not."""
    with pytest.raises(sqlalchemy.exc.DataError) as error:
        application.users.insert("x" * 256, "Potter", "harry@example.com", "pbkdf2")
    assert "example.com" not in str(error.value)
    assert application.users.count() == 0


def test_a_database_that_cannot_hold_every_character_is_refused(postgresql):
    url = postgresql.make_database("ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with make_app(url) as application:
        assert_unavailable(call(application), "encoded LATIN1")


def test_initialise_drops_users_by_force_alone(server, url, application):
    fill_table(server, url, 3, application)
    with pytest.raises(profiler.TableInUse, match="3 users"):
        application.users.initialise(False)
    application.users.initialise(True)
    assert post(application)[2] == b'{"id":1}\n'


def test_initialise_makes_the_table_once(application):
    application.users.initialise(False)
    application.users.initialise(False)
    assert application.users.count() == 0


def test_a_database_without_the_table_is_not_what_a_command_expects(application):
    with pytest.raises(profiler.Unavailable):
        application.users.expect()


def test_a_backup_is_the_servers_own_affair(server, application):
    with pytest.raises(OSError, match="pg_dump" if isinstance(server, PostgreSQL) else "mariadb-dump"):
        application.users.backup("copy", lambda left, total: None)


# -- engine --------------------------------------------------------------------


def test_a_request_is_a_ping_and_one_statement(postgresql):
    url = postgresql.make_database()
    name = database_of(url)
    postgresql.execute(f"ALTER DATABASE {name} SET log_statement = 'all'")
    with make_app(url) as application:
        assert post(application)[0] == 201
        start = postgresql.log.stat().st_size
        assert call(application, path="/users/1/")[0] == 200
        assert call(application, "PUT", "/users/1/", profile())[0] == 200
        assert call(application)[0] == 200
        assert call(application, "PUT", "/users/1/", profile(), HTTP_IF_MATCH="*")[0] == 200
        assert call(application, "DELETE", "/users/1/")[0] == 204
        with open(postgresql.log, "rb") as log:
            log.seek(start)
            lines = log.read().decode().splitlines()
    statements = [line.split(": ", 1)[1] for line in lines if line.startswith(f"{name}|LOG:  ") and ": " in line[20:]]
    words = [statement.split(":", 1)[1].split(None, 1)[0] for statement in statements]
    conditional = [";", "BEGIN", "SELECT", "UPDATE", "COMMIT"]
    assert words == [";", "SELECT", ";", "UPDATE", ";", "SELECT", *conditional, ";", "DELETE"]


def test_a_request_is_one_statement_on_mariadb_too(mariadb):
    url = mariadb.make_database()
    with make_app(url) as application:
        assert post(application)[0] == 201
        [(thread,)] = mariadb.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{database_of(url)}'")
        mariadb.execute("SET GLOBAL log_output = 'TABLE', general_log = 1")
        assert call(application, path="/users/1/")[0] == 200
        assert call(application, "PUT", "/users/1/", profile())[0] == 200
        assert call(application, "DELETE", "/users/1/")[0] == 204
        mariadb.execute("SET GLOBAL general_log = 0")
    rows = mariadb.execute(f"SELECT argument FROM mysql.general_log WHERE thread_id = {thread}")
    words = [argument.split()[0] for (argument,) in rows]
    assert words == ["SELECT", "UPDATE", "DELETE"]  # a ping is no line of it


def test_a_long_list_holds_no_connection(server, url, application, monkeypatch):
    fill_table(server, url, 1200, application)
    halves = []
    for _ in range(3 * profiler_sqlalchemy.POOL_SIZE):
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/users/", "wsgi.errors": io.StringIO()}
        body = iter(application(environ, lambda status, headers: None))
        halves.append((next(body), body))
    assert call(application, path="/users/1200/")[0] == 200
    for start, body in halves:
        assert len(json.loads(start + b"".join(body))) == 1200


@ignores_fork_warning
def test_no_connection_is_shared_by_two_processes(server, url, application):
    """A child that reads from its parent's would answer with another user."""
    fill_table(server, url, 20, application)
    assert call(application)[0] == 200

    def ask(number):
        return f'{{"id":{number},'.encode() in call(application, path=f"/users/{number}/")[2]

    def ask_often():
        with ThreadPoolExecutor(4) as threads:
            return all(threads.map(ask, [number % 20 + 1 for number in range(100)]))

    with ThreadPoolExecutor(2) as threads:
        forks = [threads.submit(in_a_fork, ask_often) for _ in range(2)]
        assert ask_often()
        assert all(fork.result() for fork in forks)
    assert ask_often()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("sqlite:///db.sqlite3", "sqlite://"),
        ("postgresql+pg8000://app:h0rcrux@db/app", "pg8000"),
        ("mysql+asyncmy://app:h0rcrux@db/app", "asyncmy"),
        ("http://example.com/", "http://"),
        ("postgresql://app:h0rcrux@db:port/app", "cannot be read"),
        ("://", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        profiler.create_app(url)
    assert "h0r" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(("driver", "extra"), [("psycopg", "postgresql"), ("pymysql", "mysql")])
def test_without_the_driver_the_extra_is_named(driver, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ValueError, match=re.escape(f"pip install 'profiler-users[{extra}]'")):
        profiler.create_app(f"{extra}://app@db/app")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgres://app:h0rcrux@db.example/app?password=h0rcrux", "postgresql://app@db.example/app"),
        ("mariadb://app:h0rcrux@db.example:3307/app", "mysql://app@db.example:3307/app"),
        (
            "postgresql+psycopg://app:h0rcrux@/app?host=a:5432&host=b:5433&target_session_attrs=read-write",
            "postgresql://app@/app on a:5432, b:5433",
        ),
        ("postgresql:///app?host=/run/postgresql", "postgresql:///app on /run/postgresql"),
    ],
)
def test_the_place_is_named_without_a_password(url, place):
    assert profiler.create_app(url).users.place == place


def test_an_option_may_be_set_in_the_url(postgresql):
    url = postgresql.make_database() + "?application_name=other&options=-c%20statement_timeout%3D1234"
    with make_app(url) as application:
        assert call(application)[0] == 200
        [(name,)] = postgresql.execute(
            f"SELECT application_name FROM pg_stat_activity WHERE datname = '{database_of(url.partition('?')[0])}'"
        )
        assert name == "other"


def test_a_path_loads_nothing_of_sqlalchemy(tmp_path):
    program = (
        "import profiler, sys; profiler.create_app('db.sqlite3').users.count(); print('sqlalchemy' in sys.modules)"
    )
    assert run_program(program, tmp_path).stdout == "False\n"


def test_the_command_serves_a_url_and_shows_no_password(server, url, tmp_path):
    """Run as a program, profiler must not become two modules with exceptions of their own."""
    environ = {**os.environ, "PROFILER_DATABASE": url, "PROFILER_PORT": "0"}
    environ.pop("PROFILER_TOKEN", None)
    with subprocess.Popen(
        [sys.executable, HERE / "profiler.py"],
        env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        address = process.stdout.readline().split("/")[2]
        banner = process.stdout.readline()
        statuses = []
        for _ in range(2):
            connection = http.client.HTTPConnection(address, timeout=10)
            with contextlib.closing(connection):
                connection.request("POST", "/users/", user(), {"Content-Type": "application/json"})
                statuses.append(connection.getresponse().status)
        process.terminate()
        output, errors = process.communicate(timeout=20)
    assert statuses == [201, 400]
    assert f"127.0.0.1:{server.port}/{database_of(url)}; it holds 0 users." in banner
    assert SECRET not in banner + output + errors
    assert process.returncode == 0


def test_the_commands_work_on_a_url(url, monkeypatch, capsys):
    monkeypatch.setenv("PROFILER_DATABASE", url)
    monkeypatch.delenv("PROFILER_TOKEN", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"5678\n")))
        status = profiler.main(arguments)
        output, errors = capsys.readouterr()
        assert SECRET not in output + errors
        assert errors.count("\n") == status
        return status, output + errors

    assert run("set-password", "harry@example.com")[0] == 1  # there is no table, and it makes none
    assert run("initialise-database")[0] == 0
    with make_app(url) as application:
        assert post(application)[0] == 201
        assert run("set-password", "harry@example.com")[0] == 0
        assert application.users.verify("Harry@example.com", "5678") == 1
    assert run("backup", "copy.sqlite3")[0] == 1
    assert run("initialise-database") == (1, "profiler: the table holds 1 user: --force drops them, for good\n")
    assert run("initialise-database", "--force")[0] == 0
    with make_app(url) as application:
        assert application.users.count() == 0


# -- errors --------------------------------------------------------------------


def assert_unavailable(answer, reason=""):
    """It is 503, says when to come again, and one line in the log tells why, but no secrets."""
    status, headers, _, errors = answer
    assert (status, headers.get("Retry-After")) == (503, "1")
    assert errors.count("\n") == 1
    assert reason in errors
    for secret in (SECRET, "example.com", "pbkdf2", "SELECT ", "INSERT INTO"):
        assert secret not in errors


def test_a_server_that_is_away_is_503_and_200_once_it_is_back(server, application, caplog):
    assert post(application)[0] == 201
    server.stop()
    assert_unavailable(call(application))
    assert_unavailable(call(application, path="/health/"))
    assert_unavailable(post(application, RON))
    assert_unavailable(call(application, "PUT", "/users/1/", profile(email="harry@example.com")))
    server.start()
    assert call(application)[0] == 200
    assert post(application, RON)[0] == 201
    assert caplog.records == []  # SQLAlchemy and the driver add no lines of their own


def test_a_connection_that_breaks_in_a_transaction_is_503(server, application, caplog):
    assert post(application)[0] == 201

    def check(current):
        server.stop()
        server.start()

    with pytest.raises(profiler.Unavailable):
        application.users.update(1, "a", "b", "c@d", check)
    assert call(application)[0] == 200
    assert caplog.records == []


def test_connections_that_the_server_ended_are_replaced_unseen(server, url, application):
    assert post(application)[0] == 201
    server.stop()
    server.start()
    assert call(application, "PUT", "/users/1/", profile())[0] == 200


def test_a_wrong_password_or_an_unknown_option_is_503(server, url):
    for wrong, reason in (
        (url.replace(SECRET, "Alohomora"), "app"),
        (url.replace("127.0.0.1", "no.such.host.invalid"), "no.such.host.invalid"),
        (url + "?frobnicate=h0rcrux", "frobnicate"),
    ):
        with make_app(wrong) as application:
            answer = call(application)
            assert_unavailable(answer, reason)
            assert "Alohomora" not in answer[3]


def test_a_port_where_nothing_answers_is_given_up_in_time(server, url, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = url.replace(str(server.port), str(silent.getsockname()[1])) + "?connect_timeout=2"
        if isinstance(server, MariaDB):
            slow += "&read_timeout=1"
        with make_app(slow) as application:
            start = time.monotonic()
            assert_unavailable(call(application))
            assert time.monotonic() - start < 4


def test_a_server_that_is_read_only_is_503_for_writes(server, url, application):
    if isinstance(server, PostgreSQL):
        on, off = ("ALTER SYSTEM SET default_transaction_read_only = on", "ALTER SYSTEM RESET ALL")

        def switch(statement):
            server.execute(statement)
            server.execute("SELECT pg_reload_conf()")
    else:
        on, off, switch = "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0", server.execute
    application.users.prepare()
    with make_app(server.allow(url)) as limited:
        assert post(limited)[0] == 201
        switch(on)
        try:
            until(lambda: post(limited, RON)[0] != 400 and call(limited, "DELETE", "/users/9/")[0] == 503)
            assert_unavailable(post(limited, {**RON, "email": "luna@example.com"}), "read")
            assert call(limited)[0] == 200
        finally:
            switch(off)
        until(lambda: call(limited, "DELETE", "/users/9/")[0] == 204)


def test_a_table_that_is_gone_is_503_once_and_made_again(server, url, application):
    assert post(application)[0] == 201
    server.execute(f"DROP TABLE {server.table}", database_of(url))
    assert_unavailable(call(application))
    assert call(application)[2] == b"[]\n"


def test_what_the_server_rolls_back_for_others_is_tried_three_times(server, url, application):
    fill_table(server, url, 1, application)
    fail(server, url, times=2)
    assert call(application, "PUT", "/users/1/", profile())[0] == 200
    fail(server, url, times=3)
    assert_unavailable(call(application, "PUT", "/users/1/", profile()))


def fail(server, url, times):
    """Let so many updates fail as a deadlock does."""
    statements = [
        "DROP SEQUENCE IF EXISTS failures",
        "CREATE SEQUENCE failures",  # which no roll back takes back
        *(
            [
                f"""CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval('failures') <= {times} THEN RAISE deadlock_detected; END IF; RETURN new; END $$""",
                'CREATE OR REPLACE TRIGGER fail BEFORE UPDATE ON "user" FOR EACH ROW EXECUTE FUNCTION fail()',
            ]
            if isinstance(server, PostgreSQL)
            else [
                f"""CREATE OR REPLACE TRIGGER fail BEFORE UPDATE ON user FOR EACH ROW
                IF nextval(failures) <= {times} THEN SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213; END IF"""
            ]
        ),
    ]
    for statement in statements:
        server.execute(statement, database_of(url))


def test_a_read_whose_connection_breaks_is_tried_again_and_a_write_is_not(server, application):
    """A write that was cut off may have been committed."""
    ending = "pg_terminate_backend(pg_backend_pid())" if isinstance(server, PostgreSQL) else "SLEEP(1)"
    calls = []

    def work(connection):
        calls.append(1)
        if len(calls) < 3:
            if isinstance(server, MariaDB):
                number = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar()
                server.execute(f"KILL {number}")
            connection.exec_driver_sql(f"SELECT {ending}")
        return "done"

    assert application.users._run(work, repeatable=True) == "done"
    calls.clear()
    with pytest.raises(profiler.Unavailable):
        application.users._run(work)
    assert len(calls) == 1


def test_a_request_that_finds_no_connection_free_is_503(url, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 0.05)
    with make_app(url) as busy, contextlib.ExitStack() as taken:
        for _ in range(profiler_sqlalchemy.POOL_SIZE):
            taken.enter_context(busy.users._connect())
        assert_unavailable(call(busy), "in use")


def test_of_two_who_take_an_email_at_once_one_is_told(server, application, monkeypatch):
    """Whose look-up came too early: the server's own answer decides, and the email is in its words."""
    monkeypatch.setattr(application.users, "find", lambda email: None)
    assert post(application)[0] == 201
    assert post(application, {**HARRY, "email": "HARRY@example.com"})[::2] == (
        400,
        b'{"error":"This email is already registered"}\n',
    )


def test_a_check_and_its_write_are_one(server, url, application):
    """Who changes the user meanwhile waits: both saw the same user, and one of them is refused."""
    fill_table(server, url, 1, application)
    seen = threading.Barrier(2, timeout=0.3)

    def check(current):
        with contextlib.suppress(threading.BrokenBarrierError):
            seen.wait()  # in vain: the other comes here only once this one is through
        if b'"First1"' not in current:
            raise profiler.NoSuchUser

    def change(name):
        with contextlib.suppress(profiler.NoSuchUser):
            application.users.update(1, name, "x", "x@example.com", check)
            return name

    with ThreadPoolExecutor(2) as threads:
        [name] = set(threads.map(change, ["one", "other"])) - {None}
    assert json.loads(application.users.get(1))["first_name"] == name


def test_a_check_that_raises_leaves_the_user_as_it_was(server, url, application):
    fill_table(server, url, 1, application)
    for change in (
        lambda check: application.users.update(1, "a", "b", "c@d", check),
        lambda check: application.users.delete(1, check),
    ):
        with pytest.raises(ZeroDivisionError):
            change(lambda current: 1 / 0)
    assert b'"First1"' in application.users.get(1)


def test_a_user_whom_nobody_has_is_told_before_the_check(application):
    with pytest.raises(profiler.NoSuchUser):
        application.users.update(1, "a", "b", "c@d", lambda current: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        application.users.delete(1, lambda current: 1 / 0)


# -- copying -------------------------------------------------------------------

ROWS = 'SELECT id, first_name, last_name, email, password, created_on FROM "user" ORDER BY id'


def copy(*arguments):
    return profiler_sqlalchemy.main(["copy", *map(str, arguments)])


@pytest.fixture
def filled(path):
    """A file with users who are no two alike, and whose ids have gaps, also at the end."""
    fill(path, 2500)
    execute(path, 'DELETE FROM "user" WHERE id IN (7, 2499, 2500)')
    execute(path, "UPDATE \"user\" SET created_on = datetime(1e9 + id, 'unixepoch'), password = 'hash' || id")
    execute(path, "UPDATE \"user\" SET first_name = '\U0001f9d9 ', email = 'Étienne@Example.com' WHERE id = 8")
    return path


def test_users_move_to_a_server_and_back_as_they_are(filled, url, tmp_path, capsys):
    assert copy(filled, url) == 0
    assert copy(url, tmp_path / "back.sqlite3") == 0
    output, errors = capsys.readouterr()
    place = profiler.create_app(url).users.place
    assert output.splitlines() == [
        f"{filled} holds 2497 users; {place} holds 2497 users.",
        f"{place} holds 2497 users; {tmp_path / 'back.sqlite3'} holds 2497 users.",
    ]
    assert errors == ""
    assert execute(tmp_path / "back.sqlite3", ROWS) == execute(filled, ROWS)


def test_users_move_from_one_server_to_another(filled, postgresql, mariadb, tmp_path):
    first, second, third = postgresql.make_database(), mariadb.make_database(), postgresql.make_database()
    for step in ((filled, first), (first, second), (second, third), (third, tmp_path / "back.sqlite3")):
        assert copy(*step) == 0
    assert execute(tmp_path / "back.sqlite3", ROWS) == execute(filled, ROWS)
    with make_app(tmp_path / "back.sqlite3") as application:
        assert post(application)[2] == b'{"id":2501}\n'


@pytest.mark.parametrize("empty", [False, True])
def test_new_ids_go_on_behind_the_highest_that_there_ever_was(filled, url, tmp_path, empty):
    if empty:
        execute(filled, 'DELETE FROM "user"')
    assert copy(filled, url) == 0
    with make_app(url) as application:
        assert application.users.count() == (0 if empty else 2497)
        assert post(application)[2] == b'{"id":2501}\n'
        call(application, "DELETE", "/users/2501/")
    assert copy(url, tmp_path / "back.sqlite3") == 0
    with make_app(tmp_path / "back.sqlite3") as application:
        assert post(application)[2] == b'{"id":2502}\n'


def test_a_target_that_had_users_goes_on_behind_their_ids(server, path, url, application):
    fill_table(server, url, 9, application)
    application.users.insert("a", "b", "c@d", "x") if isinstance(server, MariaDB) else None
    last_id = application.users.insert("a", "b", "e@f", "x") if isinstance(server, MariaDB) else 0
    server.execute(f"DELETE FROM {server.table}", database_of(url))
    fill(path, 2)
    assert copy(path, url) == 0
    assert application.users.insert("a", "b", "c@d", "x") == max(last_id + 1, 3)


def test_a_target_that_holds_users_is_refused(filled, url, application, capsys):
    post(application)
    assert copy(filled, url) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert "holds 1 user" in errors
    assert SECRET not in errors
    assert application.users.count() == 1


def test_a_file_that_holds_users_is_refused(filled, url, application, capsys):
    assert copy(url, filled) == 1
    assert "holds 2497 users" in capsys.readouterr().err
    assert len(execute(filled, ROWS)) == 2497


def test_users_whose_emails_differ_in_case_alone_are_not_copied_nor_is_anybody(path, url, application, capsys):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(TUTORIAL_SCHEMA)
        connection.executemany(
            'INSERT INTO "user" (first_name, last_name, email, password) VALUES (?, ?, ?, ?)',
            [("a", "b", f"{number}@x", "x") for number in range(1500)]
            + [("a", "b", email, "x") for email in ("e@f", "E@f")],
        )
    assert copy(path, url) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert "one email" in errors
    assert "e@f" not in errors.lower()
    assert application.users.count() == 0


def test_a_source_that_changes_meanwhile_is_not_copied(filled, url, application, monkeypatch, capsys):
    carry = profiler_sqlalchemy._carry

    def carry_slowly(old, new):
        carry(old, new)
        execute(filled, "INSERT INTO \"user\" (first_name, last_name, email, password) VALUES ('a', 'b', 'c@d', 'x')")

    monkeypatch.setattr(profiler_sqlalchemy, "_carry", carry_slowly)
    assert copy(filled, url) == 1
    assert "written to meanwhile" in capsys.readouterr().err
    assert application.users.count() == 0


def test_a_server_that_is_lost_meanwhile_is_left_without_users(filled, server, url, monkeypatch, capsys):
    carry = profiler_sqlalchemy._carry

    def carry_in_vain(old, new):
        carry(old, new)
        server.stop()
        server.start()

    monkeypatch.setattr(profiler_sqlalchemy, "_carry", carry_in_vain)
    assert copy(filled, url) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    with make_app(url) as application:
        assert application.users.count() == 0


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        ("missing.sqlite3", "URL", "no such file"),
        ("URL", "URL", "both"),
        ("db.sqlite3", "db.sqlite3", "both"),
        ("db.sqlite3", "sqlite:///other", "sqlite://"),
        ("db.sqlite3", "postgresql://app:h0rcrux@127.0.0.1:1/app", "127.0.0.1"),
        ("db.sqlite3", "mysql://app:h0rcrux@127.0.0.1:1/app", "127.0.0.1"),
        ("diary", "URL", "not a database"),
        ("db.sqlite3", "missing/db.sqlite3", "missing"),
    ],
)
def test_what_cannot_be_copied_is_one_line_and_exit_1(source, target, named, mariadb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = mariadb.make_database()
    fill("db.sqlite3", 0)
    pathlib.Path("diary").write_bytes(b"I am Tom Riddle. " * 100)
    assert copy(source.replace("URL", url), target.replace("URL", url)) == 1
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert named in errors
    assert SECRET not in errors
    assert not pathlib.Path("missing.sqlite3").exists()


def test_the_target_may_be_given_by_the_environment(filled, postgresql, tmp_path):
    """Where its password is in no list of processes. A program has no two modules of one name."""
    command = [sys.executable, "-m", "profiler_sqlalchemy", "copy", str(filled)]
    environ = {**os.environ, "PYTHONPATH": str(HERE), "PROFILER_DATABASE": postgresql.make_database()}
    output = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert (output.returncode, output.stderr) == (0, "")
    assert "holds 2497 users." in output.stdout
    environ.pop("PROFILER_DATABASE")
    output = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert output.returncode == 2
    assert "TARGET" in output.stderr


def test_progress_is_shown_on_a_terminal(filled, mariadb):
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "profiler_sqlalchemy", "copy", str(filled), mariadb.make_database()]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # at its end
            while chunk := os.read(main, 1000):
                shown += chunk
        os.close(main)
    assert process.returncode == 0
    assert b"2497/2497" in shown


# -- clusters ------------------------------------------------------------------

HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h

listen galera
    bind {listen}
    default-server check inter 500ms fall 2 rise 2 on-marked-down shutdown-sessions
    server one {one}
    server two {two} backup
    server three {three} backup
"""


class Clients:
    """Eight clients, who create users without end on two applications."""

    def __init__(self, *applications):
        self.acknowledged, self.statuses, self.stopped = [], set(), threading.Event()
        self.threads = [
            threading.Thread(target=self.write, args=(applications[number % 2], number)) for number in range(8)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def write(self, application, client):
        for number in itertools.count():
            if self.stopped.is_set():
                return
            email = f"{client}.{number}@example.com"
            status = post(application, {**HARRY, "email": email})[0]
            self.statuses.add(status)
            if status == 201:
                self.acknowledged.append(email)
            else:
                self.stopped.wait(0.02)

    def wait(self, count):
        """Wait until so many more users are acknowledged."""
        target = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= target, 30)


def emails_of(application):
    return {user["email"] for user in json.loads(call(application)[2])}


@pytest.fixture(scope="module")
def galera():
    """Three nodes of Galera, each of which takes writes."""
    library = pathlib.Path("/usr/lib/galera/libgalera_smm.so")
    if not library.exists():
        pytest.skip("Galera is not installed")
    program("rsync")
    ports = [free_port() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        nodes = []
        for port in ports:
            options = {
                "gmcast.listen_addr": f"tcp://127.0.0.1:{port}",
                "ist.recv_addr": f"127.0.0.1:{free_port()}",
                "evs.keepalive_period": "PT0.5S",
                "evs.suspect_timeout": "PT2S",
            }
            node = MariaDB(
                **{
                    "wsrep-on": "ON",
                    "wsrep-provider": library,
                    "wsrep-provider-options": ";".join(f"{name}={value}" for name, value in options.items()),
                    "wsrep-cluster-address": "gcomm://" + ",".join(f"127.0.0.1:{port}" for port in ports),
                    "wsrep-node-address": "127.0.0.1",
                    "wsrep-sst-method": "rsync",
                    "wsrep-sst-receive-address": f"127.0.0.1:{free_port()}",
                    "binlog-format": "ROW",
                    "innodb-autoinc-lock-mode": 2,
                }
            )
            stack.callback(node.close)
            if not nodes:
                node.initialise("--wsrep-new-cluster")
            else:
                node.install()
                node.start()
            nodes.append(node)
        yield nodes


@pytest.mark.cluster
def test_of_many_who_take_an_email_on_two_nodes_one_gets_it(galera):
    url = galera[0].make_database()
    with make_app(url) as one, make_app(galera[1].url(database_of(url))) as two:
        one.users.prepare()
        for number in range(25):
            fields = {**HARRY, "email": f"{number}@example.com"}
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(lambda application: post(application, fields)[0], [one, two] * 4))  # noqa: B023
            assert sorted(answers) == [201] + [400] * 7


@pytest.mark.cluster
def test_one_user_may_be_updated_on_two_nodes_at_once(galera):
    url = galera[0].make_database()
    with make_app(url) as one, make_app(galera[1].url(database_of(url))) as two:
        assert post(one)[0] == 201

        def change(number):
            return call((one, two)[number % 2], "PUT", "/users/1/", profile(first_name=str(number)))[0]

        with ThreadPoolExecutor(6) as threads:
            statuses = list(threads.map(change, range(180)))
    assert statuses.count(200) > 170
    assert set(statuses) <= {200, 503}


@pytest.mark.cluster
def test_a_node_that_is_killed_takes_no_acknowledged_user_with_it(galera, tmp_path):
    url, listen = galera[0].make_database(), free_port()
    name = database_of(url)
    addresses = {word: f"127.0.0.1:{node.port}" for word, node in zip(("one", "two", "three"), galera)}
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(listen=f"127.0.0.1:{listen}", **addresses))
    haproxy = subprocess.Popen(
        [program("haproxy"), "-db", "-f", tmp_path / "haproxy.cfg"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with make_app(url.replace(str(galera[0].port), str(listen))) as one, make_app(galera[1].url(name)) as two:
            until(lambda: call(one)[0] == 200)
            with Clients(one, two) as clients:
                clients.wait(200)
                galera[0].kill()
                clients.wait(200)
            assert clients.statuses <= {201, 503}
            assert call(one)[0] == 200
            for node in galera[1:]:
                with make_app(node.url(name)) as application:
                    assert emails_of(application) >= set(clients.acknowledged)
            galera[0].start()
            with make_app(url) as application:
                until(lambda: call(application)[0] == 200)
                assert emails_of(application) >= set(clients.acknowledged)
    finally:
        haproxy.terminate()
        haproxy.wait()


@pytest.mark.cluster
def test_a_primary_that_is_killed_takes_no_acknowledged_user_with_it():
    """Its standby confirms each commit. Once that is promoted, the services go on by themselves."""
    primary = PostgreSQL(synchronous_standby_names="standby")
    standby = PostgreSQL(cluster_name="standby")
    with contextlib.closing(primary), contextlib.closing(standby):
        primary.initialise()
        primary.start()
        standby.run(
            primary.programs / "pg_basebackup", "-D", standby.data, "-R", "-c", "fast", "--no-sync",
            "-d", f"host=127.0.0.1 port={primary.port} user=app password={SECRET}",
        )  # fmt: skip
        standby.start()
        until(lambda: primary.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        name = database_of(primary.make_database())
        hosts = f"host=127.0.0.1:{primary.port}&host=127.0.0.1:{standby.port}"
        url = f"postgresql://app:{SECRET}@/{name}?{hosts}&target_session_attrs=read-write"
        with make_app(url) as one, make_app(url) as two:
            with Clients(one, two) as clients:
                clients.wait(200)
                primary.kill()
                standby.execute("SELECT pg_promote()")
                clients.wait(200)
            assert clients.statuses <= {201, 503}
            assert emails_of(one) >= set(clients.acknowledged)
