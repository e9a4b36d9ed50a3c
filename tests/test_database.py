"""Tests of the section *database*: one SQLite file, its locks, threads and forks,
schema.sql and backups."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import (
    HARRY,
    HERE,
    RON,
    TUTORIAL_SCHEMA,
    call,
    execute,
    fill,
    ignores_fork_warning,
    in_a_fork,
    locked,
    needs_fork,
    not_on_windows,
    post,
    post_at_once,
    run_program,
    until,
)

import profiler

INSERT = (
    "INSERT INTO \"user\" (first_name, last_name, email, password) VALUES ('a', 'b', 'c', 'd')"
)


def write(application, path="/users/1/"):
    """Send a request that writes."""
    return call(application, "DELETE", path)


def is_readable(path):
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        try:
            connection.execute("SELECT * FROM sqlite_master").fetchall()
        except sqlite3.OperationalError:
            return False
    return True


@pytest.fixture
def connections(monkeypatch):
    """The connections that are opened during the test, and their class, whose `errors`
    a test can fill."""
    connect, opened = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        """Raises the exception in `errors` for statements that contain its key."""

        errors: dict = {}  # noqa: RUF012

        def execute(self, statement, *parameters):
            for part, error in self.errors.items():
                if part in statement:
                    raise error
            return super().execute(statement, *parameters)

        def rollback(self):
            if "ROLLBACK" in self.errors:
                raise self.errors["ROLLBACK"]
            super().rollback()

    def connect_and_keep(*arguments, **options):
        opened.append(connect(*arguments, **{"factory": Connection, **options}))
        return opened[-1]

    monkeypatch.setattr(profiler.sqlite3, "connect", connect_and_keep)
    return opened, Connection


# -- opening ---------------------------------------------------------------------------


def test_import_opens_no_file(tmp_path):
    program = (
        "import sys; opened = []\n"
        "watched = ('open', 'sqlite3.connect')\n"
        "sys.addaudithook(\n"
        "    lambda event, args: opened.append(args[0]) if event in watched else None\n"
        ")\n"
        "import profiler\n"
        "print([name for name in opened if str(name).endswith(('sqlite3', '.sql'))])"
    )
    output = run_program(program, tmp_path, PROFILER_DATABASE="/no/such/folder/db.sqlite3")
    assert (output.stdout.strip(), output.stderr, os.listdir(tmp_path)) == ("[]", "", [])


@pytest.mark.parametrize("name", [":memory:", ""])
def test_database_in_memory_raises_valueerror(name):
    with pytest.raises(ValueError, match="must be a file"):
        profiler.create_app(name)


@pytest.mark.parametrize(
    "url", ["postgresql://app:secret@localhost/app", "postgresql:/app:secret@h/d", "sqlite:///x"]
)
def test_url_raises_valueerror_naming_profiler_sqlalchemy(url):
    with pytest.raises(ValueError, match="profiler_sqlalchemy") as caught:
        profiler.create_app(url)
    assert "secret" not in str(caught.value)


@not_on_windows("has no file modes")
def test_new_files_are_readable_by_their_owner_only(application, path):
    assert post(application).status == 201
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert len(list(path.parent.iterdir())) == 3  # with -wal and -shm


@not_on_windows("has no file modes")
def test_new_file_behind_a_symbolic_link_is_readable_by_its_owner_only(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "db.sqlite3")
    with contextlib.closing(profiler.create_app(tmp_path / "link", iterations=1)) as application:
        assert post(application).status == 201
        assert {
            stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "elsewhere").iterdir()
        } == {0o600}


def test_wal_mode_with_every_commit_synced(application, users, path):
    assert users.count() == 0
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    with users.transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchall() == [(3,)]  # EXTRA


def test_relative_path_is_resolved_when_the_application_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(profiler.create_app("db.sqlite3")) as application:
        monkeypatch.chdir("/")
        assert call(application).status == 200
    assert (tmp_path / "db.sqlite3").exists()


@pytest.mark.parametrize(
    "name",
    [
        "a b=c#d%20e&f.sqlite3",
        "€.sqlite3",
        pytest.param("?.sqlite3", marks=not_on_windows("allows no ? in names")),
        pytest.param("\udcff.sqlite3", marks=not_on_windows("has no names of bytes")),
    ],
)
def test_file_name_may_contain_special_characters(tmp_path, name):
    with contextlib.closing(profiler.create_app(tmp_path / name)) as application:
        assert write(application).status == 204
    assert os.listdir(tmp_path) == [name]


def test_all_threads_share_three_connections(application, connections):
    with ThreadPoolExecutor(8) as threads:
        for function in (call, write, lambda application: call(application, QUERY_STRING="q=x")):
            assert {answer.status for answer in threads.map(function, [application] * 40)} <= {
                200,
                204,
            }
    assert len(connections[0]) == 3


def test_file_that_is_no_database_returns_500_and_is_not_changed(application, path):
    path.write_bytes(b"The diary of a famous wizard. " * 100)
    answer = call(application)
    assert (answer.status, answer.json) == (500, {"error": "Internal server error"})
    assert "file is not a database" in answer.errors
    assert path.read_bytes() == b"The diary of a famous wizard. " * 100
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("size", [1, 511])
def test_short_file_is_no_database_either(application, path, size):
    """SQLite would overwrite it."""
    path.write_bytes(b"h" * size)
    assert call(application).status == 500
    assert path.read_bytes() == b"h" * size


def test_empty_file_becomes_a_database(application, path):
    path.touch()
    assert call(application).json == []


def test_missing_folder_returns_503_and_names_it(tmp_path):
    answer = call(profiler.create_app(tmp_path / "missing" / "db.sqlite3"))
    assert (answer.status, list(answer.json)) == (503, ["error"])
    assert f"create the folder {tmp_path / 'missing'}" in answer.errors
    assert os.listdir(tmp_path) == []


def test_folder_created_later_is_used(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "later" / "db.sqlite3")) as application:
        assert call(application).status == 503
        (tmp_path / "later").mkdir()
        assert call(application).status == 200


def test_file_in_place_of_the_folder_returns_503(path):
    path.touch()
    assert call(profiler.create_app(path / "db.sqlite3")).status == 503


def test_folder_in_place_of_the_file_returns_503(tmp_path):
    """Some file systems count less than 512 bytes for it."""
    assert call(profiler.create_app(tmp_path)).status == 503


# -- schema.sql ------------------------------------------------------------------------


def test_schema_has_the_columns_of_the_tutorial(path):
    fill(path, 0)
    with contextlib.closing(sqlite3.connect(":memory:")) as tutorial:
        tutorial.executescript(TUTORIAL_SCHEMA)
        columns = tutorial.execute("PRAGMA table_info(user)").fetchall()
    assert execute(path, 'PRAGMA table_info("user")') == columns


HOSTILE_SCHEMAS = {
    "tutorial": "DROP TABLE IF EXISTS user;\n" + TUTORIAL_SCHEMA,
    "delete": TUTORIAL_SCHEMA + 'DELETE FROM "user";\nDROP TABLE user;',
    "alter": TUTORIAL_SCHEMA + "ALTER TABLE user RENAME TO users;",
    "replace": TUTORIAL_SCHEMA + "DROP TABLE user; " + TUTORIAL_SCHEMA,
    "update": "UPDATE user SET password = '';"
    + TUTORIAL_SCHEMA
    + "CREATE TABLE post (user TEXT);",
}


@pytest.fixture
def schema(monkeypatch):
    """A function that replaces schema.sql."""
    return lambda text: monkeypatch.setattr(
        profiler, "read_installed_file", lambda name: text.encode()
    )


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_foreign_schema_sql_is_not_executed_if_there_is_a_table(
    path, accounts, users, tmp_path, schema, name
):
    fill(path, 7)
    schema(HOSTILE_SCHEMAS[name])
    before = execute(path, 'SELECT * FROM "user"')
    accounts.create("Harry", "Potter", "harry@example.com", "1234")
    with pytest.raises(FileExistsError):
        users.initialise()
    users.backup(str(tmp_path / "copy"))
    users.close()
    assert users.count() == 8
    assert execute(path, 'SELECT * FROM "user" WHERE id < 8') == before
    assert execute(tmp_path / "copy", "SELECT count(*) FROM user") == [(8,)]


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_foreign_schema_sql_is_refused_and_changes_nothing(application, path, schema, name):
    execute(path, "CREATE TABLE post (text)")
    schema(HOSTILE_SCHEMAS[name])
    answer = call(application)
    assert (answer.status, "schema.sql must be one statement" in answer.errors) == (503, True)
    assert execute(path, "SELECT name FROM sqlite_master") == [("post",)]


def test_forced_initialisation_with_a_foreign_schema_sql_keeps_the_users(path, users, schema):
    fill(path, 7)
    schema("CREATE TABLE post (text)")
    with pytest.raises(profiler.Unavailable, match="must be one statement"):
        users.initialise(force=True)
    schema('CREATE TABLE "user" (id INTEGER PRIMARY KEY)')
    with pytest.raises(profiler.Unavailable, match="no such column"):
        users.initialise(force=True)
    assert users.count() == 7
    assert execute(path, "SELECT name FROM sqlite_master WHERE name = 'post'") == []


def test_schema_sql_in_utf_16_returns_503(application, path, monkeypatch):
    monkeypatch.setattr(profiler, "read_installed_file", lambda name: "x".encode("utf-16"))
    answer = call(application)
    assert (answer.status, "cannot read schema.sql" in answer.errors) == (503, True)
    assert not path.exists()


def test_schema_sql_with_nul_returns_503(application, schema):
    """sqlite3 raises ValueError for it before Python 3.11."""
    schema('CREATE TABLE "user" (id)\0')
    answer = call(application)
    assert (answer.status, "schema.sql must be one statement" in answer.errors) == (503, True)


def test_creation_of_the_table_waits_for_a_reader_outside_wal_mode(application, path, monkeypatch):
    monkeypatch.setattr(profiler, "_can_map_files", lambda folder: False)
    execute(path, "CREATE TABLE post (text)")
    with contextlib.closing(sqlite3.connect(path)) as reader, ThreadPoolExecutor(1) as threads:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM post").fetchall()
        answer = threads.submit(call, application)
        # A writer that waits for readers to end lets no new one in.
        until(lambda: answer.done() or not is_readable(path))
        assert not answer.done()
        reader.rollback()
        assert answer.result(timeout=10).status == 200


def test_folder_without_write_access_is_named_even_if_the_table_is_missing(
    application, path, connections, monkeypatch
):
    execute(path, "CREATE TABLE post (text)")
    connections[1].errors["CREATE"] = sqlite3.OperationalError("unable to open database file")
    monkeypatch.setattr(profiler.os, "access", lambda path, mode: False)
    answer = call(application)
    assert (answer.status, "schema.sql" in answer.errors) == (503, False)
    assert f"may not read and write {path.parent}" in answer.errors


@pytest.mark.parametrize("name", ["user", "User", "USER"])
def test_existing_table_is_used_without_reading_schema_sql(application, path, monkeypatch, name):
    execute(path, TUTORIAL_SCHEMA.replace("user", name, 1).strip())
    monkeypatch.setattr(profiler, "read_installed_file", lambda name: pytest.fail("read"))
    assert (post(application).status, len(call(application).json)) == (201, 1)


@pytest.mark.parametrize(
    "text", ["", "CREATE TABLE users (id INTEGER);", "CREATE TABLE post (user TEXT);"]
)
def test_schema_sql_without_the_table_returns_503_and_changes_nothing(
    application, path, schema, text
):
    schema(text)
    answer = call(application)
    assert (answer.status, "schema.sql must be one statement" in answer.errors) == (503, True)
    assert execute(path, "SELECT name FROM sqlite_master") == []


def test_tutorial_database_is_served_as_it_is(client, path):
    execute(path, TUTORIAL_SCHEMA.strip())
    row = (
        "Harry",
        "Potter",
        "harry@example.com",
        profiler.hash_password("1234", 1),
        "2020-01-02 03:04:05",
    )
    execute(
        path,
        "INSERT INTO user (first_name, last_name, email, password, created_on) "
        "VALUES (?, ?, ?, ?, ?)",
        row,
    )
    assert client.get("/users/1/").json["created_on"] == "2020-01-02 03:04:05"
    client.post_json("/users/", {**RON, "email": "Harry@example.com"}, status=400)
    assert client.post_json("/users/", RON, status=201).json == {"id": 2}
    client.put_json("/users/2/", {**RON, "email": "HARRY@example.com"}, status=400)
    client.post_json("/users/verify/", {**HARRY, "email": "HARRY@example.com"}, status=200)
    assert execute(path, "SELECT sql FROM sqlite_master WHERE name = 'user'") == [
        (TUTORIAL_SCHEMA.strip()[:-1],)
    ]


def test_table_of_another_shape_returns_503(application, path):
    execute(path, 'CREATE TABLE "user" (name TEXT)')
    for path_info in ("/users/", "/users/1/", "/health/"):
        answer = call(application, path=path_info)
        assert (answer.status, "no such column" in answer.errors) == (503, True)


def test_health_of_an_sqlite_without_json_returns_503(application, connections):
    """An option of SQLite before 3.38."""
    connections[1].errors["json_object"] = sqlite3.OperationalError(
        "no such function: json_object"
    )
    answer = call(application, path="/health/")
    assert (answer.status, "json_object" in answer.errors) == (503, True)


def test_view_instead_of_a_table_can_be_read(application, path):
    execute(path, TUTORIAL_SCHEMA.replace("user", "account", 1).strip())
    execute(path, "CREATE VIEW user AS SELECT * FROM account")
    assert (call(application).json, call(application, path="/health/").status) == ([], 200)
    answer = post(application)
    assert (answer.status, "cannot modify user because it is a view" in answer.errors) == (
        503,
        True,
    )


def test_log_names_the_missing_column_of_a_table_without_autoincrement(application, path):
    execute(path, 'CREATE TABLE "user" (id INTEGER PRIMARY KEY, email TEXT, password TEXT)')
    answer = post(application)
    assert (answer.status, "first_name" in answer.errors) == (503, True)


def test_files_are_found_in_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.write(HERE / "profiler.py", "profiler.py")
        archive.write(HERE / "schema.sql", "schema.sql")
    program = (
        "import profiler; print(profiler.__file__, profiler.create_app('x.sqlite3').users.count())"
    )
    output = run_program(program, tmp_path, PYTHONPATH=str(tmp_path / "app.zip"))
    assert output.stdout.split() == [str(tmp_path / "app.zip" / "profiler.py"), "0"], output.stderr


def test_files_are_found_without_a_module_spec(path):
    """mod_wsgi loads a script like this."""
    namespace = {"__file__": str(HERE / "profiler.py"), "__name__": "_mod_wsgi_"}
    exec(compile((HERE / "profiler.py").read_text("utf-8"), "profiler.py", "exec"), namespace)
    with contextlib.closing(namespace["create_app"](path)) as application:
        assert call(application).status == 200


def test_files_of_a_wheel_are_preferred_to_those_of_another_package(tmp_path):
    shutil.copy(HERE / "profiler.py", tmp_path)
    (tmp_path / "profiler_users").mkdir()
    shutil.copy(HERE / "schema.sql", tmp_path / "profiler_users")
    (tmp_path / "schema.sql").write_text("CREATE TABLE other (a);")
    program = "import profiler; print(profiler.create_app('x.sqlite3').users.count())"
    assert run_program(program, tmp_path, PYTHONPATH=str(tmp_path)).stdout == "0\n"


def test_missing_schema_sql_is_named(tmp_path):
    shutil.copy(HERE / "profiler.py", tmp_path)
    program = "import profiler; profiler.create_app('x.sqlite3').users.count()"
    output = run_program(program, tmp_path, PYTHONPATH=str(tmp_path))
    assert f"schema.sql is missing: copy it to {tmp_path}" in output.stderr
    assert not (tmp_path / "x.sqlite3").exists()


# -- transactions and locks ------------------------------------------------------------


def test_failed_transaction_is_rolled_back(application, users):
    with pytest.raises(ZeroDivisionError), users.transaction() as connection:
        connection.execute(INSERT)
        raise ZeroDivisionError
    assert users.count() == 0
    assert post(application).status == 201


def test_connection_that_cannot_roll_back_is_closed(application, users, path, connections):
    _, kind = connections
    users.ping()
    kind.errors.update(
        dict.fromkeys(["COMMIT", "ROLLBACK"], sqlite3.OperationalError("disk I/O error"))
    )
    assert post(application).status == 503
    kind.errors.clear()
    assert execute(path, 'SELECT count(*) FROM "user"') == [(0,)]
    with locked(path):  # it holds no lock
        pass
    assert post(application).status == 201


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (sqlite3.OperationalError("database is locked"), 503),
        (sqlite3.OperationalError("database table is locked"), 503),
        (sqlite3.OperationalError("database or disk is full"), 503),
        (sqlite3.OperationalError("disk I/O error"), 503),
        (sqlite3.OperationalError("attempt to write a readonly database"), 503),
        (sqlite3.DatabaseError("database disk image is malformed"), 500),
        (sqlite3.IntegrityError("CHECK constraint failed"), 500),
    ],
)
def test_operational_error_returns_503_and_other_errors_500(
    application, connections, short_timeouts, error, status
):
    connections[1].errors["COMMIT"] = error
    answer = write(application)
    assert (answer.status, str(error) in answer.errors) == (status, True)
    if status == 503:
        assert answer.error.startswith(
            "The service is busy" if "lock" in str(error) else "The database is unavailable"
        )
        assert answer.errors.count("\n") == 1
    connections[1].errors.clear()
    assert write(application).status == 204


def test_read_error_closes_the_connection(application, connections):
    opened, kind = connections
    assert call(application).status == 200
    count = len(opened)
    kind.errors["json_object"] = sqlite3.OperationalError("disk I/O error")
    assert call(application, path="/users/1/").status == 503
    kind.errors.clear()
    assert call(application, path="/users/1/").status == 404
    assert len(opened) == count + 1


def test_locked_database_returns_503_and_logs_one_line(application, path, short_timeouts):
    fill(path, 1)
    with locked(path):
        answer = write(application)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json == {"error": "The service is busy: try again"}
    assert answer.errors == "profiler: 503: database is locked\n"
    assert execute(path, 'SELECT count(*) FROM "user"') == [(1,)]


def test_write_that_waits_too_long_for_another_thread_returns_503(
    application, users, short_timeouts
):
    with users.transaction():
        answer = write(application)
    assert (answer.status, answer.headers["Retry-After"], answer.errors.count("\n")) == (
        503,
        "1",
        1,
    )


def test_waiting_writer_retries_at_short_intervals(application, path, monkeypatch):
    """SQLite's own pauses grow to 100 ms."""
    pauses = []
    assert write(application).status == 204
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(path))
        monkeypatch.setattr(
            profiler.time, "sleep", lambda seconds: pauses.append(seconds) or stack.close()
        )
        assert write(application).status == 204
    assert len(pauses) == 1
    assert pauses[0] <= 0.01


