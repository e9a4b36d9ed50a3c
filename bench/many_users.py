"""Measure searches, and what an index for them costs, on a server with many users.

    python -m pip install '.[postgresql,mysql]'
    python bench/many_users.py [--server mariadb] [--users 10000000]

The server is started here. It makes the users itself, by one statement: a million takes
about a minute. The statements that create the index are those of docs/databases.md.
"""

import argparse
import pathlib
import re
import statistics
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
import servers  # noqa: E402

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
SIZES = """
SELECT pg_size_pretty(pg_relation_size('"user"')), pg_size_pretty(pg_relation_size('user_search'))
"""
# More than psycopg executes before it prepares a statement, and PostgreSQL before it plans
# one for all parameters.
REPEATS = 12


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


def measure_searches(users, count):
    print("| searched for | limit | median ms | slowest | \n| --- | --- | --- | --- |")
    for name, text in texts(users, count).items():
        for limit in (1, 50, 1000):
            durations = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                try:
                    users.page(limit, text=text)
                except profiler_sqlalchemy.Unavailable as error:
                    print(f"| {name} | {limit} | {error} | |", flush=True)
                    break
                durations.append(1000 * (time.perf_counter() - begin))
                if sum(durations) > 20_000:
                    break
            else:
                median, slowest = statistics.median(durations), max(durations)
                print(f"| {name} | {limit} | {median:.1f} | {slowest:.1f} |", flush=True)
                continue
            if durations:
                print(f"| {name} | {limit} | {statistics.median(durations):.0f} | |", flush=True)


def measure_inserts(users, prefix, count=2000):
    begin = time.perf_counter()
    for number in range(count):
        users.insert("Anna", "Meier", f"{prefix}{number}@example.com", "x")
    return f"one insert: {1e6 * (time.perf_counter() - begin) / count:.0f} µs"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", choices=FILL, default="postgresql")
    parser.add_argument("--users", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.server == "postgresql":
        start = servers.postgresql(max_wal_size="8GB", maintenance_work_mem="1GB")
    else:
        start = servers.mariadb(**{"innodb-buffer-pool-size": "2G"})
    with start as server:
        url = server.make_database()
        database = servers.database_of(url)
        users = profiler_sqlalchemy.SQLAlchemyUsers(url)
        users.count()

        def execute(statement):
            begin = time.perf_counter()
            rows = server.execute(statement, database)
            summary = " ".join(statement.split())[:60]
            print(f"{time.perf_counter() - begin:.1f} s: {summary} {rows or ''}", flush=True)

        execute(FILL[arguments.server].format(users=arguments.users))
        execute(ANALYZE[arguments.server])
        print(measure_inserts(users, "without"))
        measure_searches(users, arguments.users)
        if arguments.server == "postgresql":
            for statement in index_statements():
                execute(statement)
            execute(SIZES)
            execute(ANALYZE["postgresql"])
            print(measure_inserts(users, "with"))
            measure_searches(users, arguments.users)
        users.close()


if __name__ == "__main__":
    main()
