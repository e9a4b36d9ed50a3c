"""Users in PostgreSQL, MySQL or MariaDB, for services that outgrow one SQLite file.

    export PROFILER_DATABASE=postgresql://app@db.example/app
    python -m profiler_sqlalchemy
    gunicorn profiler_sqlalchemy:application
    python -m profiler_sqlalchemy copy db.sqlite3

This module is another storage for profiler.py, which provides the rules, the HTTP interface,
the server, the options and the commands. A database is a URL here, or the path of an SQLite
file. Responses are the same on every database, byte for byte.

It needs SQLAlchemy and a driver: pip install sqlalchemy "psycopg[binary]" for PostgreSQL,
pip install sqlalchemy pymysql for MySQL and MariaDB. docs/databases.md describes the URL,
where its password belongs, poolers and clusters.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import sqlite3
import sys
import threading
import time

import profiler
from profiler import Busy, EmailTaken, NoSuchUser, Unavailable

INSTALL = (
    'pip install sqlalchemy "psycopg[binary]" for PostgreSQL, '
    "pip install sqlalchemy pymysql for MySQL and MariaDB"
)
try:
    import sqlalchemy
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"profiler: {error}: {INSTALL}")
    raise ImportError(f"{error}: {INSTALL}") from None

TYPE_CHECKING = False  # as in profiler
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any, Callable, ClassVar, TypeVar

    from sqlalchemy import Connection, Engine

    from profiler import Guard, Steps, StrOrBytesPath

    Rows = list[Any]
    # of Failures
    Account = int | bytes
    Result = TypeVar("Result")

# -- configuration ---------------------------------------------------------------------

# SQLAlchemy's name of the driver for each scheme of a URL.
DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mysql+pymysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "mariadb+pymysql": "mysql+pymysql",
}
# Options of the drivers whose values are no text.
NO_TEXT = {"conv", "cursor_factory", "cursorclass", "prepare_threshold", "row_factory", "ssl"}
POOL_SIZE = 8  # connections of a process
# Searches read the whole table. If they could take all connections, logins would wait.
MAX_SEARCHES = 2  # connections that search at the same time

# Seconds. A request takes little more than TIMEOUT.
TIMEOUT = 10  # for a statement
LOCK_TIMEOUT = 5  # for a row that others have locked, on MySQL and MariaDB
CONNECT_TIMEOUT = 5  # to connect to a host
POOL_TIMEOUT = 2.0  # to wait for a connection of the pool
RETRY_TIME = 2.0  # from the start of a request to its last attempt
PING_AFTER = 1.0  # a connection that was idle for longer is tested before a write
GRACE = 1.0  # from TIMEOUT to the end of a connection that still waits
PAUSE = 0.1  # between attempts, at most
ATTEMPTS = 3
COPY_BATCH = 1000  # users

# An account that was left alone for this time may have all its attempts at once again. To
# wait for that allows no more guesses than to guess at every interval.
FORGET_FAILURES = int(profiler.MAX_FAILURES * profiler.ATTEMPT_INTERVAL)  # seconds
FORGET_EVERY = 100  # wrong passwords: how often old ones are deleted, on average
RETRY_FAILURES = 60.0  # seconds to count in memory before the table is tried again

# SQLSTATEs of PostgreSQL; error numbers of MySQL and MariaDB.
DUPLICATE_KEY = ("23505", 1062)
# Deadlocks, and conflicts with other transactions.
ROLLED_BACK = ("40001", "40P01", 1213, 1205)
# A prepared statement does not fit the table any more, or is gone.
STALE_STATEMENT = ("0A000", "26000", "42P05")
# The server has become a standby.
READ_ONLY = ("25006", 1290, 1792, 1836)
# PostgreSQL's driver has only the message of an error while it connects.
TOO_MANY_CONNECTIONS = "too many|Too many|connection slots|max_user_connections"


# -- dialects --------------------------------------------------------------------------
# The SQL in which the databases differ.
#
# `email` is as entered, `email_key` as compared: MariaDB has no index on an expression, and
# lower() of every database depends on its locale. Both compare bytes, because other
# collations equate e and é, or all emoji. `created_on` is in UTC.
#
# profiler_failure counts wrong passwords: `account` is a SHA-256, `last` is Unix time by the
# clock of the database, because the clocks of several machines differ.


class _Dialect:
    table = '"user"'
    create_user: str
    create_profiler_failure: str
    # created_on as text, so that no stored value is outside Python's range
    created_on: str
    # A row if the table with a name exists.
    find_table = ""
    # What makes the table of users useless, or NULL.
    find_problem = ""
    # The condition that a user contains a text.
    contains = ""
    # Options of the method that executes a search.
    search_options: ClassVar[Mapping[str, bool]] = {}
    # How an INSERT returns the id.
    returning = ""
    # How an INSERT leaves a row that exists.
    on_duplicate = ""
    # the time in UTC, without fractions of a second; and Unix time
    now = ""
    unix_time = ""

    # for copies
    text = "TEXT"
    insert = """
INSERT INTO "user" (id, first_name, last_name, email, email_key, password, created_on)
VALUES (:id, :first_name, :last_name, :email, :email_key, :password, :created_on)
"""
    # A row whose last column is or contains the highest id that was ever used.
    last_id: str
    set_last_id: str
    # The database counts the next id, not the last one.
    counts_next = False


_IS_AMBIGUOUS = "'é' = coalesce((SELECT email_key FROM {} LIMIT 0), 'e')"
_AMBIGUOUS = "email_key has a collation that equates é and e: its collation must be "


class _PostgreSQL(_Dialect):
    create_user = """
