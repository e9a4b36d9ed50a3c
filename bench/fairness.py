"""Measure how long clients of the built-in server wait beside others, and what idle
connections cost.

    python -m pip install -r bench/requirements.txt
    python bench/fairness.py [--module profiler.py] [--users 1000000] [--seconds 10]

A row says what other clients do. The next columns are the milliseconds within which 99
of 100 requests of four clients were answered: one gets a user, one updates a user, one
verifies a password, and one asks for the health. The limit stands in the head of the
column. What is above its limit is marked with **, and the exit status is 1. All
processes run on this machine and compete for its cores. Needs wrk.
"""

import argparse
import contextlib
import json
import math
import pathlib
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from run import HERE, copy_module, fill, profiler, python, say, serving, table

ITERATIONS = 1000  # of PBKDF2: 0.1 ms, so that a login does not wait for its own hash
TIMEOUT = 10.0  # seconds, of a client
LONG_NAME = "\N{GRINNING FACE}" * profiler.MAX_NAME  # 4 bytes each

LOGIN = {"email": "verified@example.com", "password": "1234"}
UPDATE = {"first_name": "A", "last_name": "B", "email": "updated@example.com"}


def make_request(method, path, fields=None):
    body = json.dumps(fields).encode() if fields else b""
    headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode() + body


class Probe(NamedTuple):
    request: bytes
    pause: float  # seconds between two requests
    limit: int  # milliseconds for 99 of 100


PROBES = {
    "user": Probe(make_request("GET", "/users/7/"), 0.002, 20),
    "update": Probe(make_request("PUT", "/users/8/", UPDATE), 0.02, 300),
    "login": Probe(make_request("POST", "/users/verify/", LOGIN), 0.02, 300),
    "health": Probe(make_request("GET", "/health/"), 0.01, 50),
}


class Client:
    """A client with one connection, which it opens again after a failure."""

    def __init__(self, port):
        self.port = port
        self.connection = self.stream = None

    def exchange(self, request, count=1):
        """Send a request, or the same several times at once; return the statuses.

        The status is 0 if the connection cannot be opened, breaks or takes too long.
        """
        try:
            if not self.connection:
                self.connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.stream = self.connection.makefile("rb")
            self.connection.sendall(request * count)
            return [self._receive_status() for _ in range(count)]
        except OSError:
            self.close()
            return [0] * count

    def close(self):
        if self.connection:
            self.stream.close()
            self.connection.close()
            self.connection = None

    def _receive_status(self):
        """Receive a response with a Content-Length; return its status."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.stream.readline()
            if not line:
                raise ConnectionError("the server closed the connection")
            head += line
        self.stream.read(int(re.search(rb"Content-Length: ([0-9]+)", head)[1]))
        return int(head.split()[1])


# -- what the other clients do ---------------------------------------------------------
# Each function ends by itself after so many seconds, and says how it fared.


def wrk(connections, path, port, _, seconds, limit=math.inf):
    """Send requests over so many connections, without a pause.

    The limit is that of the slowest request, in milliseconds.
    """
    url = f"http://127.0.0.1:{port}{path}"
    options = ["-t1", f"-c{connections}", f"-d{seconds}", f"--timeout={seconds}"]
    run = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True)
    rate = float(re.search(r"Requests/sec: +([0-9.]+)", run.stdout)[1])
    number, unit = re.search(r"Latency +\S+ +\S+ +([0-9.]+)(us|ms|s|m) ", run.stdout).groups()
    slowest = float(number) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]
    fared = (
        f"{rate:,.1f} requests a second, slowest {slowest:,.0f} ms" if rate else "none finished"
    )
    fared = mark(fared, slowest > limit)
    return "; ".join([fared, *re.findall(r"Socket errors.*|Non-2xx.*", run.stdout)])


def list_slowly(port, _, seconds):
    """List all users at 10 KB a second."""
    end = time.monotonic() + seconds
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.settimeout(TIMEOUT)
        connection.connect(("127.0.0.1", port))
        connection.sendall(make_request("GET", "/users/"))
        while time.monotonic() < end and connection.recv(1024):
            time.sleep(0.1)


def pipeline(port, _, seconds):
    """Send 1,000 requests at once, again and again."""
    end = time.monotonic() + seconds
    client, count = Client(port), 0
    while time.monotonic() < end:
        count += client.exchange(PROBES["user"].request, 1000).count(200)
    return f"{count / seconds:,.0f} requests a second"


def create(clients, port, _, seconds):
    """Create users, one after the other in each client."""
    end = time.monotonic() + seconds

    def create_users(number):
        client, count = Client(port), 0
        while time.monotonic() < end:
            user = {**UPDATE, **LOGIN, "email": f"{number}-{time.monotonic()}@example.com"}
            count += client.exchange(make_request("POST", "/users/", user)).count(201)
        return count

    with ThreadPoolExecutor(clients) as threads:
        count = sum(threads.map(create_users, range(clients)))
    return f"{count / seconds:,.0f} users created a second"


def hold_lock(_, database, seconds):
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")


class Case(NamedTuple):
    name: str
    jobs: tuple
    probes: tuple = tuple(PROBES)
    database: str = "many"
    iterations: int = ITERATIONS


CASES = [
    Case("none", ()),
    Case(
        "2 list everybody: one as fast as it can, one at 10 KB/s",
        (partial(wrk, 1, "/users/"), list_slowly),
    ),
    Case("100 list everybody", (partial(wrk, 100, "/users/"),)),
    Case("400 search without a match", (partial(wrk, 400, "/users/?q=nobody-has-this"),)),
    Case(
        "24 get pages of 1,000 users with the longest names, 2 MB",
        (partial(wrk, 24, "/users/?limit=1000"),),
        database="long names",
    ),
    Case(
        "8 create users, with 600,000 iterations",
        (partial(create, 8),),
        ("user", "update", "health"),
        iterations=profiler.ITERATIONS,
    ),
    Case("8 create users, with 1,000 iterations", (partial(create, 8),)),
    Case("one pipelines 1,000 requests at once", (pipeline,)),
    Case("another process holds the write lock", (hold_lock,), ("user", "login", "health")),
    Case("1,000 get a user", (partial(wrk, 1000, "/users/7/", limit=1000),)),
]


# -- measuring -------------------------------------------------------------------------


def probe(port, kind, seconds):
    """Return the sorted latencies of a client in milliseconds, and how many requests failed."""
    client, latencies, failed = Client(port), [], 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        [status] = client.exchange(PROBES[kind].request)
        latencies.append((time.perf_counter() - started) * 1000)
        failed += status != 200
        time.sleep(PROBES[kind].pause)
    return sorted(latencies), failed


def measure(port, database, jobs, kinds, seconds):
    """Return the cells of a row: what the probes waited for, and how the others fared."""
    with ProcessPoolExecutor(max(1, len(jobs))) as pool, ThreadPoolExecutor() as threads:
        others = [pool.submit(job, port, database, seconds + 2) for job in jobs]
        time.sleep(1)
        probes = {kind: threads.submit(probe, port, kind, seconds) for kind in kinds}
        cells = [
            format_probe(kind, *probes[kind].result()) if kind in probes else "" for kind in PROBES
        ]
        return [*cells, "; ".join(filter(None, [other.result() for other in others]))]


def format_probe(kind, latencies, failed):
    most = latencies[int(len(latencies) * 0.99)]
    text = f"{most:,.1f}, {failed} of {len(latencies)} failed" if failed else f"{most:,.1f}"
    return mark(text, failed or most > PROBES[kind].limit)


def mark(text, is_missed):
    return f"**{text}**" if is_missed else text


def get_memory(pid, field):
    """Return the resident memory of a process in MB: VmRSS, or VmHWM for the most so far."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024