@pytest.mark.parametrize("is_wal", [True, False])
def test_reads_are_served_while_another_process_holds_the_write_lock(
    application, path, is_wal, short_timeouts
):
    """Even the first one, and of a file that cannot be switched to WAL mode because of
    the lock."""
    fill(path, 0) if is_wal else execute(path, TUTORIAL_SCHEMA.strip())
    with locked(path):
        assert call(application).json == []
        assert call(application, QUERY_STRING="q=x").json == []


def test_file_that_is_locked_for_a_moment_is_still_switched_to_wal_mode(
    application, path, monkeypatch
):
    execute(path, TUTORIAL_SCHEMA.strip())
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(path))
        monkeypatch.setattr(profiler.time, "sleep", lambda _: stack.close())
        assert call(application).status == 200
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]


def test_database_locked_at_first_use_returns_503_to_all_readers_in_time(
    application, path, monkeypatch
):
    monkeypatch.setattr(profiler, "BUSY_TIMEOUT", 0.1)
    monkeypatch.setattr(profiler, "WAL_TIMEOUT", 0.01)
    execute(path, TUTORIAL_SCHEMA.strip())
    with locked(path, "BEGIN EXCLUSIVE"), ThreadPoolExecutor(8) as threads:
        started = time.monotonic()
        assert {
            answer.status for answer in threads.map(lambda _: call(application), range(8))
        } == {503}
        assert time.monotonic() - started < 5


