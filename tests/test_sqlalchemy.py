"""profiler_sqlalchemy on PostgreSQL and MariaDB, on MySQL where it is installed, and through
PgBouncer. servers.py starts them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

fcntl, termios = (
    pytest.importorskip(name, reason="needs a Unix") for name in ("fcntl", "termios")
)
sqlalchemy = pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
pymysql = pytest.importorskip("pymysql", reason="PyMySQL is not installed")

import servers  # noqa: E402
from conftest import (  # noqa: E402
    HARRY,
    HERE,
    ITERATIONS,
    RON,
    TUTORIAL_SCHEMA,
    call,
    execute,
    fill,
    ignores_fork_warning,
    in_a_fork,
    post,
    post_at_once,
    start,
    until,
)
from servers import SECRET, MariaDB, PostgreSQL, database_of  # noqa: E402

import profiler  # noqa: E402
import profiler_sqlalchemy  # noqa: E402
from test_profiler import *  # noqa: E402, F403


@pytest.fixture(scope="session")
def postgresql_server():
    if reason := servers.missing("postgresql"):
        pytest.skip(reason)
    with servers.postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server():
    if reason := servers.missing("mariadb"):
        pytest.skip(reason)
    with servers.mariadb() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server():
    pytest.importorskip("cryptography", reason="PyMySQL needs it for MySQL's passwords")
    with servers.mysql() as server:
        yield server


# Debian has MySQL only in its unstable distribution.
@pytest.fixture(params=["postgresql", "mariadb", *([] if servers.missing("mysql") else ["mysql"])])
def server(request):
    return request.getfixturevalue(f"{request.param}_server")


_urls = {}


@pytest.fixture
def database_url(server):
    """The URL of a database without a table. It is used again, because creating one
    takes longer."""
    if server not in _urls:
        _urls[server] = server.make_database()
    for table in (server.table, "profiler_failure"):
        server.execute(f"DROP TABLE IF EXISTS {table}", database_of(_urls[server]))
    return _urls[server]


@pytest.fixture
def url(database_url):
    """The same. Some claims have a parameter of this name."""
    return database_url


@contextlib.contextmanager
def make_app(database):
    with contextlib.closing(
        profiler_sqlalchemy.create_app(str(database), iterations=ITERATIONS)
    ) as application:
        yield application


@pytest.fixture
def application(database_url):
    """An application on a server. PyMySQL takes 40 ms to prepare TLS for each connection."""
    options = "?ssl_disabled=1" if database_url.startswith("mysql") else ""
    with make_app(database_url + options) as application:
        yield application


def fill_table(server, url, count, application):
    """Create users 1 to count, without the application."""
    application.users.count()
    rows = ", ".join(
        f"({i}, 'First{i}', 'Last{i}', 'user{i}@example.com', 'user{i}@example.com', 'x', "
        "'2026-11-22 10:50:00')"
        for i in range(1, count + 1)
    )
    server.execute(f"INSERT INTO {server.table} VALUES {rows}", database_of(url))


@pytest.fixture
def advance(server, database_url):
    """A function that lets some seconds pass for the wrong passwords that are stored."""

    def advance(seconds):
        server.execute(
            f"UPDATE profiler_failure SET last = last - {seconds}", database_of(database_url)
        )

    return advance


def put(application, user_id=1, method="PUT", fields=None, **environ):
    fields = fields or {
        "first_name": "Ginny",
        "last_name": "Weasley",
        "email": "ginny@example.com",
    }
    return call(application, method, f"/users/{user_id}/", fields=fields, **environ)


def get(application, user_id=1):
    return call(application, path=f"/users/{user_id}/")


def assert_unavailable(answer, reason=""):
    """It is a 503 with Retry-After, and the log has one line with the reason, without secrets."""
    assert (answer.status, answer.headers.get("Retry-After")) == (503, "1")
    assert answer.errors.count("\n") == 1
    assert reason in answer.errors
    for secret in (SECRET, "example.com", "Potter", "pbkdf2", "SELECT id", "INSERT INTO"):
        assert secret not in answer.errors


# -- the same responses ----------------------------------------------------------------
# The tests of test_profiler.py are imported above. They run here, too, with the fixtures of
# this module.


def user(**fields):
    return json.dumps({**HARRY, **fields}).encode()


def profile(**fields):
    return json.dumps(
        {"first_name": "Ginny", "last_name": "Weasley", "email": "ginny@example.com", **fields}
    ).encode()


def passwords(old, new):
    return json.dumps({"old_password": old, "new_password": new}).encode()


HOSTILE = [
    "", " ", "\t", None, 1, True, [], {}, "\0", "a\nb", "a\x1bb", "a\x7fb", "a\x85b", "\ud800",
    "x" * 255, "x" * 256,
    "\U0001f9d9" * 255, "\U0001f9d9" * 256, "\uffff", "\U0010ffff", " a ", "a ",
    "'; DROP TABLE user; --", '"\\/',
    "%s %(x)s :id ? {0} $1", "\u202e\u00e9e\u0301", "\ufeff", "100% _!\\",
]  # fmt: skip
EMAILS = [
    "HARRY@EXAMPLE.COM", "harry@example.com ", "harry@", "@example.com", "a@b@c", "a b@c",
    "\u00e9@x", "\u00c9@x",
    "e@x", "E@X", "\u0130@x", "i@x", "\u017f@x", "s@x", "\U0001f9d9@x", "\U0001f409@x",
    "\u00df@x", "ss@x", "%@x",
    "_@x", "a" * 252 + "@x", "a" * 253 + "@x", "\U0001f9d9" * 252 + "@x",
]  # fmt: skip
IDS = [
    "0",
    "00",
    "01",
    "1",
    "2",
    "9223372036854775807",
    "9223372036854775808",
    "9" * 5000,
    "-1",
    "1.0",
    "x",
    "\u0661",
]
QUERIES = [
    "limit=1", "limit=2&after=1", "limit=3&sort=-id", "limit=2&sort=-id&after=9", "sort=-id",
    "sort=id&after=5",
    "limit=0", "limit=1001", "limit=x", "after=-1", "after=9223372036854775807",
    "after=9223372036854775808",
    "email=harry@example.com", "email=HARRY@example.com", "email=nobody@example.com", "email=",
    "email=%C3%89@x",
    "email=%C3%A9@x", "email=e@x&limit=1", "email=harry@example.com&after=1", "sort=name",
    "limit=1&limit=2",
    "email=%F0%9F%A7%99@x", "email=%25@x", "email=%FF@x", "q=pot", "q=POT&limit=2", "q=%25",
    "q=_", "q=!", "q=%5C",
    "q='", "q=%00", "q=ginny&sort=-id&limit=1", "q=potter&after=3&limit=2", "q=nobody", "q=",
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
    *(
        ("POST", "/users/", user(first_name=value, email=f"f{i}@x"))
        for i, value in enumerate(HOSTILE)
    ),
    *(("PUT", "/users/2/", profile(last_name=value)) for value in HOSTILE),
    *(("PATCH", "/users/2/", json.dumps({"last_name": value}).encode()) for value in HOSTILE),
    *(("POST", "/users/", user(email=email)) for email in EMAILS),
    *(("PUT", "/users/2/", profile(email=email)) for email in EMAILS),
    *(("PATCH", "/users/2/", json.dumps({"email": email}).encode()) for email in EMAILS),
    *(("GET", f"/users/{user_id}/") for user_id in IDS),
    *(("PUT", f"/users/{user_id}/", profile(email="HARRY@example.com")) for user_id in IDS),
    *(("PATCH", f"/users/{user_id}/", b"{}") for user_id in IDS),
    *(("GET", "/users/", b"", {"QUERY_STRING": query}) for query in QUERIES),
    ("POST", "/users/", b"[" * 100),
    ("POST", "/users/", b'"' + b"x" * 70_000 + b'"'),
    ("POST", "/users/", json.dumps({**RON, "password_hash": "x"}).encode()),
    (
        "POST",
        "/users/verify/",
        json.dumps({"email": "hARRY@example.com", "password": "1234"}).encode(),
    ),
    (
        "POST",
        "/users/verify/",
        json.dumps({"email": "harry@example.com", "password": "12345"}).encode(),
    ),
    (
        "POST",
        "/users/verify/",
        json.dumps({"email": "nobody@example.com", "password": "1234"}).encode(),
    ),
    ("PUT", "/users/1/password/", passwords("1234", "\U0001f9d9\n")),
    ("PUT", "/users/1/password/", passwords("1234", "5678")),
    ("PUT", "/users/1/password/", passwords("\U0001f9d9\n", "a\0")),
    ("PUT", "/users/99999/password/", passwords("1234", "5678")),
    ("PUT", "/users/1/password/reset/", passwords("", "8765")),
    ("PUT", "/users/99999/password/reset/", passwords("", "8765")),
    (
        "POST",
        "/users/verify/",
        json.dumps({"email": "harry@example.com", "password": "8765"}).encode(),
    ),
    ("GET", "/users/1/"),
    ("GET", "/users/1/", b"", {"HTTP_IF_NONE_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(email="harry@example.com"), {"HTTP_IF_MATCH": '"stale"'}),
    ("PUT", "/users/1/", profile(email="ron@example.com"), {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(email="Harry@example.com"), {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/1/", profile(), {"HTTP_IF_MATCH": "ETAG"}),
    ("PATCH", "/users/1/", b'{"first_name":"Harry"}', {"HTTP_IF_MATCH": "ETAG"}),
    ("PUT", "/users/99999/", profile(), {"HTTP_IF_MATCH": "ETAG"}),
    ("GET", "/users/1/"),
    ("PUT", "/users/1/password/", passwords("8765", "1234"), {"HTTP_IF_MATCH": '"stale"'}),
    ("PUT", "/users/1/password/", passwords("8765", "1234"), {"HTTP_IF_MATCH": "ETAG"}),
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
    """Return the responses to all requests, except for times, and entity tags, which
    depend on them."""
    answers, etag = [], ""
    for method, path_info, *rest in REQUESTS:
        body, environ = (*rest, b"", {})[:2] if len(rest) < 2 else rest
        environ = {
            name: etag if value == "ETAG" else value for name, value in (environ or {}).items()
        }
        status, headers, content, errors = call(application, method, path_info, body, **environ)
        etag = headers.get("ETag", etag)
        headers = {name: "ETAG" if name == "ETag" else value for name, value in headers.items()}
        content = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", b"TIME", content)
        answers.append((status, headers, content, errors))
    return answers


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """The responses on SQLite."""
    with make_app(tmp_path_factory.mktemp("sqlite") / "db.sqlite3") as sqlite:
        return answer_all(sqlite)


def assert_same(application, expected):
    assert {status for status, *_ in expected} == {200, 201, 204, 304, 400, 403, 404, 412, 413}
    for request, answer, on_sqlite in zip(REQUESTS, answer_all(application), expected):
        assert answer == on_sqlite, request


def test_responses_are_the_same_as_on_sqlite_byte_for_byte(application, expected):
    assert_same(application, expected)


def test_json_is_the_same_as_on_sqlite_whatever_is_stored(application, tmp_path):
    """The endpoints accept no control characters, but another program may have stored some."""
    text = (
        "".join(map(chr, range(1, 0x250))) + "\u2028\u2029\ufeff\ufffe\uffff\U0001f9d9\U0010ffff"
    )
    texts = [text[start : start + 100] for start in range(0, len(text), 100)]
    with make_app(tmp_path / "db.sqlite3") as sqlite:
        for number, text in enumerate(texts, start=1):
            for users in (application.users, sqlite.users):
                assert users.insert(text, text, f"{number}@x", "x") == number
            one, other = application.users.get(number), sqlite.users.get(number)
            assert one.split(b',"created_on"')[0] == other.split(b',"created_on"')[0]


@pytest.mark.parametrize(("text", "on_mariadb"), [("é", True), ("É", True), ("e", False)])
def test_search_ignores_the_case_of_other_letters_on_mariadb_only(
    server, application, text, on_mariadb
):
    other = {"é": "É", "É": "é", "e": "é"}[text]
    application.users.insert(other * 3, "x", "x@x", "x")
    assert bool(application.users.page(10, text=text)[0]) == (
        on_mariadb and isinstance(server, MariaDB)
    )


# -- table -----------------------------------------------------------------------------


def test_first_request_creates_the_table(server, url, application):
    assert call(application).status == 200
    assert server.execute(f"SELECT count(*) FROM {server.table}", database_of(url))[0][0] == 0


@ignores_fork_warning
def test_six_processes_can_create_the_table_at_once(server):
    for _ in range(3):
        url = server.make_database()
        assert post_at_once(6, profiler_sqlalchemy.create_app, url) == [0] * 6
        assert server.execute(f"SELECT count(*) FROM {server.table}", database_of(url))[0][0] == 6


def test_role_that_may_only_change_rows_can_use_an_existing_table(server, url, application):
    assert post(application).status == 201
    with make_app(server.allow(url)) as limited:
        assert post(limited, json.dumps(RON).encode()).status == 201
        assert call(limited, "DELETE", "/users/1/").status == 204
    assert application.users.count() == 1


def test_role_that_may_not_create_the_table_gets_503(server, url, application):
    application.users.count()
    limited_url = server.allow(url)
    server.execute(f"DROP TABLE {server.table}", database_of(url))
    with make_app(limited_url) as limited:
        assert_unavailable(call(limited), "denied")


@pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE", "DELETE"])
def test_missing_privilege_is_503_with_one_line_in_the_log(server, url, application, right):
    post(application)
    name = server.table if isinstance(server, PostgreSQL) else f"{database_of(url)}.{server.table}"
    with make_app(server.allow(url)) as limited:
        server.execute(f"REVOKE {right} ON {name} FROM limited", database_of(url))
        answers = {
            "SELECT": lambda: get(limited),
            "INSERT": lambda: post(limited, json.dumps(RON).encode()),
            "UPDATE": lambda: put(limited),
            "DELETE": lambda: call(limited, "DELETE", "/users/1/"),
        }
        assert_unavailable(answers[right](), "denied")


def test_missing_privilege_for_a_sequence_is_503(postgresql_server):
    """An identity column needs none, but the bigserial of a table that was created by hand."""
    url = postgresql_server.make_database()
    name = database_of(url)
    with make_app(url) as application:
        application.users.count()
    postgresql_server.execute('ALTER TABLE "user" ALTER id DROP IDENTITY', name)
    postgresql_server.execute("CREATE SEQUENCE ids", name)
    postgresql_server.execute("ALTER TABLE \"user\" ALTER id SET DEFAULT nextval('ids')", name)
    with make_app(postgresql_server.allow(url)) as limited:
        assert_unavailable(post(limited), "permission denied for sequence ids")


def test_initialise_without_the_right_to_drop_is_one_line_and_exit_1(
    server, url, application, capsys
):
    post(application)
    limited = server.allow(url)
    with pytest.raises(SystemExit) as exit:
        profiler_sqlalchemy.main(["initialise-database", "--force", "--database", limited])
    assert str(exit.value).startswith("profiler: ")
    assert re.search("denied|must be owner", str(exit.value))
    assert "\n" not in str(exit.value)
    assert SECRET not in str(exit.value)
    assert application.users.count() == 1


def test_ids_are_not_reused_even_after_a_restart(server, application):
    assert post(application).json == {"id": 1}
    call(application, "DELETE", "/users/1/")
    server.stop()
    server.start()
    until(lambda: post(application).json == {"id": 2})


@pytest.fixture
def tokyo(monkeypatch):
    """Another time zone of this process."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_times_are_utc_whatever_the_zones_and_formats_are(server, tokyo):
    url = server.make_database()
    if isinstance(server, PostgreSQL):
        server.execute(f"ALTER DATABASE {database_of(url)} SET timezone = 'America/New_York'")
        server.execute(f"ALTER DATABASE {database_of(url)} SET datestyle = 'German'")
    else:
        server.execute("SET GLOBAL time_zone = '+05:30'")
    before = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    with make_app(url) as application:
        post(application)
        created_on = get(application).json["created_on"]
    assert before <= created_on <= time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())


