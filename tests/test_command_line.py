"""The command line: in a process of its own where that matters, otherwise by calling main."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipapp

import pytest
from conftest import (
    BODY,
    HARRY,
    HERE,
    RON,
    TOKEN,
    Answer,
    copy_module,
    execute,
    fill,
    not_on_windows,
    post,
)

import profiler

IPV6 = socket.has_ipv6 and pathlib.Path("/proc/net/if_inet6").exists()
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="this system has no IPv6")
needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/limits").exists(), reason="needs Linux's /proc"
)
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
]


class Command:
    """The command in a process of its own, in a folder with nothing but the two files."""

    def __init__(
        self,
        folder,
        *arguments,
        command=(sys.executable, "profiler.py"),
        stderr=subprocess.PIPE,
        **environ,
    ):
        copy_module(folder)
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def address(self):
        """Wait until the server has started; return its address."""
        self.url, self.banner = self.process.stdout.readline(), self.process.stdout.readline()
        match = re.fullmatch(r"http://\[?([0-9a-f.:]+?)\]?:([0-9]+)/(users/)?\n", self.url)
        return match[1].replace("0.0.0.0", "127.0.0.1"), int(match[2])

    def end(self, signum=None):
        """Return the exit status and what was written to stdout and stderr."""
        if signum is not None:
            self.process.send_signal(signum)
        output, errors = self.process.communicate(timeout=20)
        return self.process.returncode, output, errors


@contextlib.contextmanager
def inheriting(signum, action):
    """Let child processes inherit what a signal does."""
    previous = signal.signal(signum, action)
    yield
    signal.signal(signum, previous)


def ask(address, method="GET", path="/users/", fields=None, **headers):
    """Send a request and return the response."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
        if fields is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, None if fields is None else json.dumps(fields), headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call main in tmp_path. Return the exit status and what was written to stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiler.Server, "serve", lambda server: pytest.fail("it serves"))

    def run(*arguments, **environ):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            try:
                code = profiler.main(list(arguments))
            except SystemExit as error:
                code = error.code
        output = capsys.readouterr()
        if isinstance(code, str):  # what the interpreter does with sys.exit(message)
            return 1, output.out, f"{output.err}{code}\n"
        return code or 0, output.out, output.err

    return run


@pytest.fixture
def with_harry(tmp_path):
    """A folder with a database that has one user."""
    with contextlib.closing(
        profiler.create_app(tmp_path / "db.sqlite3", iterations=1)
    ) as application:
        assert post(application).status == 201
    return tmp_path


# -- serving ---------------------------------------------------------------------------


@not_on_windows("cannot send a signal to another process")
@pytest.mark.parametrize("signum", SIGNALS)
def test_two_files_in_an_empty_folder_serve_until_a_signal(tmp_path, signum):
    with inheriting(signal.SIGHUP, signal.SIG_DFL), Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert ask(address, "POST", fields=HARRY).json == {"id": 1}
        assert ask(address).status == 200
        status, output, errors = command.end(signum)
    assert command.url == f"http://127.0.0.1:{address[1]}/\n"
    assert (
        command.banner
        == f"Database: {tmp_path / 'db.sqlite3'} (users: 0). Press Ctrl-C to stop.\n"
    )
    assert (status, output) == (0, "")
    assert [line.split('"')[1] for line in errors.splitlines()] == [
        "POST /users/ HTTP/1.1",
        "GET /users/ HTTP/1.1",
    ]
    # SQLite's -wal file was merged and deleted.
    assert sorted(os.listdir(tmp_path)) == ["db.sqlite3", "profiler.py", "schema.sql"]
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(1,)]


@not_on_windows("cannot send a signal to another process")
def test_repeated_signals_do_not_change_the_exit_status(tmp_path):
    for _ in range(3):
        with Command(tmp_path, "--port", "0") as command:
            command.address()
            command.process.send_signal(signal.SIGTERM)
            command.process.send_signal(signal.SIGINT)
            assert command.end(signal.SIGTERM) == (0, "", "")


