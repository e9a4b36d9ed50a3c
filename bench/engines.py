"""Measure profiler on SQLite, PostgreSQL and MariaDB, beside Flask-SQLAlchemy on PostgreSQL; write ENGINES.md.

    python -m pip install '.[postgresql,mysql,test]' -r bench/requirements.txt
    python bench/engines.py [--quick]

The servers are started here, with commits on disk. HTTP loads need wrk. Figures are medians of rounds taken in turns.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import tracemalloc

import run
from run import HERE, fill, gets, in_turns, puts, python, request, requests_per_second, say, serving, table

import profiler

sys.path.insert(0, str(HERE.parent))
import profiler_sqlalchemy
from test_profiler_sqlalchemy import MariaDB, PostgreSQL, database_of

COUNT = 100_000


@contextlib.contextmanager
def started(server):
    with contextlib.closing(server):
        server.initialise()
        if server.process is None:
            server.start()
        yield server


def peer_table(server, url):
    """Give the peer a database with the same users, in the table as its model has it; return the URL."""
    name = database_of(url)
    peer = server.make_database(f"TEMPLATE {name}")
    for statement in ('ALTER TABLE "user" DROP COLUMN email_key', 'CREATE UNIQUE INDEX ON "user" (email)'):
        server.execute(statement, database_of(peer))
    server.execute('VACUUM ANALYZE "user"', database_of(peer))
    return peer


def pages(users, count):
    def templates(_):
        chosen = [random.randint(0, users - 101) for _ in range(count)]
        return [(dict(request("GET", "/users/")[0], QUERY_STRING=f"limit=100&after={after}"), b"") for after in chosen]

    return templates


def measure_in_process(urls, peer, quick):
    apps = {f"profiler, {name}": profiler.create_app(url) for name, url in urls.items()}
    os.environ["PEER_DATABASE"] = peer
    import peer_flask_sqlalchemy

    apps["Flask-SQLAlchemy, PostgreSQL"] = peer_flask_sqlalchemy.app
    for title, unit, scale, templates, rounds in (
        ("One user", "µs", 1e6, gets(COUNT, 50 if quick else 500), 7),
        ("One update, committed", "µs", 1e6, puts(COUNT, 20 if quick else 200), 7),
        ("A page of 100", "µs", 1e6, pages(COUNT, 10 if quick else 100), 7),
        (f"{COUNT:,} users listed", "ms", 1e3, lambda _: [request("GET", "/users/")], 3),
    ):
        say(title)
        seconds = in_turns(apps, templates, 2 if quick else rounds)
        first = seconds["profiler, SQLite"]
        rows = [[who, f"{s * scale:,.0f}", f"{s / first:.1f}"] for who, s in seconds.items()]
        yield f"## {title}, in process\n\n" + table(["", unit, "times SQLite's"], rows)
    rows = []
    for who, app in apps.items():
        say(f"memory of the list: {who}")
        run.call(app, request("GET", "/users/?limit=1"))
        tracemalloc.start()
        run.call(app, request("GET", "/users/"))
        rows.append([who, f"{tracemalloc.get_traced_memory()[1] / 2**20:.1f} MB"])
        tracemalloc.stop()
    yield f"## Memory while {COUNT:,} users are listed\n\n" + table(["", "most that Python held"], rows)
    for app in apps.values():
        if hasattr(app, "close"):
            app.close()


def measure_http(urls, peer, quick):
    def gunicorn(workers, app):
        return python("-m", "gunicorn", f"-w{workers}", "--threads", "8", "-b", "127.0.0.1:PORT", app)

    own = "profiler:application"
    servers = {f"profiler, {name}, 2 processes": (gunicorn(2, own), url) for name, url in urls.items()}
    servers["Flask-SQLAlchemy, PostgreSQL, 2 processes"] = (gunicorn(2, "peer_flask_sqlalchemy:app"), peer)
    for workers in (1, 4):
        servers[f"profiler, PostgreSQL, {workers} processes"] = (gunicorn(workers, own), urls["PostgreSQL"])
    for title, path, seconds, rounds in (
        ("One user", "/users/4711/", 5, 3),
        (f"{COUNT:,} users listed", "/users/", 10, 1),
    ):
        rates = {who: [] for who in servers}
        for _ in range(1 if quick else rounds):
            for who, (command, database) in servers.items():
                say(f"wrk, {title}: {who}")
                with serving(command, database) as (_, port):
                    requests_per_second(port, "/users/4711/", 1)
                    rates[who].append(requests_per_second(port, path, 2 if quick and seconds == 5 else seconds))
        medians = {who: statistics.median(values) for who, values in rates.items()}
        flask = medians["Flask-SQLAlchemy, PostgreSQL, 2 processes"]
        rows = [[who, f"{rate:,.1f}", f"{rate / flask:.2f}"] for who, rate in medians.items()]
        head = ["gunicorn, 8 threads a process", "requests a second", "times Flask-SQLAlchemy's"]
        yield f"## {title} over HTTP, 16 connections\n\n" + table(head, rows)


def main():
    parser = argparse.ArgumentParser(description="Measure profiler on three engines.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ENGINES.md stays as it is")
    quick = parser.parse_args().quick
    with (
        tempfile.TemporaryDirectory() as name,
        started(PostgreSQL(fsync="on")) as postgresql,
        started(MariaDB(**{"innodb-flush-log-at-trx-commit": 1})) as mariadb,
    ):
        path = fill(pathlib.Path(name), "own", COUNT)
        urls = {"SQLite": path, "PostgreSQL": postgresql.make_database(), "MariaDB": mariadb.make_database()}
        for url in list(urls.values())[1:]:
            say(profiler_sqlalchemy.copy(path, url))
        peer = peer_table(postgresql, urls["PostgreSQL"])
        versions = f"{postgresql.execute('SHOW server_version')[0][0]} and {mariadb.execute('SELECT version()')[0][0]}"
        head = (
            f"# Results on three engines\n\nMade by `python bench/engines.py` on {datetime.date.today()}: "
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"PostgreSQL and MariaDB {versions}, on the same machine as their clients.\n"
        )
        report = [*measure_in_process(urls, peer, quick), *measure_http(urls, peer, quick)]
    text = "\n".join([head, *report])
    print(text)
    if not quick:
        (HERE / "ENGINES.md").write_text(text)


if __name__ == "__main__":
    main()