def test_text_that_is_too_long_is_not_truncated(application):
    """MySQL servers that are not strict do that, and ours is not."""
    with pytest.raises(profiler.Unavailable, match="too long") as error:
        application.users.insert("x" * 256, "Potter", "harry@example.com", "pbkdf2")
    assert "example.com" not in str(error.value)
    assert application.users.count() == 0


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_encoding_that_cannot_store_every_character_is_503(postgresql_server, encoding):
    url = postgresql_server.make_database(
        f"ENCODING {encoding} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    with make_app(url) as application:
        assert_unavailable(call(application), f"encoding of the database is {encoding}")


def test_initialise_deletes_users_by_force_only(server, url, application):
    fill_table(server, url, 3, application)
    with pytest.raises(FileExistsError, match="3"):
        application.users.initialise()
    assert application.users.initialise(True)
    assert post(application).json == {"id": 1}


def test_initialise_returns_whether_it_created_the_table(application):
    assert application.users.initialise()
    assert not application.users.initialise()
    assert application.users.count() == 0


def test_table_that_disappears_is_503_and_not_created_again(server, url, application):
    """A restored backup creates it itself."""
    assert post(application).status == 201
    server.execute(f"DROP TABLE {server.table}", database_of(url))
    assert_unavailable(call(application))
    assert_unavailable(call(application))
    with make_app(url) as other:
        other.users.count()
    assert call(application).body == b"[]\n"


def test_backup_names_the_programs_of_the_servers(application):
    with pytest.raises(OSError, match="pg_dump, mariadb-dump or mysqldump"):
        application.users.backup("copy")


PROBLEMS = [
    ("postgresql", 'DROP CONSTRAINT "user_email_key_key"', "email_key has no unique index"),
    ("postgresql", "DROP id, ADD id uuid DEFAULT gen_random_uuid()", "the ids are no integers"),
    ("postgresql", "ALTER created_on TYPE timestamptz", "timestamp without time zone"),
    ("postgresql", "ALTER email_key TYPE varchar(254) COLLATE blind", "equates é and e"),
    ("postgresql", "DROP email_key", "email_key"),
    ("postgresql", "DROP password", "password"),
    ("mariadb", "DROP INDEX email_key", "email_key has no unique index"),
    ("mariadb", "DROP INDEX email_key, ADD UNIQUE (email_key, id)", "email_key has no unique"),
    ("mariadb", "DROP INDEX email_key, ADD UNIQUE (email_key(9))", "email_key has no unique"),
    ("mariadb", "MODIFY id CHAR(36) NOT NULL", "the ids are no integers"),
    ("mariadb", "MODIFY email_key VARCHAR(254) COLLATE utf8mb4_general_ci", "equates é and e"),
    ("mariadb", "ENGINE = MyISAM", "must be InnoDB"),
    ("mariadb", "DROP email_key", "email_key"),
]


@pytest.mark.parametrize(("name", "change", "problem"), PROBLEMS)
def test_table_that_cannot_be_served_makes_health_503(request, name, change, problem):
    server = request.getfixturevalue(f"{name}_server")
    url = server.make_database()
    with make_app(url) as application:
        assert call(application, path="/health/").status == 200
        if "blind" in change:
            server.execute(
                "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level1', "
                "deterministic = false)",
                database_of(url),
            )
        server.execute(f"ALTER TABLE {server.table} {change}", database_of(url))
        answer = call(application, path="/health/")
        assert answer.status == 503
        assert problem in answer.errors
        assert answer.errors.count("\n") == 1


def test_server_does_not_start_on_a_table_that_cannot_be_served(server, url, application):
    application.users.count()
    key = (
        "DROP CONSTRAINT user_email_key_key"
        if isinstance(server, PostgreSQL)
        else "DROP INDEX email_key"
    )
    server.execute(f"ALTER TABLE {server.table} {key}", database_of(url))
    with pytest.raises(SystemExit) as exit:
        profiler_sqlalchemy.main(["--database", url, "--port", "0"])
    location = application.users.location.partition("?")[0]
    assert str(exit.value) == (
        f"profiler: {location}: the table of users cannot be served: email_key has no unique index"
    )


def test_view_of_a_table_can_be_served(server, url, application):
    post(application)
    statements = [
        f"ALTER TABLE {server.table} RENAME TO account",
        f"CREATE VIEW {server.table} AS SELECT * FROM account",
    ]
    for statement in statements:
        server.execute(statement, database_of(url))
    try:
        assert call(application, path="/health/").status == 200
        assert put(application).status == 200
    finally:
        server.execute(f"DROP VIEW {server.table}", database_of(url))
        server.execute("DROP TABLE account", database_of(url))


def test_role_that_may_only_change_rows_can_check_the_table(server, url, application):
    application.users.count()
    with make_app(server.allow(url)) as limited:
        assert call(limited, path="/health/").status == 200


# -- the statements of the documentation -----------------------------------------------


def documented_statements(title, number=0):
    """Return the SQL statements in a code block of a section of docs/databases.md."""
    text = servers.DOCUMENTATION.read_text("utf-8")
    [(_, section)] = re.findall(rf"^(##+) {title}$(.*?)^##", text, re.MULTILINE | re.DOTALL)
    block = re.findall(r"^```sql\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[number]
    return [statement.strip() for statement in block.split(";") if statement.strip()]


def number_of(server):
    """The first code block is about PostgreSQL, the second about MySQL and MariaDB."""
    return 0 if isinstance(server, PostgreSQL) else 1


def test_documented_first_steps_give_all_rights_that_the_service_needs(server):
    statements = documented_statements("PostgreSQL, MySQL, MariaDB", number_of(server))
    for statement in statements:
        server.execute(re.sub(r"\bapp\b", "documented", statement))
    try:
        url = server.url("documented", "documented").replace(SECRET, "secret")
        with make_app(url) as application:
            assert post(application).status == 201
            assert_limited(application)
            assert application.users.initialise(force=True)
    finally:
        server.execute("DROP DATABASE documented")
        server.execute(f"DROP {'ROLE' if isinstance(server, PostgreSQL) else 'USER'} documented")


def test_documented_tables_are_those_that_the_service_creates(server):
    dialect = profiler_sqlalchemy._DIALECTS[
        "mysql" if isinstance(server, MariaDB) else "postgresql"
    ]
    statements = documented_statements("The tables", number_of(server))
    assert statements[0] == dialect.create_user.strip()
    assert statements[1] == dialect.create_profiler_failure.strip()


def test_documented_rights_are_enough(server, caplog):
    url = server.make_database()
    for statement in documented_statements("The tables", number_of(server)):
        server.execute(statement.replace("TO app", "TO limited"), database_of(url))
    with make_app(server.url(database_of(url), "limited")) as application:
        assert call(application, path="/health/").status == 200
        assert post(application).status == 201
        assert put(application).status == 200
        assert_limited(application, "ginny@example.com")
        assert call(application, "DELETE", "/users/1/").status == 204
    count = server.execute("SELECT count FROM profiler_failure", database_of(url))
    assert count == [(10,)]
    assert caplog.records == []


def test_documented_index_serves_searches_at_every_limit(postgresql_server):
    """Also once PostgreSQL has a plan for all texts: that of a statement that is prepared."""
    url = postgresql_server.make_database()
    name = database_of(url)
    with make_app(url) as application:
        application.users.count()
        postgresql_server.execute(
            """
INSERT INTO "user" (first_name, last_name, email, email_key, password, created_on)
SELECT md5('f' || n), md5('l' || n), n || '@x', n || '@x', 'x', now()
FROM generate_series(1, 30000) AS n
""",
            name,
        )
        for statement in documented_statements("Many users"):
            postgresql_server.execute(statement, name)
        postgresql_server.execute('VACUUM ANALYZE "user"', name)
        for limit in (1, 50, 1000):
            for _ in range(12):
                assert application.users.page(limit, text="zzqqxx") == (b"", None)
            assert json.loads(b"[%b]" % application.users.page(limit, text="29999@X")[0])
        # Each search looks into the index once for each of the three columns.
        used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'user_search'"
        until(lambda: postgresql_server.execute(used, name) == [(3 * 39,)])


# -- rows of other programs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "created_on", "served"),
    [
        ("postgresql", "infinity", "infinity"),
        ("postgresql", "-infinity", "-infinity"),
        ("postgresql", "0044-03-15 12:00:00 BC", "0044-03-15 12:00:00 BC"),
        ("postgresql", "20000-01-01 00:00:00", "20000-01-01 00:00:00"),
        ("postgresql", "2026-11-22 10:50:00.999999", "2026-11-22 10:50:00"),
        ("mariadb", "0000-00-00 00:00:00", "0000-00-00 00:00:00"),
        ("mariadb", "9999-12-31 23:59:59", "9999-12-31 23:59:59"),
    ],
)
def test_any_time_is_served(request, name, created_on, served):
    server = request.getfixturevalue(f"{name}_server")
    url = server.make_database()
    with make_app(url) as application:
        fill_table(server, url, 3, application)
        server.execute(
            f"UPDATE {server.table} SET created_on = '{created_on}' WHERE id = 2", database_of(url)
        )
        assert get(application, 2).json["created_on"] == served
        assert [user["created_on"] for user in call(application).json][1] == served
        assert call(application, path="/health/").status == 200
        assert put(application, 2, HTTP_IF_MATCH=get(application, 2).headers["ETag"]).status == 200


# -- connections -----------------------------------------------------------------------


@contextlib.contextmanager
def logged_statements(server, url):
    """Yield a list, which contains the statements of one application's connection at
    the end of the block."""
    statements = []
    if isinstance(server, PostgreSQL):
        name, before = database_of(url), server.log.stat().st_size
        yield statements
        log = server.log.read_bytes()[before:].decode()
        pattern = rf"^{name}\|LOG:  (?:statement|execute [^:]*):(.*?)(?=^\w*\||\Z)"
        statements += [text.strip() for text in re.findall(pattern, log, re.MULTILINE | re.DOTALL)]
    else:
        name = database_of(url)
        [(thread,)] = server.execute(
            f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"
        )
        server.execute("SET GLOBAL log_output = 'TABLE', general_log = 1")
        yield statements
        server.execute("SET GLOBAL general_log = 0")
        rows = server.execute(
            "SELECT argument FROM mysql.general_log "
            f"WHERE thread_id = {thread} ORDER BY event_time"
        )
        statements += [
            argument.decode() if isinstance(argument, bytes) else argument for (argument,) in rows
        ]


@pytest.fixture
def logged(server):
    """The URL of a database whose statements are logged."""
    url = server.make_database()
    if isinstance(server, PostgreSQL):
        server.execute(f"ALTER DATABASE {database_of(url)} SET log_statement = 'all'")
    return url


def test_each_operation_is_one_statement_and_a_conditional_write_four(server, logged):
    with make_app(logged) as application:
        assert post(application).status == 201
        with logged_statements(server, logged) as statements:
            assert get(application).status == 200
            assert put(application).status == 200
            assert call(application).status == 200
            assert put(application, HTTP_IF_MATCH="*").status == 200
            assert call(application, "DELETE", "/users/1/").status == 204
    words = [statement.split()[0] for statement in statements]
    assert words == ["SELECT", "UPDATE", "SELECT", "BEGIN", "SELECT", "UPDATE", "COMMIT", "DELETE"]


def test_patch_is_one_update_of_the_given_columns(server, logged):
    with make_app(logged) as application:
        assert post(application).status == 201
        with logged_statements(server, logged) as statements:
            assert put(application, method="PATCH", fields={"first_name": "Ginny"}).status == 200
            assert (
                put(application, method="PATCH", fields={"email": "Ginny@example.com"}).status
                == 200
            )
    first, second = (
        re.findall(r"(\w+) = ", statement.partition("WHERE")[0]) for statement in statements
    )
    assert (first, second) == (["first_name"], ["email", "email_key"])


def test_write_after_idle_time_is_preceded_by_a_ping_and_a_read_is_not(
    postgresql_server, monkeypatch
):
    url = postgresql_server.make_database()
    postgresql_server.execute(f"ALTER DATABASE {database_of(url)} SET log_statement = 'all'")
    with make_app(url) as application:
        post(application)
        monkeypatch.setattr(profiler_sqlalchemy, "PING_AFTER", 0)
        with logged_statements(postgresql_server, url) as statements:
            assert get(application).status == 200
            assert put(application).status == 200
    assert [statement.split()[0] for statement in statements] == ["SELECT", ";", "UPDATE"]


def test_half_read_lists_hold_no_connection(server, url, application):
    fill_table(server, url, 1200, application)
    halves = []
    for _ in range(3 * profiler_sqlalchemy.POOL_SIZE):
        body = start(application)
        halves.append((next(body), body))
    assert get(application, 1200).status == 200
    for first, body in halves:
        assert len(json.loads(first + b"".join(body))) == 1200


def count_connections(server, url):
    name = database_of(url)
    if isinstance(server, PostgreSQL):
        return server.execute(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")[
            0
        ][0]
    return server.execute(
        f"SELECT count(*) FROM information_schema.processlist WHERE db = '{name}'"
    )[0][0]


def test_32_threads_of_cold_requests_open_at_most_8_connections(server, url):
    created = []

    def create():
        created.append(profiler_sqlalchemy.create_app(url, iterations=1))
        return created[-1]

    application = profiler.create_on_first_use(create)
    barrier, counts, done = threading.Barrier(33), [], threading.Event()

    def request(number):
        barrier.wait()
        return [get(application, i).status for i in range(20)] + [
            post(application, user(email=f"{number}@x")).status
        ]

    def watch():
        while not done.is_set():
            counts.append(count_connections(server, url))

    with ThreadPoolExecutor(33) as threads:
        answers = [threads.submit(request, number) for number in range(32)]
        watcher = threads.submit(watch)
        barrier.wait()
        statuses = {status for answer in answers for status in answer.result()}
        done.set()
        watcher.result()
    for one in created:
        one.close()
    assert statuses <= {200, 404, 201}
    assert 1 <= max(counts) <= profiler_sqlalchemy.POOL_SIZE == 8


def test_io_thread_never_waits_for_the_server(application):
    assert call(application).status == 200
    for path_info in ("/users/", "/users/1/", "/health/"):
        assert application.may_wait({"REQUEST_METHOD": "GET", "PATH_INFO": path_info})


@ignores_fork_warning
def test_child_process_does_not_use_the_connections_of_its_parent(server, url, application):
    """It would receive its parent's responses."""
    fill_table(server, url, 20, application)
    assert call(application).status == 200

    def ask(number):
        return get(application, number).json["id"] == number

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
        ("postgresql://app:h0rcrux@db:port/app", "invalid database URL"),
        ("postgresql://app:h0rcrux@a:5432,b:5432/app", "?host=a,b&port=5432,5432"),
        ("postgresql:/app:h0rcrux@db/app", "invalid database URL"),
        ("postgresql:app:h0rcrux@db/app", "invalid database URL"),
        ("mysql:/app:h0rcrux@db/app", "invalid database URL"),
        ('mysql://app:h0rcrux@db/app?ssl={"rejectUnauthorized":true}', "write ssl_ca=FILE"),
        ("mysql://app:h0rcrux@db/app?ssl=true", "write ssl_ca=FILE"),
        ("mysql://app:h0rcrux@db/app?cursorclass=h0r", "option cursorclass"),
        ("postgresql://app:h0rcrux@db/app?prepare_threshold=0", "option prepare_threshold"),
        ("postgresql://app:h0rcrux@db/app?row_factory=h0r", "option row_factory"),
        ("://", "invalid database URL"),
    ],
)
def test_invalid_url_is_rejected_without_its_password(url, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        profiler_sqlalchemy.create_app(url)
    assert "h0r" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    ("driver", "scheme", "install"),
    [
        ("psycopg", "postgresql", 'pip install sqlalchemy "psycopg[binary]" for PostgreSQL'),
        ("pymysql", "mysql", "pip install sqlalchemy pymysql for MySQL and MariaDB"),
    ],
)
def test_missing_driver_is_reported_with_what_to_install(driver, scheme, install, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ValueError, match=re.escape(install)):
        profiler_sqlalchemy.create_app(f"{scheme}://app@db/app")