@pytest.mark.parametrize("signum", SIGNALS)
def test_shutdown_by_a_signal_does_not_wait_for_idle_connections(tmp_path, signum):
    """The process raises the signal itself, because Windows cannot send one."""
    program = f"""
import os, signal, threading, time, profiler
def interrupt():
    while not os.path.exists("stop"):
        time.sleep(0.01)
    signal.raise_signal({int(signum)})
threading.Thread(target=interrupt).start()
profiler.main(["--port", "0", "--no-access-log"])
"""
    copy_module(tmp_path)
    with Command(tmp_path, command=(sys.executable, "-c", program)) as command:
        connection = http.client.HTTPConnection(*command.address(), timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/users/")
            assert connection.getresponse().read() == b"[]\n"
            started = time.monotonic()
            (tmp_path / "stop").touch()
            assert command.end() == (0, "", "")
            assert time.monotonic() - started < profiler.DRAIN_TIMEOUT


@not_on_windows("cannot send a signal to another process")
def test_signals_while_the_database_is_closed_do_not_change_the_exit_status(tmp_path):
    program = """
import os, signal, profiler
serve, close = profiler.Server.serve, profiler.Users.close
served = []
def close_slowly(users):
    for signum in (signal.SIGTERM, signal.SIGINT) * 2 if served else ():
        os.kill(os.getpid(), signum)
    close(users)
profiler.Server.serve = lambda server: (serve(server), served.append(True))
profiler.Users.close = close_slowly
profiler.main(["--port", "0", "--no-access-log"])
print(served)
"""
    copy_module(tmp_path)
    with Command(tmp_path, command=(sys.executable, "-c", program)) as command:
        command.address()
        assert command.end(signal.SIGTERM) == (0, "[True]\n", "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_nohup_is_honoured(tmp_path):
    with (
        inheriting(signal.SIGHUP, signal.SIG_IGN),
        Command(tmp_path, "--port", "0", "--no-access-log") as command,
    ):
        address = command.address()
        command.process.send_signal(signal.SIGHUP)
        for _ in range(3):
            assert ask(address).status == 200
        assert command.end(signal.SIGTERM) == (0, "", "")


@not_on_windows("cannot send a signal to another process")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_was_ignored_by_the_parent_ends_the_server(tmp_path, signum):
    """A shell script starts a background job so that it ignores SIGINT."""
    with inheriting(signum, signal.SIG_IGN), Command(tmp_path, "--port", "0") as command:
        command.address()
        assert command.end(signum) == (0, "", "")


def test_interrupt_before_the_server_starts_exits_with_130(run, monkeypatch):
    def interrupt(users):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiler.Users, "count", interrupt)
    assert run() == (130, "", "")


def test_url_is_the_page(tmp_path):
    shutil.copy(HERE / "index.html", tmp_path)
    fill(tmp_path / "db.sqlite3", 2)
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert command.url.endswith(f":{address[1]}/\n")
        assert "(users: 2)" in command.banner
        assert b"<html" in ask(address, path="/").body


@needs_proc
def test_idle_server_uses_no_processor(tmp_path):
    def ticks(pid):
        return sum(
            map(
                int,
                pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13],
            )
        )

    # While there is a connection, its deadlines have to be checked.
    with (
        Command(tmp_path, "--port", "0") as command,
        contextlib.closing(socket.create_connection(command.address())),
    ):
        before = ticks(command.process.pid)
        select.select([], [], [], 1)
        assert ticks(command.process.pid) - before <= os.sysconf("SC_CLK_TCK") / 20