def measure_idle(port, pid, count):
    """Return what idle connections cost, and how long a new client waits beside them."""
    request = PROBES["user"].request
    before = get_memory(pid, "VmRSS")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            idle = stack.enter_context(contextlib.closing(Client(port)))
            idle.exchange(request)
        after = get_memory(pid, "VmRSS")
        latencies = []
        for _ in range(200):
            started = time.perf_counter()
            with contextlib.closing(Client(port)) as client:
                client.exchange(request)
            latencies.append((time.perf_counter() - started) * 1000)
    most = format_probe("user", sorted(latencies), 0)
    return (
        f"{count:,} idle connections: {before:.1f} MB became {after:.1f} MB. A new client "
        f"beside them was answered within {most} ms in 99 of 100 cases."
    )


def fill_with_long_names(folder, count):
    path = fill(folder, "long-names", count)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE user SET first_name = :name, last_name = :name", {"name": LONG_NAME}
        )
    return path


def add_login(database):
    """Add the user that logs in."""
    password_hash = profiler.hash_password(LOGIN["password"], ITERATIONS)
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        statement = "INSERT INTO user (first_name, last_name, email, password) VALUES (?, ?, ?, ?)"
        connection.execute(statement, ("A", "B", LOGIN["email"], password_hash))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=pathlib.Path, default=HERE.parent / "profiler.py")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--idle", type=int, default=10_000, help="connections")
    parser.add_argument("--seconds", type=int, default=10, help="of each row")
    arguments = parser.parse_args()
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        module = copy_module(arguments.module.resolve(), folder / "module")
        command = python(module, "--port", "PORT", "--no-access-log", "--iterations")
        databases = {
            "many": fill(folder, "many", arguments.users),
            "long names": fill_with_long_names(folder, 5000),
        }
        for database in databases.values():
            add_login(database)
        rows = []
        for case in CASES:
            say(case.name)
            database = databases[case.database]
            with serving([*command, case.iterations], database) as (process, port):
                cells = measure(port, database, case.jobs, case.probes, arguments.seconds)
                rows.append([case.name, *cells, f"{get_memory(process.pid, 'VmHWM'):.0f}"])
        say(f"{arguments.idle:,} idle connections")
        with serving([*command, ITERATIONS], databases["many"]) as (process, port):
            idle = measure_idle(port, process.pid, arguments.idle)
    heads = [f"{kind}, ms (at most {probe.limit})" for kind, probe in PROBES.items()]
    report = table(["other clients", *heads, "how they fared", "most memory, MB"], rows) + idle
    print(report)
    if "**" in report:
        sys.exit("Limits were missed.")


if __name__ == "__main__":
    main()