def test_missing_sqlalchemy_is_reported_in_one_line(tmp_path):
    missing = "No module named 'sqlalchemy'"
    (tmp_path / "sqlalchemy.py").write_text(f'raise ImportError("{missing}")\n')
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}"}
    options = {"env": environ, "cwd": tmp_path, "capture_output": True, "text": True}
    command = [sys.executable, "-m", "profiler_sqlalchemy", "--database", "postgresql://app@db/"]
    output = subprocess.run(command, **options)
    assert (output.returncode, output.stdout) == (1, "")
    assert output.stderr.startswith(f"profiler: {missing}: pip install sqlalchemy ")
    assert output.stderr.count("\n") == 1
    output = subprocess.run([sys.executable, "-c", "import profiler_sqlalchemy"], **options)
    assert output.stderr.splitlines()[-1].startswith(f"ImportError: {missing}: pip install ")


@pytest.mark.parametrize(
    ("url", "location"),
    [
        (
            "postgres://app:h0rcrux@db.example/app?password=h0rcrux",
            "postgresql://app@db.example/app",
        ),
        ("mariadb://app:h0rcrux@db.example:3307/app", "mysql://app@db.example:3307/app"),
        (
            "postgresql+psycopg://app:h0rcrux@/app?host=a:5432&host=b:5433"
            "&target_session_attrs=read-write",
            "postgresql://app@/app on a:5432,b:5433",
        ),
        ("postgresql://app@/app?host=a,b&port=5432,5433", "postgresql://app@/app on a,b"),
        ("postgresql://app@db.example/app\n", "postgresql://app@db.example/app"),
        ("postgresql:///app?host=/run/postgresql", "postgresql:///app on /run/postgresql"),
    ],
)
def test_location_contains_no_password(url, location):
    assert profiler_sqlalchemy.create_app(url).users.location == location


