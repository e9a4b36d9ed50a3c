"""Users in PostgreSQL, MySQL or MariaDB, for services that outgrow one SQLite file: a
storage of profiler.

    gunicorn profiler_sqlalchemy:application
    python -m profiler_sqlalchemy --database postgresql://app:secret@db.example/app
    python -m profiler_sqlalchemy copy db.sqlite3 mysql://app@127.0.0.1/app

It has the options, commands and environment variables of profiler, which provides the
rules, the HTTP interface and the server; here, a database is a URL or a path. Responses
are the same on every database, byte for byte. Install it with `pip install
'profiler-users[postgresql]'` or `'profiler-users[mysql]'`.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import logging
import os
import random
import re
import sqlite3
import sys
import time
from datetime import datetime, timezone
from typing import NamedTuple

import sqlalchemy
from sqlalchemy import BigInteger, Column, DateTime, Identity, String, Table, Text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

import profiler
from profiler import Busy, EmailTaken, NoSuchUser, Unavailable

TYPE_CHECKING = False  # as in profiler
if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from typing import Any, Callable, TypeVar

    from sqlalchemy import Connection, Engine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from profiler import Guard, Path

    Result = TypeVar("Result")

# -- configuration ---------------------------------------------------------------------

DRIVERS = {  # from the scheme of a URL to SQLAlchemy's
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mysql+pymysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "mariadb+pymysql": "mysql+pymysql",
}
POOL_SIZE = 8  # connections of a process

# A request takes little more than TIMEOUT. All in seconds.
TIMEOUT = 10  # for a statement
LOCK_TIMEOUT = 5  # for a row that others have locked, on MySQL and MariaDB
CONNECT_TIMEOUT = 5  # to connect to a host
POOL_TIMEOUT = 2.0  # to wait for a connection of the pool
RETRY_TIME = 2.0  # from the start of a request to its last attempt
PING_AFTER = 1.0  # of idle time, before a write
GRACE = 1.0  # after TIMEOUT, before a connection that waits is closed
PAUSE = 0.1  # between attempts, at most
ATTEMPTS = 3
COPY_BATCH = 1000  # users

# SQLSTATEs of PostgreSQL; error numbers of MySQL and MariaDB.
DUPLICATE_KEY = ("23505", 1062)
ROLLED_BACK = ("40001", "40P01", 1213, 1205)  # deadlocks, and conflicts with other transactions
STALE_STATEMENT = (
    "0A000",
    "26000",
    "42P05",
)  # a prepared statement does not fit the table, or is gone
READ_ONLY = ("25006", 1290, 1792, 1836)  # the server has become a standby


# -- dialects --------------------------------------------------------------------------
# `email` is as entered, `email_key` as compared: MariaDB has no index on an expression,
# and lower() of every database depends on its locale. Both compare bytes, because other
# collations equate e and é, or all emoji.

_USERS = Table(
    "user",
    sqlalchemy.MetaData(),
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("first_name", String(255), nullable=False),
    Column("last_name", String(255), nullable=False),
    Column("email", String(254), nullable=False),
    Column(
        "email_key",
        String(254).with_variant(String(254, "C"), "postgresql"),
        nullable=False,
        unique=True,
    ),
    Column("password", Text, nullable=False),
    Column("created_on", DateTime, nullable=False),  # in UTC
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mysql_collate="utf8mb4_bin",
)


class _Dialect(NamedTuple):
    """The SQL in which the databases differ."""

    table: str
    created_on: str  # as text, so that no stored value is outside Python's range
    last_id: str  # the highest id that was ever used
    set_last_id: str
    exists: str = ""  # the table
    contains: str = ""  # the condition that a column contains a text
    returning: str = ""
    text: str = "{}"  # a column as text


_DIALECTS = {
    "postgresql": _Dialect(
        table='"user"',
        exists="""SELECT 1 WHERE to_regclass('"user"') IS NOT NULL""",
        # JSON has the ISO format whatever DateStyle is.
        created_on="replace(to_jsonb(date_trunc('second', created_on)) #>> '{}', 'T', ' ')",
        contains="""{} COLLATE "C" ILIKE %(pattern)s ESCAPE '!'""",
        returning="RETURNING id",
        last_id="""
