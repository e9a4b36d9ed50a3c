"""Measure profiler next to its peers, in one run, on databases created here; write
RESULTS.md and results.svg.

    python -m pip install -r bench/requirements.txt
    python bench/run.py [--quick]

Every figure is a median of rounds in which all candidates take turns. Loads over HTTP
need wrk.
"""

import argparse
import contextlib
import datetime
import hashlib
import http.client
import importlib.util
import io
import json
import os
import pathlib
import platform
import random
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from importlib.metadata import version
from wsgiref.util import setup_testing_defaults

import matplotlib
import psutil
import tabulate

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import profiler  # noqa: E402

FILL = """WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
INSERT INTO user (first_name, last_name, email, password)
SELECT 'First' || i, 'Last' || i, 'user' || i || '@example.com',
    'pbkdf2:sha256:600000$' || hex(zeroblob(32))
FROM n"""
SCHEMA = (HERE.parent / "schema.sql").read_text()
# The tutorial's table, in its rollback-journal file.
TUTORIAL = SCHEMA.replace(" COLLATE NOCASE", "")
RUNS = 6  # of each server
UVICORN = ("--loop", "uvloop", "--http", "httptools", "--no-access-log")  # with one worker
GRANIAN = ("--interface", "wsgi", "--no-ws", "--workers", "1", "--blocking-threads", "1")
PACKAGES = (
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "flask",
    "bottle",
    "falcon",
    "gunicorn",
    "waitress",
    "granian",
)
COLOURS = {"profiler": "#2a6f97", "other": "#a9b4c2"}


# -- databases and servers -------------------------------------------------------------


def fill(folder, name, count, schema=None):
    """Make a database of so many users and return its path: profiler's, or one with
    another schema."""
    path = str(folder / f"{name}-{count}.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        if schema is None:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(schema or SCHEMA)
        connection.execute(FILL, (count,))
    return path


def copy_module(path, folder):
    """Copy a module into a new folder, with the schema next to it or the repository's."""
    folder.mkdir()
    beside = path.parent / "schema.sql"
    shutil.copy(beside if beside.exists() else HERE.parent / "schema.sql", folder)
    return shutil.copy(path, folder / "profiler.py")


@contextlib.contextmanager
def serving(command, database, path="/users/1/"):
    """Run a server on a free port, given to the command as PORT; yield its process and
    port once it answers."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = [str(part).replace("PORT", str(port)) for part in command]
    environ = {
        **os.environ,
        "PROFILER_DATABASE": database,
        "PEER_DATABASE": database,
        "PYTHONPATH": str(HERE.parent),
    }
    process = subprocess.Popen(
        command, cwd=HERE, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                ask(port, "GET", path)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no answer from {' '.join(command)}")
            time.sleep(0.05)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)  # gunicorn lets the requests in flight finish


def ask(port, method, path, fields=None):
    """Send one request; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"} if fields else {}
        connection.request(method, path, json.dumps(fields) if fields else None, headers)
        response = connection.getresponse()
        response.read()
        return response.status


def python(*arguments):
    return [sys.executable, *arguments]


def profiler_server(*arguments):
    return python(HERE.parent / "profiler.py", "--port", "PORT", *arguments, "--no-access-log")


# -- in process ------------------------------------------------------------------------


def request(method, path, fields=None):
    """Return what makes the environ of a request, each time anew."""
    body = json.dumps(fields).encode() if fields else b""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.errors": sys.stderr}
    environ.update(
        {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body))} if body else {}
    )
    setup_testing_defaults(environ)
    return environ, body


def call(app, template):
    """Call a WSGI application and consume its answer; return the number of bytes."""
    environ, body = template
    environ = {**environ, "wsgi.input": io.BytesIO(body)}
    result = app(environ, lambda status, headers, exc_info=None: None)
    size = sum(map(len, result))
    if hasattr(result, "close"):
        result.close()
    return size