def settings_of(application):
    """Return what the connections of an application have set, on PostgreSQL."""
    rows = application.users._read(
        "SELECT current_setting('statement_timeout'), current_setting('application_name')"
    )
    return rows[0]


def test_url_overrides_the_default_options(postgresql_server):
    url = postgresql_server.make_database()
    with make_app(url) as application:
        assert settings_of(application) == ("10s", "profiler")
    with make_app(
        url + "?application_name=other&options=-c%20statement_timeout%3D1234"
    ) as application:
        assert settings_of(application) == ("1234ms", "other")


@pytest.mark.parametrize(
    ("options", "expected"), [("?options=", "10s"), ("?options=-c%20statement_timeout%3D0", "0")]
)
def test_default_is_switched_off_by_a_value_and_not_by_an_empty_one(
    postgresql_server, options, expected
):
    with make_app(postgresql_server.make_database() + options) as application:
        assert settings_of(application)[0] == expected


def test_default_of_mariadb_is_switched_off_by_a_value(mariadb_server):
    with make_app(
        mariadb_server.make_database() + "?init_command=DO%200&read_timeout=86400"
    ) as application:
        assert application.users._read("SELECT @@sql_mode, @@innodb_lock_wait_timeout")[0] == (
            "",
            50,
        )


def test_statement_of_mariadb_ends_when_its_client_gives_up(mariadb_server):
    url = mariadb_server.make_database() + "?read_timeout=1"
    with make_app(url) as application:
        with pytest.raises(profiler.Unavailable):
            application.users._read("SELECT SLEEP(30)")
        name = database_of(url)
        running = f"SELECT 1 FROM information_schema.processlist WHERE db = '{name}'"
        until(lambda: not mariadb_server.execute(f"{running} AND info LIKE '%SLEEP(30)%'"))
        setting = application.users._read("SELECT @@max_statement_time")
        assert setting[0][0] == 1


@pytest.mark.parametrize(("option", "seconds"), [("", 10), ("?read_timeout=86400", 86400)])
def test_statement_timeout_of_mariadb_is_the_read_timeout(mariadb_server, option, seconds):
    with make_app(mariadb_server.make_database() + option) as application:
        assert application.users._read("SELECT @@max_statement_time")[0][0] == seconds


def test_connect_timeout_is_shared_by_several_hosts():
    def timeout(text):
        url = profiler_sqlalchemy._add_options(profiler_sqlalchemy._parse_url(text))
        return int(url.query["connect_timeout"])

    assert timeout("postgresql://a/app") == 5
    assert timeout("postgresql:///app?host=a&host=b&host=c") == 3
    assert timeout("postgresql:///app?host=a,b,c,d,e,f,g") == 2


# -- errors ----------------------------------------------------------------------------


def test_stopped_server_is_503_and_200_when_it_is_back(server, application, caplog):
    assert post(application).status == 201
    server.stop()
    assert_unavailable(call(application))
    assert_unavailable(call(application, path="/health/"))
    assert_unavailable(post(application, json.dumps(RON).encode()))
    assert_unavailable(put(application, fields={**HARRY}))
    server.start()
    assert call(application).status == 200
    assert post(application, json.dumps(RON).encode()).status == 201
    assert caplog.records == []  # SQLAlchemy and the driver add no lines


def test_connection_lost_in_a_transaction_is_503(server, application, caplog):
    assert post(application).status == 201

    def guard(current):
        server.stop()
        server.start()

    with pytest.raises(profiler.Unavailable):
        application.users.update(1, {"first_name": "a"}, guard)
    assert call(application).status == 200
    assert caplog.records == []


def test_connections_closed_by_the_server_are_replaced(server, application, monkeypatch):
    """All of the pool, for reads at once, for writes after a ping."""
    assert post(application).status == 201
    monkeypatch.setattr(profiler_sqlalchemy, "PING_AFTER", 0)
    for request in (get, put):
        with ThreadPoolExecutor(8) as threads:
            assert {answer.status for answer in threads.map(get, [application] * 100)} == {200}
        server.stop()
        server.start()
        with ThreadPoolExecutor(8) as threads:
            assert {answer.status for answer in threads.map(request, [application] * 16)} == {200}


def test_wrong_password_or_unknown_option_is_503(server, url):
    for wrong, reason in (
        (url.replace(SECRET, "Alohomora"), "app"),
        (url.replace("127.0.0.1", "no.such.host.invalid"), "no.such.host.invalid"),
        (url + "?frobnicate=h0rcrux", "frobnicate"),
    ):
        with make_app(wrong) as application:
            answer = call(application)
            assert_unavailable(answer, reason)
            assert "Alohomora" not in answer.errors


@pytest.mark.parametrize("password", ["ä", "漢\U0001f9d9", "s3cr/@: %2F+#?&=", "p"])
@pytest.mark.parametrize("place", ["://odd:{}@{}", "://odd@{1}?password={0}"])
def test_password_may_contain_any_characters(mariadb_server, password, place):
    url = mariadb_server.make_database()
    mariadb_server.execute(f"CREATE OR REPLACE USER odd IDENTIFIED BY '{password}'")
    mariadb_server.execute(f"GRANT ALL ON {database_of(url)}.* TO odd")
    address = url.partition("@")[2]
    with make_app("mysql" + place.format(quote(password, safe=""), address)) as application:
        assert call(application).status == 200


def test_password_may_be_in_an_option_file(mariadb_server, tmp_path):
    url = mariadb_server.make_database()
    (tmp_path / "my.cnf").write_text(f"[client]\npassword={SECRET}\n")
    with make_app(
        f"{url.replace(f':{SECRET}', '')}?read_default_file={tmp_path}/my.cnf"
    ) as application:
        assert call(application).status == 200


@pytest.mark.filterwarnings("ignore:.passwd. is deprecated")
def test_characters_that_cannot_be_sent_are_not_logged(mariadb_server):
    url = mariadb_server.make_database()
    with make_app(f"{url.replace(f':{SECRET}', '')}?passwd=%E6%BC%A2") as application:
        answer = call(application)
    assert_unavailable(answer, "an option in the URL cannot be sent")
    assert "6f22" not in answer.errors


def test_malformed_option_file_is_reported_without_its_content(tmp_path):
    (tmp_path / "my.cnf").write_text("password=h0rcrux\n")
    with make_app(f"mysql://app@127.0.0.1/app?read_default_file={tmp_path}/my.cnf") as application:
        assert_unavailable(call(application), "[client]")


def test_read_only_server_is_503_for_writes(server, url, application):
    if isinstance(server, PostgreSQL):
        on, off = ("ALTER SYSTEM SET default_transaction_read_only = on", "ALTER SYSTEM RESET ALL")

        def switch(statement):
            server.execute(statement)
            server.execute("SELECT pg_reload_conf()")
    else:
        on, off, switch = "SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0", server.execute
    application.users.count()
    with make_app(server.allow(url)) as limited:
        assert post(limited).status == 201
        switch(on)
        try:
            until(lambda: call(limited, "DELETE", "/users/9/").status == 503)
            assert_unavailable(post(limited, user(email="luna@example.com")), "read")
            assert call(limited).status == 200
        finally:
            switch(off)
        until(lambda: call(limited, "DELETE", "/users/9/").status == 204)


def test_statement_rolled_back_for_others_is_attempted_three_times(server, url, application):
    fill_table(server, url, 1, application)
    fail(server, url, times=2)
    assert put(application).status == 200
    fail(server, url, times=3)
    assert_unavailable(put(application))


def fail(server, url, times):
    """Make so many updates fail as in a deadlock. What counts them is not rolled back."""
    statements = (
        [
            "DROP SEQUENCE IF EXISTS failures",
            "CREATE SEQUENCE failures",
            f"""CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('failures') <= {times} THEN RAISE deadlock_detected; END IF;
            RETURN new; END $$""",
            """CREATE OR REPLACE TRIGGER fail BEFORE UPDATE ON "user"
            FOR EACH ROW EXECUTE FUNCTION fail()""",
        ]
        if isinstance(server, PostgreSQL)
        else [
            "DROP TRIGGER IF EXISTS fail",
            "DROP TABLE IF EXISTS failures",
            "CREATE TABLE failures (n INT AUTO_INCREMENT PRIMARY KEY)",
            f"""CREATE TRIGGER fail BEFORE UPDATE ON user FOR EACH ROW BEGIN
            INSERT INTO failures VALUES (NULL);
            IF LAST_INSERT_ID() <= {times} THEN
            SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213; END IF; END""",
        ]
    )
    for statement in statements:
        server.execute(statement, database_of(url))


@pytest.mark.parametrize(("is_read", "count"), [(True, 3), (False, 1)])
def test_read_whose_connection_breaks_is_repeated_and_a_write_is_not(
    server, application, is_read, count
):
    """A write may have been committed."""
    application.users.count()
    calls = []

    def work(cursor):
        calls.append(1)
        if len(calls) < 3:
            if isinstance(server, MariaDB):
                cursor.execute("SELECT CONNECTION_ID()")
                server.execute(f"KILL {cursor.fetchone()[0]}")
                cursor.execute("SELECT SLEEP(1)")
            else:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return "done"

    with contextlib.nullcontext() if is_read else pytest.raises(profiler.Unavailable):
        assert application.users._repeat(work, is_read) == "done"
    assert len(calls) == count


