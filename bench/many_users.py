"""Measure a server with many users; print a section of MANY_USERS.md.

    python -m pip install '.[postgresql,mysql]' -r bench/requirements.txt
    python bench/many_users.py [--server mariadb] [--users 10000000]

The server is started here, with durable commits. It makes the users itself, by one
statement. The statements that create the index for searches are those of
docs/databases.md.
"""

import argparse
import contextlib
import datetime
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from run import HERE, fill, say, table

sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
import servers  # noqa: E402

import profiler  # noqa: E402
import profiler_sqlalchemy  # noqa: E402

# 5,003 first names, 100,003 last names, and emails that all differ.
FILL = {
    "postgresql": """
INSERT INTO "user" (first_name, last_name, email, email_key, password, created_on)
SELECT initcap(translate(substr(md5('f' || n % 5003), 1, 7), '0123456789', 'aeiouaeiou')),
    initcap(translate(substr(md5('l' || n % 100003), 1, 9), '0123456789', 'aeiouaeiou')),
    email, email, 'pbkdf2:sha256:600000$' || repeat('0', 96),
    TIMESTAMP '2020-01-01' + n * INTERVAL '1 second'
FROM (
    SELECT n, substr(md5('e' || n), 1, 10) || n || '@'
        || (ARRAY['example.com', 'example.org', 'example.net'])[n % 3 + 1] AS email
    FROM generate_series(1, {users}) AS n
) AS made
""",
    "mariadb": """
INSERT INTO user (first_name, last_name, email, email_key, password, created_on)
SELECT substr(md5(concat('f', seq % 5003)), 1, 7), substr(md5(concat('l', seq % 100003)), 1, 9),
    concat(substr(md5(concat('e', seq)), 1, 10), seq, '@', elt(seq % 3 + 1,
        'example.com', 'example.org', 'example.net')) AS email,
    (SELECT email), concat('pbkdf2:sha256:600000$', repeat('0', 96)),
    TIMESTAMP('2020-01-01') + INTERVAL seq SECOND
FROM seq_1_to_{users}
""",
}
ANALYZE = {"postgresql": 'VACUUM ANALYZE "user"', "mariadb": "ANALYZE TABLE user"}
SIZES = "SELECT pg_relation_size('\"user\"') >> 20, pg_relation_size('user_search') >> 20"
CALLS = 2000  # of each operation but searches
# More than psycopg executes before it prepares a statement, and PostgreSQL before it plans
# one for all parameters.
SEARCHES = 12
SEARCH_TIME = 20  # seconds, after which a search is not repeated
LIST_TIME = 180  # seconds, after which the list is read no further
COPIED = 1_000_000  # users


def timed(function, *arguments, **options):
    """Return what a function returns, and the seconds it took."""
    begin = time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - begin


def index_statements():
    """Return the statements of the documentation that create the index."""
    documentation = servers.DOCUMENTATION.read_text("utf-8")
    [block] = re.findall(r"^```sql\n([^`]*pg_trgm[^`]*)```", documentation, re.MULTILINE)
    return [statement.strip() for statement in block.split(";") if statement.strip()]


def texts(users, count):
    """Return texts to search for: of nobody, of a few users, of many and of all."""
    page, _ = users.page(1, after=count - 5)
    first_name, last_name, email = re.findall(rb'"(?:first_name|last_name|email)":"(.*?)"', page)
    return {
        "nobody": "zzqqxx",
        "one of the last users": email.split(b"@")[0].decode(),
        "a last name": last_name.decode(),
        "a first name": first_name.decode(),
        "three letters": "abc",
        "every email": "example",
    }


def search(users, text, limit):
    """Return the milliseconds of a search: the median, and the slowest."""
    seconds = []
    while len(seconds) < SEARCHES and sum(seconds) < SEARCH_TIME:
        try:
            seconds.append(timed(users.page, limit, text=text)[1])
        except profiler.Unavailable:
            return "503"
    return f"{1000 * statistics.median(seconds):,.1f} ({1000 * max(seconds):,.1f})"


def measure_searches(users, chosen):
    for name, text in chosen.items():
        for limit in (1, 50, 1000):
            say(f"search for {name}, limit {limit}")
            yield search(users, text, limit)