SELECT last_value FROM pg_sequences
WHERE format('%I.%I', schemaname, sequencename) = pg_get_serial_sequence('"user"', 'id')
""",
        set_last_id="SELECT setval(pg_get_serial_sequence('\"user\"', 'id'), {0})",
    ),
    "mysql": _Dialect(
        table="user",
        exists="SHOW TABLES LIKE 'user'",
        created_on="LEFT(created_on, 19)",
        contains="LOWER({}) LIKE LOWER(%(pattern)s) ESCAPE '!'",
        last_id="SHOW CREATE TABLE user",
        set_last_id="ALTER TABLE user AUTO_INCREMENT = {1}",
    ),
    "sqlite": _Dialect(  # for copies
        table='"user"',
        text="CAST({} AS TEXT)",
        created_on="CAST(created_on AS TEXT)",
        last_id="SELECT seq FROM sqlite_sequence WHERE name = 'user'",
        set_last_id="INSERT INTO sqlite_sequence VALUES ('user', {0})",
    ),
}


def _to_json(rows: Sequence[Any]) -> bytes:
    """Return users as comma-separated JSON objects. An encoder with a dict for each
    takes twice as long.
    """
    quote = json.encoder.encode_basestring
    users = [
        f'{{"id":{user_id},"first_name":{quote(first_name)},"last_name":{quote(last_name)},"email":{quote(email)},'
        f'"created_on":{quote(created_on)}}}'
        for user_id, first_name, last_name, email, created_on in rows
    ]
    return ",".join(users).encode()


# -- connections -----------------------------------------------------------------------
# Theory of operation: the threads of a process share a pool of connections in
# autocommit mode. Every operation is one statement, except writes with a precondition,
# which lock the row in a transaction. Statements run on the driver's own cursor,
# because SQLAlchemy's takes longer than the database. Whether a connection still works
# is tested before a write, if it was idle; a read is simply repeated. A write whose
# connection broke is not, because it may have been committed. After a fork, the child
# abandons its parent's connections.


def _parse_url(text: str) -> URL:
    """Return the URL with SQLAlchemy's name of the driver. Raise ValueError, without
    the password in the URL.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "invalid database URL: write it as postgresql://user:password@host:5432/name, "
            "with %40 for @ and %2F for / in the password"
        ) from None
    if url.drivername not in DRIVERS:
        raise ValueError(
            f"{url.drivername}:// is not supported: use a path, or a URL that starts with postgresql://, mysql:// "
            "or mariadb://"
        )
    return url.set(drivername=DRIVERS[url.drivername])


def _hosts(url: URL) -> list[str]:
    """Return the hosts in the query of a URL."""
    hosts = url.query.get("host", ())
    return [
        host for part in ([hosts] if isinstance(hosts, str) else hosts) for host in part.split(",")
    ]


def _location(url: URL) -> str:
    """Return the URL for people, without its password, and without its query, which may
    contain one.
    """
    location = str(
        URL.create(url.get_backend_name(), url.username, None, url.host, url.port, url.database)
    )
    return f"{location} on {', '.join(_hosts(url))}" if _hosts(url) else location