CREATE TABLE "user" (
    id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    first_name VARCHAR(255) NOT NULL,
    last_name VARCHAR(255) NOT NULL,
    email VARCHAR(254) NOT NULL,
    email_key VARCHAR(254) COLLATE "C" NOT NULL UNIQUE,
    password TEXT NOT NULL,
    created_on TIMESTAMP NOT NULL
)
"""
    create_profiler_failure = """
CREATE TABLE profiler_failure (
    account CHAR(64) COLLATE "C" PRIMARY KEY,
    count BIGINT NOT NULL,
    last DOUBLE PRECISION NOT NULL
)
"""
    # JSON has the ISO format whatever DateStyle is.
    created_on = "replace(to_jsonb(date_trunc('second', created_on)) #>> '{}', 'T', ' ')"
    find_table = "SELECT 1 WHERE to_regclass(%s) IS NOT NULL"
    find_problem = f"""
SELECT CASE
    WHEN pg_typeof((SELECT id FROM "user" LIMIT 0))::text NOT IN ('smallint', 'integer', 'bigint')
        THEN 'the ids are no integers: the type of id must be bigint'
    WHEN pg_typeof((SELECT created_on FROM "user" LIMIT 0)) <> 'timestamp'::regtype
        THEN 'the type of created_on must be timestamp without time zone'
    WHEN {_IS_AMBIGUOUS.format('"user"')} THEN '{_AMBIGUOUS}"C"'
    WHEN EXISTS (
        SELECT FROM pg_class WHERE oid = to_regclass('"user"') AND relkind IN ('r', 'p')
    ) AND NOT EXISTS (
        SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE indrelid = to_regclass('"user"') AND attname = 'email_key' AND indnkeyatts = 1
            AND indisunique AND indisvalid AND indpred IS NULL
    ) THEN 'email_key has no unique index'
END
"""
    contains = """
(first_name COLLATE "C" ILIKE %(pattern)s ESCAPE '!'
    OR last_name COLLATE "C" ILIKE %(pattern)s ESCAPE '!'
    OR email COLLATE "C" ILIKE %(pattern)s ESCAPE '!')
"""
    # A prepared statement has one plan for all texts, which uses no index.
    search_options: ClassVar = {"prepare": False}
    returning = "RETURNING id"
    on_duplicate = "ON CONFLICT DO NOTHING"
    now = "date_trunc('second', now() AT TIME ZONE 'UTC')"
    unix_time = "extract(epoch FROM now())::float8"
    last_id = """
SELECT last_value FROM pg_sequences
WHERE format('%I.%I', schemaname, sequencename) = pg_get_serial_sequence('"user"', 'id')
"""
    set_last_id = "SELECT setval(pg_get_serial_sequence('\"user\"', 'id'), {})"


class _MySQL(_Dialect):
    table = "user"
    create_user = """
CREATE TABLE user (
    id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    first_name VARCHAR(255) NOT NULL,
    last_name VARCHAR(255) NOT NULL,
    email VARCHAR(254) NOT NULL,
    email_key VARCHAR(254) NOT NULL UNIQUE,
    password TEXT NOT NULL,
    created_on DATETIME NOT NULL
) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
"""
    create_profiler_failure = """
CREATE TABLE profiler_failure (
    account CHAR(64) NOT NULL PRIMARY KEY,
    count BIGINT NOT NULL,
    last DOUBLE NOT NULL
) ENGINE=InnoDB CHARACTER SET ascii COLLATE ascii_bin
"""
    created_on = "LEFT(created_on, 19)"
    find_table = "SHOW TABLES LIKE %s"
    find_problem = f"""
SELECT CASE
    WHEN NOT EXISTS (
        SELECT 1 FROM information_schema.columns WHERE table_schema = database()
            AND table_name = 'user' AND column_name = 'id' AND data_type LIKE '%int'
    ) THEN 'the ids are no integers: the type of id must be bigint'
    WHEN {_IS_AMBIGUOUS.format("user")} THEN '{_AMBIGUOUS}utf8mb4_bin'
    WHEN EXISTS (
        SELECT 1 FROM information_schema.tables JOIN information_schema.engines USING (engine)
        WHERE table_schema = database() AND table_name = 'user' AND transactions <> 'YES'
    ) THEN 'its storage engine has no transactions: the engine must be InnoDB'
    WHEN EXISTS (
        SELECT 1 FROM information_schema.tables WHERE table_schema = database()
            AND table_name = 'user' AND table_type = 'BASE TABLE'
    ) AND NOT EXISTS (
        SELECT 1 FROM information_schema.statistics
        WHERE table_schema = database() AND table_name = 'user'
        GROUP BY index_name HAVING count(*) = 1 AND max(non_unique) = 0
            AND max(column_name) = 'email_key' AND max(sub_part) IS NULL
    ) THEN 'email_key has no unique index'
END
"""
    contains = """
(LOWER(first_name) LIKE LOWER(%(pattern)s) ESCAPE '!'
    OR LOWER(last_name) LIKE LOWER(%(pattern)s) ESCAPE '!'
    OR LOWER(email) LIKE LOWER(%(pattern)s) ESCAPE '!')