def test_request_without_a_free_connection_is_503(url, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 0.05)
    with make_app(url) as busy, contextlib.ExitStack() as stack:
        for _ in range(profiler_sqlalchemy.POOL_SIZE):
            stack.enter_context(busy.users._places)
        assert_unavailable(call(busy), "waited too long for a connection to the database")


def test_searches_leave_connections_to_other_requests(server, url, application, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 0.2)
    fill_table(server, url, 1, application)
    with ThreadPoolExecutor(16) as threads, blocked_searches(monkeypatch) as running:

        def search(_):
            return call(application, QUERY_STRING="q=First")

        searches = [threads.submit(search, number) for number in range(16)]
        for _ in range(profiler_sqlalchemy.MAX_SEARCHES):
            assert running.acquire(timeout=10)
        for _ in range(10):
            assert get(application).status == 200
            assert call(application, path="/health/").status == 200
        until(lambda: sum(search.done() for search in searches) == 14)
        refused = [search.result() for search in searches if search.done()]
    assert_unavailable(refused[0], "waited too long for other searches")
    assert sorted(search.result().status for search in searches) == [200] * 2 + [503] * 14


def test_search_that_fails_makes_room_for_others(application, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 0)
    application.users.count()
    with monkeypatch.context() as patch:
        patch.setattr(application.users, "_run", lambda *_: 1 / 0)
        for _ in range(2 * profiler_sqlalchemy.MAX_SEARCHES):
            with pytest.raises(ZeroDivisionError):
                application.users.page(10, text="x")
    assert application.users.page(10, text="x") == (b"", None)


@contextlib.contextmanager
def blocked_searches(monkeypatch):
    """Let no search end before the block does. Yield a semaphore that counts those that run."""
    fetch, running, go_on = profiler_sqlalchemy._fetch, threading.Semaphore(0), threading.Event()

    def fetch_slowly(cursor, statement, parameters=(), **options):
        if "ESCAPE" in statement:
            running.release()
            assert go_on.wait(30)
        return fetch(cursor, statement, parameters, **options)

    monkeypatch.setattr(profiler_sqlalchemy, "_fetch", fetch_slowly)
    try:
        yield running
    finally:
        go_on.set()


@pytest.fixture
def limited_to_three(server, url):
    """A URL whose account may have three connections, which is less than the pool may have."""
    with make_app(url) as application:
        fill_table(server, url, 20, application)
    command, limit, unlimited = (
        ("ALTER ROLE limited CONNECTION LIMIT", 3, -1)
        if isinstance(server, PostgreSQL)
        else ("ALTER USER limited WITH MAX_USER_CONNECTIONS", 3, 0)
    )
    limited = server.allow(url)
    server.execute(f"{command} {limit}")
    yield limited
    server.execute(f"{command} {unlimited}")


@contextlib.contextmanager
def three_connections_in_use(application):
    """Hold three connections in the block."""
    running, go_on = threading.Semaphore(0), threading.Event()

    def hold(cursor):
        running.release()
        assert go_on.wait(30)

    application.users.count()
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            threads.submit(application.users._run, hold, True)
        try:
            for _ in range(3):
                assert running.acquire(timeout=20)
            yield
        finally:
            go_on.set()


def test_request_waits_for_another_one_if_the_server_allows_no_more_connections(
    limited_to_three, monkeypatch
):
    monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 20)
    with make_app(limited_to_three) as application, ThreadPoolExecutor(4) as threads:
        with three_connections_in_use(application):
            waiting = [threads.submit(get, application, number) for number in range(1, 5)]
            time.sleep(0.3)
            assert not any(answer.done() for answer in waiting)
        answers = [answer.result() for answer in waiting]
        assert {(answer.status, answer.errors) for answer in answers} == {(200, "")}


def test_request_is_503_if_no_other_one_returns_its_connection_in_time(
    limited_to_three, monkeypatch
):
    with make_app(limited_to_three) as application, three_connections_in_use(application):
        monkeypatch.setattr(profiler_sqlalchemy, "POOL_TIMEOUT", 0.2)
        assert_unavailable(get(application), "connections")


def test_without_a_connection_of_its_own_a_request_is_503_at_once(postgresql_server):
    url = postgresql_server.make_database("CONNECTION LIMIT 0")
    with make_app(postgresql_server.url(database_of(url), "limited")) as limited:
        begin = time.monotonic()
        assert_unavailable(call(limited), "too many connections for database")
        assert time.monotonic() - begin < profiler_sqlalchemy.POOL_TIMEOUT


def test_exception_other_than_an_error_of_the_driver_returns_the_connection(application):
    def work(cursor):
        raise ZeroDivisionError

    for _ in range(2 * profiler_sqlalchemy.POOL_SIZE):
        with pytest.raises(ZeroDivisionError):
            application.users._repeat(work)
    assert call(application).status == 200


def test_email_taken_after_the_look_up_is_400(application, monkeypatch):
    """The unique key decides. The message of the server contains the email."""
    assert post(application).status == 201
    hash_password = profiler.hash_password

    def rename_ron(*arguments):
        application.users.update(2, {"email": "LUNA@example.com"})
        return hash_password(*arguments)

    assert post(application, json.dumps(RON).encode()).status == 201
    monkeypatch.setattr(profiler, "hash_password", rename_ron)
    answer = post(application, user(email="luna@example.com"))
    assert answer.status == 400
    assert answer.error == "This email is already registered"
    assert answer.errors == ""


def test_duplicate_of_another_unique_column_is_503_with_a_log_line(server, url, application):
    """It is not a taken email: the operator has a unique index."""
    post(application)
    server.execute(f"CREATE UNIQUE INDEX own ON {server.table} (last_name)", database_of(url))
    assert_unavailable(post(application, user(email="james@example.com")), "own")
    fill_ron = post(application, json.dumps(RON).encode()).json["id"]
    assert_unavailable(put(application, fill_ron, "PATCH", {"last_name": "Potter"}), "own")
    assert put(application, fill_ron, "PATCH", {"email": "harry@example.com"}).status == 400


def test_ids_inserted_by_another_program_are_not_reported_as_taken_emails(postgresql_server):
    url = postgresql_server.make_database()
    with make_app(url) as application:
        fill_table(postgresql_server, url, 2, application)
        for _ in range(2):
            assert_unavailable(post(application), "user_pkey")
        assert post(application).json == {"id": 3}
        assert post(application).status == 400


@pytest.mark.parametrize("type_name", ["text", "varchar(300)"])
def test_changed_column_type_does_not_break_prepared_statements(postgresql_server, type_name):
    """PostgreSQL rejects them: cached plan must not change result type."""
    url = postgresql_server.make_database()
    with make_app(url) as application:
        fill_table(postgresql_server, url, 3, application)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(get, [application] * 200))
        postgresql_server.execute(
            f'ALTER TABLE "user" ALTER first_name TYPE {type_name}', database_of(url)
        )
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(get, [application] * 50))
        assert {(answer.status, answer.errors) for answer in answers} == {(200, "")}
        assert put(application).status == 200


def test_lost_prepared_statements_are_prepared_again(postgresql_server):
    with make_app(postgresql_server.make_database()) as application:
        post(application)
        for _ in range(10):
            assert get(application).status == 200
        application.users._repeat(
            lambda cursor: cursor.execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
        )
        assert get(application).status == 200
        assert put(application).status == 200


def test_precondition_and_write_are_atomic(server, url, application):
    """Of two who see the same user, one is rejected."""
    fill_table(server, url, 1, application)
    seen = threading.Barrier(2, timeout=0.3)

    def guard(current):
        with contextlib.suppress(threading.BrokenBarrierError):
            seen.wait()  # in vain: the other waits for the row
        if b'"First1"' not in current:
            raise profiler.NoSuchUser

    def change(name):
        with contextlib.suppress(profiler.NoSuchUser):
            application.users.update(1, {"first_name": name}, guard)
            return name

    with ThreadPoolExecutor(2) as threads:
        [name] = set(threads.map(change, ["one", "other"])) - {None}
    assert json.loads(application.users.get(1))["first_name"] == name


def test_guard_that_raises_leaves_the_user_unchanged(server, url, application):
    fill_table(server, url, 1, application)
    for change in (
        lambda guard: application.users.update(1, {"first_name": "a"}, guard),
        lambda guard: application.users.delete(1, guard),
        lambda guard: application.users.replace_password_hash(1, None, "y", guard),
    ):
        with pytest.raises(ZeroDivisionError):
            change(lambda current: 1 / 0)
    assert b'"First1"' in application.users.get(1)
    assert application.users.find_credentials(1)[1] == "x"


# -- wrong passwords -------------------------------------------------------------------


