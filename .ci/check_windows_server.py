"""Use the server on CPython for Windows under Wine, from this side of Wine. .ci/windows runs it.

Arguments: FOLDER PYTHON. The first is a folder in Wine's drive C: with profiler.py, as
this system names it; the second is python.exe, as Windows names it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

FOLDER, PYTHON = pathlib.Path(sys.argv[1]), sys.argv[2]
HARRY = {"first_name": "Harry", "last_name": "Potter", "email": "h@example.com", "password": "x"}
GET = b"GET /users/1/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
CONNECTIONS = 600  # select() of CPython for Windows takes 512


def start(*arguments):
    """Start Python with these arguments. Wine's CPython needs pipes."""
    return subprocess.Popen(
        ["wine", PYTHON, *arguments],
        cwd=FOLDER,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    """Run a command of the module. Return its exit status, stdout and stderr."""
    with start("profiler.py", *arguments) as process:
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors


@contextlib.contextmanager
def serving():
    """Run the server. Yield its process and its port."""
    with start("profiler.py", "--port", "0", "--no-access-log") as process:
        try:
            url, _ = process.stdout.readline(), process.stdout.readline()
            match = re.fullmatch(r"http://127\.0\.0\.1:([0-9]+)/(users/)?\n", url)
            assert match, (url, process.poll())
            yield process, int(match[1])
        finally:
            process.kill()


def connect(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=20)


def ask(connection, method, path, fields=None):
    """Send a request. Return the status and the JSON value of the response."""
    headers = {} if fields is None else {"Content-Type": "application/json"}
    connection.request(method, path, None if fields is None else json.dumps(fields), headers)
    with connection.getresponse() as response:
        return response.status, json.loads(response.read() or "null")


def count_users(path):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute('SELECT count(*) FROM "user"').fetchone()[0]


def check_requests(port):
    with contextlib.closing(connect(port)) as connection:
        assert ask(connection, "POST", "/users/", HARRY) == (201, {"id": 1})
        assert ask(connection, "GET", "/users/1/")[1]["email"] == HARRY["email"]
        login = {"email": HARRY["email"], "password": HARRY["password"]}
        assert ask(connection, "POST", "/users/verify/", login) == (200, {"id": 1})
        assert ask(connection, "POST", "/users/verify/", {**login, "password": "y"})[0] == 403
    print("users are created and verified")


def check_backup():
    status, output, errors = run("backup", "copy.sqlite3")
    assert (status, errors) == (0, ""), (status, output, errors)
    assert count_users(FOLDER / "copy.sqlite3") == 1
    status, output, errors = run("backup", "copy.sqlite3")
    assert (status, output) == (1, ""), (status, output, errors)
    print("a backup is written during serving, and not replaced:", errors.strip())


def check_connections(port):
    """Return the clients, which are left idle."""
    clients = []
    for _ in range(CONNECTIONS):
        client = socket.create_connection(("127.0.0.1", port), timeout=20)
        client.sendall(GET)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        clients.append(client)
    kept = 0
    for client in clients:
        client.setblocking(False)
        try:
            client.recv(1)
        except BlockingIOError:
            kept += 1
        except ConnectionError:
            pass
        client.setblocking(True)
    with contextlib.closing(connect(port)) as connection:
        assert ask(connection, "GET", "/health/")[0] == 200
    print(f"{CONNECTIONS} clients were served, and {kept} idle connections are kept")
    return clients


def check_interrupt(process):
    """Wine makes Ctrl-C of SIGINT."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    seconds = time.monotonic() - begin
    assert (process.returncode, output) == (0, ""), (process.returncode, output, errors)
    assert "Traceback" not in errors, errors
    assert not (FOLDER / "db.sqlite3-wal").exists()
    assert seconds < 8  # idle clients would get 10
    print(f"Ctrl-C ends the server in {seconds:.1f} s, with idle connections")


def check_termination():
    """Terminate the server during writes, as `taskkill /F` does. Every user whose
    creation was answered is there afterwards."""
    fields = {name: HARRY[name] for name in ("first_name", "last_name")}
    fields["password_hash"] = "pbkdf2:sha256:1$salt$" + "0" * 64
    created = 0
    with serving() as (process, port), contextlib.closing(connect(port)) as connection:
        before = len(ask(connection, "GET", "/users/")[1])
        timer = threading.Timer(3, process.kill)
        timer.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in range(100_000):
                user = {**fields, "email": f"{number}@example.com"}
                assert ask(connection, "POST", "/users/", user)[0] == 201
                created += 1
        timer.join()
    assert created
    with serving() as (_, port), contextlib.closing(connect(port)) as connection:
        # One more may have been created without an answer.
        assert len(ask(connection, "GET", "/users/")[1]) - before - created in (0, 1)
    print(f"none of {created} users was lost when the server was terminated")


def check_waitress():
    listen = socket.create_server(("127.0.0.1", 0))
    port = listen.getsockname()[1]
    listen.close()
    with start("-m", "waitress", f"--listen=127.0.0.1:{port}", "profiler:application") as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                with contextlib.closing(connect(port)) as connection:
                    try:
                        assert ask(connection, "GET", "/users/1/")[0] == 200
                        break
                    except ConnectionRefusedError:
                        assert time.monotonic() < deadline
                        time.sleep(0.1)
        finally:
            process.kill()
    print("waitress serves it")


def main():
    with serving() as (process, port):
        check_requests(port)
        check_backup()
        clients = check_connections(port)
        check_interrupt(process)
        for client in clients:
            client.close()
    check_termination()
    check_waitress()


if __name__ == "__main__":
    main()
