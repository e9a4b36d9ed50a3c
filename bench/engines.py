"""Measure profiler on SQLite, PostgreSQL and MariaDB, next to the bare drivers and
Flask-SQLAlchemy; write ENGINES.md.

    python -m pip install '.[postgresql,mysql,test]' -r bench/requirements.txt
    python bench/engines.py [--quick]

The servers are started here, with durable commits. Loads over HTTP need wrk. Figures
are medians of rounds in which all candidates take turns.
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
from importlib.metadata import version

import run
from run import (
    HERE,
    fill,
    gets,
    in_turns,
    puts,
    python,
    request,
    requests_per_second,
    say,
    serving,
    table,
)

sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
from servers import database_of, mariadb, postgresql  # noqa: E402

import profiler_sqlalchemy  # noqa: E402

COUNT = 100_000
COLUMNS = "id, first_name, last_name, email, created_on"
FLASK = "Flask-SQLAlchemy, PostgreSQL"


def peer_table(server, url):
    """Create a database with the same users for the peer, in the table of its model;
    return the URL."""
    peer = server.make_database(f"TEMPLATE {database_of(url)}")
    for statement in (
        'ALTER TABLE "user" DROP COLUMN email_key',
        'CREATE UNIQUE INDEX ON "user" (email)',
    ):
        server.execute(statement, database_of(peer))
    server.execute('VACUUM ANALYZE "user"', database_of(peer))
    return peer


def bare(connection, table):
    """Return an application that only executes the statement of a request with the
    driver, and returns nothing.

    psycopg prepares a statement at its sixth execution; PyMySQL never does.
    """

    def application(environ, start_response):
        user_id = int(environ["PATH_INFO"].split("/")[2])
        with connection.cursor() as cursor:
            if environ["REQUEST_METHOD"] == "GET":
                cursor.execute(f"SELECT {COLUMNS} FROM {table} WHERE id = %s", (user_id,))
                cursor.fetchall()
            else:
                email = f"{user_id}.{random.random()}@b.c"
                cursor.execute(
                    f"UPDATE {table} SET first_name = %s, last_name = %s, "
                    "email = %s, email_key = %s WHERE id = %s",
                    ("F", "L", email, email, user_id),
                )
        return (b"",)

    return application


def pages(users, count):
    def templates(_):
        chosen = [random.randint(0, users - 101) for _ in range(count)]
        return [
            (dict(request("GET", "/users/")[0], QUERY_STRING=f"limit=100&after={after}"), b"")
            for after in chosen
        ]

    return templates


def measure_in_process(urls, peer, drivers, quick):
    apps = {f"profiler, {name}": profiler_sqlalchemy.create_app(url) for name, url in urls.items()}
    os.environ["PEER_DATABASE"] = peer
    import peer_flask_sqlalchemy

    apps[FLASK] = peer_flask_sqlalchemy.app
    for title, unit, scale, templates, rounds, candidates in (
        ("One user", "µs", 1e6, gets(COUNT, 50 if quick else 500), 31, {**apps, **drivers}),
        (
            "One update, committed",
            "µs",
            1e6,
            puts(COUNT, 20 if quick else 200),
            31,
            {**apps, **drivers},
        ),
        ("A page of 100", "µs", 1e6, pages(COUNT, 10 if quick else 100), 21, apps),
        (f"{COUNT:,} users listed", "ms", 1e3, lambda _: [request("GET", "/users/")], 3, apps),
    ):
        say(title)
        seconds = in_turns(candidates, templates, 2 if quick else rounds)
        first = seconds["profiler, SQLite"]
        rows = [[who, f"{s * scale:,.0f}", f"{s / first:.1f}"] for who, s in seconds.items()]
        yield f"## {title}, in process\n\n" + table(["", unit, "times SQLite's"], rows)
        if candidates is not apps:
            ratio = seconds["profiler, PostgreSQL"] / seconds["psycopg, one statement"]
            yield f"On PostgreSQL, profiler takes {ratio:.2f} times the bare driver's statement.\n"
    rows = []
    for who, app in apps.items():
        say(f"memory of the list: {who}")
        run.call(app, request("GET", "/users/?limit=1"))
        tracemalloc.start()
        run.call(app, request("GET", "/users/"))
        rows.append([who, f"{tracemalloc.get_traced_memory()[1] / 2**20:.1f} MB"])
        tracemalloc.stop()
    yield f"## Memory while {COUNT:,} users are listed\n\n" + table(
        ["", "peak of Python's memory"], rows
    )
    for app in apps.values():
        if hasattr(app, "close"):
            app.close()


def measure_http(urls, peer, quick):
    def gunicorn(workers, app):
        return python(
            "-m", "gunicorn", f"-w{workers}", "--threads", "8", "-b", "127.0.0.1:PORT", app
        )

    own, flask = "profiler_sqlalchemy:application", "peer_flask_sqlalchemy:app"
    servers = {
        f"profiler, {name}, 2 processes": (gunicorn(2, own), url) for name, url in urls.items()
    }
    servers[f"{FLASK}, 2 processes"] = (gunicorn(2, flask), peer)
    for workers in (1, 4):
        servers[f"profiler, PostgreSQL, {workers} processes"] = (
            gunicorn(workers, own),
            urls["PostgreSQL"],
        )
        servers[f"{FLASK}, {workers} processes"] = (gunicorn(workers, flask), peer)
    for title, path, seconds, rounds in (
        ("One user", "/users/4711/", 5, 3),
        # Long enough for a peer to finish some, also on a machine that does other work.
        (f"{COUNT:,} users listed", "/users/", 30, 1),
    ):
        rates = {who: [] for who in servers}
        for _ in range(1 if quick else rounds):
            for who, (command, database) in servers.items():
                say(f"wrk, {title}: {who}")
                with serving(command, database) as (_, port):
                    requests_per_second(port, "/users/4711/", 1)
                    rates[who].append(
                        requests_per_second(port, path, 2 if quick and seconds == 5 else seconds)
                    )
        medians = {who: statistics.median(values) for who, values in rates.items()}
        rows = []
        for who, rate in medians.items():
            peers_rate = medians[f"{FLASK}, {who.rpartition(', ')[2]}"]
            ratio = f"{rate / peers_rate:.2f}" if peers_rate else "the peer finished none"
            rows.append([who, f"{rate:,.1f}", ratio])
        head = [
            "gunicorn, 8 threads per process",
            "requests per second",
            "times Flask-SQLAlchemy's",
        ]
        yield f"## {title} over HTTP, 16 connections\n\n" + table(head, rows)


def main():
    parser = argparse.ArgumentParser(description="Measure profiler on three databases.")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; ENGINES.md is not written"
    )
    quick = parser.parse_args().quick
    os.environ["PROFILER_ANONYMOUS"] = "1"
    with (
        tempfile.TemporaryDirectory() as name,
        postgresql(fsync="on") as postgresql_server,
        mariadb(**{"innodb-flush-log-at-trx-commit": 1}) as mariadb_server,
        contextlib.ExitStack() as stack,
    ):
        path = fill(pathlib.Path(name), "own", COUNT)
        urls = {
            "SQLite": path,
            "PostgreSQL": postgresql_server.make_database(),
            "MariaDB": mariadb_server.make_database(),
        }
        for url in (urls["PostgreSQL"], urls["MariaDB"]):
            profiler_sqlalchemy.main(["copy", path, url])
        peer = peer_table(postgresql_server, urls["PostgreSQL"])
        postgresql_server.execute('VACUUM ANALYZE "user"', database_of(urls["PostgreSQL"]))
        drivers = {}
        for who, server, url in (
            ("psycopg, one statement", postgresql_server, urls["PostgreSQL"]),
            ("PyMySQL, one statement", mariadb_server, urls["MariaDB"]),
        ):
            connection = stack.enter_context(contextlib.closing(server.connect(database_of(url))))
            drivers[who] = bare(connection, server.table)
        postgresql_version = postgresql_server.execute("SHOW server_version")[0][0]
        mariadb_version = mariadb_server.execute("SELECT version()")[0][0]
        head = (
            "# Results on three databases\n\n"
            f"Made by `python bench/engines.py` on {datetime.date.today()}: "
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"PostgreSQL {postgresql_version}, MariaDB {mariadb_version}, "
            f"psycopg {version('psycopg')}, PyMySQL {version('pymysql')}, "
            "servers and clients on the same machine, whose load average was "
            f"{os.getloadavg()[0]:.1f} before.\n"
        )
        report = [
            *measure_in_process(urls, peer, drivers, quick),
            *measure_http(urls, peer, quick),
        ]
    text = "\n".join([head, *report])
    print(text)
    if not quick:
        (HERE / "ENGINES.md").write_text(text)


if __name__ == "__main__":
    main()