"""
    on_duplicate = "ON DUPLICATE KEY UPDATE account = account"
    now = "utc_timestamp()"
    # unix_timestamp() depends on the time zone, in which an hour may occur twice.
    unix_time = "(timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) / 1e6)"
    text = "CHAR"
    insert = _Dialect.insert.replace('"', "")
    last_id = "SHOW CREATE TABLE user"
    set_last_id = "ALTER TABLE user AUTO_INCREMENT = {}"
    counts_next = True


class _SQLite(_Dialect):
    """For copies only."""

    created_on = "CAST(created_on AS TEXT)"
    insert = """
INSERT INTO "user" (id, first_name, last_name, email, password, created_on)
VALUES (:id, :first_name, :last_name, :email, :password, :created_on)
"""
    last_id = "SELECT seq FROM sqlite_sequence WHERE name = 'user'"
    set_last_id = """
DELETE FROM sqlite_sequence WHERE name = 'user';
INSERT INTO sqlite_sequence VALUES ('user', {})
"""


_DIALECTS = {"postgresql": _PostgreSQL, "mysql": _MySQL, "sqlite": _SQLite}


def _to_json(rows: Sequence[Any]) -> bytes:
    """Return users as JSON objects, separated by commas.

    An encoder with a dict for each takes twice as long.
    """
    quote = json.encoder.encode_basestring
    return ",".join(
        f'{{"id":{user_id},"first_name":{quote(first_name)},"last_name":{quote(last_name)},'
        f'"email":{quote(email)},"created_on":{quote(created_on)}}}'
        for user_id, first_name, last_name, email, created_on in rows
    ).encode()


# -- connections -----------------------------------------------------------------------
# Theory of operation: the threads of a process share a pool of connections, which are in
# autocommit mode. Every operation is one statement, except for writes with a precondition:
# they lock the row in a transaction. Statements are executed by the driver's own cursor,
# because SQLAlchemy's takes longer than the database does.
#
# A connection may have broken while it was idle. A read is simply repeated on another one.
# A write is not repeated if its connection broke, because it may have been committed.
# Therefore a connection that was idle is tested before a write. After a fork, the child
# abandons the connections of its parent.


def _parse_url(text: str) -> URL:
    """Return the URL, with SQLAlchemy's name of the driver.

    Raise ValueError. The message contains no part of the URL that may be a password.
    """
    try:
        url = make_url(text.strip())
    except (ArgumentError, ValueError):
        raise ValueError(
            "invalid database URL: write it as postgresql://user:password@host:5432/name, with "
            "%40 for @ and %2F for / in the password, or with several hosts as "
            "postgresql://user:password@/name?host=a,b&port=5432,5432"
        ) from None
    if url.drivername not in DRIVERS:
        raise ValueError(
            f"{url.drivername}:// is not supported: use a path, or a URL that starts with "
            "postgresql://, mysql:// or mariadb://"
        )
    for name in NO_TEXT.intersection(url.query):
        hint = ": write ssl_ca=FILE" if name == "ssl" else ""
        raise ValueError(f"the option {name} cannot be set in a URL{hint}")
    return url.set(drivername=DRIVERS[url.drivername])


def _list_hosts(url: URL) -> str:
    """Return the hosts in the query of a URL, separated by commas."""
    return ",".join(url.normalized_query.get("host", ()))


def _describe(url: URL) -> str:
    """Return the URL for people, without its password and its query, which may contain one."""
    backend = url.get_backend_name()
    location = str(URL.create(backend, url.username, None, url.host, url.port, url.database))
    hosts = _list_hosts(url)
    return f"{location} on {hosts}" if hosts else location


def _add_options(url: URL) -> URL:
    """Return the URL with our options of the driver. Those in the URL take precedence."""
    if url.get_backend_name() == "mysql":
        # The server ends a statement when its client gives up.
        patience = str(url.query.get("read_timeout"))
        timeout = int(patience) if profiler.DIGITS.fullmatch(patience) else TIMEOUT
        # Without a strict mode, MySQL truncates what is too long. Each of MySQL and MariaDB
        # refuses the other's variable of a timeout. MariaDB executes the first comment,
        # MySQL the second.
        options = (
            f"connect_timeout={CONNECT_TIMEOUT}&read_timeout={TIMEOUT}&write_timeout={TIMEOUT}"
            "&charset=utf8mb4&init_command=SET SESSION sql_mode='TRADITIONAL'"
            f", innodb_lock_wait_timeout={LOCK_TIMEOUT}"
            f" /*M!100108 , max_statement_time={timeout} */"
            f" /*!50708 , max_execution_time={timeout * 1000} */"
        )
    else:
        # for each host; libpq's minimum is 2
        timeout = max(2, min(CONNECT_TIMEOUT, TIMEOUT // (_list_hosts(url).count(",") + 1)))
        options = (
            f"connect_timeout={timeout}&keepalives_idle=5&keepalives_interval=2&keepalives_count=3"
            f"&tcp_user_timeout={TIMEOUT * 1000}&application_name=profiler&client_encoding=utf8"
        )
    return url.set(query={**make_url(f"x://?{options}").query, **url.query})


def _create_engine(url: URL) -> Engine:
    """Return an engine, which connects on first use. Raise ValueError without a driver."""
    backend = url.get_backend_name()
    # As bytes, because PyMySQL encodes text as Latin-1.
    password = str(url.query.get("password", url.password or "")).encode()
    try:
        engine = sqlalchemy.create_engine(
            _add_options(url),
            connect_args={"password": password} if backend == "mysql" else {},
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            pool_use_lifo=True,
        )
    except ImportError as error:
        raise ValueError(f"{error}: {INSTALL}") from None

    def prepare(connection: Any, record: Any) -> None:
        now = time.monotonic()
        record.info.update(opened=now, used=now, cursor=connection.cursor())
        if backend == "postgresql":
            _prepare_psycopg(connection, record.info, "options" not in url.query)

    sqlalchemy.event.listen(engine, "connect", prepare)
    return engine


def _limit_waiting(connection: Any, info: dict[str, Any]) -> None:
    """Close a connection that waits beyond the deadline in `info`.

    psycopg has no timeout for reading. The server's ends no statement while the server
    hangs. psycopg's method `wait` runs a generator: it yields what it waits for, and
    receives whether that is ready, at least every 0.1 seconds.
    """
    from psycopg import OperationalError

    info["deadline"] = time.monotonic() + CONNECT_TIMEOUT
    wait = connection.wait

    def limited(steps: Steps) -> Steps:
        try:
            wanted = next(steps)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > info["deadline"]:
                    connection.close()
                    raise OperationalError("the server does not answer")
                wanted = steps.send(ready)
        except StopIteration as end:
            return end.value

    connection.wait = lambda steps: wait(limited(steps))


def _prepare_psycopg(connection: Any, info: dict[str, Any], set_timeout: bool) -> None:
    """Prepare a new connection. Raise Unavailable if the database cannot store all characters."""
    _limit_waiting(connection, info)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise Unavailable(
            f"the encoding of the database is {encoding}: create one with ENCODING 'UTF8'"
        )
    pid = connection.execute("SELECT pg_backend_pid()").fetchone()[0]
    if pid != connection.info.backend_pid:
        # There is a pooler. Its clients may share a session, and with it the names of
        # prepared statements: a statement would execute another client's. Settings
        # would apply to others, too.
        connection.prepare_threshold = None
    elif set_timeout:
        connection.execute(f"SET statement_timeout = '{TIMEOUT}s'")


def _fetch(cursor: Any, statement: str, parameters: Any = (), **options: Any) -> Any:
    """Execute a SELECT. Return its rows."""
    cursor.execute(statement, parameters, **options)
    return cursor.fetchall()


def _change(cursor: Any, statement: str, parameters: Any = ()) -> int:
    """Execute a statement. Return the number of rows that it has found."""
    cursor.execute(statement, parameters)
    return int(cursor.rowcount)


def _code(error: BaseException | None) -> object:
    """Return the error number of MySQL or MariaDB, or the SQLSTATE of PostgreSQL.

    PyMySQL's errors have a SQLSTATE, too, but it says less than the number.
    """
    number = error.args[0] if error and error.args else None
    return number if isinstance(number, int) else getattr(error, "sqlstate", None)


def _message(error: BaseException) -> str:
    """Return the driver's message in one line, without values, which may be an email."""
    error = getattr(error, "orig", None) or error
    # The messages of these quote a value, or a line of a file, which may be a password.
    if isinstance(error, (UnicodeError, configparser.Error)):
        return (
            "an option in the URL cannot be sent, or the file in read_default_file is malformed: "
            "it needs a section [client]"
        )
    text = getattr(getattr(error, "diag", None), "message_primary", None) or str(error)
    return re.sub("entry '.*' for", "entry for", " ".join(text.split()))