def measure(name, operation):
    """Call an operation with numbers; return the name, the median and the slowest."""
    say(name)
    seconds = [timed(operation, number)[1] for number in range(CALLS)]
    return [name, f"{1e6 * statistics.median(seconds):,.0f}", f"{1e6 * max(seconds):,.0f}"]


def measure_operations(users, count):
    ids = random.sample(range(1, count + 1), CALLS)
    emails = [re.search(rb'"email":"(.*?)"', users.get(i))[1].decode() for i in ids]
    names = {"first_name": "Anna", "last_name": "Meier"}
    return [
        measure("get a user", lambda n: users.get(ids[n])),
        measure("find an email, as a login does", lambda n: users.find(emails[n])),
        measure("a page of 100 in the middle", lambda n: users.page(100, count // 2 + n)),
        measure("update a user", lambda n: users.update(ids[n], {**names, "email": f"{n}@b.c"})),
        measure("create a user", create(users, "before")),
    ]


def create(users, prefix):
    return lambda n: users.insert("Anna", "Meier", f"{prefix}{n}@example.com", "x")


def read_list(users):
    """Read pages until LIST_TIME is over; return how many users they had."""
    count, after, begin = 0, 0, time.monotonic()
    while after is not None and time.monotonic() < begin + LIST_TIME:
        page, after = users.page(profiler.BATCH, after)
        count += page.count(b'{"id":')
    return count


def copy(server):
    """Copy users from an SQLite file to an empty database; return the seconds."""
    say("copy")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(profiler.Users(fill(Path(folder), "source", COPIED))) as source,
        contextlib.closing(profiler_sqlalchemy.SQLAlchemyUsers(server.make_database())) as users,
    ):
        return timed(profiler_sqlalchemy.copy, source, users)[1]


def measure_server(server, name, count):
    url = server.make_database()
    users = profiler_sqlalchemy.SQLAlchemyUsers(url)
    users.count()

    def execute(statement):
        say(" ".join(statement.split())[:60])
        return timed(server.execute, statement, servers.database_of(url))

    _, seconds = execute(FILL[name].format(users=count))
    execute(ANALYZE[name])
    [(version,)] = server.execute("SELECT version()")
    yield f"## {count:,} users on {'PostgreSQL' if name == 'postgresql' else 'MariaDB'}\n"
    yield (
        f"Made by `{' '.join(['python bench/many_users.py', *sys.argv[1:]])}` on "
        f"{datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {version.partition(' on ')[0]}, server and client on the "
        f"same machine. The server made the users in {seconds:,.0f} s.\n"
    )
    operations = measure_operations(users, count)
    say("list")
    listed, seconds = timed(read_list, users)
    notes = (
        f"- The list, in pages of {profiler.BATCH}: {listed:,} users in {seconds:,.0f} s, "
        f"{listed / seconds:,.0f} per second.\n"
        f"- A copy of {COPIED:,} users from an SQLite file: {copy(server):,.0f} s.\n"
    )
    chosen = texts(users, count)
    columns = {
        "searched for": [who for who in chosen for _ in range(3)],
        "limit": ["1", "50", "1000"] * len(chosen),
        "ms without an index": list(measure_searches(users, chosen)),
    }
    if name == "postgresql":
        seconds = sum(execute(statement)[1] for statement in index_statements())
        [(of_table, of_index)], _ = execute(SIZES)
        notes += (
            f"- The index took {seconds:,.0f} s and {of_index:,} MB. The table has "
            f"{of_table:,} MB.\n"
        )
        execute(ANALYZE[name])
        operations.append(measure("create a user, with the index", create(users, "after")))
        columns["with the index"] = list(measure_searches(users, chosen))
    yield table(["in process", "median µs", "slowest"], operations)
    yield "Searches: the median, and the slowest.\n"
    yield table(columns, zip(*columns.values()))
    yield notes
    users.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", choices=FILL, default="postgresql")
    parser.add_argument("--users", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.server == "postgresql":
        start = servers.postgresql(
            fsync="on", shared_buffers="2GB", max_wal_size="8GB", maintenance_work_mem="1GB"
        )
    else:
        start = servers.mariadb(
            **{
                "innodb-buffer-pool-size": "2G",
                "innodb-log-file-size": "2G",
                "innodb-flush-log-at-trx-commit": 1,
            }
        )
    with start as server:
        for part in measure_server(server, arguments.server, arguments.users):
            print(part, flush=True)


if __name__ == "__main__":
    main()