def test_lock_that_prevents_creation_of_the_table_is_reported(application, path, short_timeouts):
    execute(path, "CREATE TABLE other (a)")
    with locked(path):
        answer = call(application)
    assert (answer.status, answer.errors) == (503, "profiler: 503: database is locked\n")


@pytest.fixture
def stalled_search(application, path, monkeypatch):
    """Stalls a search in SQLite, in another thread, during the test."""
    fill(path, 10)
    connect, searching, started, go_on = sqlite3.connect, [], threading.Event(), threading.Event()

    def wait():
        if threading.current_thread() in searching:
            started.set()
            assert go_on.wait(10)

    def connect_and_watch(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_progress_handler(wait, 1)
        return connection

    monkeypatch.setattr(profiler.sqlite3, "connect", connect_and_watch)
    assert call(application, QUERY_STRING="q=user").status == 200  # connects
    answers = []
    searching.append(
        threading.Thread(target=lambda: answers.append(call(application, QUERY_STRING="q=First3")))
    )
    searching[0].start()
    assert started.wait(10)
    yield answers
    go_on.set()
    searching[0].join()
    assert [user["id"] for user in answers[0].json] == [3]


def test_search_does_not_block_other_requests(application, stalled_search):
    assert call(application, path="/users/3/").status == 200
    assert len(call(application).json) == 10
    assert write(application).status == 204
    assert call(application, path="/health/").status == 200
    assert stalled_search == []


def test_close_does_not_wait_for_a_stalled_statement(application, stalled_search, monkeypatch):
    monkeypatch.setattr(profiler, "CLOSE_TIMEOUT", 0.01)
    application.close()
    assert stalled_search == []
    assert call(application, path="/users/3/").status == 200


def test_close_waits_for_all_connections_together(users, monkeypatch):
    timeouts = []

    def time_out(slot, timeout):
        timeouts.append(timeout)
        return False

    monkeypatch.setattr(profiler.ConnectionSlot, "enter_within", time_out)
    users.close()
    assert timeouts
    assert sum(timeouts) == pytest.approx(profiler.CLOSE_TIMEOUT)


# -- threads that must not wait --------------------------------------------------------


def test_short_reads_may_wait_until_the_file_is_open(application, users):
    assert users.short_reads_may_wait
    assert call(application, path="/users/1/").status == 404
    assert not users.short_reads_may_wait
    application.close()
    assert users.short_reads_may_wait


def test_short_reads_may_wait_where_the_file_cannot_be_switched_to_wal_mode(
    application, users, path, short_timeouts
):
    execute(path, TUTORIAL_SCHEMA.strip())
    with locked(path, "BEGIN"), contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM user").fetchall()
        assert call(application, path="/users/1/").status == 404
        assert users.short_reads_may_wait


# -- files that move -------------------------------------------------------------------


@not_on_windows("refuses to move or delete an open file")
def test_moved_file_returns_503_until_it_is_back(application, path, tmp_path):
    """A new file would be empty, and writes to the old one would be lost."""
    assert post(application).status == 201
    path.rename(tmp_path / "moved")
    for answer in (write(application), call(application, path="/health/")):
        assert (answer.status, answer.errors.count("\n"), "put it back" in answer.errors) == (
            503,
            1,
            True,
        )
    application.close()
    assert call(application).status == 503
    assert not path.exists()
    (tmp_path / "moved").rename(path)
    assert len(call(application).json) == 1
    assert write(application).status == 204


@not_on_windows("refuses to move or delete an open file")
def test_other_file_in_its_place_returns_503(application, path, tmp_path):
    assert post(application).status == 201
    path.rename(tmp_path / "moved")
    fill(path, 3)
    assert (write(application).status, call(application, path="/health/").status) == (503, 503)
    application.close()
    assert call(application).status == 503
    assert execute(path, 'SELECT count(*) FROM "user"') == [(3,)]


@not_on_windows("refuses to move or delete an open file")
def test_deleted_wal_file_is_noticed_by_writes_health_and_backup(
    application, users, path, tmp_path
):
    """What is written to a file without a name is lost."""
    assert post(application).status == 201
    wal = path.parent / f"{path.name}-wal"
    wal.rename(tmp_path / "moved")
    for _ in range(2):
        put = call(application, "PUT", "/users/1/", fields=RON)
        create = call(application, "POST", fields=RON)
        health = call(application, path="/health/")
        assert [put.status, create.status, health.status] == [503] * 3
    with pytest.raises(profiler.Unavailable, match="-wal file was moved, replaced or deleted"):
        users.backup(str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    (tmp_path / "moved").rename(wal)
    assert call(application, "PUT", "/users/1/", fields=RON).status == 200


def test_switch_to_wal_mode_after_the_first_connection_keeps_writes_possible(
    application, path, short_timeouts
):
    execute(path, TUTORIAL_SCHEMA.strip())
    with locked(path, "BEGIN") as reader:
        reader.execute("SELECT * FROM user").fetchall()
        assert call(application, path="/users/1/").status == 404
        assert execute(path, "PRAGMA journal_mode") == [("delete",)]
    assert post(application).status == 201
    assert post(application, json.dumps(RON).encode()).status == 201
    assert execute(path, "PRAGMA journal_mode") == [("wal",)]
    assert call(application, path="/health/").status == 200


@not_on_windows("refuses to move or delete an open file")
def test_wal_file_deleted_while_only_reading_is_noticed(application, path):
    fill(path, 1)
    assert call(application).status == 200
    (path.parent / f"{path.name}-wal").unlink()
    assert (call(application, path="/health/").status, write(application).status) == (503, 503)


def test_wal_file_is_not_missed_while_another_thread_opens_the_file(users, path, monkeypatch):
    """SQLite deletes it when the last connection is closed."""
    fill(path, 1)
    users.get(1)
    users.close()
    identify = profiler._identify

    def identify_and_open(path):
        identity = identify(path)
        if path.endswith("-shm"):
            monkeypatch.setattr(profiler, "_identify", identify)
            users.get(1)
        return identity

    monkeypatch.setattr(profiler, "_identify", identify_and_open)
    users.check_files()
    assert profiler._identify is identify


def test_wal_file_is_not_missed_while_another_thread_closes_the_file(users, path, monkeypatch):
    fill(path, 1)
    users.get(1)
    identify = profiler._identify

    def close_and_identify(name):
        if name.endswith("-wal"):
            users.close()
        return identify(name)

    monkeypatch.setattr(profiler, "_identify", close_and_identify)
    users.check_files()
    assert not os.path.exists(f"{path}-wal")


@not_on_windows("refuses to move or delete an open file")
def test_wal_file_deleted_while_another_connection_is_opened_is_noticed(
    application, users, path, monkeypatch
):
    fill(path, 1)
    users.get(1)
    can_map_files = profiler._can_map_files

    def delete_and_map(folder):
        os.unlink(f"{path}-wal")
        return can_map_files(folder)

    monkeypatch.setattr(profiler, "_can_map_files", delete_and_map)
    assert users.count() == 1
    monkeypatch.setattr(profiler, "_can_map_files", can_map_files)
    assert os.path.exists(f"{path}-wal")
    assert write(application).status == 503


@not_on_windows("refuses to move or delete an open file")
@pytest.mark.parametrize("suffixes", [("-wal", "-shm"), ("-wal",), ("-shm",)])
@pytest.mark.parametrize("was_noticed", [True, False])
def test_wal_file_that_another_process_created_anew_is_noticed(
    application, path, suffixes, was_noticed
):
    """What is written to the deleted one is lost."""
    assert post(application).status == 201
    for suffix in suffixes:
        os.unlink(f"{path}{suffix}")
    if was_noticed:
        assert write(application).status == 503
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM user')"
    subprocess.run([sys.executable, "-c", program, path], stderr=subprocess.DEVNULL)
    assert [write(application).status, call(application, path="/health/").status] == [503, 503]
    assert post(application, json.dumps(RON).encode()).status == 503


def test_health_of_a_damaged_file_is_an_error(application, path):
    """What was read before must not hide it."""
    fill(path, 100)
    execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert call(application, path="/health/").status == 200
    with open(path, "rb+") as file:
        file.write(b"h" * 512)
    assert call(application, path="/health/").status in (500, 503)


@not_on_windows("refuses to move or delete an open file")
def test_deleted_shm_file_is_noticed(application, path):
    """Another process would create a new one, and both would write without a common lock."""
    assert post(application).status == 201
    (path.parent / f"{path.name}-shm").unlink()
    assert (call(application, path="/health/").status, write(application).status) == (503, 503)


def test_wal_file_that_another_process_truncates_is_no_error(application, path):
    assert post(application).status == 201
    assert execute(path, "PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]
    assert (write(application).status, call(application, path="/health/").status) == (204, 200)


def test_backup_of_a_database_that_does_not_exist_creates_nothing(users, tmp_path):
    with pytest.raises(OSError, match="no such database"):
        users.backup(str(tmp_path / "copy"))
    assert os.listdir(tmp_path) == []


def test_backup_of_another_database_fails_and_changes_nothing_in_it(tmp_path, path):
    """For example, if --database has a typing error."""
    execute(path, "CREATE TABLE t (a)")
    before = path.read_bytes()
    with pytest.raises(OSError, match="no table of users"):
        profiler.Users(path).backup(str(tmp_path / "copy"))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


def test_file_that_is_deleted_while_access_is_checked_is_no_error(users, path, monkeypatch):
    assert users.count() == 0
    users.close()
    exists, asked = os.path.exists, []

    def exists_a_moment_longer(name):
        if name not in asked:
            asked.append(name)
            return True
        return exists(name)

    monkeypatch.setattr(os.path, "exists", exists_a_moment_longer)
    users.check_access()
    assert f"{path}-wal" in asked


def test_existing_database_without_the_columns_is_refused(users, path):
    execute(path, "CREATE TABLE user (id INTEGER PRIMARY KEY)")
    with pytest.raises(profiler.Unavailable, match="no such column"):
        users.initialise()


def test_backup_of_a_short_file_fails(tmp_path, path):
    path.write_bytes(b"h" * 511)
    with pytest.raises(OSError, match="not a database"):
        profiler.Users(path).backup(str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


# -- forks -----------------------------------------------------------------------------


@needs_fork
@ignores_fork_warning
def test_fork_closes_the_connections_first(application, connections):
    """SQLite's locks do not survive a fork: sqlite.org/howtocorrupt.html, section 2.6."""
    opened, _ = connections
    assert (post(application).status, call(application, QUERY_STRING="q=harry").status) == (
        201,
        200,
    )
    before = list(opened)
    assert len(before) == 3
    assert in_a_fork(lambda: post(application, json.dumps(RON).encode()).status == 201)
    for connection in before:
        with pytest.raises(sqlite3.ProgrammingError):
            connection.execute("SELECT 1")
    assert len(call(application).json) == 2


def test_closing_during_a_fork_does_not_lock_the_database(application, users, monkeypatch):
    monkeypatch.setattr(profiler, "CLOSE_TIMEOUT", 0.01)
    profiler._call_all("before_fork")
    users.close()
    profiler._call_all("after_fork_in_parent")
    assert write(application).status == 204


def test_second_fork_waits_for_the_first_one(application):
    assert post(application).status == 201

    def fork():
        profiler._call_all("before_fork")
        profiler._call_all("after_fork_in_parent")

    profiler._call_all("before_fork")
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(fork)
        time.sleep(0.05)
        assert not second.done()
        # An object that was created since is in use, but was not held by this fork.
        slot = profiler.ConnectionSlot(1)
        with slot:
            profiler._call_all("after_fork_in_parent")
        second.result(timeout=10)
    assert (write(application).status, call(application).status) == (204, 200)


@needs_fork
@ignores_fork_warning
def test_daemon_whose_parent_ended_loses_no_write(application, path):
    """Without locks of its own, its -wal file would be deleted by the next process that
    closes the database."""
    other = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute('UPDATE user SET last_name = 1'); c.commit()"
    )
    read, write = os.pipe()
    if os.fork() == 0:
        post(application)
        parent = os.getpid()
        if os.fork() == 0:
            until(lambda: os.getppid() != parent)
            users = application.users
            users.insert("a", "b", "a@example.com", "hash")
            subprocess.run([sys.executable, "-c", f"{other}; c.close()", str(path)], check=True)
            users.insert("a", "b", "b@example.com", "hash")
            os.write(write, b"done")
        os._exit(0)
    os.close(write)
    assert os.read(read, 4) == b"done"
    os.close(read)
    os.wait()
    assert execute(path, 'SELECT count(*) FROM "user"') == [(3,)]


@needs_fork
@ignores_fork_warning
def test_fork_waits_for_a_transaction_and_the_child_can_write(application, users):
    """With a copy of its connection, the child would believe that it is locked forever."""
    assert post(application).status == 201
    started = threading.Event()

    def guard(user):
        started.set()
        time.sleep(0.2)

    with ThreadPoolExecutor(1) as threads:
        update = threads.submit(users.update, 1, {"last_name": "P."}, guard)
        assert started.wait(10)
        assert in_a_fork(lambda: write(application).status == 204)
        update.result(timeout=10)
    assert write(application).status == 204


@needs_fork
@ignores_fork_warning
def test_fork_waits_for_a_backup(application, users, path, tmp_path, monkeypatch):
    """The copy has a connection, too. With it, the child would lose what it writes."""
    assert post(application).status == 201
    started, events = threading.Event(), []
    execute = profiler._execute

    def execute_slowly(connection, statement, *given, **options):
        cursor = execute(connection, statement, *given, **options)
        if statement.startswith("VACUUM"):
            started.set()
            time.sleep(0.2)
            events.append("copied")
        return cursor

    monkeypatch.setattr(profiler, "_execute", execute_slowly)
    with ThreadPoolExecutor(1) as threads:
        backup = threads.submit(users.backup, str(tmp_path / "copy"))
        assert started.wait(10)
        assert in_a_fork(lambda: events == ["copied"] and write(application).status == 204)
        backup.result(timeout=10)


@needs_fork
@ignores_fork_warning
def test_child_does_not_recreate_a_file_that_was_moved(application, path, tmp_path):
    assert post(application).status == 201
    application.close()
    path.rename(tmp_path / "moved")
    assert in_a_fork(lambda: call(application).status == 503)
    assert not path.exists()


@needs_fork
@ignores_fork_warning
def test_twelve_processes_can_create_the_file_at_once(tmp_path):
    for number in range(3):
        path = tmp_path / f"{number}.sqlite3"
        assert post_at_once(12, profiler.create_app, path) == [0] * 12
        assert execute(path, 'SELECT count(*) FROM "user"') == [(12,)]
        assert execute(path, "PRAGMA journal_mode") == [("wal",)]


# -- backup ----------------------------------------------------------------------------


def integrity(path):
    return execute(path, "PRAGMA integrity_check")


def test_backup_is_a_complete_database_readable_by_its_owner_only(application, users, tmp_path):
    assert post(application).status == 201
    users.delete(1)
    assert post(application).status == 201
    users.backup(str(tmp_path / "copy"))
    assert integrity(tmp_path / "copy") == [("ok",)]
    if os.name != "nt":  # which has no file modes
        assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir() if "copy" in file.name] == ["copy"]
    with contextlib.closing(profiler.create_app(tmp_path / "copy", iterations=1)) as copy:
        assert call(copy, path="/users/2/").body == call(application, path="/users/2/").body
        assert call(copy, "POST", fields=RON).json == {"id": 3}


def test_backup_may_have_a_relative_path(application, users, tmp_path, monkeypatch):
    assert post(application).status == 201
    monkeypatch.chdir(tmp_path)
    users.backup("copy")
    assert integrity(tmp_path / "copy") == [("ok",)]


@pytest.mark.parametrize("suffix", ["-2026-11-25", "-backup", ".bak", "-wal2", "-journal.old"])
def test_backup_may_be_named_after_the_database(users, path, suffix):
    assert users.count() == 0
    users.backup(f"{path}{suffix}")
    assert integrity(f"{path}{suffix}") == [("ok",)]


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_backup_may_not_have_a_name_that_sqlite_uses(users, path, suffix):
    """SQLite would delete a -journal file at the next start."""
    assert users.count() == 0
    with pytest.raises(OSError, match="choose another name"):
        users.backup(f"{path}{suffix}")
    assert not os.path.exists(f"{path}-journal")


def test_backup_never_replaces_a_file(users, path, tmp_path):
    assert users.count() == 0
    (tmp_path / "file").write_text("mine")
    targets = [tmp_path / "file", tmp_path, path]
    if os.name != "nt":  # where links need a privilege
        targets.append(tmp_path / "link")
        targets[-1].symlink_to(tmp_path / "nowhere")
    for target in targets:
        with pytest.raises(OSError, match="choose another name"):
            users.backup(str(target))
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert users.count() == 0


def test_backup_does_not_replace_a_file_created_meanwhile(users, tmp_path, monkeypatch):
    assert users.count() == 0
    fsync = os.fsync
    monkeypatch.setattr(
        profiler.os, "fsync", lambda file: (tmp_path / "copy").write_text("mine") and fsync(file)
    )
    with pytest.raises(OSError, match="exists"):
        users.backup(str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "mine"
    assert not list(tmp_path.glob("*.part*"))


def test_backup_on_a_full_disk_names_the_target_and_leaves_nothing(users, tmp_path, monkeypatch):
    assert users.count() == 0
    before = sorted(os.listdir(tmp_path))

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(profiler.os, "fsync", fsync)
    with pytest.raises(OSError, match=re.escape(f"to {tmp_path / 'copy'}: No space left")):
        users.backup(str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == before


def test_backup_interrupted_by_sqlite_leaves_no_part_or_journal(users, tmp_path, connections):
    assert users.count() == 0
    before = sorted(os.listdir(tmp_path))

    class Error(sqlite3.OperationalError):
        """Leaves a journal, as SQLite does on a full disk."""

        def __str__(self):
            for part in tmp_path.glob("*.part"):
                (tmp_path / f"{part.name}-journal").touch()
            return "database or disk is full"

    connections[1].errors["VACUUM INTO ?"] = Error()
    message = f"to {tmp_path / 'copy'}: database or disk is full"
    with pytest.raises(OSError, match=re.escape(message)):
        users.backup(str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == before


def test_backup_to_a_missing_folder_raises_oserror(users, tmp_path):
    assert users.count() == 0
    with pytest.raises(OSError, match="No such file or directory"):
        users.backup(str(tmp_path / "missing" / "copy"))


def test_backup_is_synced_before_it_gets_its_name_and_its_folder_after(
    users, tmp_path, monkeypatch
):
    assert users.count() == 0
    synced, fsync = [], os.fsync

    def record(file):
        synced.append((stat.S_ISDIR(os.fstat(file).st_mode), (tmp_path / "copy").exists()))
        fsync(file)

    monkeypatch.setattr(profiler.os, "fsync", record)
    users.backup(str(tmp_path / "copy"))
    folder = [] if os.name == "nt" else [(True, True)]  # Windows cannot open a folder
    assert synced == [(False, False), *folder]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_backup_works_without_hard_links(users, tmp_path, monkeypatch, number):
    assert users.count() == 0

    def link(*_):
        raise OSError(number, "no links")

    monkeypatch.setattr(profiler.os, "link", link)
    users.backup(str(tmp_path / "copy"))
    assert integrity(tmp_path / "copy") == [("ok",)]
    assert not list(tmp_path.glob("*.part*"))


def test_backup_does_not_wait_for_the_write_lock(users, path, tmp_path):
    fill(path, 3)
    with locked(path) as connection:
        connection.execute(INSERT)
        users.backup(str(tmp_path / "copy"))
    assert execute(tmp_path / "copy", 'SELECT count(*) FROM "user"') == [(3,)]


def test_backup_during_writes_contains_everything_acknowledged_before(
    application, users, tmp_path, monkeypatch
):
    monkeypatch.setattr(profiler, "hash_password", lambda *_: "hash" * 200)
    stop = threading.Event()

    def create(client):
        count = 0
        while not stop.is_set():
            count += 1
            assert (
                call(
                    application, "POST", fields={**HARRY, "email": f"{client}.{count}@b.c"}
                ).status
                == 201
            )

    with ThreadPoolExecutor(4) as threads:
        writers = [threads.submit(create, client) for client in range(4)]
        until(lambda: users.count() > 100)
        before = users.count()
        users.backup(str(tmp_path / "copy"))
        stop.set()
        for writer in writers:
            writer.result()
    assert integrity(tmp_path / "copy") == [("ok",)]
    [(count,)] = execute(tmp_path / "copy", 'SELECT max(id) FROM "user"')
    assert before <= count <= users.count()