# -- users -----------------------------------------------------------------------------


def _fold(email: str) -> str:
    """Return an email with its ASCII letters in lower case, as SQLite's NOCASE compares it."""
    return email.encode().lower().decode()


class SQLAlchemyUsers:
    """The users in one database of a server: a profiler.Storage.

    Threads and, after a fork, processes may share the object.
    """

    # Any read may have to wait for the server.
    short_reads_may_wait = True

    def __init__(self, url: str) -> None:
        """Store the URL. Nothing is connected yet. Raise ValueError."""
        parsed = _parse_url(url)
        self.location = _describe(parsed)
        self._engine = _create_engine(parsed)
        self._dialect = _DIALECTS[self._engine.dialect.name]
        self._driver = self._engine.dialect.loaded_dbapi
        self._columns = f"id, first_name, last_name, email, {self._dialect.created_on}"
        self._get = f"SELECT {self._columns} FROM {self._dialect.table} WHERE id = %s"
        # The tables that are known to exist.
        self._tables: set[str] = set()
        # Connections that were opened before this time are replaced.
        self._replace_before = 0.0
        self.failures: profiler.Failures = SharedFailures(self)
        self._searches = profiler.CapacityLimiter("other searches", POOL_TIMEOUT, MAX_SEARCHES)
        self._places = profiler.CapacityLimiter(
            "a connection to the database", POOL_TIMEOUT, POOL_SIZE
        )
        profiler.register_for_forks(self)

    def find_credentials(self, key: int | str) -> tuple[int, str] | None:
        """See profiler.Storage."""
        column, value = ("id", key) if isinstance(key, int) else ("email_key", _fold(key))
        statement = f"SELECT id, password FROM {self._dialect.table} WHERE {column} = %s"
        rows = self._read(statement, (value,))
        return rows[0] if rows else None

    def get(self, user_id: int) -> bytes:
        """See profiler.Storage."""
        rows = self._read(self._get, (user_id,))
        if not rows:
            raise NoSuchUser
        return _to_json(rows)

    def page(
        self,
        limit: int,
        after: int | None = None,
        descending: bool = False,
        email: str | None = None,
        text: str = "",
    ) -> tuple[bytes, int | None]:
        """See profiler.Storage."""
        conditions = ["TRUE"]
        # One more row tells whether there are more.
        read_limit = limit + 1
        if after is not None:
            conditions.append("id < %(after)s" if descending else "id > %(after)s")
        if email is not None:
            conditions.append("email_key = %(email_key)s")
        if text:
            conditions.append(self._dialect.contains)
            # If few rows are wanted, PostgreSQL reads all users in the order of their ids,
            # and ignores an index for searches.
            read_limit = max(read_limit, profiler.BATCH)
        parameters = {
            "after": after,
            "email_key": _fold(email or ""),
            "pattern": "%" + re.sub("([!%_])", r"!\1", text) + "%",
            "limit": read_limit,
        }
        statement = f"""
SELECT {self._columns} FROM {self._dialect.table} WHERE {" AND ".join(conditions)}
ORDER BY id {"DESC" if descending else "ASC"} LIMIT %(limit)s
"""
        rows = self._search(statement, parameters) if text else self._read(statement, parameters)
        return _to_json(rows[:limit]), rows[limit - 1][0] if len(rows) > limit else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """See profiler.Storage."""
        values = (first_name, last_name, email, _fold(email), password_hash)
        statement = f"""
INSERT INTO {self._dialect.table} (first_name, last_name, email, email_key, password, created_on)
VALUES (%s, %s, %s, %s, %s, {self._dialect.now}) {self._dialect.returning}
"""

        def operation(cursor: Any) -> int:
            cursor.execute(statement, values)
            return int(cursor.fetchone()[0] if self._dialect.returning else cursor.lastrowid)

        with self._email_taken(email):
            return self._run(operation)

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """See profiler.Storage."""
        columns = dict(fields)
        if "email" in fields:
            columns["email_key"] = _fold(fields["email"])
        assignments = ", ".join(f"{name} = %s" for name in columns) or "id = id"
        statement = f"UPDATE {self._dialect.table} SET {assignments} WHERE id = %s"
        with self._email_taken(fields.get("email"), user_id):
            if not self._write(statement, (*columns.values(), user_id), user_id, guard):
                raise NoSuchUser

    def delete(self, user_id: int, guard: Guard | None = None) -> None:
        """See profiler.Storage."""
        self._write(f"DELETE FROM {self._dialect.table} WHERE id = %s", (user_id,), user_id, guard)

    def replace_password_hash(
        self, user_id: int, expected: str | None, new: str, guard: Guard | None = None
    ) -> bool:
        """See profiler.Storage."""
        statement = f"""
UPDATE {self._dialect.table} SET password = %s
WHERE id = %s AND coalesce(password, '') = coalesce(%s, password, '')
"""
        return self._write(statement, (new, user_id, expected), user_id, guard) > 0

    def count(self) -> int:
        """See profiler.Storage."""
        return int(self._read(f"SELECT count(*) FROM {self._dialect.table}")[0][0])

    def ping(self) -> None:
        """See profiler.Storage."""
        self._read(
            f"SELECT {self._columns}, email_key, password FROM {self._dialect.table} LIMIT 1"
        )
        [(problem,)] = self._read(self._dialect.find_problem, None)
        if problem:
            raise Unavailable(f"the table of users cannot be served: {problem}")

    def initialise(self, force: bool = False) -> bool:
        """See profiler.Storage."""
        created = self._create_table()
        if not force and (count := self.count()):
            raise FileExistsError(f"the table holds users ({count}): --force deletes them")
        if force and not created:
            # Ids begin at 1 again, so wrong passwords are forgotten, too.
            drop = f"DROP TABLE IF EXISTS {self._dialect.table}, profiler_failure"
            self._repeat(lambda cursor: cursor.execute(drop))
            self._tables.clear()
            self._create_table()
        return created or force

    def backup(self, path: str) -> None:
        """Raise OSError: the server has its own program for that."""
        raise OSError(
            "a database server has its own program for that: use pg_dump, mariadb-dump or "
            "mysqldump"
        )

    def close(self) -> None:
        """Close this process's connections, those in use once they are returned.

        The next use opens new ones.
        """
        self._replace_before = time.monotonic()
        self._engine.dispose()

    def after_fork_in_child(self) -> None:
        """Start without connections. Those of the parent are not closed."""
        self._engine.dispose(close=False)

    def _exists(self, table: str = "user") -> bool:
        """Return True if a table exists."""
        find_table = self._dialect.find_table
        return bool(self._repeat(lambda cursor: _fetch(cursor, find_table, (table,)), True))

    def _create_table(self, table: str = "user") -> bool:
        """Create a table if it does not exist. Return True if it was created."""
        statement = getattr(self._dialect, f"create_{table}")
        attempt = 1
        while not self._exists(table):
            try:
                self._repeat(lambda cursor: cursor.execute(statement))
                return True
            except Unavailable:
                # Another process may have created it at the same moment, which databases
                # report in many ways.
                if attempt == ATTEMPTS:
                    raise
            attempt += 1
            time.sleep(PAUSE)
        return False

    @contextlib.contextmanager
    def _email_taken(self, email: str | None, user_id: int = 0) -> Iterator[None]:
        """Raise EmailTaken for a duplicate key in the block, if another user has the email.

        The duplicate may also be an id, or the key of an index that the operator has added.
        """
        try:
            yield
        except Unavailable as error:
            if email and _code(error.__cause__) in DUPLICATE_KEY:
                owner = self.find_credentials(email)
                if owner and owner[0] != user_id:
                    raise EmailTaken from None
            raise

    def _read(self, statement: str, parameters: Any = (), **options: Any) -> Any:
        """Return the rows of a SELECT."""
        return self._run(lambda cursor: _fetch(cursor, statement, parameters, **options), True)

    def _search(self, statement: str, parameters: Any) -> Any:
        """Return the rows of a SELECT that may take long. Raise Busy."""
        with self._searches:
            return self._read(statement, parameters, **self._dialect.search_options)

    def _write(self, statement: str, parameters: Any, user_id: int, guard: Guard | None) -> int:
        """Return how many rows a statement has found. Raise what the guard raises.

        The guard sees the user first. Nobody can change the user before the statement does.
        """

        def operation(cursor: Any) -> int:
            if guard is None:
                return _change(cursor, statement, parameters)
            cursor.execute("BEGIN")
            try:
                rows = _fetch(cursor, f"{self._get} FOR UPDATE", (user_id,))
                guard(_to_json(rows) if rows else None)
                count = _change(cursor, statement, parameters)
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")
            return count

        return self._run(operation)

    def _run(
        self, operation: Callable[[Any], Result], is_read: bool = False, table: str = "user"
    ) -> Result:
        """Return what an operation returns, once there is a table. Raise Busy, Unavailable."""
        if table not in self._tables:
            self._create_table(table)
            self._tables.add(table)
        with self._places:
            return self._repeat(operation, is_read)

    def _repeat(self, operation: Callable[[Any], Result], is_read: bool = False) -> Result:
        """Return what an operation returns. Attempt it again if that is safe."""
        start, attempt = time.monotonic(), 1
        while True:
            connection = self._check_out(start, is_read)
            try:
                result = operation(connection.info["cursor"])
                if not is_read and self._dialect.returning:
                    # pgpool in raw mode has begun a transaction. Otherwise there is none,
                    # and psycopg sends nothing.
                    connection.commit()
                return result
            except self._driver.Error as error:
                may_repeat = self._handle(connection, error, is_read)
                if not may_repeat or attempt == ATTEMPTS or time.monotonic() > start + RETRY_TIME:
                    kind = Busy if _code(error) in ROLLED_BACK else Unavailable
                    raise kind(_message(error)) from error
            except Exception:
                raise
            except BaseException:
                # The response to the statement may be unread.
                connection.invalidate()
                raise
            finally:
                self._check_in(connection)
            attempt += 1
            # At random, or two transactions might meet again.
            time.sleep(random.uniform(0, PAUSE))  # noqa: S311

    def _handle(self, connection: Any, error: Any, is_read: bool) -> bool:
        """Replace connections that are useless after an error.

        Return True if it is safe to repeat what failed.
        """
        code = _code(error)
        is_lost = self._engine.dialect.is_disconnect(error, connection.dbapi_connection, None)
        # Connections of the same age have the same fault.
        if is_lost or code in READ_ONLY + STALE_STATEMENT:
            self._replace_before = time.monotonic()
        return code in ROLLED_BACK + STALE_STATEMENT or (is_lost and is_read)

    def _check_out(self, start: float, is_read: bool) -> Any:
        """Return a connection of the pool. Raise Unavailable."""
        while True:
            pool: Any = self._engine.pool
            try:
                connection = pool.connect()
            # Drivers raise a TypeError for an unknown option, among others.
            except Exception as error:
                message = _message(error)
                # If the server allows no more connections, but the pool has some (its
                # overflow counts from -POOL_SIZE), wait for one of these. Then let fewer
                # threads use one, for a while.
                if not (
                    pool.overflow() > -POOL_SIZE
                    and re.search(TOO_MANY_CONNECTIONS, message)
                    and self._places.enter_within(max(0, start + POOL_TIMEOUT - time.monotonic()))
                ):
                    raise Unavailable(message) from None
                timer = threading.Timer(RETRY_TIME, self._places.leave)
                timer.daemon = True
                timer.start()
                continue
            connection.info["deadline"] = start + TIMEOUT + GRACE
            if self._is_usable(connection, is_read):
                return connection
            connection.invalidate()
            if time.monotonic() > start + RETRY_TIME:
                raise Unavailable("the server does not answer")

    def _is_usable(self, connection: Any, is_read: bool) -> bool:
        """Return True if a connection of the pool may be used. If necessary, test it."""
        if connection.info["opened"] < self._replace_before:
            return False
        if is_read or time.monotonic() < connection.info["used"] + PING_AFTER:
            return True
        with contextlib.suppress(self._driver.Error):
            self._engine.dialect.do_ping(connection.dbapi_connection)
            return True
        return False

    def _check_in(self, connection: Any) -> None:
        """Return a connection to the pool, or close it if it is to be replaced."""
        if connection.is_valid:
            connection.info["used"] = time.monotonic()
            if connection.info["opened"] < self._replace_before:
                connection.invalidate()
        connection.close()


