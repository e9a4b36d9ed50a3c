"""Where the service runs: permissions, file systems, output, older databases, upgrades."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import sqlite3
import subprocess
import sys
import tempfile

import pytest
from conftest import (
    HARRY,
    HERE,
    ITERATIONS,
    TUTORIAL_SCHEMA,
    call,
    copy_module,
    execute,
    fill,
    post,
    run_program,
)
from test_command_line import Command, ask

import profiler

"".encode("idna")  # The codec could not be loaded by a user who may not read this Python.
posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has no modes of files")


# -- permissions -----------------------------------------------------------------------


@pytest.fixture
def folder():
    """A folder that every user can reach, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


@contextlib.contextmanager
def as_nobody():
    """Run the block in this process with the rights of a user who owns nothing."""
    if os.geteuid() != 0:
        yield
        return
    access = os.access

    def access_as_nobody(path, mode):
        status = os.stat(path) if access(path, os.F_OK) else None
        return status is not None and (status.st_mode & mode) == mode

    os.seteuid(65534)
    os.access = access_as_nobody  # access() asks for the real user, who is still root
    try:
        yield
    finally:
        os.access = access
        os.seteuid(0)


FORBIDDEN = {
    "file": (lambda folder: os.chmod(folder / "db.sqlite3", 0o444), "db.sqlite3"),
    "folder": (lambda folder: os.chmod(folder, 0o555), ""),
    "-wal file": (lambda folder: os.chmod(folder / "db.sqlite3-wal", 0o600), "db.sqlite3-wal"),
}


@pytest.fixture
def forbidden(folder, request):
    """A database that another user may not write, and the path that forbids it."""
    path = folder / "db.sqlite3"
    fill(path, 1)
    os.chmod(path, 0o666)
    other = sqlite3.connect(path)
    other.execute('SELECT * FROM "user"').fetchall()  # so that there is a -wal file
    for name in ("-wal", "-shm"):
        os.chmod(f"{path}{name}", 0o666)
    os.chmod(folder, 0o777)
    if request.param != "-wal file":
        other.close()
    forbid, name = FORBIDDEN[request.param]
    forbid(folder)
    yield path, str(folder / name).rstrip("/") if name else str(folder)
    other.close()
    os.chmod(folder, 0o755)


@posix_only
@pytest.mark.parametrize("forbidden", FORBIDDEN, indirect=True)
def test_start_without_permission_names_the_path(forbidden, monkeypatch, capsys):
    path, culprit = forbidden
    monkeypatch.setattr(profiler.Server, "serve", lambda server: pytest.fail("it serves"))
    with as_nobody(), pytest.raises(SystemExit) as caught:
        profiler.main(["--port", "0", "--database", str(path)])
    message = str(caught.value)
    assert message.startswith(f"profiler: {path}: this user may not ")
    assert message.endswith(culprit)
    assert "\n" not in message


@posix_only
@pytest.mark.parametrize("forbidden", FORBIDDEN, indirect=True)
def test_health_and_writes_without_permission_are_503_and_the_log_names_the_path(forbidden):
    path, culprit = forbidden
    application = profiler.create_app(path, iterations=1)
    with contextlib.closing(application), as_nobody():
        answers = [call(application, path="/health/"), post(application)]
    assert [answer.status for answer in answers] == [503, 503]
    assert all(culprit in answer.errors for answer in answers)


# -- file systems ----------------------------------------------------------------------


@pytest.fixture
def no_shared_memory(monkeypatch):
    """Files cannot be mapped, as on 9p."""

    class Mmap:
        @staticmethod
        def mmap(*_):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(profiler, "mmap", Mmap)


@pytest.mark.usefixtures("no_shared_memory")
@pytest.mark.parametrize("mode", ["new", "delete", "wal"])
def test_where_files_cannot_be_mapped_the_database_is_not_in_wal_mode(application, path, mode):
    """SQLite could not read it there: "disk I/O error"."""
    if mode != "new":
        fill(path, 1)
        execute(path, f"PRAGMA journal_mode = {mode}")
    assert post(application).status == 201
    assert call(application, QUERY_STRING="q=harry").status == 200
    assert path.read_bytes()[18:20] == b"\1\1"  # not WAL: sqlite.org/fileformat.html
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_full_disk_does_not_end_wal_mode(path, monkeypatch):
    """No file can be created there, but that says nothing about mapping files."""
    fill(path, 1)
    real_open = open

    def fail_to_create(name, mode="r", *more, **options):
        if "x" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(name, mode, *more, **options)

    monkeypatch.setattr(profiler, "open", fail_to_create, raising=False)
    with contextlib.closing(profiler.create_app(path)) as application:
        assert call(application, path="/users/1/").status == 200
        assert execute(path, "PRAGMA journal_mode") == [("wal",)]