@contextlib.contextmanager
def gunicorn(url, workers):
    """Run gunicorn with so many processes. Yield a function that sends a password for an
    email, and returns the status."""
    pytest.importorskip("gunicorn")
    port = servers.free_port()
    settings = {"PROFILER_DATABASE": url, "PROFILER_ITERATIONS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "gunicorn", "--preload", "--log-level", "warning"]
    command += ["-w", str(workers), "--threads", "4", "--bind", f"127.0.0.1:{port}"]

    def verify(email, password="wrong"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            body = json.dumps({"email": email, "password": password})
            connection.request(
                "POST", "/users/verify/", body, {"Content-Type": "application/json"}
            )
            return connection.getresponse().status

    def answers():
        with contextlib.suppress(OSError):
            return verify("nobody@example.com", "")

    with subprocess.Popen(
        [*command, "profiler_sqlalchemy:application"], env={**os.environ, **settings}
    ) as process:
        try:
            servers.until(answers, 60, 0.1)
            yield verify
        finally:
            process.terminate()


def test_processes_share_the_limit_of_wrong_passwords(server, url, application, advance):
    """10 guesses, and then one a minute, for an email that is known and for one that is not."""
    post(application)
    with gunicorn(url, workers=8) as verify, ThreadPoolExecutor(64) as threads:

        def guess(email, count):
            return sorted(threads.map(verify, [email] * count))

        for email in ("harry@example.com", "ron@example.com"):
            assert [verify(email) for _ in range(11)] == [403] * 10 + [429]
            assert guess(email, 64) == [429] * 64
            advance(61)
            assert guess(email, 64) == [403] + [429] * 63
        # However many begin before the first wrong password is counted.
        assert guess("luna@example.com", 64) == [403] * 10 + [429] * 54
        application.accounts.reset_password(1, "5678")
        assert verify("harry@example.com", "5678") == 200


def test_wrong_passwords_at_once_do_not_exceed_the_limit(application):
    """However many begin before the first one is counted."""
    post(application)

    def guess(number):
        fields = {"email": "harry@example.com", "password": "wrong"}
        return call(application, "POST", "/users/verify/", fields=fields).status

    with ThreadPoolExecutor(64) as threads:
        statuses = list(threads.map(guess, range(64)))
    assert sorted(statuses) == [403] * 10 + [429] * 54


def test_right_password_beside_too_many_wrong_ones_is_429(application, monkeypatch):
    """Otherwise guesses that are hashed at the same time would all be answered."""
    post(application)
    compare = profiler.verify_password

    def verify_slowly(*given):
        for _ in range(10):
            application.users.failures.add(1)
        return compare(*given)

    monkeypatch.setattr(profiler, "verify_password", verify_slowly)
    assert verify(application).status == 429


def verify(application, password="1234", email="harry@example.com"):
    fields = {"email": email, "password": password}
    return call(application, "POST", "/users/verify/", fields=fields)


def test_right_password_reads_only_and_one_row_of_wrong_ones(server, logged):
    with make_app(logged) as application:
        assert post(application).status == 201
        verify(application)
        with logged_statements(server, logged) as statements:
            assert verify(application).status == 200
            assert verify(application, "wrong").status == 403
            assert verify(application, "wrong").status == 403
    words = [statement.split()[0] for statement in statements]
    right, first_wrong, second_wrong = words[:3], words[3:6], words[6:]
    assert right == ["SELECT"] * 3
    assert first_wrong == ["SELECT", "INSERT", "UPDATE"]
    assert second_wrong == ["SELECT", "SELECT", "INSERT", "UPDATE"]


def test_wrong_passwords_are_found_by_the_primary_key(postgresql_server, mariadb_server):
    for server, key in ((postgresql_server, "profiler_failure_pkey"), (mariadb_server, "PRIMARY")):
        url = server.make_database()
        with make_app(url) as application:
            failures = application.users.failures
            failures.check(1)
            values = ", ".join(f"('{number}', 1, 9e9)" for number in range(3000))
            server.execute(f"INSERT INTO profiler_failure VALUES {values}", database_of(url))
            server.execute(
                f"ANALYZE {'TABLE' * (key == 'PRIMARY')} profiler_failure", database_of(url)
            )
            select = failures._select.replace("%s", "'7'")
            plan = server.execute(f"EXPLAIN {select}", database_of(url))
            assert key in str(plan)


def test_old_wrong_passwords_are_forgotten_and_deleted(
    server, url, application, advance, monkeypatch
):
    monkeypatch.setattr(profiler_sqlalchemy, "FORGET_EVERY", 10**9)
    failures = application.users.failures
    for account in (1, 1, 2, 3):
        failures.add(account)
    advance(599)
    assert failures.check(1) == 2
    advance(2)
    assert failures.check(1) == 0
    failures.add(1)
    assert failures.check(1) == 1
    monkeypatch.setattr(profiler_sqlalchemy, "FORGET_EVERY", 1)
    failures.add(4)
    rows = server.execute("SELECT count(*) FROM profiler_failure", database_of(url))
    assert rows == [(2,)]


def test_count_ends_at_the_limit_until_a_minute_has_passed(application, advance):
    failures = application.users.failures
    for count in range(10):
        assert failures.check(b"a@x") == count
        failures.add(b"a@x")
    for change in (failures.check, failures.add):
        with pytest.raises(profiler.TooManyAttempts) as refusal:
            change(b"a@x")
        assert 50 < refusal.value.retry_after <= 60
    advance(61)
    assert failures.check(b"a@x") == 10
    failures.add(b"a@x")
    with pytest.raises(profiler.TooManyAttempts):
        failures.check(b"a@x")
    failures.clear(b"a@x")
    assert failures.check(b"a@x") == 0


def test_password_that_another_process_has_reset_is_right_at_once(url, application):
    post(application)
    assert_limited(application)
    with make_app(url) as other:
        other.accounts.reset_password(1, "5678")
    assert verify(application, "5678").status == 200


def test_new_table_has_no_wrong_passwords(application):
    """Its ids begin at 1 again."""
    post(application)
    for _ in range(11):
        verify(application, "wrong")
    application.users.initialise(force=True)
    post(application)
    assert verify(application).status == 200


def assert_limited(application, email="harry@example.com"):
    statuses = [verify(application, "wrong", email).status for _ in range(12)]
    assert statuses == [403] * 10 + [429] * 2


def test_without_the_right_to_create_its_table_wrong_passwords_are_counted_in_memory(
    server, url, application, caplog
):
    """One line in the log says so."""
    post(application)
    assert caplog.records == []
    with make_app(server.allow(url)) as limited:
        assert_limited(limited)
        assert verify(limited, "wrong", "ron@example.com").status == 403
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith("profiler: each process counts wrong passwords by itself: ")
    assert "denied" in message
    assert "\n" not in message
    # Others still count in the table.
    assert verify(application).status == 200


def test_table_of_wrong_passwords_may_be_created_later(server, url, application, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "RETRY_FAILURES", 0)
    post(application)
    with make_app(server.allow(url)) as limited:
        for _ in range(5):
            verify(limited, "wrong")
        application.users.failures.check(1)
        server.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON "
            + ("" if isinstance(server, PostgreSQL) else f"{database_of(url)}.")
            + "profiler_failure TO limited",
            database_of(url),
        )
        assert_limited(limited)
    with pytest.raises(profiler.TooManyAttempts):
        application.users.failures.check(1)


def test_on_a_read_only_server_wrong_passwords_are_counted_in_memory(
    server, url, application, caplog
):
    post(application)
    application.users.failures.check(1)
    if isinstance(server, PostgreSQL):
        name = database_of(url)
        server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    else:
        server.allow(url)
        server.execute(f"GRANT SELECT ON {database_of(url)}.profiler_failure TO limited")
        url = server.url(database_of(url), "limited")
        server.execute("SET GLOBAL read_only = 1")
    try:
        with make_app(url) as replica:
            assert verify(replica).status == 200
            assert_limited(replica)
            [record] = caplog.records
            assert "read" in record.getMessage() or "denied" in record.getMessage()
    finally:
        if isinstance(server, PostgreSQL):
            server.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        else:
            server.execute("SET GLOBAL read_only = 0")


def test_wrong_password_that_cannot_be_stored_is_counted_in_memory(application, monkeypatch):
    """For example because the disk is full. Otherwise guessing would be free."""
    post(application)
    # The table is created.
    verify(application, "wrong")
    change = profiler_sqlalchemy._change

    def change_in_vain(cursor, statement, parameters=()):
        if "profiler_failure" in statement:
            raise profiler.Unavailable("No space left on device")
        return change(cursor, statement, parameters)

    monkeypatch.setattr(profiler_sqlalchemy, "_change", change_in_vain)
    # The first one was counted in memory, too.
    statuses = [verify(application, "wrong").status for _ in range(11)]
    assert statuses == [403] * 9 + [429] * 2


def test_wrong_passwords_are_limited_through_a_pooler(pooled_url):
    with make_app(pooled_url) as one, make_app(pooled_url) as other:
        post(one)
        statuses = [verify(app, "wrong").status for app in [one, other] * 6]
    assert statuses == [403] * 10 + [429] * 2


# -- timeouts --------------------------------------------------------------------------


@pytest.fixture
def short_timeouts(monkeypatch):
    """A tenth of the real ones."""
    for name in ("TIMEOUT", "LOCK_TIMEOUT", "CONNECT_TIMEOUT"):
        monkeypatch.setattr(profiler_sqlalchemy, name, 1)
    for name in ("POOL_TIMEOUT", "RETRY_TIME", "GRACE"):
        monkeypatch.setattr(profiler_sqlalchemy, name, 0.2)


@contextlib.contextmanager
def assert_in_time(limit=1.8):
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < limit


REQUEST_KINDS = {
    "get": get,
    "list": call,
    "put": put,
    "conditional": lambda application: put(application, HTTP_IF_MATCH="*"),
    "delete": lambda application: call(application, "DELETE", "/users/1/"),
}


@pytest.mark.parametrize("kind", REQUEST_KINDS)
def test_request_to_a_frozen_server_ends_in_time(server, url, application, short_timeouts, kind):
    application.close()
    with make_app(url) as application:
        fill_table(server, url, 1, application)
        server.freeze()
        try:
            with assert_in_time():
                assert_unavailable(REQUEST_KINDS[kind](application))
        finally:
            server.thaw()
        until(lambda: call(application).status == 200)


def test_ping_of_a_frozen_server_ends_in_time(server, url, short_timeouts, monkeypatch):
    monkeypatch.setattr(profiler_sqlalchemy, "PING_AFTER", 0)
    with make_app(url) as application:
        fill_table(server, url, 1, application)
        server.freeze()
        try:
            with assert_in_time():
                assert_unavailable(put(application))
        finally:
            server.thaw()


def test_first_request_to_a_frozen_server_ends_in_time(server, url, short_timeouts):
    """The system accepts the connection, and nothing answers."""
    with make_app(url) as application:
        server.freeze()
        try:
            with assert_in_time(2.8):  # libpq waits at least 2 seconds
                assert_unavailable(call(application))
        finally:
            server.thaw()


@pytest.mark.parametrize("kind", REQUEST_KINDS)
def test_request_for_a_locked_table_ends_in_time(server, url, short_timeouts, kind):
    with (
        make_app(url) as application,
        contextlib.closing(server.connect(database_of(url))) as other,
    ):
        fill_table(server, url, 1, application)
        cursor = other.cursor()
        if isinstance(server, PostgreSQL):
            cursor.execute("BEGIN")
            cursor.execute('LOCK TABLE "user" IN ACCESS EXCLUSIVE MODE')
        else:
            cursor.execute("LOCK TABLES user WRITE")
        with assert_in_time():
            assert_unavailable(REQUEST_KINDS[kind](application))


@pytest.mark.parametrize("kind", ["put", "conditional", "delete"])
def test_request_for_a_locked_row_ends_in_time(server, url, short_timeouts, kind):
    with (
        make_app(url) as application,
        contextlib.closing(server.connect(database_of(url))) as other,
    ):
        fill_table(server, url, 1, application)
        cursor = other.cursor()
        cursor.execute("BEGIN")
        cursor.execute(f"SELECT * FROM {server.table} FOR UPDATE")
        with assert_in_time():
            assert_unavailable(REQUEST_KINDS[kind](application))
        assert get(application).status == 200


def test_requests_that_wait_for_a_connection_end_in_time(server, url, short_timeouts):
    with (
        make_app(url) as application,
        contextlib.closing(server.connect(database_of(url))) as other,
    ):
        fill_table(server, url, 1, application)
        cursor = other.cursor()
        cursor.execute("BEGIN")
        cursor.execute(f"SELECT * FROM {server.table} FOR UPDATE")

        def timed_put(_):
            with assert_in_time(2):
                return put(application).status

        with ThreadPoolExecutor(32) as threads:
            assert set(threads.map(timed_put, range(32))) == {503}


def test_close_does_not_wait_for_a_stuck_request(server, url, application):
    application.close()
    with make_app(url) as application, ThreadPoolExecutor(2) as threads:
        fill_table(server, url, 1, application)
        server.freeze()
        try:
            stuck = threads.submit(get, application)
            time.sleep(0.1)
            with assert_in_time(1):
                application.close()
            assert not stuck.done()
        finally:
            server.thaw()
        assert stuck.result().status == 200
        assert get(application).status == 200


# -- poolers ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["transaction", "session"])
def pooler(request, postgresql_server):
    """PgBouncer, as docs/databases.md configures it."""
    if reason := servers.missing("pgbouncer"):
        pytest.skip(reason)
    with servers.pgbouncer(postgresql_server, request.param) as pooler:
        yield pooler


@pytest.fixture
def pooled_url(postgresql_server, pooler):
    return pooler.url(database_of(postgresql_server.make_database()))


def test_responses_through_a_pooler_are_the_same_as_on_sqlite(pooled_url, expected):
    with make_app(pooled_url) as application:
        assert_same(application, expected)


def test_clients_of_a_pooler_never_execute_statements_of_each_other(pooled_url):
    """One only reads, the other only deletes a user who does not exist. Each would
    prepare its statements as _pg3_0."""
    with make_app(pooled_url) as reader, make_app(pooled_url) as deleter:
        for number in range(200):
            reader.users.insert("a", "b", f"{number}@x", "x")

        def request(number):
            if number % 2:
                return call(deleter, "DELETE", "/users/9999/").status
            user_id = random.randint(1, 200)
            answer = get(reader, user_id)
            return answer.status if answer.json["id"] == user_id else 0

        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(request, range(3000))) == {200, 204}
        assert reader.users.count() == 200