def _options(url: URL) -> dict[str, Any]:
    """Return the driver's options of a connection. Those in the URL take precedence."""
    if url.get_backend_name() == "mysql":
        options = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": TIMEOUT,
            "write_timeout": TIMEOUT,
            "charset": "utf8mb4",
            # Without a strict mode, MySQL truncates what is too long.
            "init_command": f"SET SESSION sql_mode='TRADITIONAL', innodb_lock_wait_timeout={LOCK_TIMEOUT}",
        }
    else:
        options = {
            # For each host. libpq's minimum is 2.
            "connect_timeout": max(2, min(CONNECT_TIMEOUT, TIMEOUT // max(1, len(_hosts(url))))),
            "application_name": "profiler",
            "client_encoding": "utf8",
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": TIMEOUT * 1000,  # milliseconds
        }
    return {name: value for name, value in options.items() if name not in url.query}


def _create_engine(url: URL) -> Engine:
    """Return an engine, which connects on first use. Raise ValueError if the driver is
    not installed.
    """
    backend = url.get_backend_name()
    try:
        engine = sqlalchemy.create_engine(
            url,
            connect_args=_options(url),
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            pool_use_lifo=True,
        )
    except (ImportError, NoSuchModuleError) as error:
        raise ValueError(
            f"{url.drivername}: {error}: pip install 'profiler-users[{backend}]'"
        ) from None

    def prepare(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info.update(opened=time.monotonic(), used=time.monotonic())
        if backend == "postgresql":
            _prepare_psycopg(connection, record.info, "options" not in url.query)

    sqlalchemy.event.listen(engine, "connect", prepare)
    return engine


def _prepare_psycopg(connection: Any, info: dict[str, Any], set_timeout: bool) -> None:
    """Prepare a new connection for use. Raise Unavailable if the database cannot store
    every character.
    """
    _limit_waiting(connection, info)
    info["deadline"] = time.monotonic() + CONNECT_TIMEOUT
    encoding = connection.info.parameter_status("server_encoding")
    if encoding == "SQL_ASCII":
        _replace_invalid_utf8(connection)
    elif encoding != "UTF8":
        raise Unavailable(
            f"the encoding of the database is {encoding}: create one with ENCODING 'UTF8'"
        )
    if connection.info.backend_pid != connection.execute("SELECT pg_backend_pid()").fetchone()[0]:
        # There is a pooler. Its clients may share a session, and with it the names of
        # prepared statements: a statement would execute another client's. Settings
        # would apply to others, too.
        connection.prepare_threshold = None
    elif set_timeout:
        connection.execute(f"SET statement_timeout = '{TIMEOUT}s'")
    info["deadline"] = float("inf")


def _replace_invalid_utf8(connection: Any) -> None:
    """Read U+FFFD for invalid UTF-8, which a database with the encoding SQL_ASCII may contain."""
    from psycopg.adapt import Loader

    connection.execute(
        "SET client_encoding = 'SQL_ASCII'"
    )  # otherwise the server refuses to send it

    class ReplacingLoader(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode("utf-8", "replace")

    for type_name in ("text", "varchar"):
        connection.adapters.register_loader(type_name, ReplacingLoader)


def _limit_waiting(connection: Any, info: dict[str, Any]) -> None:
    """Close a connection that waits beyond the deadline in `info`: a server that hangs
    does not close it.
    """
    from psycopg import OperationalError

    wait = connection.wait

    def limited(steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
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

    connection.wait = lambda steps, *arguments, **options: wait(
        limited(steps), *arguments, **options
    )


def _fetch(cursor: Any, statement: str, parameters: Any = ()) -> list[Any]:
    """Execute a SELECT and return its rows."""
    cursor.execute(statement, parameters)
    return list(cursor.fetchall())


@contextlib.contextmanager
def _transaction(cursor: Any) -> Iterator[None]:
    """Commit at the end of the block, roll back if it raises."""
    cursor.execute("BEGIN")
    try:
        yield
    except BaseException:
        cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


def _code(error: BaseException | None) -> object:
    """Return the error number of MySQL and MariaDB, which have a SQLSTATE, too, or the
    SQLSTATE of PostgreSQL.
    """
    number = error.args[0] if error and error.args else None
    return number if isinstance(number, int) else getattr(error, "sqlstate", None)


def _message(error: BaseException) -> str:
    """Return the driver's message in one line, without the statement, and without
    values, which may be an email.
    """
    if isinstance(error, DBAPIError) and error.orig:
        error = error.orig
    if isinstance(error, configparser.Error):  # its message quotes a line of the file
        return "the file in read_default_file is malformed: it needs a section [client]"
    text = getattr(getattr(error, "diag", None), "message_primary", None) or str(error)
    return re.sub("entry '.*' for", "entry for", " ".join(text.split()))


# -- users -----------------------------------------------------------------------------


def _fold(email: str) -> str:
    """Return an email with its ASCII letters in lower case, as SQLite's NOCASE compares them."""
    return re.sub("[A-Z]+", lambda match: match[0].lower(), email)


class SQLAlchemyUsers:
    """The users in one database of a server: a profiler.Storage.

    Threads and, after a fork, processes may share the object.
    """

    # Any read may have to wait for the server.
    reads_may_wait = True

    def __init__(self, url: str) -> None:
        """Store the URL; connect to nothing yet. Raise ValueError."""
        parsed = _parse_url(url)
        self.location = _location(parsed)
        self._engine = _create_engine(parsed)
        self._dialect = _DIALECTS[self._engine.dialect.name]
        self._driver = self._engine.dialect.loaded_dbapi
        self._table = self._dialect.table
        self._columns = f"id, first_name, last_name, email, {self._dialect.created_on}"
        self._get = f"SELECT {self._columns} FROM {self._table} WHERE id = %s"
        self._has_table = False
        self._valid_from = 0.0  # connections opened before this time are not used again
        self.failures = profiler.Failures()
        profiler.call_at_fork(self)

    def find(self, email: str) -> tuple[int, str] | None:
        """Return the id and the password hash of the user with this email, or None."""
        statement = f"SELECT id, password FROM {self._table} WHERE email_key = %s"
        rows = self._read(statement, (_fold(email),))
        return (rows[0][0], rows[0][1]) if rows else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        values = (first_name, last_name, email, _fold(email), password_hash, now)
        statement = f"""
INSERT INTO {self._table} (first_name, last_name, email, email_key, password, created_on)
VALUES (%s, %s, %s, %s, %s, %s) {self._dialect.returning}
"""

        def insert(cursor: Any) -> int:
            cursor.execute(statement, values)
            return int(cursor.fetchone()[0] if self._dialect.returning else cursor.lastrowid)

        with self._email_taken(email):
            return self._run(insert)

    def page(
        self,
        limit: int,
        after: int | None = None,
        descending: bool = False,
        email: str | None = None,
        text: str = "",
    ) -> tuple[bytes, int | None]:
        """Return one page of users as comma-separated JSON objects, and the last id if
        more follow.
        """
        conditions, parameters = ["TRUE"], dict[str, object](limit=limit + 1)
        if after is not None:
            conditions.append("id < %(after)s" if descending else "id > %(after)s")
            parameters["after"] = after
        if email is not None:
            conditions.append("email_key = %(email_key)s")
            parameters["email_key"] = _fold(email)
        if text:
            columns = [
                self._dialect.contains.format(name)
                for name in ("first_name", "last_name", "email")
            ]
            conditions.append(f"({' OR '.join(columns)})")
            parameters["pattern"] = "%" + re.sub("([!%_])", r"!\1", text) + "%"
        statement = f"""
SELECT {self._columns} FROM {self._table} WHERE {" AND ".join(conditions)}
ORDER BY id {"DESC" if descending else "ASC"} LIMIT %(limit)s
"""
        rows = self._read(statement, parameters)
        return _to_json(rows[:limit]), rows[limit - 1][0] if len(rows) > limit else None

    def get(self, user_id: int) -> bytes:
        """Return one user as a JSON object. Raise NoSuchUser."""
        rows = self._read(self._get, (user_id,))
        if not rows:
            raise NoSuchUser
        return _to_json(rows)

    def get_password_hash(self, user_id: int) -> str:
        """Return a user's password hash. Raise NoSuchUser."""
        rows = self._read(f"SELECT password FROM {self._table} WHERE id = %s", (user_id,))
        if not rows:
            raise NoSuchUser
        return str(rows[0][0])

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """Change a user's names and email, those that are in `fields`. Raise
        NoSuchUser, EmailTaken, and as guard.
        """
        columns = dict(fields)
        if "email" in fields:
            columns["email_key"] = _fold(fields["email"])
        assignments = ", ".join(f"{name} = %s" for name in columns) or "id = id"
        statement = f"UPDATE {self._table} SET {assignments} WHERE id = %s"
        with self._email_taken(fields.get("email"), user_id):
            if not self._write(statement, (*columns.values(), user_id), user_id, guard):
                raise NoSuchUser

    def delete(self, user_id: int, guard: Guard | None = None) -> None:
        """Delete a user, if there is one with this id, which is never reused. Raise as guard."""
        self._write(f"DELETE FROM {self._table} WHERE id = %s", (user_id,), user_id, guard)

    def replace_password_hash(
        self, user_id: int, old: str | None, new: str, guard: Guard | None = None
    ) -> bool:
        """Replace the hash if it still equals `old` (None: always). Return whether it
        did. Raise as guard.
        """
        statement = f"UPDATE {self._table} SET password = %s WHERE id = %s"
        if old is None:
            return self._write(statement, (new, user_id), user_id, guard) > 0
        return (
            self._write(f"{statement} AND password = %s", (new, user_id, old), user_id, guard) > 0
        )

    def count(self) -> int:
        """Return the number of users."""
        return int(self._read(f"SELECT count(*) FROM {self._table}")[0][0])

    def ping(self) -> None:
        """Raise an exception unless users can be read."""
        self._read(f"SELECT {self._columns}, password FROM {self._table} LIMIT 1")

    def initialise(self, force: bool = False) -> bool:
        """Create the table; if it exists and `force` is true, drop it with its users
        first. Return whether it did.

        Raise FileExistsError if it holds users and `force` is false.
        """
        created = self._create_table()
        if not force and (count := self.count()):
            raise FileExistsError(f"the table holds users ({count}): --force deletes them")
        if force and not created:
            self._attempt(lambda cursor: cursor.execute(f"DROP TABLE {self._table}"))
            self._create_table()
        return created or force

    def backup(self, path: str) -> None:
        """Raise OSError: the server has its own program for that."""
        raise OSError(
            "a database server has its own program for that: use pg_dump, mariadb-dump or mysqldump"
        )

    def close(self) -> None:
        """Close this process's connections, those in use once they are returned. The
        next use opens new ones.
        """
        self._valid_from = time.monotonic()
        self._engine.dispose()

    def after_fork_in_child(self) -> None:
        """Start without connections. A forked child drops those of its parent, but does
        not close them.
        """
        self._engine.dispose(close=False)

    def _exists(self) -> bool:
        """Return whether the table exists."""
        return bool(
            self._attempt(lambda cursor: _fetch(cursor, self._dialect.exists), is_read=True)
        )

    def _create_table(self) -> bool:
        """Create the table if it does not exist. Return whether it did."""
        if self._exists():
            return False
        statement = str(CreateTable(_USERS).compile(dialect=self._engine.dialect))
        try:
            self._attempt(lambda cursor: cursor.execute(statement))
        except Unavailable:
            # Another process may have created it at the same moment, which databases
            # report in many ways.
            for _ in range(ATTEMPTS):
                time.sleep(PAUSE)
                if self._exists():
                    return False
            raise
        return True

    @contextlib.contextmanager
    def _email_taken(self, email: str | None, user_id: int = 0) -> Iterator[None]:
        """Raise EmailTaken for a duplicate key in the block, but only if another user
        has the email.
        """
        try:
            yield
        except Unavailable as error:
            owner = self.find(email) if email and _code(error.__cause__) in DUPLICATE_KEY else None
            if owner and owner[0] != user_id:
                raise EmailTaken from None
            raise

    def _read(self, statement: str, parameters: Any = ()) -> list[Any]:
        """Return the rows of a SELECT."""
        return self._run(lambda cursor: _fetch(cursor, statement, parameters), is_read=True)

    def _write(self, statement: str, parameters: Any, user_id: int, guard: Guard | None) -> int:
        """Return how many rows a statement has changed, once the guard has seen the
        user. Raise as guard.
        """

        def write(cursor: Any) -> int:
            if guard is None:
                cursor.execute(statement, parameters)
                return int(cursor.rowcount)
            with _transaction(cursor):
                rows = _fetch(cursor, f"{self._get} FOR UPDATE", (user_id,))
                guard(_to_json(rows) if rows else None)
                cursor.execute(statement, parameters)
                return int(cursor.rowcount)

        return self._run(write)

    def _run(self, work: Callable[[Any], Result], is_read: bool = False) -> Result:
        """Return what `work` returns for a cursor, once there is a table. Raise Busy,
        Unavailable.
        """
        if not self._has_table:
            self._create_table()
            self._has_table = True
        return self._attempt(work, is_read)

    def _attempt(self, work: Callable[[Any], Result], is_read: bool = False) -> Result:
        """Return what `work` returns for a cursor, attempted again if that is safe."""
        start, attempt = time.monotonic(), 1
        while True:
            connection = self._take(start, is_read)
            try:
                result = work(connection.cursor())
                if not is_read and self._dialect.returning:
                    # pgpool in raw mode has begun a transaction. If there is none, this
                    # sends nothing.
                    connection.commit()
                return result
            except self._driver.Error as error:
                may_repeat = self._drop_if_useless(connection, error, is_read)
                if not may_repeat or attempt == ATTEMPTS or time.monotonic() > start + RETRY_TIME:
                    raise (Busy if _code(error) in ROLLED_BACK else Unavailable)(
                        _message(error)
                    ) from error
            except BaseException as error:
                if not isinstance(error, Exception):  # the response may be unread
                    connection.invalidate()
                raise
            finally:
                self._return(connection)
            attempt += 1
            time.sleep(random.uniform(0, PAUSE))  # noqa: S311  # or two transactions might meet again

    def _drop_if_useless(
        self, connection: PoolProxiedConnection, error: Any, is_read: bool
    ) -> bool:
        """Close a connection that should be replaced. Return whether it is safe to
        repeat what failed on it.
        """
        code = _code(error)
        is_lost = self._engine.dialect.is_disconnect(error, connection.dbapi_connection, None)
        if is_lost or code in READ_ONLY:
            self._valid_from = time.monotonic()
        elif code in STALE_STATEMENT:
            connection.invalidate()
        return code in (*ROLLED_BACK, *STALE_STATEMENT) or (is_lost and is_read)

    def _take(self, start: float, is_read: bool) -> PoolProxiedConnection:
        """Return a connection of the pool. Raise Busy, Unavailable."""
        while True:
            try:
                connection = self._engine.raw_connection()
            except sqlalchemy.exc.TimeoutError:
                raise Busy(f"all {POOL_SIZE} connections to the database are in use") from None
            except (
                Exception
            ) as error:  # drivers raise a TypeError for an unknown option, and others
                raise Unavailable(_message(error)) from None
            connection.info["deadline"] = start + TIMEOUT + GRACE
            if self._is_usable(connection, is_read):
                return connection
            connection.invalidate()
            if time.monotonic() > start + RETRY_TIME:
                raise Unavailable("the server does not answer")

    def _is_usable(self, connection: PoolProxiedConnection, is_read: bool) -> bool:
        """Return whether a connection of the pool may be used, if necessary after a ping."""
        if connection.info["opened"] < self._valid_from:
            return False
        if is_read or time.monotonic() < connection.info["used"] + PING_AFTER:
            return True
        try:
            return self._engine.dialect.do_ping(connection.dbapi_connection)  # type: ignore[arg-type]
        except self._driver.Error:
            return False

    def _return(self, connection: PoolProxiedConnection) -> None:
        """Return a connection to the pool, or close it if it was opened before an
        outage or before close().
        """
        if connection.is_valid:
            connection.info.update(deadline=float("inf"), used=time.monotonic())
            if connection.info["opened"] < self._valid_from:
                connection.invalidate()
        connection.close()


# -- copying ---------------------------------------------------------------------------
# All users or none, between any two databases. Rows are read as they are served,
# inserted, and read from the target: a value that would be served differently
# afterwards, such as a time with a zone, is an error.

_FIELDS = (
    "id",
    "first_name",
    "last_name",
    "email",
    "password",
    "created_on",
)  # in the order of rows


class _Side:
    """The source or the target of a copy, with a connection that holds a transaction."""

    def __init__(self, users: profiler.Storage, connection: Connection) -> None:
        self.location, self.connection = users.location, connection
        self.dialect = dialect = _DIALECTS[connection.dialect.name]
        self.is_sqlite = dialect is _DIALECTS["sqlite"]
        names = ("first_name", "last_name", "email", "coalesce(password, '')")
        columns = ", ".join(dialect.text.format(name) for name in names)
        self.select = f"SELECT id, {columns}, {dialect.created_on} FROM {dialect.table}"

    def execute(self, statement: str, parameters: Any = None, **options: Any) -> Any:
        """Execute a statement with parameters such as :id."""
        return self.connection.execute(
            sqlalchemy.text(statement), parameters, execution_options=options
        )

    def last_id(self) -> int:
        """Return the highest id that was ever used, perhaps by a user who was deleted since."""
        last_id = self.execute(f"SELECT max(id) FROM {self.dialect.table}").scalar() or 0
        if (
            self.is_sqlite
            and not self.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'"
            ).first()
        ):
            return int(last_id)
        row: Sequence[Any] = self.execute(self.dialect.last_id).first() or (0,)
        if len(row) > 1:  # MySQL's row ends with the statement that would create the table
            match = re.search("AUTO_INCREMENT=([0-9]+)", row[1])
            return int(match[1]) - 1 if match else 0
        return max(last_id, row[0] or 0)

    def set_last_id(self, last_id: int) -> None:
        """Make ids continue after this one."""
        if self.is_sqlite:
            self.execute("DELETE FROM sqlite_sequence WHERE name = 'user'")
        if last_id:
            self.execute(self.dialect.set_last_id.format(last_id, last_id + 1))

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        """Insert rows. Raise ValueError, which names the first user who cannot be
        stored; SQLAlchemyError.
        """
        names = _FIELDS if self.is_sqlite else (*_FIELDS, "email_key")
        values = ", ".join(f":{name}" for name in names)
        statement = f"INSERT INTO {self.dialect.table} ({', '.join(names)}) VALUES ({values})"
        users = [{**dict(zip(_FIELDS, row)), "email_key": _fold(row[3] or "")} for row in rows]
        try:
            with self.connection.begin_nested():
                self.execute(statement, users)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            for user in users:
                try:
                    self.execute(statement, user)
                except DBAPIError as error:
                    raise ValueError(f"user {user['id']}: {_message(error)}") from None

    def check(self, rows: list[tuple[Any, ...]]) -> None:
        """Raise ValueError, which names the first user who is not served as in these rows."""
        condition = "WHERE id BETWEEN :first AND :last ORDER BY id"
        stored = self.execute(
            f"{self.select} {condition}", {"first": rows[0][0], "last": rows[-1][0]}
        ).all()
        stored_rows = {row[0]: tuple(row) for row in stored}
        for row in rows:
            changed = [
                name
                for name, old, new in zip(_FIELDS, row, stored_rows.get(row[0], ("",) * 6))
                if old != new
            ]
            if changed:
                raise ValueError(f"user {row[0]}: the target would change {', '.join(changed)}")


def copy(source: profiler.Storage, target: profiler.Storage) -> str:
    """Copy all users, with ids, password hashes and times, or none. Return a sentence
    about it.

    Raise ValueError if the target holds users or cannot store one; Unavailable,
    SQLAlchemyError, sqlite3.Error.
    """
    if source.location == target.location:
        raise ValueError(f"{target.location} is both source and target")
    if not (
        source._exists()
        if isinstance(source, SQLAlchemyUsers)
        else os.path.exists(source.location)
    ):
        raise FileNotFoundError(f"{source.location} does not exist, or has no table of users")
    if count := target.count():
        raise ValueError(
            f"{target.location} holds users already ({count}): choose a target without any"
        )
    with _connect(source) as old, _connect(target) as new:
        # First, because MySQL's ALTER TABLE commits what precedes it.
        new.set_last_id(max(old.last_id(), new.last_id()))
        copied = _copy_rows(old, new, source.count())
        if copied != source.count():
            raise ValueError(
                f"{source.location} has changed meanwhile: stop the service, and copy again"
            )
    return f"Copied all users ({copied}) from {source.location} to {target.location}."


@contextlib.contextmanager
def _connect(users: profiler.Storage) -> Iterator[_Side]:
    """Open a transaction for a copy. Commit at the end of the block, roll back if it raises."""
    if isinstance(users, SQLAlchemyUsers):
        with users._engine.execution_options(
            isolation_level="REPEATABLE READ"
        ).begin() as connection:
            yield _Side(users, connection)
        return
    engine = sqlalchemy.create_engine(URL.create("sqlite", database=users.location))
    with engine.connect() as connection, connection.begin():
        connection.connection.text_factory = lambda text: text.decode("utf-8", "replace")  # type: ignore[attr-defined]
        connection.exec_driver_sql("BEGIN")
        yield _Side(users, connection)
    engine.dispose()


def _copy_rows(old: _Side, new: _Side, total: int) -> int:
    """Copy all rows, with a progress bar on a terminal. Return how many. Raise as
    _Side.insert and _Side.check.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # only needed here

    copied, statement = 0, f"{old.select} ORDER BY id"
    progress = tqdm(total=total, unit=" users", disable=None)
    with progress, contextlib.closing(old.execute(statement, yield_per=COPY_BATCH)) as result:
        for batch in result.partitions(COPY_BATCH):
            rows = [tuple(row) for row in batch]
            new.insert(rows)
            new.check(rows)
            progress.update(len(rows))
            copied += len(rows)
    return copied


# -- application and command line ------------------------------------------------------


def create_app(
    database: Path | None = None,
    *,
    iterations: int | None = None,
    token: str | None = None,
    anonymous: bool | None = None,
) -> profiler.Application:
    """Return a WSGI application as profiler.create_app does; the database may be a URL,
    too. Raise ValueError.
    """
    accounts = profiler.Accounts(open_database(database), iterations)
    return profiler.Application(accounts, token, anonymous)


application = app = profiler.create_on_first_use(create_app)


def open_database(database: Path | None = None) -> profiler.Storage:
    """Return the users in the database of a URL or a path, by default PROFILER_DATABASE.

    Raise ValueError.
    """
    if database is None:
        database = os.environ.get("PROFILER_DATABASE") or None
    location = os.fsdecode(database or "")
    return SQLAlchemyUsers(location) if "://" in location else profiler.Users(database)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command (default: sys.argv). Exit with 2 for an invalid setting, with 1 for
    a failure.
    """
    logging.getLogger("psycopg").addHandler(
        logging.NullHandler()
    )  # it would report a lost connection, too
    database = "a path, or a URL of PostgreSQL, MySQL or MariaDB"
    parser, commands = profiler.make_parser("profiler-sqlalchemy", database)
    command = commands.add_parser(
        "copy", help="copy all users to another database", allow_abbrev=False
    )
    command.add_argument("source", metavar="SOURCE", help=database)
    command.add_argument(
        "target", metavar="TARGET", nargs="?", help="one without users (default: --database)"
    )
    command.set_defaults(run=_copy)
    profiler.run_command(parser, argv, open_database)


def _copy(arguments: argparse.Namespace, users: profiler.Storage) -> None:
    try:
        with contextlib.closing(open_database(arguments.source)) as source:
            target = open_database(arguments.target) if arguments.target else users
            with contextlib.closing(target):
                print(copy(source, target))
    except (
        ValueError,
        OSError,
        Unavailable,
        SQLAlchemyError,
        sqlite3.Error,
        ImportError,
    ) as error:
        sys.exit(f"profiler: {_message(error).rstrip('.')}. Nothing was copied.")
    except KeyboardInterrupt:
        sys.exit("profiler: interrupted. Nothing was copied.")


if __name__ == "__main__":
    main()