def in_turns(candidates, templates, rounds):
    """Return for each candidate the median seconds of a call, as `time_in_turns` does."""
    seconds = time_in_turns(candidates, templates, rounds)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_in_turns(candidates, templates, rounds):
    """Return for each candidate the seconds of a call in each round.

    The candidates take turns in each round. The templates are made anew for each.
    """
    seconds = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, app in candidates.items():
            chosen = templates(number)
            started = time.perf_counter()
            for template in chosen:
                call(app, template)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / len(chosen))
    return seconds


def gets(users, count):
    return lambda _: [request("GET", f"/users/{random.randint(1, users)}/") for _ in range(count)]


def puts(users, count):
    def templates(number):
        ids = random.sample(range(1, users + 1), count)
        return [
            request(
                "PUT",
                f"/users/{i}/",
                {"first_name": f"F{number}", "last_name": "L", "email": f"{number}.{i}@b.c"},
            )
            for i in ids
        ]

    return templates


def pages(users, count):
    """Return what makes requests for pages of 100 users."""

    def page():
        environ, body = request("GET", "/users/")
        after = random.randint(0, users - 101)
        return {**environ, "QUERY_STRING": f"limit=100&after={after}"}, body

    return lambda _: [page() for _ in range(count)]


def peers(folder, count):
    """Return the applications that are compared in process, each on a database of its own."""
    os.environ["PEER_DATABASE"] = fill(folder, "peer", count, TUTORIAL)
    own = fill(folder, "own", count)
    import floor
    import peer_bottle
    import peer_falcon
    import peer_flask

    return {
        "profiler": profiler.create_app(own),
        "profiler, without ETag": without_entity_tag(own),
        "floor": floor.make_app(fill(folder, "floor", count)),
        "Falcon": peer_falcon.app,
        "Bottle": peer_bottle.app,
        "Flask": peer_flask.app,
    }