def test_service_changes_no_setting_of_other_clients_of_a_pooler(pooled_url):
    with make_app(pooled_url) as application:
        assert settings_of(application)[0] == "0"


def test_killed_pooler_is_503_and_200_when_it_is_back(pooler, pooled_url):
    with make_app(pooled_url) as application:
        assert post(application).status == 201
        pooler.kill()
        assert_unavailable(call(application))
        pooler.start()
        assert call(application).status == 200
        assert put(application).status == 200


def test_six_threads_of_conditional_writes_through_a_pooler_lose_none(pooled_url):
    with make_app(pooled_url) as application:
        assert post(application).status == 201

        def increment(_):
            while True:
                answer = get(application)
                number = int(answer.json["last_name"]) if answer.json["last_name"].isdigit() else 0
                fields = {"last_name": str(number + 1)}
                changed = put(
                    application, 1, "PATCH", fields, HTTP_IF_MATCH=answer.headers["ETag"]
                )
                if changed.status == 200:
                    return
                assert changed.status == 412

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(increment, range(60)))
        assert get(application).json["last_name"] == "60"


class Pgpool(servers.PostgreSQLProtocol):
    """pgpool in front of one server."""

    def __init__(self, server, mode):
        self.program = servers.program("pgpool")
        super().__init__()
        self.server, self.mode = server, mode

    def create(self):
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "pcp_port": servers.free_port(),
            "pcp_listen_addresses": "", "unix_socket_directories": self.folder,
            "socket_dir": self.folder,
            "pcp_socket_dir": self.folder, "backend_clustering_mode": self.mode,
            "backend_hostname0": "127.0.0.1",
            "backend_port0": self.server.port, "allow_clear_text_frontend_auth": "on",
            "num_init_children": 20,
            "pid_file_name": self.folder / "pid", "logdir": self.folder, "sr_check_period": 0,
        }  # fmt: skip
        self.write(
            "pgpool.conf", "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        )
        for name in ("pcp.conf", "pool_hba.conf", "pool_passwd"):
            self.write(name, "")
        self.start()

    def command(self):
        names = {"-f": "pgpool.conf", "-F": "pcp.conf", "-a": "pool_hba.conf"}
        return [
            self.program,
            "-n",
            *itertools.chain(*((flag, self.folder / name) for flag, name in names.items())),
        ]


@pytest.mark.skipif(
    not servers.find_program("pgpool"), reason="not installed (Debian package): pgpool2"
)
@pytest.mark.parametrize("mode", ["streaming_replication", "raw"])
def test_responses_through_pgpool_are_the_same_and_writes_are_committed(
    postgresql_server, expected, mode
):
    """In its mode raw, pgpool begins a transaction for a write and does not commit it."""
    with servers.running(Pgpool(postgresql_server, mode)) as pool:
        url = postgresql_server.make_database()
        with make_app(pool.url(database_of(url))) as application, make_app(url) as direct:
            assert post(application).status == 201
            assert get(direct).json == get(application).json
            assert (
                put(application, 1, "PATCH", {"first_name": "James"}, HTTP_IF_MATCH="*").status
                == 200
            )
            assert get(direct).json["first_name"] == "James"
        with make_app(pool.url(database_of(postgresql_server.make_database()))) as application:
            assert_same(application, expected)


# -- TLS -------------------------------------------------------------------------------


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with two authorities, ca.pem and other.pem, and a certificate of the
    first for 127.0.0.1."""
    if not servers.find_program("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("ca", "other"):
        openssl(
            folder,
            "req",
            "-x509",
            *key,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-subj",
            f"/CN={name}",
        )
    openssl(
        folder, "req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server"
    )
    (folder / "extensions").write_text("subjectAltName = IP:127.0.0.1\n")
    openssl(
        folder, "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-CAcreateserial",
        "-out", "server.pem", "-extfile", "extensions",
    )  # fmt: skip
    return folder


def with_certificate(server, certificates, prefix):
    """Configure a server that was not created yet."""
    for name in ("server.key", "server.pem", "ca.pem"):
        server.write(name, (certificates / name).read_text())
    server.settings[prefix.format("key")] = server.folder / "server.key"
    server.settings[prefix.format("cert")] = server.folder / "server.pem"
    return servers.running(server)


def test_postgresql_is_used_only_with_a_verified_certificate_and_name(certificates):
    if reason := servers.missing("postgresql"):
        pytest.skip(reason)
    with with_certificate(PostgreSQL(ssl="on"), certificates, "ssl_{}_file") as server:
        url = f"{server.make_database()}?sslmode=verify-full&sslrootcert={certificates}"
        with make_app(f"{url}/ca.pem") as application:
            assert post(application).status == 201
            assert application.users._read(
                "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            ) == [(True,)]
        with make_app(f"{url}/other.pem") as application:
            assert_unavailable(call(application), "certificate verify failed")
        with make_app(f"{url}/ca.pem".replace("127.0.0.1", "localhost")) as application:
            assert_unavailable(call(application), "does not match host name")


def test_mariadb_is_used_only_with_a_verified_certificate_and_name(certificates):
    if reason := servers.missing("mariadb"):
        pytest.skip(reason)
    with with_certificate(MariaDB(), certificates, "ssl-{}") as server:
        url = f"{server.make_database()}?ssl_ca={certificates}"
        with make_app(f"{url}/ca.pem") as application:
            assert post(application).status == 201
            assert application.users._read("SHOW STATUS LIKE 'Ssl_cipher'")[0][1]
        with make_app(f"{url}/other.pem") as application:
            assert_unavailable(call(application), "certificate verify failed")
        with make_app(f"{url}/ca.pem".replace("127.0.0.1", "localhost")) as application:
            assert_unavailable(call(application), "mismatch")


# -- copy ------------------------------------------------------------------------------

ROWS = """
SELECT id, first_name, last_name, email, CAST(password AS TEXT), created_on FROM "user" ORDER BY id
"""


def copy(*arguments):
    """Run the command. Return None or the error."""
    try:
        profiler_sqlalchemy.main(["copy", *map(str, arguments)])
    except SystemExit as exit:
        return exit.code
    return None


@pytest.fixture
def filled(path):
    """A file with users who all differ, and whose ids have gaps, also at the end."""
    fill(path, 2500)
    execute(path, 'DELETE FROM "user" WHERE id IN (7, 2499, 2500)')
    execute(
        path,
        "UPDATE user SET created_on = datetime(1e9 + id, 'unixepoch'), password = 'hash' || id",
    )
    execute(
        path,
        "UPDATE user SET first_name = '\U0001f9d9 ', email = 'Étienne@Example.com' WHERE id = 8",
    )
    return path


def test_users_are_copied_to_a_server_and_back_unchanged(filled, url, tmp_path, capsys):
    assert copy(filled, url) is None
    assert copy(url, tmp_path / "back.sqlite3") is None
    output, errors = capsys.readouterr()
    location = profiler_sqlalchemy.create_app(url).users.location
    assert output.splitlines() == [
        f"Copied all users (2497) from {filled} to {location}.",
        f"Copied all users (2497) from {location} to {tmp_path / 'back.sqlite3'}.",
    ]
    assert errors == ""
    assert execute(tmp_path / "back.sqlite3", ROWS) == execute(filled, ROWS)


def test_rows_are_copied_in_batches(filled, url, monkeypatch):
    """Statements for each row would take 15 times as long."""
    batches = []
    monkeypatch.setattr(
        profiler_sqlalchemy._Database, "check", lambda side, rows: batches.append(len(rows))
    )
    assert copy(filled, url) is None
    assert batches == [1000, 1000, 497]


def test_users_are_copied_from_server_to_server(
    filled, postgresql_server, mariadb_server, tmp_path
):
    first, second, third = (
        server.make_database() for server in (postgresql_server, mariadb_server, postgresql_server)
    )
    for step in (
        (filled, first),
        (first, second),
        (second, third),
        (third, tmp_path / "back.sqlite3"),
    ):
        assert copy(*step) is None
    assert execute(tmp_path / "back.sqlite3", ROWS) == execute(filled, ROWS)
    with make_app(tmp_path / "back.sqlite3") as application:
        assert post(application).json == {"id": 2501}


@pytest.mark.parametrize("empty", [False, True])
def test_new_ids_continue_after_the_highest_ever_used(filled, url, tmp_path, empty):
    if empty:
        execute(filled, 'DELETE FROM "user"')
    assert copy(filled, url) is None
    with make_app(url) as application:
        assert application.users.count() == (0 if empty else 2497)
        assert post(application).json == {"id": 2501}
        call(application, "DELETE", "/users/2501/")
    assert copy(url, tmp_path / "back.sqlite3") is None
    with make_app(tmp_path / "back.sqlite3") as application:
        assert post(application).json == {"id": 2502}


def test_target_that_had_users_continues_after_their_ids(server, path, url, application):
    fill_table(server, url, 9, application)
    application.users.insert("a", "b", "c@d", "x") if isinstance(server, MariaDB) else None
    last_id = application.users.insert("a", "b", "e@f", "x") if isinstance(server, MariaDB) else 0
    server.execute(f"DELETE FROM {server.table}", database_of(url))
    fill(path, 2)
    assert copy(path, url) is None
    assert application.users.insert("a", "b", "c@d", "x") == max(last_id + 1, 3)


def test_target_with_users_is_rejected(filled, url, application):
    post(application)
    error = copy(filled, url)
    assert "holds users already (1)" in error
    assert SECRET not in error
    assert application.users.count() == 1
    assert "holds users already (2497)" in copy(url, filled)
    assert len(execute(filled, ROWS)) == 2497


def create_foreign(path, rows):
    """Create a file of another program: its columns may contain anything."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(TUTORIAL_SCHEMA.replace("NOT NULL", ""))
        columns = "(id, first_name, last_name, email, password, created_on)"
        connection.executemany(f'INSERT INTO "user" {columns} VALUES (?, ?, ?, ?, ?, ?)', rows)


GOOD = [(i, "a", "b", f"{i}@x", "x", "2026-11-22 10:00:00") for i in range(1, 1500)]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ((1500, "a", "b", "7@X", "x", "2026-11-22 10:00:00"), "duplicate|Duplicate"),
        ((1500, "a", "b", "c@x", "x", "2026-11-22 10:00:00Z"), "created_on|datetime"),
        ((1500, "a", "b", "c@x", "x", "2026-11-22 10:00:00+02:00"), "created_on|datetime"),
        ((1500, "a", "b", "c@x", "x", "2026-11-22T10:00:00"), "created_on"),
        ((1500, "a", "b", "c@x", "x", "2026-11-22 10:00:00.123456"), "created_on"),
        ((1500, "a", "b", "c@x", "x", 1795341600), "created_on|time"),
        ((1500, "a", "b", "c@x", "x", 1795341600.5), "created_on|time"),
        ((1500, "a", "b", "c@x", "x", "yesterday"), "created_on|time"),
        ((1500, None, "b", "c@x", "x", "2026-11-22 10:00:00"), "first_name"),
        ((1500, "a" * 256, "b", "c@x", "x", "2026-11-22 10:00:00"), "too long"),
        ((-5, "a", "b", "c@x", "x", None), "created_on"),
        ((-5, "a", "b", "c@x", "x", "2026-11-22T10:00:00"), "created_on"),
    ],
)
def test_user_who_would_be_served_differently_is_named_and_nothing_is_copied(
    path, url, application, row, named
):
    create_foreign(path, [*GOOD, row])
    error = copy(path, url)
    assert re.search(rf"user {row[0]}: .*({named})", error), error
    assert error.endswith(". Nothing was copied.")
    assert "\n" not in error
    assert "7@x" not in error.lower()
    assert application.users.count() == 0