# -- wrong passwords -------------------------------------------------------------------


class SharedFailures(profiler.Failures):
    """Counts wrong passwords in a table, for all processes and machines.

    It counts in memory, too. While the table cannot be used, that count is the one that
    limits.
    """

    def __init__(self, users: SQLAlchemyUsers) -> None:
        super().__init__()
        self._users = users
        # Before this time, the table is not used.
        self._retry_at = 0.0
        now = users._dialect.unix_time
        oldest = f"{now} - {FORGET_FAILURES}"
        # After a failover, the clock may be behind.
        self._select = f"""
SELECT count, greatest(0, {now} - last) FROM profiler_failure
WHERE account = %s AND last > {oldest}
"""
        self._insert = f"""
INSERT INTO profiler_failure (account, count, last) VALUES (%s, 0, {now})
{users._dialect.on_duplicate}
"""
        # MySQL assigns from left to right.
        self._update = f"""
UPDATE profiler_failure
SET count = CASE WHEN last > {oldest} THEN count + 1 ELSE 1 END, last = {now}
WHERE account = %s
    AND (count < {profiler.MAX_FAILURES} OR last <= {now} - {profiler.ATTEMPT_INTERVAL})
"""
        self._forget = f"DELETE FROM profiler_failure WHERE account <> %s AND last < {oldest}"

    def check_early(self, account: Account) -> None:
        """Ask the table only if this process knows of wrong passwords.

        So an attempt costs one statement, and two after a wrong password.
        """
        if account in self._counts:
            self.check(account)

    def check(self, account: Account) -> int:
        """See profiler.Failures."""
        rows = self._try(_fetch, self._select, account)
        if rows is None:
            return super().check(account)
        if not rows:
            return 0
        [(count, elapsed)] = rows
        profiler.check_failure_count(count, elapsed)
        return int(count)

    def add(self, account: Account) -> None:
        """See profiler.Failures."""
        if random.randrange(FORGET_EVERY) == 0:  # noqa: S311
            self._try(_change, self._forget, account)
        self._try(_change, self._insert, account)
        counted = self._try(_change, self._update, account)
        try:
            super().add(account)
        except profiler.TooManyAttempts:
            if counted is None:
                raise
        if counted == 0:
            self.check(account)

    def clear(self, account: Account) -> None:
        """See profiler.Failures."""
        super().clear(account)
        self._try(_change, "DELETE FROM profiler_failure WHERE account = %s", account)

    def _try(self, execute: Any, statement: str, account: Account, *parameters: object) -> Any:
        """Return what a function returns for a statement, or None if there is no table to use."""
        if time.monotonic() < self._retry_at:
            return None
        key = hashlib.sha256(repr(account).encode()).hexdigest()
        try:
            return self._users._run(
                lambda cursor: execute(cursor, statement, (key, *parameters)),
                table="profiler_failure",
            )
        except Unavailable as error:
            self._users._tables.discard("profiler_failure")
            if not self._retry_at:
                logging.getLogger("profiler").warning(
                    "profiler: each process counts wrong passwords by itself: %s", error
                )
            self._retry_at = time.monotonic() + RETRY_FAILURES
            return None