def without_entity_tag(path):
    """Return profiler's application as it would be if a user had no ETag."""
    spec = importlib.util.spec_from_file_location(
        "profiler_without_entity_tag", HERE.parent / "profiler.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_entity_tag = lambda body: ""
    return module.create_app(path)


def measure_in_process(folder, quick):
    """One user, the whole list, one update: seconds of each round by candidate."""
    count = 100_000
    apps = peers(folder, count)
    say("one user, in process")
    one = time_in_turns(apps, gets(count, 200 if quick else 2000), 5 if quick else 21)
    apps.pop("floor")
    apps.pop("profiler, without ETag").close()
    say("the whole list, in process")
    whole = time_in_turns(apps, lambda _: [request("GET", "/users/")], 3 if quick else 9)
    say("one update, in process")
    update = time_in_turns(apps, puts(count, 20 if quick else 200), 3 if quick else 9)
    apps["profiler"].close()
    yield f"One user of {count:,}, in process", "µs", 1e6, one
    yield f"{count:,} users listed, in process, to the last byte", "ms", 1e3, whole
    yield "One update, committed", "µs", 1e6, update


def measure_growth(folder, quick):
    """What one user, one page and one update cost, at a thousand and at many users."""
    many = 100_000 if quick else 1_000_000
    apps = {
        f"{count:,} users": profiler.create_app(fill(folder, "growth", count))
        for count in (1_000, many)
    }
    rounds = 5 if quick else 15
    works = {
        "one user": lambda users: gets(users, 2000),
        "one page of 100": lambda users: pages(users, 50),
        "one update": lambda users: puts(users, 200),
    }
    rows = []
    for work, templates in works.items():
        say(f"growth: {work}")
        seconds = {name: [] for name in apps}
        for number in range(rounds):
            for name, app in apps.items():
                users = int(name.split()[0].replace(",", ""))
                chosen = templates(users)(number)
                started = time.perf_counter()
                for template in chosen:
                    call(app, template)
                seconds[name].append((time.perf_counter() - started) / len(chosen) * 1e6)
        small, large = (statistics.median(values) for values in seconds.values())
        rows.append([work, f"{small:.1f}", f"{large:.1f}", f"{large / small:.2f}"])
    for app in apps.values():
        app.close()
    return [*(f"µs at {name}" for name in apps), "ratio"], rows


# -- over HTTP -------------------------------------------------------------------------


def requests_per_second(port, path, seconds, connections=16):
    output = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", f"http://127.0.0.1:{port}{path}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "Non-2xx" in output:
        raise RuntimeError(output)
    return float(re.search(r"Requests/sec:\s+([0-9.]+)", output)[1])


def measure_http(folder, quick):
    """Requests a second for one user, 16 connections, of each run by server."""
    own, peer = fill(folder, "http", 100_000), fill(folder, "http-peer", 100_000, TUTORIAL)

    def module(*arguments):
        return python("-m", *arguments)

    gunicorn = module("gunicorn", "-w2", "--threads", "4", "-b", "127.0.0.1:PORT")
    uvicorn = module("uvicorn", "--port", "PORT", *UVICORN)
    granian = module("granian", "--port", "PORT", *GRANIAN)
    servers = {
        "profiler": (profiler_server(), own),
        "profiler, with its access log": (profiler_server()[:-1], own),
        "profiler, gunicorn -w2 --threads 4": ([*gunicorn, "profiler:application"], own),
        "profiler, granian, 1 thread": ([*granian, "profiler:application"], own),
        "hello, granian, 1 thread": ([*granian, "floor:hello"], own),
        "FastAPI, async, uvicorn": ([*uvicorn, "peer_fastapi:async_app"], peer),
        "FastAPI, sync, uvicorn": ([*uvicorn, "peer_fastapi:sync_app"], peer),
        "Falcon, gunicorn -w2 --threads 4": ([*gunicorn, "peer_falcon:app"], peer),
        "Flask, gunicorn -w2 --threads 4": ([*gunicorn, "peer_flask:app"], peer),
        "Flask, waitress": (module("waitress", "--port=PORT", "peer_flask:app"), peer),
        "Flask, flask run": (module("flask", "--app=peer_flask", "run", "--port=PORT"), peer),
    }
    rates = {name: [] for name in servers}
    for _ in range(1 if quick else RUNS):
        for name, (command, database) in servers.items():
            say(f"wrk: {name}")
            with serving(command, database) as (_, port):
                requests_per_second(port, "/users/4711/", 1)
                rates[name].append(requests_per_second(port, "/users/4711/", 2 if quick else 6))
    return rates


def describe_modes(rates):
    """Return sentences about the servers whose runs fall into two groups, far apart."""
    sentences = []
    for name, runs in rates.items():
        runs = sorted(runs)
        for size in range(2, len(runs) - 1):
            low, high = runs[:size], runs[size:]
            if high[0] > 1.5 * low[-1]:
                sentences.append(
                    f" {name} has two modes: {low[0]:,.0f} to {low[-1]:,.0f} requests a second "
                    f"in {len(low)} runs, and {high[0]:,.0f} to {high[-1]:,.0f} in {len(high)}. "
                    "Its median says little."
                )
    return "".join(sentences)


def measure_hashing(folder, quick):
    """Users created, and passwords checked, by 8 clients, as a share of what the cores
    can hash; what a GET waits meanwhile."""
    user = {"first_name": "A", "last_name": "B", "email": "verified@b.c", "password": "1234"}
    uvicorn = python("-m", "uvicorn", "--port", "PORT", *UVICORN)
    servers = {
        "profiler": (profiler_server(), fill(folder, "hashing", 1_000)),
        "FastAPI, sync, uvicorn": (
            [*uvicorn, "peer_fastapi:sync_app"],
            fill(folder, "hashing-peer", 1_000, TUTORIAL),
        ),
    }
    creations = [(f"users created, {name}", name, "/users/", 201) for name in servers]
    works = [*creations, ("passwords checked, profiler", "profiler", "/users/verify/", 200)]
    rates, waits, possible = {work[0]: [] for work in works}, {work[0]: [] for work in works}, []
    seconds = 5 if quick else 8
    with contextlib.ExitStack() as stack:
        ports = {
            name: stack.enter_context(serving(*server))[1] for name, server in servers.items()
        }
        ask(ports["profiler"], "POST", "/users/", user)
        for number in range(1 if quick else 5):
            say("hashes of all cores")
            possible.append(hashes_per_second(8 if quick else 32))
            for work, name, path, status in works:
                say(f"8 clients: {work}")

                def fields(client, count, is_new=status == 201, number=number):
                    return {**user, "email": f"{number}.{client}.{count}@b.c"} if is_new else user

                post = partial(post_for, seconds, ports[name], path, status, fields)
                rates[work].append(watch(ports[name], post, waits[work]))
    most = statistics.median(possible)
    return [
        [
            work,
            f"{statistics.median(runs):.1f}",
            f"{min(runs):.1f} to {max(runs):.1f}",
            f"{statistics.median(runs) / most:.2f}",
            f"{statistics.quantiles(waits[work], n=100)[98] * 1e3:.0f} ms",
        ]
        for work, runs in rates.items()
    ], (
        f"8 clients. All cores together computed {most:.1f} hashes a second "
        f"({min(possible):.1f} to {max(possible):.1f})."
    )


def hashes_per_second(count):
    """Return how many hashes a second all cores compute; `count` for each of them."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as threads:
        started = time.perf_counter()
        hashes = [
            threads.submit(hashlib.pbkdf2_hmac, "sha256", b"1234", b"salt", profiler.ITERATIONS)
            for _ in range(cores * count)
        ]
        wait(hashes)
        return len(hashes) / (time.perf_counter() - started)


def post_for(seconds, port, path, status, fields):
    """Let 8 clients send requests, each with fields of its own; return requests a second."""
    started = time.perf_counter()

    def work(client):
        count = 0
        while time.perf_counter() < started + seconds:
            if ask(port, "POST", path, fields(client, count)) != status:
                raise RuntimeError(f"a request to {path} failed")
            count += 1
        return count

    with ThreadPoolExecutor(8) as clients:
        return sum(clients.map(work, range(8))) / (time.perf_counter() - started)


def watch(port, function, waits):
    """Return what the function returns; note how long GETs take meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(function)
        while not result.done():
            started = time.perf_counter()
            ask(port, "GET", "/users/1/")
            waits.append(time.perf_counter() - started)
            time.sleep(0.02)
        return result.result()


# -- a million users, memory, import ---------------------------------------------------


def measure_million(folder, quick):
    """The first byte, the memory, and the write-ahead log behind a reader that stalls."""
    count = 200_000 if quick else 1_000_000
    path = fill(folder, "million", count)
    with serving(profiler_server(), path) as (process, port):
        memory = psutil.Process(process.pid).memory_info
        idle = memory().rss
        firsts, most = [], 0
        for _ in range(3):
            say(f"{count:,} users listed")
            with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as connection:
                started = time.perf_counter()
                connection.sendall(
                    b"GET /users/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                connection.recv(1)
                firsts.append(time.perf_counter() - started)
                while connection.recv(1 << 20):
                    most = max(most, memory().rss)
        say("6,000 updates behind a stalled reader")
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.sendall(b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(1 << 16)
            app = profiler.create_app(path)
            log = 0
            for template in puts(count, 600 if quick else 6000)(0):
                call(app, template)
                log = max(log, os.path.getsize(f"{path}-wal"))
            app.close()
    return [
        [f"first byte of {count:,} users", f"{statistics.median(firsts) * 1e3:.1f} ms"],
        ["memory beyond idle, while they are listed", f"{(most - idle) / 2**20:.1f} MB"],
        ["largest write-ahead log while a reader stalls", f"{log / 2**20:.1f} MB"],
    ]


def measure_start(folder, quick):
    """Idle memory of the server, and seconds to import."""
    say("memory and import")
    with serving(profiler_server(), fill(folder, "idle", 100_000)) as (process, _):
        idle = psutil.Process(process.pid).memory_info().rss / 2**20

    # Both are compiled before they are measured.
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds(module, where):
        program = (
            "import time; start = time.perf_counter(); "
            f"import {module}; print(time.perf_counter() - start)"
        )
        values = []
        for _ in range(4 if quick else 16):
            run = subprocess.run(
                python("-c", program),
                cwd=where,
                env=environ,
                capture_output=True,
                text=True,
                check=True,
            )
            values.append(float(run.stdout))
        return statistics.median(values[1:])

    own, flask = seconds("profiler", HERE.parent), seconds("peer_flask", HERE)
    return [
        ["idle memory of `python profiler.py`", f"{idle:.1f} MB", ""],
        [
            "import",
            f"{own * 1e3:.0f} ms",
            f"{own / flask:.2f} of the Flask service's {flask * 1e3:.0f} ms",
        ],
    ]


# -- the report ------------------------------------------------------------------------


def say(text):
    print(f"... {text}", file=sys.stderr, flush=True)


def table(headers, rows):
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


def table_of_runs(values, unit, form):
    """Return a table of the runs of each candidate."""
    first = statistics.median(values["profiler"])
    rows = []
    for name, runs in values.items():
        median, least, most = statistics.median(runs), min(runs), max(runs)
        rows.append(
            [
                name,
                f"{median:{form}}",
                f"{least:{form}} to {most:{form}}",
                f"{median / first:.2f}",
            ]
        )
    return table(["", f"{unit}, median", "lowest to highest", "times profiler's"], rows)


def draw(charts, path):
    """Draw a panel for each chart: (title, runs by name).

    A bar is a median. The line at its end is the range of the runs.
    """
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "profiler"
    import matplotlib.pyplot as plot

    figure, axes = plot.subplots(
        len(charts),
        1,
        figsize=(8, 1 + sum(0.45 + 0.3 * len(v) for _, v in charts)),
        height_ratios=[len(v) for _, v in charts],
    )
    for axis, (title, values) in zip(axes, charts):
        names = list(values)[::-1]
        colours = [
            COLOURS["profiler" if name.startswith("profiler") else "other"] for name in names
        ]
        medians = [statistics.median(values[name]) for name in names]
        below = [median - min(values[name]) for name, median in zip(names, medians)]
        above = [max(values[name]) - median for name, median in zip(names, medians)]
        style = {"elinewidth": 1, "ecolor": "#1d2433"}
        bars = axis.barh(names, medians, color=colours, xerr=[below, above], error_kw=style)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(x=0.12)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description="Measure profiler next to its peers.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute's look: fewer rounds; RESULTS.md and results.svg stay",
    )
    quick = parser.parse_args().quick
    report, charts = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for title, unit, scale, seconds in measure_in_process(folder, quick):
            values = {who: [each * scale for each in rounds] for who, rounds in seconds.items()}
            report.append(
                f"## {title}\n\n"
                f"All took turns in each of {len(values['profiler'])} rounds.\n\n"
                + table_of_runs(values, unit, ".1f")
            )
            charts.append((f"{title} ({unit}, less is better)", values))
        if shutil.which("wrk"):
            rates = measure_http(folder, quick)
            report.append(
                "## One user over HTTP, 16 connections\n\n"
                f"Each of {len(rates['profiler'])} rounds started every server anew."
                f"{describe_modes(rates)}\n\n" + table_of_runs(rates, "requests a second", ",.0f")
            )
            served = {who: runs for who, runs in rates.items() if "hello" not in who}
            charts.append(
                ("One user over HTTP, 16 connections (requests a second, more is better)", served)
            )
        else:
            report.append(
                "## One user over HTTP\n\nSkipped: wrk is not installed (apt-get install wrk).\n"
            )
        rows, hashes = measure_hashing(folder, quick)
        heads = ["", "a second, median", "lowest to highest", "of the hashes", "a GET, 99 %"]
        report.append(f"## Hashing\n\n{hashes}\n\n" + table(heads, rows))
        report.append(
            "## Growth\n\n" + table(["", *(growth := measure_growth(folder, quick))[0]], growth[1])
        )
        report.append("## A million users\n\n" + table(["", ""], measure_million(folder, quick)))
        report.append("## Start\n\n" + table(["", "", ""], measure_start(folder, quick)))
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    head = (
        "# Results\n\n"
        f"Made by `python bench/run.py{' --quick' if quick else ''}` on {datetime.date.today()}: "
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {packages}.\n"
    )
    text = "\n".join([head, *report])
    print(text)
    if not quick:
        (HERE / "RESULTS.md").write_text(text)
        draw(charts, HERE / "results.svg")


if __name__ == "__main__":
    main()