def test_hash_stored_as_blob_still_verifies_after_the_copy(path, url, application):
    password_hash = profiler.hash_password("1234", ITERATIONS)
    create_foreign(
        path,
        [
            (1, b"Harry", "P", "a@x", password_hash.encode(), "2026-11-22 10:00:00"),
            (2, "R", "W", "b@x", None, b"2026-11-22 10:00:00"),
        ],
    )
    with make_app(path) as sqlite:
        before = call(sqlite).body
    assert copy(path, url) is None
    assert call(application).body == before
    fields = {"email": "a@x", "password": "1234"}
    assert call(application, "POST", "/users/verify/", fields=fields).status == 200
    assert (
        call(application, "POST", "/users/verify/", fields={**fields, "email": "b@x"}).status
        == 403
    )


@pytest.mark.parametrize(
    "created_on", ["infinity", "20000-01-01 00:00:00", "0044-03-15 12:00:00 BC"]
)
def test_time_of_postgresql_is_copied_to_sqlite_and_named_for_mariadb(
    postgresql_server, mariadb_server, tmp_path, created_on
):
    url = postgresql_server.make_database()
    with make_app(url) as application:
        fill_table(postgresql_server, url, 3, application)
        postgresql_server.execute(
            f"UPDATE \"user\" SET created_on = '{created_on}' WHERE id = 2", database_of(url)
        )
        assert copy(url, tmp_path / "copy.sqlite3") is None
        with make_app(tmp_path / "copy.sqlite3") as sqlite:
            assert call(sqlite).body == call(application).body
    assert "user 2: " in copy(url, mariadb_server.make_database())


def test_table_without_autoincrement_is_copied(path, url, application):
    """Flask-SQLAlchemy creates such tables."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(TUTORIAL_SCHEMA.replace("AUTOINCREMENT", ""))
        connection.execute(
            "INSERT INTO user VALUES (7, 'a', 'b', 'c@d', 'x', '2026-11-22 10:00:00')"
        )
    assert copy(path, url) is None
    assert post(application).json == {"id": 8}


@pytest.fixture
def after_the_last_batch(monkeypatch):
    """A function that sets what happens once all rows were copied, before the commit."""
    check = profiler_sqlalchemy._Database.check

    def patch(function):
        def check_and_call(side, rows):
            check(side, rows)
            if len(rows) < 1000:
                function()

        monkeypatch.setattr(profiler_sqlalchemy._Database, "check", check_and_call)

    return patch


def test_source_that_changes_during_the_copy_is_not_copied(
    filled, url, application, after_the_last_batch
):
    insert = 'INSERT INTO "user" (first_name, last_name, email, password)'
    after_the_last_batch(lambda: execute(filled, f"{insert} VALUES ('a', 'b', 'c@d', 'x')"))
    assert "has changed meanwhile" in copy(filled, url)
    assert application.users.count() == 0


def test_server_lost_during_the_copy_is_left_without_users(
    filled, server, url, after_the_last_batch
):
    def restart():
        server.stop()
        server.start()

    after_the_last_batch(restart)
    error = copy(filled, url)
    assert error.startswith("profiler: ")
    assert "\n" not in error
    with make_app(url) as application:
        assert application.users.count() == 0


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        ("missing.sqlite3", "URL", "missing.sqlite3 does not exist"),
        ("URL", "URL", "both"),
        ("db.sqlite3", "db.sqlite3", "both"),
        ("db.sqlite3", "sqlite:///other", "sqlite://"),
        ("db.sqlite3", "postgresql://app:h0rcrux@127.0.0.1:1/app", "127.0.0.1"),
        ("db.sqlite3", "mysql://app:h0rcrux@127.0.0.1:1/app", "127.0.0.1"),
        ("diary", "URL", "not a database"),
        ("db.sqlite3", "missing/db.sqlite3", "missing"),
    ],
)
def test_failed_copy_is_one_line(
    source, target, named, mariadb_server, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    url = mariadb_server.make_database()
    fill("db.sqlite3", 0)
    pathlib.Path("diary").write_bytes(b"I am Tom Riddle. " * 100)
    error = copy(source.replace("URL", url), target.replace("URL", url))
    assert named in error
    assert error.startswith("profiler: ")
    assert error.endswith("Nothing was copied.")
    assert "\n" not in error
    assert SECRET not in error
    assert capsys.readouterr().out == ""
    assert not pathlib.Path("missing.sqlite3").exists()


def test_copy_from_a_database_without_a_table_fails(mariadb_server, tmp_path):
    url, target = mariadb_server.make_database(), tmp_path / "db.sqlite3"
    for _ in range(2):  # and creates none
        with pytest.raises(SystemExit, match="has no table of users"):
            profiler_sqlalchemy.main(["copy", url, str(target)])
    assert not target.exists()


# -- command line ----------------------------------------------------------------------


def run_command(folder, *arguments, **environ):
    command = [sys.executable, "-m", "profiler_sqlalchemy", *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(HERE), **environ}
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)


def test_target_of_a_copy_may_be_given_by_the_environment(filled, postgresql_server, tmp_path):
    """There its password is not visible in the list of processes."""
    output = run_command(
        tmp_path, "copy", filled, PROFILER_DATABASE=postgresql_server.make_database()
    )
    assert (output.returncode, output.stderr) == (0, "")
    assert output.stdout.startswith("Copied all users (2497) ")


def test_command_serves_a_url_without_showing_its_password(server, url, tmp_path):
    environ = {**os.environ, "PROFILER_DATABASE": url, "PROFILER_PORT": "0"}
    with subprocess.Popen(
        [sys.executable, HERE / "profiler_sqlalchemy.py"],
        env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        address = process.stdout.readline().split("/")[2]
        banner = process.stdout.readline()
        statuses = []
        for method in ("POST", "POST", "GET"):
            connection = http.client.HTTPConnection(address, timeout=10)
            with contextlib.closing(connection):
                connection.request(method, "/users/", user(), {"Content-Type": "application/json"})
                statuses.append(connection.getresponse().status)
        process.terminate()
        output, errors = process.communicate(timeout=20)
    assert statuses == [201, 400, 200]
    assert f"127.0.0.1:{server.port}/{database_of(url)} (users: 0)." in banner
    assert SECRET not in banner + output + errors
    assert process.returncode == 0


def test_commands_work_on_a_url(url, monkeypatch, capsys):
    monkeypatch.setenv("PROFILER_DATABASE", url)

    def run(*arguments):
        try:
            profiler_sqlalchemy.main(arguments)
        except SystemExit as exit:
            return str(exit.code)
        return capsys.readouterr().out

    assert "pg_dump" in run("backup", "copy.sqlite3")
    assert run("initialise-database") == "Successfully created database schema.\n"
    assert run("initialise-database") == "The database schema exists.\n"
    with make_app(url) as application:
        assert post(application).status == 201
    assert "its own program" in run("backup", "copy.sqlite3")
    assert (
        run("initialise-database") == "profiler: the table holds users (1): --force deletes them"
    )
    assert run("initialise-database", "--force") == "Successfully created database schema.\n"
    with make_app(url) as application:
        assert application.users.count() == 0


def test_path_is_plain_sqlite(tmp_path):
    users = profiler_sqlalchemy.create_app(tmp_path / "db.sqlite3").users
    assert type(users) is profiler.Users
    output = run_command(tmp_path, "initialise-database", "--database", "other.sqlite3")
    assert (output.returncode, output.stdout) == (0, "Successfully created database schema.\n")
    assert execute(tmp_path / "other.sqlite3", ROWS) == []


def test_invalid_url_exits_with_2(tmp_path):
    output = run_command(tmp_path, "--database", "oracle://app:h0rcrux@db/app")
    assert output.returncode == 2
    assert "oracle:// is not supported" in output.stderr
    assert SECRET not in output.stderr


def test_profiler_imports_nothing_of_sqlalchemy_and_names_the_other_command(tmp_path):
    program = (
        "import profiler, sys; profiler.create_app('db').users.count(); "
        "print('sqlalchemy' in sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    options = {"env": environ, "cwd": tmp_path, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", program], **options).stdout == "False\n"
    command = [sys.executable, "-m", "profiler", "--database", "postgresql://app:h0rcrux@db/app"]
    output = subprocess.run(command, **options)
    assert output.returncode == 2
    assert "python -m profiler_sqlalchemy" in output.stderr
    assert SECRET not in output.stderr


def test_application_is_configured_by_the_environment(url, monkeypatch):
    monkeypatch.setenv("PROFILER_DATABASE", url)
    monkeypatch.setenv("PROFILER_ITERATIONS", "1")
    with contextlib.closing(profiler_sqlalchemy.create_app()) as application:
        assert post(application).json == {"id": 1}
        assert application.accounts.iterations == 1
    assert profiler_sqlalchemy.app is profiler_sqlalchemy.application