@pytest.mark.usefixtures("no_shared_memory")
def test_without_wal_every_commit_is_synced_with_its_folder(application, users):
    """Otherwise a power loss could bring back the journal of an acknowledged write."""
    assert post(application).status == 201
    with users.transaction() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchall() == [(b"delete",)]
        assert connection.execute("PRAGMA synchronous").fetchall() == [(3,)]  # EXTRA


@posix_only
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EACCES])
def test_backup_succeeds_where_a_folder_cannot_be_synced(
    application, users, tmp_path, monkeypatch, error
):
    """CIFS and FUSE answer EINVAL; a folder may be writable but not readable."""
    assert post(application).status == 201
    fsync = os.fsync

    def fail_for_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") or os.path.isdir(f"/dev/fd/{descriptor}"):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(profiler.os, "fsync", fail_for_folders)
    users.backup(str(tmp_path / "copy"))
    assert execute(tmp_path / "copy", 'SELECT count(*) FROM "user"') == [(1,)]


@posix_only
def test_module_behind_a_symbolic_link_finds_its_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "bin").mkdir()
    copy_module(tmp_path / "real")
    (tmp_path / "bin" / "profiler").symlink_to(tmp_path / "real" / "profiler.py")
    command = [sys.executable, str(tmp_path / "bin" / "profiler"), "initialise-database"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert output.stdout == "Successfully created database schema.\n", output.stderr
    (tmp_path / "bin" / "profiler.py").symlink_to(tmp_path / "real" / "profiler.py")
    program = "import profiler; print(profiler.create_app('x.sqlite3').users.count())"
    assert run_program(program, tmp_path, PYTHONPATH=str(tmp_path / "bin")).stdout == "0\n"


# -- output ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoding"), [("caf\u00e9", "ascii"), ("\u65e5\u672c", "cp1252")]
)
def test_path_that_stdout_cannot_encode_does_not_end_the_start(tmp_path, name, encoding):
    folder = tmp_path / name
    folder.mkdir()
    with Command(folder, "--port", "0", PYTHONIOENCODING=encoding, PYTHONUTF8="0") as command:
        assert ask(command.address()).status == 200
    assert "Press Ctrl-C to stop." in command.banner


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_stdout_ends_neither_the_start_nor_a_backup(tmp_path):
    copy_module(tmp_path)
    fill(tmp_path / "db.sqlite3", 1)
    with open("/dev/full", "w") as full:
        backup = subprocess.run(
            [sys.executable, "profiler.py", "backup", "copy"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=20,
        )
        assert (backup.returncode, backup.stderr) == (0, b"")
        command = [sys.executable, "profiler.py", "--port", "0"]
        program = (
            "import profiler; profiler.Server.serve = lambda server: None; "
            "profiler.main(['--port', '0'])"
        )
        command = [sys.executable, "-c", program]
        server = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=20
        )
        assert (server.returncode, server.stderr) == (0, b"")


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize("quote", ['"', "'"])
def test_token_in_quotes_is_refused_at_the_start(accounts, quote):
    """docker run --env-file keeps the quotes."""
    for token in ("0123456789abcdef", "0123456789abcdef fedcba9876543210"):
        with pytest.raises(ValueError, match="without quotes"):
            profiler.Application(accounts, token=f"{quote}{token}{quote}")
    profiler.Application(accounts, token=f"0123456789{quote}abcdef")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8-sig"])
def test_token_file_of_windows_is_read(tmp_path, encoding):
    text = "0123456789abcdef\r\nfedcba9876543210\r\n"
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    (tmp_path / "token").write_bytes((mark + text).encode(encoding))
    with Command(tmp_path, "--port", "0", "--token-file", "token") as command:
        address = command.address()
        for token in text.split():
            assert ask(address, Authorization=f"Bearer {token}").status == 200
        assert ask(address).status == 401


def test_scrypt_that_openssl_refuses_is_403_with_a_line_in_the_log(
    application, users, monkeypatch
):
    """FIPS 140."""

    class Hashlib:
        pbkdf2_hmac = profiler.pbkdf2_hmac
        sha256 = profiler.hashlib.sha256

        @staticmethod
        def scrypt(*_, **__):
            raise ValueError("[digital envelope routines] unsupported")

    users.insert("H", "P", "harry@example.com", "scrypt:1024:8:1$salt$" + "0" * 128)
    monkeypatch.setattr(profiler, "hashlib", Hashlib)
    answer = call(application, "POST", "/users/verify/", fields=HARRY)
    assert (answer.status, answer.errors.count("\n"), "user 1" in answer.errors) == (403, 1, True)