# -- application and command line ------------------------------------------------------


def create_app(
    database: StrOrBytesPath | None = None,
    *,
    iterations: int | None = None,
    token: str | None = None,
    anonymous: bool | None = None,
) -> profiler.Application:
    """Return a WSGI application, as profiler.create_app does.

    :param database: a URL or a path; default: PROFILER_DATABASE, or else ./db.sqlite3
    :raises ValueError: for an invalid setting
    """
    users = open_database(database)
    return profiler.Application(profiler.Accounts(users, iterations), token, anonymous)


application = app = profiler.create_on_first_use(create_app)


def open_database(database: StrOrBytesPath | None = None) -> profiler.Storage:
    """Return the users in a database. Nothing is opened yet. Raise ValueError.

    :param database: a URL or a path; default: PROFILER_DATABASE, or else ./db.sqlite3
    """
    location = os.fsdecode(database or "")
    if database is None:
        location = os.environ.get("PROFILER_DATABASE", "")
    # A URL without its slashes is no path: messages show paths, and would show its password.
    if re.match(r"\s*(postgres|mysql|mariadb)[\w+]*:|.*://", location):
        return SQLAlchemyUsers(location)
    return profiler.Users(database)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, by default that of sys.argv.

    Exit with 2 for an invalid setting, with 1 for a failure.
    """
    # It reports a lost connection, too.
    logging.getLogger("psycopg").disabled = True
    database = "a path, or a URL of PostgreSQL, MySQL or MariaDB"
    parser, commands = profiler.make_parser("profiler-sqlalchemy", database)
    command = commands.add_parser(
        "copy", help="copy all users to another database", allow_abbrev=False
    )
    command.add_argument("source", metavar="SOURCE", help=database)
    command.add_argument(
        "target", metavar="TARGET", nargs="?", help="one without users (default: --database)"
    )
    command.set_defaults(run=_run_copy)
    profiler.run_command(parser, argv, open_database)


def _run_copy(arguments: Any, users: profiler.Storage) -> None:
    try:
        target = open_database(arguments.target) if arguments.target else users
        source = open_database(arguments.source)
        with contextlib.closing(source), contextlib.closing(target):
            print(copy(source, target))
    except (ValueError, OSError, Unavailable, SQLAlchemyError, sqlite3.Error) as error:
        sys.exit(f"profiler: {_message(error).rstrip('.')}. Nothing was copied.")
    except KeyboardInterrupt:
        sys.exit("profiler: interrupted. Nothing was copied.")


# -- copying ---------------------------------------------------------------------------
# All users or none, between any two databases. Nothing else needs this section. Rows are
# read as they are served, inserted, and read from the target: a value that would be served
# differently afterwards, such as a time with a zone, is an error.

# in the order of rows
_FIELDS = ("id", "first_name", "last_name", "email", "password", "created_on")


class _Database:
    """The source or the target of a copy, in a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect = dialect = _DIALECTS[connection.dialect.name]
        # The columns are those of _FIELDS.
        self.select = f"""
SELECT id, CAST(first_name AS {dialect.text}), CAST(last_name AS {dialect.text}),
    CAST(email AS {dialect.text}), coalesce(CAST(password AS {dialect.text}), ''),
    {dialect.created_on}
FROM {dialect.table}
"""

    def execute(self, statement: str, parameters: Any = None, **options: Any) -> Any:
        """Execute a statement with parameters such as :id."""
        text = sqlalchemy.text(statement)
        return self._connection.execute(text, parameters, execution_options=options)

    def find_last_id(self) -> int:
        """Return the highest id that was ever used, perhaps by a user who was deleted since."""
        last_ids = [self.execute(f"SELECT max(id) FROM {self.dialect.table}").scalar() or 0]
        # SQLite has no table of sequences if it has no table with AUTOINCREMENT.
        with contextlib.suppress(DBAPIError):
            for row in self.execute(self.dialect.last_id):
                if match := re.search("(?:^|AUTO_INCREMENT=)([0-9]+)", str(row[-1])):
                    last_ids.append(int(match[1]) - self.dialect.counts_next)
        return max(last_ids)

    def set_last_id(self, last_id: int) -> None:
        """Make ids continue after this one."""
        statements = self.dialect.set_last_id.format(last_id + self.dialect.counts_next)
        for statement in statements.split(";") if last_id else ():
            self.execute(statement)

    def insert(self, rows: Rows) -> None:
        """Insert rows.

        Raise ValueError, which names the first user who cannot be stored; SQLAlchemyError.
        """
        users = [{**dict(zip(_FIELDS, row)), "email_key": _fold(row[3] or "")} for row in rows]
        try:
            with self._connection.begin_nested():
                self.execute(self.dialect.insert, users)
        except DBAPIError as error:
            if len(rows) == 1:
                raise ValueError(f"user {rows[0][0]}: {_message(error)}") from None
            for row in rows:
                self.insert([row])

    def check(self, rows: Rows) -> None:
        """Raise ValueError, which names the first user who is not served as in these rows."""
        statement = f"{self.select} WHERE id BETWEEN :first AND :last ORDER BY id"
        rows_by_id = {
            row[0]: row
            for row in self.execute(statement, {"first": rows[0][0], "last": rows[-1][0]})
        }
        for row in rows:
            columns = zip(_FIELDS, row, rows_by_id.get(row[0], ("",) * 6))
            changed = [name for name, old, new in columns if old != new]
            if changed:
                raise ValueError(f"user {row[0]}: the target would change {', '.join(changed)}")