@needs_proc
def test_more_connections_than_open_files_are_served(tmp_path):
    """Some descriptors are reserved for the database."""
    limited = ("sh", "-c", f'ulimit -n 80; exec {sys.executable} profiler.py "$@"', "sh")
    with contextlib.ExitStack() as stack:
        command = stack.enter_context(
            Command(tmp_path, "--port", "0", "--no-access-log", command=limited)
        )
        address = command.address()
        for _ in range(100):
            connection = stack.enter_context(
                contextlib.closing(http.client.HTTPConnection(*address, timeout=10))
            )
            connection.request("GET", "/users/")
            assert connection.getresponse().read() == b"[]\n"
        connection.request("POST", "/users/", BODY, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 201
        assert command.end(signal.SIGTERM) == (0, "", "")


# -- log -------------------------------------------------------------------------------


def test_no_access_log_is_silent(tmp_path):
    with Command(tmp_path, "--port", "0", "--no-access-log") as command:
        ask(command.address())
        assert command.end(signal.SIGTERM)[2] == ""


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_closed_or_full_stderr_is_no_failure(tmp_path, redirection):
    """Nor is the warning about few iterations."""
    shell = ("sh", "-c", f'exec {sys.executable} profiler.py "$@" {redirection}', "sh")
    with Command(
        tmp_path, "--port", "0", "--iterations", "1", command=shell, PYTHONUNBUFFERED=""
    ) as command:
        address = command.address()
        for _ in range(2):
            assert ask(address).json == []
        assert command.end(signal.SIGTERM)[0] == 0
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(0,)]


@not_on_windows("has no non-blocking pipes")
def test_stderr_that_nobody_reads_blocks_neither_requests_nor_shutdown(tmp_path):
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w"):
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x")
        os.set_blocking(writer, True)
        with Command(tmp_path, "--port", "0", stderr=writer) as command:
            address = command.address()
            for number in range(3):
                assert (
                    ask(address, "POST", fields={**HARRY, "email": f"{number}@example.com"}).status
                    == 201
                )
                assert ask(address).status == 200
            assert command.end(signal.SIGTERM)[0] == 0


