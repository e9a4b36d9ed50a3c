"""Measure how long readers wait beside heavy clients of the built-in server, and what
idle connections cost.

    python bench/fairness.py [--users 1000000] [--idle 10000] [--seconds 4] [--module profiler.py]

Each row: the time within which 50 and 99 of 100 GETs of one user were answered, in
milliseconds, while other clients did what the row says. The reader sends a request
every 2 ms over one connection. All processes run on this machine.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
FILL = """WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
INSERT INTO user (first_name, last_name, email, password)
SELECT 'First' || i, 'Last' || i, 'user' || i || '@example.com',
    'pbkdf2:sha256:600000$' || hex(zeroblob(32))
FROM n"""
GET = b"GET /users/7/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive_response(connection, received=b""):
    """Receive one response with a Content-Length; return what follows it."""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, rest = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: ([0-9]+)", head)[1])
    while len(rest) < length:
        rest += connection.recv(65536)
    return rest[length:]


def measure(port, seconds):
    """Return the latencies of one reader, in milliseconds, sorted."""
    latencies = []
    with connect(port) as connection:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            connection.sendall(GET)
            receive_response(connection)
            latencies.append((time.perf_counter() - start) * 1000)
            time.sleep(0.002)
    return sorted(latencies)


def list_fast(port):
    while True:
        with connect(port) as connection:
            connection.sendall(
                b"GET /users/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            while connection.recv(1 << 20):
                pass


def list_slowly(port):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while connection.recv(1024):
            time.sleep(0.1)


def create(port, number):
    with connect(port) as connection:
        for count in range(10**9):
            email = f"{number}-{count}-{os.getpid()}@example.com"
            body = json.dumps(
                {"first_name": "a", "last_name": "b", "email": email, "password": "1234"}
            ).encode()
            head = "POST /users/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            receive_response(connection)


def pipeline(port):
    with connect(port) as connection:
        while True:
            connection.sendall(GET * 1000)
            rest = b""
            for _ in range(1000):
                rest = receive_response(connection, rest)


def search(port):
    with connect(port) as connection:
        while True:
            connection.sendall(
                b"GET /users/?q=nobody-has-this HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            receive_response(connection)


def hold_lock(path, seconds):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def running(*jobs):
    """Run each function in a process of its own."""
    processes = [
        multiprocessing.Process(target=function, args=arguments, daemon=True)
        for function, *arguments in jobs
    ]
    for process in processes:
        process.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def get_memory(pid):
    """Return the resident memory of a process in MB."""
    return (
        int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])
        / 1024
    )


def print_row(name, latencies):
    median, most = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(f"| {name} | {median:.2f} | {most:.2f} |", flush=True)


def measure_idle(port, pid, count):
    """Print what idle keep-alive connections cost, and how long a new client waits beside them."""
    before = get_memory(pid)
    connections = []
    try:
        for _ in range(count):
            connections.append(connect(port))
            connections[-1].sendall(GET)
            receive_response(connections[-1])
        after = get_memory(pid)
        latencies = []
        for _ in range(200):
            start = time.perf_counter()
            with connect(port) as connection:
                connection.sendall(GET)
                receive_response(connection)
            latencies.append((time.perf_counter() - start) * 1000)
        print_row(f"a new client beside {len(connections)} idle connections", sorted(latencies))
        print(f"\n{len(connections)} idle connections: {before:.1f} MB became {after:.1f} MB.")
    finally:
        for connection in connections:
            connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--module", type=pathlib.Path, default=HERE.parent / "profiler.py")
    arguments = parser.parse_args()
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        for name in (arguments.module, arguments.module.parent / "schema.sql"):
            shutil.copy(name, folder)
        path = pathlib.Path(folder, "db.sqlite3")
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(pathlib.Path(folder, "schema.sql").read_text())
            connection.execute(FILL, (arguments.users,))
        command = [sys.executable, arguments.module.name, "--port", "0", "--no-access-log"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            port = int(re.search(r":(\d+)/", server.stdout.readline())[1])
            rows = (
                ("nobody else", ()),
                (
                    "one client lists everybody as fast as it can, one at 10 KB/s",
                    ((list_fast, port), (list_slowly, port)),
                ),
                ("8 clients create users", tuple((create, port, number) for number in range(8))),
                ("one client pipelines 1,000 requests at once", ((pipeline, port),)),
                ("another process holds the write lock", ((hold_lock, path, 60),)),
                ("one client searches everybody without a match", ((search, port),)),
            )
            print("| other clients | median, ms | 99 % within, ms |\n| --- | ---: | ---: |")
            for name, jobs in rows:
                with running(*jobs):
                    try:
                        print_row(name, measure(port, arguments.seconds))
                    except (
                        TypeError
                    ):  # no Content-Length: the version measured has no such request
                        print(f"| {name} | not answered | |")
            measure_idle(port, server.pid, arguments.idle)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