def copy(source: profiler.Storage, target: profiler.Storage) -> str:
    """Copy all users, with ids, password hashes and times, or none. Return a sentence about it.

    Raise ValueError if the target holds users or cannot store one; OSError, Unavailable,
    SQLAlchemyError, sqlite3.Error.
    """
    if source.location == target.location:
        raise ValueError(f"{target.location} is both source and target")
    if isinstance(source, SQLAlchemyUsers):
        exists = source._exists()
    else:
        exists = os.path.exists(source.location)
    if not exists:
        raise FileNotFoundError(f"{source.location} does not exist, or has no table of users")
    if count := target.count():
        raise ValueError(
            f"{target.location} holds users already ({count}): choose a target without any"
        )
    with _connect(source) as old, _connect(target) as new:
        # First, because MySQL's ALTER TABLE commits what precedes it.
        new.set_last_id(max(old.find_last_id(), new.find_last_id()))
        copied = 0
        result = old.execute(f"{old.select} ORDER BY id", yield_per=COPY_BATCH)
        with contextlib.closing(result):
            for batch in result.partitions(COPY_BATCH):
                rows = [tuple(row) for row in batch]
                new.insert(rows)
                new.check(rows)
                copied += len(rows)
        if copied != source.count():
            raise ValueError(
                f"{source.location} has changed meanwhile: stop the service, and copy again"
            )
    return f"Copied all users ({copied}) from {source.location} to {target.location}."


@contextlib.contextmanager
def _connect(users: profiler.Storage) -> Iterator[_Database]:
    """Open a transaction. Commit at the end of the block, roll back if it raises."""
    if isinstance(users, SQLAlchemyUsers):
        engine: Engine = users._engine.execution_options(isolation_level="REPEATABLE READ")
    else:
        engine = sqlalchemy.create_engine(URL.create("sqlite", database=users.location))
    with engine.connect() as connection, connection.begin():
        connection.info["deadline"] = float("inf")
        if engine.name == "sqlite":
            sqlite: Any = connection.connection
            sqlite.text_factory = lambda text: text.decode("utf-8", "replace")
            connection.exec_driver_sql("BEGIN")
        yield _Database(connection)
    engine.dispose()


if __name__ == "__main__":
    main()