# -- upgrades --------------------------------------------------------------------------


def test_nothing_is_imported_after_the_start(tmp_path):
    """Python may be upgraded, or removed, under the running process."""
    program = """
import json, socket, sys, threading, profiler
users = profiler.Users("db.sqlite3")
application = profiler.Application(profiler.Accounts(users, 1))
users.ping()
server = profiler.Server(socket.AF_INET, ("127.0.0.1", 0), application)
"".encode("idna")  # for this client
imported = []
sys.addaudithook(lambda event, given: event == "import" and imported.append(given[0]))
thread = threading.Thread(target=server.serve)
thread.start()
body = json.dumps({"first_name": "\\u00e9", "last_name": "P", "email": "h@e.x", "password": "1"})
body = b"\\xef\\xbb\\xbf" + body.encode()
HEAD = "HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\nContent-Length: "
for method, path in (
    ("POST", "/users/"), ("POST", "/users/"), ("GET", "/users/"), ("GET", "/users/?q=\\u00e9"),
    ("GET", "/users/1/"), ("PUT", "/users/1/"), ("PATCH", "/users/1/"), ("GET", "/health/"),
    ("POST", "/users/verify/"), ("PUT", "/users/1/password/"), ("PUT", "/users/1/password/reset/"),
    ("DELETE", "/users/1/"), ("GET", "/"), ("GET", "/openapi.json"), ("BREW", "/\\xff\\"\\\\"),
    ("nonsense", ""), ("GET", "/bug"),
):
    if path == "/bug":
        # A traceback may need more modules, or else is logged in one line.
        print([name for name in imported if name not in sys.builtin_module_names])
        application.may_wait = lambda environ: 1 / 0
    with socket.create_connection(server.server_address, timeout=10) as connection:
        head = f"{method} {path} {HEAD}{len(body)}\\r\\nConnection: close\\r\\n\\r\\n"
        connection.sendall(head.encode("latin-1") + body)
        while connection.recv(65536):
            pass
server.stop()
thread.join()
"""
    output = run_program(program, tmp_path)
    assert output.stdout == "[]\n", output.stderr
    assert "ZeroDivisionError" in output.stderr


def test_traceback_that_cannot_be_formatted_is_logged_in_one_line(application, users, monkeypatch):
    def fail(*_):
        raise ImportError("No module named 'tokenize'")

    class Traceback:
        format_exception = staticmethod(fail)

    monkeypatch.setattr(profiler, "traceback", Traceback)
    monkeypatch.setattr(users, "get", lambda user_id: 1 / 0)
    answer = call(application, path="/users/1/")
    assert (answer.status, answer.errors) == (
        500,
        "profiler: 500: ZeroDivisionError: division by zero\n",
    )


# Databases as earlier versions created them.
OLDER_DATABASES = {
    "the tutorial": TUTORIAL_SCHEMA,
    "1.0.0, 1.1.0 and 1.2.0": (HERE / "schema.sql").read_text("utf-8"),
}


@pytest.mark.parametrize("name", OLDER_DATABASES)
@pytest.mark.parametrize(
    "email", ["harry", "a@b@example.com", "soft\u00adhyphen@example.com", "h" * 288 + "@x"]
)
def test_user_of_an_older_database_can_log_in(application, path, name, email):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(OLDER_DATABASES[name])
        connection.execute(
            "INSERT INTO user (first_name, last_name, email, password) VALUES (?, ?, ?, ?)",
            ("Harry", "Potter", email, profiler.hash_password("1234", ITERATIONS)),
        )
    fields = {"email": email.upper() if email.isascii() else email, "password": "1234"}
    assert call(application, "POST", "/users/verify/", fields=fields).json == {"id": 1}
    assert len(call(application, QUERY_STRING=f"email={profiler.quote(email)}").json) == 1
    passwords = {"old_password": "1234", "new_password": "5678"}
    assert call(application, "PUT", "/users/1/password/", fields=passwords).status == 204
    assert call(application, "PATCH", "/users/1/", fields={"first_name": "H."}).status == 200
    assert call(application, "PUT", "/users/1/", fields={**HARRY, "email": email}).status == 400