@not_on_windows("cannot send a signal to another process")
def test_stuck_statement_does_not_stop_shutdown(tmp_path):
    """A search that never ends, in a worker."""
    copy_module(tmp_path)
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    )
    program = f"""
import os, profiler
profiler.DRAIN_TIMEOUT = profiler.CLOSE_TIMEOUT = 0.1
read = profiler.Database.read
def read_forever(database, connection, statement, parameters=()):
    if " LIKE " in statement:
        statement, parameters = {endless!r}, ()
    return read(database, connection, statement, parameters)
profiler.Database.read = read_forever
profiler.main(["--port", "0", "--no-access-log"])
"""
    with contextlib.ExitStack() as stack:
        command = stack.enter_context(Command(tmp_path, command=(sys.executable, "-c", program)))
        address = command.address()
        connection = stack.enter_context(
            contextlib.closing(socket.create_connection(address, timeout=10))
        )
        connection.sendall(b"GET /users/?q=x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ask(address).json == []
        assert command.end(signal.SIGTERM) == (0, "", "")
        assert connection.recv(1) == b""


@needs_proc
def test_closed_stderr_is_not_replaced_by_the_database(tmp_path):
    """What is written to descriptor 2, such as a fatal error of the interpreter, must
    not end up in a file."""
    shell = ("sh", "-c", f'exec {sys.executable} profiler.py "$@" 2>&-', "sh")
    with Command(tmp_path, "--port", "0", command=shell) as command:
        command.address()
        assert os.readlink(f"/proc/{command.process.pid}/fd/2") == os.devnull


# -- settings --------------------------------------------------------------------------


def test_flags_override_the_environment_which_overrides_defaults(tmp_path):
    with Command(
        tmp_path, "--database", "flag.sqlite3", PROFILER_DATABASE="environment.sqlite3", PORT="0"
    ) as command:
        command.address()
        assert "flag.sqlite3" in command.banner
    environ = {
        "PROFILER_DATABASE": "environment.sqlite3",
        "PROFILER_PORT": "0",
        "PORT": "bad",
        "PROFILER_HOST": "::1",
    }
    with Command(tmp_path, "--host", "127.0.0.1", **environ) as command:
        command.address()
        assert "environment.sqlite3" in command.banner
    assert not (tmp_path / "db.sqlite3").exists()


def test_empty_environment_variables_count_as_unset(tmp_path):
    names = ["HOST", "DATABASE", "ANONYMOUS", "ITERATIONS"]
    with Command(
        tmp_path, PROFILER_PORT="", PORT="0", **{f"PROFILER_{name}": "" for name in names}
    ) as command:
        assert command.address()[0] == "127.0.0.1"
        assert "db.sqlite3" in command.banner


def test_kubernetes_service_variable_is_not_a_port(tmp_path):
    """Kubernetes sets it for a Service with the name "profiler"."""
    with Command(tmp_path, PROFILER_PORT="tcp://10.0.0.1:5000", PORT="0") as command:
        command.address()


INVALID_SETTINGS = [
    (["--port", "http"], {}, "port must be a number from 0 to 65535"),
    (["--port", "65536"], {}, "port must be a number from 0 to 65535"),
    (["--port", "-1"], {}, "port"),
    (["--port", "\u0663"], {}, "port must be a number from 0 to 65535"),
    ([], {"PROFILER_PORT": "http"}, "port must be a number from 0 to 65535"),
    ([], {"PORT": "http"}, "port must be a number from 0 to 65535"),
    (["--host", "no.such.host.invalid"], {}, "invalid host 'no.such.host.invalid'"),
    ([], {"PROFILER_HOST": "\udcff"}, "invalid host '\\udcff'"),
    (["--host", "\udcff"], {}, "invalid host '\\udcff'"),
    (["--host", "a" * 64], {}, "invalid host"),
    (["--database", ":memory:"], {}, "must be a file"),
    ([], {"PROFILER_DATABASE": ":memory:"}, "must be a file"),
    (["--database", "postgresql://localhost/users"], {}, "python -m profiler_sqlalchemy"),
    (["--token-file", "missing"], {}, "'missing'"),
    (["--token-file", "."], {}, "'.'"),
    (["--token-file", os.devnull], {}, "must be at least 16"),
    ([], {"PROFILER_TOKEN": "short"}, "must be at least 16"),
    ([], {"PROFILER_TOKEN": f"{TOKEN} short"}, "must be at least 16"),
    ([], {"PROFILER_TOKEN": ""}, "must be at least 16"),
    ([], {"PROFILER_ANONYMOUS": "yes"}, "PROFILER_ANONYMOUS must be a number from 0 to 1"),
    (["--iterations", "0"], {}, "iterations must be a number from 1 to 10000000"),
    (["--iterations", "10000001"], {}, "iterations must be a number from 1 to 10000000"),
    (["--iterations", "many"], {}, "iterations must be a number from 1 to 10000000"),
    ([], {"PROFILER_ITERATIONS": "0"}, "iterations must be a number from 1 to 10000000"),
    (["--host", "0.0.0.0"], {}, "--anonymous"),
    (["--host", "::"], {}, "--anonymous"),
    (["--host", "::1234"], {}, "--anonymous"),
    (["--frobnicate"], {}, "--frobnicate"),
    (["--force"], {}, "--force"),
    (["initialise-database", "--f"], {}, "--f"),
    (["backup"], {}, "PATH"),
    (["frobnicate"], {}, "frobnicate"),
]


@pytest.mark.parametrize(("arguments", "environ", "message"), INVALID_SETTINGS)
def test_invalid_setting_exits_with_2_and_names_it(run, arguments, environ, message):
    status, output, errors = run(*arguments, **environ)
    assert (status, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert not os.listdir(".")


@not_on_windows("has no environment of bytes")
def test_undecodable_host_exits_with_2_and_no_traceback(tmp_path):
    copy_module(tmp_path)
    environ = {**os.environb, b"PROFILER_HOST": b"\xff"}
    output = subprocess.run(
        [sys.executable, "profiler.py"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert (output.returncode, output.stdout) == (2, "")
    assert "Traceback" not in output.stderr
    assert "invalid host" in output.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--token", TOKEN], [f"--token={TOKEN}"]])
def test_token_is_not_taken_from_the_command_line(run, arguments):
    """Everybody could read it in the list of processes. It is not an abbreviation of
    --token-file."""
    status, _, errors = run(*arguments)
    assert status == 2
    assert "--token-file" not in errors.splitlines()[-1]


@pytest.mark.parametrize("path", ["", "missing", "."])
def test_token_file_that_cannot_be_read_exits_with_2(run, path):
    """Also an empty path, which an unset variable leaves: nothing may start without a token."""
    status, _, errors = run("--token-file", path)
    assert status == 2
    assert "--token-file" in errors.splitlines()[-1]


def test_token_file_that_is_not_text_exits_with_2(run, tmp_path):
    (tmp_path / "tokens").write_bytes(b"\xff" * 20)
    status, _, errors = run("--token-file", "tokens")
    assert status == 2
    assert "--token-file" in errors.splitlines()[-1]


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_host_may_be_an_ipv6_address(tmp_path, host):
    with Command(tmp_path, "--host", host, "--port", "0") as command:
        address = command.address()
        assert command.url.startswith("http://[::1]:")
        assert ask(address).status == 200
        assert ask(address, Host=f"[::1]:{address[1]}").status == 200


@needs_ipv6
def test_host_may_have_an_ipv6_scope(run):
    """No interface has this address. Without its scope, the system would call it invalid."""
    status, _, errors = run("--host", "fe80::1234:5678%lo", "--port", "0", "--anonymous")
    assert (status, errors.count("\n")) == (1, 1)
    assert "fe80::1234:5678" in errors
    assert "Cannot assign requested address" in errors


def test_token_is_required_and_opens_other_addresses_and_hosts(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", "--token-file", "token") as command:
        address = command.address()
        assert ask(address).status == 401
        assert ask(address, Authorization=f"Bearer {TOKEN}", Host="accounts.example").status == 200
        _, output, errors = command.end(signal.SIGTERM)
    if os.name != "nt":  # which terminates the process before it has written its log
        assert re.findall('" ([0-9]+) ', errors) == ["401", "200"]
    assert TOKEN not in command.url + command.banner + output + errors


def test_each_line_of_the_token_file_is_a_token(tmp_path):
    """The file may begin with a byte order mark."""
    tokens = [f"{TOKEN}{number}" for number in range(3)]
    (tmp_path / "tokens").write_bytes("\r\n".join(["", *tokens, ""]).encode("utf-8-sig"))
    with Command(
        tmp_path, "--port", "0", "--token-file", "tokens", PROFILER_TOKEN="unused" * 9
    ) as command:
        address = command.address()
        for token in tokens:
            assert ask(address, Authorization=f"Bearer {token}").status == 200
        for token in ("unused" * 9, tokens[0][:-1], " ".join(tokens)):
            assert ask(address, Authorization=f"Bearer {token}").status == 401


def test_without_a_token_only_loopback_hosts_are_served(tmp_path):
    """Otherwise a website could use DNS rebinding to read all users."""
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        assert ask(address, Host="evil.example").status == 421
        assert ask(address, Host="localhost").status == 200


@pytest.mark.parametrize(
    ("arguments", "environ"), [(["--anonymous"], {}), ([], {"PROFILER_ANONYMOUS": "1"})]
)
def test_anonymous_opens_other_addresses_and_hosts(tmp_path, arguments, environ):
    with Command(tmp_path, "--host", "0.0.0.0", "--port", "0", *arguments, **environ) as command:
        assert ask(command.address(), Host="accounts.example").status == 200


@not_on_windows("selects only sockets")
@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["--iterations", "1000"], {"PROFILER_ITERATIONS": "2000"}),
        ([], {"PROFILER_ITERATIONS": "1000"}),
    ],
)
def test_few_iterations_are_used_with_a_warning(tmp_path, arguments, environ):
    with Command(tmp_path, "--port", "0", "--no-access-log", *arguments, **environ) as command:
        address = command.address()
        assert select.select([command.process.stderr], [], [], 10)[0]  # before any request
        assert ask(address, "POST", fields=HARRY).status == 201
        _, _, errors = command.end(signal.SIGTERM)
    assert errors.count("\n") == 1
    assert "1000 iterations" in errors
    assert "600000" in errors
    [(password_hash,)] = execute(tmp_path / "db.sqlite3", 'SELECT password FROM "user"')
    assert password_hash.startswith("pbkdf2:sha256:1000$")


# -- failures --------------------------------------------------------------------------


def test_port_in_use_is_one_line_and_exit_1(tmp_path):
    with Command(tmp_path, "--port", "0") as first:
        port = first.address()[1]
        with Command(tmp_path, "--port", str(port)) as second:
            status, output, errors = second.end()
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert f"port {port} of 127.0.0.1" in errors
    assert "--port" in errors


@pytest.mark.parametrize(
    "arguments", [["--port", "0"], ["initialise-database"], ["backup", "copy"]]
)
def test_missing_folder_is_one_line_and_exit_1(run, tmp_path, arguments):
    status, output, errors = run("--database", "missing/db.sqlite3", *arguments)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert str(tmp_path / "missing" / "db.sqlite3") in errors
    if arguments[0] != "backup":
        assert f"create the folder {tmp_path / 'missing'}" in errors


@not_on_windows("refuses to delete the current folder")
def test_deleted_current_folder_is_one_line_and_exit_1(run, tmp_path, monkeypatch):
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    status, output, errors = run("--port", "0")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "No such file or directory" in errors


@pytest.mark.parametrize(
    "arguments", [["--port", "0"], ["initialise-database", "--force"], ["backup", "copy"]]
)
@pytest.mark.parametrize(
    "content", [b"I am Tom Riddle. " * 100, b"I am Tom Riddle.", b"I"], ids=len
)
def test_file_that_is_no_database_is_one_line_and_exit_1(run, tmp_path, arguments, content):
    (tmp_path / "diary").write_bytes(content)
    status, output, errors = run("--database", "diary", *arguments)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "not a database" in errors
    assert (tmp_path / "diary").read_bytes() == content
    assert os.listdir(tmp_path) == ["diary"]


def test_table_without_a_column_is_one_line_and_exit_1(run, path):
    """Every request would fail on it."""
    execute(path, "CREATE TABLE user (id INTEGER, first_name, last_name, email, created_on)")
    status, output, errors = run("--port", "0")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "no such column: password" in errors


@not_on_windows("refuses to move or delete an open file")
def test_file_that_was_moved_is_not_recreated(tmp_path):
    with Command(tmp_path, "--port", "0") as command:
        address = command.address()
        (tmp_path / "db.sqlite3").rename(tmp_path / "moved")
        assert ask(address).status == 503
        assert not (tmp_path / "db.sqlite3").exists()
        (tmp_path / "moved").rename(tmp_path / "db.sqlite3")
        assert ask(address).status == 200


def test_missing_schema_is_one_line_and_leaves_no_file(tmp_path):
    shutil.copy(HERE / "profiler.py", tmp_path)
    output = subprocess.run(
        [sys.executable, "profiler.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (output.returncode, output.stdout, output.stderr.count("\n")) == (1, "", 1)
    assert "schema.sql" in output.stderr
    assert os.listdir(tmp_path) == ["profiler.py"]


# -- commands --------------------------------------------------------------------------


def test_version(run):
    assert run("--version") == (0, f"profiler {profiler.__version__}\n", "")


def test_help_lists_commands_flags_and_variables(run):
    status, output, _ = run("--help")
    assert status == 0
    flags = (
        "--host --port --database --token-file --anonymous --iterations --no-access-log --version"
    )
    variables = "HOST PORT DATABASE TOKEN ANONYMOUS ITERATIONS"
    for word in [
        "initialise-database",
        "backup",
        *flags.split(),
        *(f"PROFILER_{name}" for name in variables.split()),
    ]:
        assert word in output


def test_initialise_database_creates_the_table(run, tmp_path):
    assert run("initialise-database", "--database", "a.sqlite3") == (
        0,
        "Successfully created database schema.\n",
        "",
    )
    assert run("--database", "a.sqlite3", "initialise-database") == (
        0,
        "The database schema exists.\n",
        "",
    )
    assert execute(tmp_path / "a.sqlite3", 'SELECT count(*) FROM "user"') == [(0,)]
    assert not (tmp_path / "db.sqlite3").exists()


def test_initialise_database_deletes_users_only_with_force(run, path):
    fill(path, 3)
    status, output, errors = run("initialise-database")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "users (3)" in errors
    assert "--force" in errors
    assert execute(path, 'SELECT count(*) FROM "user"') == [(3,)]
    assert run("initialise-database", "--force") == (
        0,
        "Successfully created database schema.\n",
        "",
    )
    assert execute(path, 'SELECT count(*) FROM "user"') == [(0,)]


def test_initialise_database_does_not_reuse_ids_of_an_empty_table(run, path):
    fill(path, 3)
    execute(path, 'DELETE FROM "user"')
    assert run("initialise-database")[0] == 0
    fill(path, 1)
    assert execute(path, 'SELECT id FROM "user"') == [(4,)]


@pytest.mark.parametrize("arguments", [["initialise-database"], ["backup", "copy"]])
def test_commands_ignore_settings_of_the_server(run, path, arguments):
    fill(path, 0)
    assert (
        run(
            *arguments,
            PROFILER_PORT="x",
            PORT="x",
            PROFILER_HOST="0.0.0.0",
            PROFILER_TOKEN="short",
        )[0]
        == 0
    )


def test_backup_of_a_missing_database_creates_nothing(run, tmp_path):
    status, output, errors = run("backup", "copy")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert str(tmp_path / "db.sqlite3") in errors
    assert os.listdir(tmp_path) == []


def test_backup_writes_a_copy_that_can_be_served(with_harry):
    with Command(with_harry, "--port", "0") as command:
        address = command.address()
        assert ask(address, "POST", fields=RON).status == 201
        with Command(with_harry, "backup", "copy.sqlite3") as backup:
            assert backup.end() == (0, "Backup written to copy.sqlite3.\n", "")
    with Command(with_harry, "--port", "0", "--database", "copy.sqlite3") as command:
        assert [user["first_name"] for user in ask(command.address()).json] == ["Harry", "Ron"]


@pytest.mark.parametrize("target", ["db.sqlite3", "missing/copy", "db.sqlite3-wal", "existing"])
def test_backup_that_fails_is_one_line_and_exit_1(run, with_harry, target):
    (with_harry / "existing").write_bytes(b"mine")
    before = {name: (with_harry / name).read_bytes() for name in os.listdir(with_harry)}
    status, output, errors = run("backup", target)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert str(pathlib.Path(target)) in errors
    assert {name: (with_harry / name).read_bytes() for name in os.listdir(with_harry)} == before


# -- other ways to run it --------------------------------------------------------------


@pytest.mark.parametrize("entry_point", ["profiler:main", None])
def test_zip_archive_is_served(tmp_path, entry_point):
    """Made by zipapp, of the module or of a copy that is called __main__.py, and run by
    a relative path."""
    source = tmp_path / "source"
    source.mkdir()
    copy_module(source)
    if entry_point is None:
        (source / "profiler.py").rename(source / "__main__.py")
    zipapp.create_archive(source, tmp_path / "p.pyz", main=entry_point)
    with Command(tmp_path, "--port", "0", command=(sys.executable, "./p.pyz")) as command:
        os.unlink(tmp_path / "schema.sql")
        assert ask(command.address(), "POST", fields=HARRY).status == 201
