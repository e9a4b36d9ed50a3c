"""Users in PostgreSQL, MySQL or MariaDB, for whoever outgrows one file: a storage of profiler in SQLAlchemy Core.

    PROFILER_DATABASE=postgresql://app:secret@db.example/app python profiler.py
    python -m profiler_sqlalchemy copy db.sqlite3 mysql://app@127.0.0.1/app

The module profiler imports this one when its database is a URL; the rules and the answers are the same, byte for byte.
Install it with `pip install 'profiler-users[postgresql]'` or `'profiler-users[mysql]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import re
import sqlite3
import string
import sys
import time
from datetime import datetime, timezone

import sqlalchemy
from sqlalchemy import BigInteger, Column, DateTime, Identity, String, Table, Text, bindparam, func, select
from sqlalchemy.dialects.sqlite import DATETIME as SQLITE_DATETIME
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

import profiler
from profiler import Busy, EmailTaken, NoSuchUser, TableInUse, Unavailable

TYPE_CHECKING = False  # as in profiler
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Callable, TypeVar

    from sqlalchemy import Connection, Engine
    from sqlalchemy.sql import Executable

    from profiler import Check

    Result = TypeVar("Result")

# -- configuration -----------------------------------------------------------------------------------------------------

DRIVERS = {  # what a URL may begin with, and what SQLAlchemy calls that
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mysql+pymysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "mariadb+pymysql": "mysql+pymysql",
}
# Of a connection, so that no server that is silent, and no network that is gone, holds a request for long. In seconds,
# but tcp_user_timeout and statement_timeout are in milliseconds. What the URL's query sets goes before these.
OPTIONS: dict[str, dict[str, Any]] = {
    "postgresql": {
        "connect_timeout": 5,
        "application_name": "profiler",
        "client_encoding": "utf8",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "options": "-c statement_timeout=10000",
    },
    "mysql": {
        "connect_timeout": 5,
        "read_timeout": 10,
        "write_timeout": 10,
        "charset": "utf8mb4",
        # A server that is not strict cuts what is too long, in silence.
        "init_command": "SET SESSION sql_mode='TRADITIONAL', innodb_lock_wait_timeout=5",
    },
}
POOL_SIZE = 8  # connections of a process
POOL_TIMEOUT = 5.0  # seconds that a request waits for one of them
ATTEMPTS = 3  # at what the database rolled back for the sake of others
MAKE_ATTEMPTS = 5  # at the table, while other processes make it
PAUSE = 0.1  # seconds between attempts, at most
COPY_BATCH = 1000  # users

# SQLSTATEs of PostgreSQL, and error numbers of MySQL and MariaDB.
TAKEN = ("23505", 1062)  # another row has the key
ROLLED_BACK = ("40001", "40P01", 1213, 1205)  # another transaction went first: a deadlock, or the like
CHANGED = ("25006", 1290, 1792, 1836, "42P01", 1146)  # the server is read-only now; the table is gone


# -- table -------------------------------------------------------------------------------------------------------------
# `email` is as it was told; `email_key` is as it is compared. A column of its own, for MariaDB has no index on an
# expression, and no engine's own lower() stops at ASCII whatever the locale. Collations that compare bytes, because
# others take é for e, and all emoji for one.

_METADATA = sqlalchemy.MetaData()
_SQLITE_TIME = SQLITE_DATETIME(truncate_microseconds=True)  # type: ignore[no-untyped-call]
_USERS = Table(
    "user",
    _METADATA,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("first_name", String(255), nullable=False),
    Column("last_name", String(255), nullable=False),
    Column("email", String(254), nullable=False),
    Column("email_key", String(254).with_variant(String(254, "C"), "postgresql"), nullable=False, unique=True),
    Column("password", Text, nullable=False),
    Column("created_on", DateTime().with_variant(_SQLITE_TIME, "sqlite"), nullable=False),  # in UTC
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mysql_collate="utf8mb4_bin",
)
_user = _USERS.c
_PUBLIC = _user["id", "first_name", "last_name", "email", "created_on"]  # in the order of the answer
_CARRIED = [column for column in _user if column is not _user.email_key]  # which SQLite's table has not

_FIND = select(_user.id, _user.password).where(_user.email_key == bindparam("key"))
_GET = select(*_PUBLIC).where(_user.id == bindparam("user_id"))
_GET_PASSWORD = select(_user.password).where(_user.id == bindparam("user_id"))
_COUNT = select(func.count()).where(_user.id > 0)  # what is below is nobody's
_CHECK = select(_USERS).limit(1)

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def _key(email: str) -> str:
    """Return what is compared of an email: all of it but the case of ASCII's letters, as SQLite's NOCASE does."""
    return email.translate(_LOWER)


def _to_json(rows: Sequence[Any]) -> bytes:
    """Return the users as JSON objects with commas between. An encoder would take twice as long for a dict of each."""
    quote = json.encoder.encode_basestring
    users = [
        f'{{"id":{user_id},"first_name":{quote(first_name)},"last_name":{quote(last_name)},"email":{quote(email)},'
        f'"created_on":"{created_on.isoformat(" ", "seconds")}"}}'
        for user_id, first_name, last_name, email, created_on in rows
    ]
    return ",".join(users).encode()


# -- engine ------------------------------------------------------------------------------------------------------------


def _read_url(text: str) -> URL:
    """Return the URL with the driver's name in it. Raise ValueError, without the URL: it may hold a password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "the database's URL cannot be read: write it as postgresql://user:password@host:5432/name, "
            "with %40 for an @ and %2F for a / in the password"
        ) from None
    if url.drivername not in DRIVERS:
        raise ValueError(
            f"{url.drivername}:// is not a database of profiler: "
            "name a path, or a URL that begins with postgresql://, mysql:// or mariadb://"
        )
    return url.set(drivername=DRIVERS[url.drivername])


def _make_engine(url: URL) -> Engine:
    """Return an engine, which connects when it is first used. Raise ValueError without the driver."""
    backend = url.get_backend_name()
    options = {name: value for name, value in OPTIONS[backend].items() if name not in url.query}
    try:
        # Every operation is one statement: in autocommit mode no BEGIN, COMMIT or ROLLBACK goes with it.
        return sqlalchemy.create_engine(
            url,
            connect_args=options,
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            pool_use_lifo=True,
        )
    except (ImportError, NoSuchModuleError) as error:
        raise ValueError(f"{url.drivername}: {error}: pip install 'profiler-users[{backend}]'") from None


def _name_place(url: URL) -> str:
    """Return the URL for people: without its password, and without its query, which may hold another."""
    place = str(URL.create(url.get_backend_name(), url.username, None, url.host, url.port, url.database))
    hosts = url.query.get("host", ())
    return f"{place} on {', '.join([hosts] if isinstance(hosts, str) else hosts)}" if hosts else place


@contextlib.contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    """Commit at the end of the block, roll back if it raises; at the isolation that is the server's default."""
    connection.execution_options(isolation_level=connection.default_isolation_level)
    with connection.begin():
        yield


def _code(error: DBAPIError) -> object:
    """Return the number of an error of MySQL or MariaDB, which come with a SQLSTATE too; the SQLSTATE of any other."""
    number = error.orig.args[0] if error.orig and error.orig.args else None
    return number if isinstance(number, int) else getattr(error.orig, "sqlstate", None)


def _check_encoding(connection: Connection) -> None:
    """Raise Unavailable for a database of PostgreSQL that cannot hold every character."""
    if connection.dialect.name == "postgresql":
        encoding = connection.scalar(sqlalchemy.text("SHOW server_encoding"))
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise Unavailable(f"the database is encoded {encoding}: make one with ENCODING 'UTF8'")


def _tell(error: BaseException) -> str:
    """Return the driver's own words, in a line: SQLAlchemy would add the statement."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


# -- users -------------------------------------------------------------------------------------------------------------


class SQLAlchemyUsers(profiler.Users):
    """The users in one database of a server. Threads and, after a fork, processes may share the object.

    Every method raises Unavailable, or Busy, when the server cannot do it as things are.
    """

    def __init__(self, url: str, iterations: int, hashers: int) -> None:
        """Take the URL; connect at the first use. Raise ValueError for one that cannot be used."""
        parsed = _read_url(url)
        self.place = _name_place(parsed)
        self._engine = _make_engine(parsed)
        self._made = False
        super().__init__(iterations, hashers)

    def find(self, email: str) -> tuple[int, str] | None:
        """Return the id and the password hash of the user who has an email, if there is one."""
        rows = self._read(_FIND, key=_key(email))
        return (rows[0].id, rows[0].password) if rows else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""
        user = {
            "first_name": first_name,
            "last_name": last_name,
            "email": email,
            "email_key": _key(email),
            "password": password_hash,
            "created_on": datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0),
        }
        result = self._run(lambda connection: connection.execute(_USERS.insert(), user))
        return int(result.inserted_primary_key[0])  # type: ignore[index]

    def page(
        self, limit: int, after: int | None = None, email: str | None = None, descending: bool = False
    ) -> tuple[bytes, int | None]:
        """Return users behind an id, as JSON objects with commas between, and the id after which there are more.

        With an email, only the user who has it counts. An id below 1 is nobody's.
        """
        order = _user.id.desc() if descending else _user.id
        statement = select(*_PUBLIC).where(_user.id > 0).order_by(order).limit(limit + 1)
        if after is not None:
            statement = statement.where(_user.id < after if descending else _user.id > after)
        if email is not None:
            statement = statement.where(_user.email_key == _key(email))
        rows = self._read(statement)
        return _to_json(rows[:limit]), rows[limit - 1].id if len(rows) > limit else None

    def get(self, user_id: int) -> bytes:
        """Return one user as a JSON object. Raise NoSuchUser."""
        rows = self._read(_GET, user_id=user_id)
        if not rows:
            raise NoSuchUser
        return _to_json(rows)

    def get_password(self, user_id: int) -> str:
        """Return the password hash of a user. Raise NoSuchUser."""
        rows = self._read(_GET_PASSWORD, user_id=user_id)
        if not rows:
            raise NoSuchUser
        return str(rows[0].password)

    def update(self, user_id: int, first_name: str, last_name: str, email: str, check: Check | None = None) -> None:
        """Give a user other names and another email. Raise NoSuchUser, EmailTaken, and what `check` raises."""

        def check_user(user: bytes | None) -> None:
            if user is None:
                raise NoSuchUser
            if check:
                check(user)

        values = {"first_name": first_name, "last_name": last_name, "email": email, "email_key": _key(email)}
        statement = _USERS.update().where(_user.id == user_id).values(values)
        if not self._write(statement, user_id, check_user if check else None):
            raise NoSuchUser

    def delete(self, user_id: int, check: Check | None = None) -> None:
        """Delete a user, if there is one with this id, which is never used again. Raise what `check` raises."""
        self._write(_USERS.delete().where(_user.id == user_id), user_id, check)

    def replace_password(self, user_id: int, old_hash: str | None, new_hash: str) -> bool:
        """Store another password hash, if the one that is stored is still the old one, or any; tell whether it was."""
        statement = _USERS.update().where(_user.id == user_id).values(password=new_hash)
        if old_hash is not None:
            statement = statement.where(_user.password == old_hash)
        return bool(self._write(statement, user_id))

    def count(self) -> int:
        """Return how many users there are."""
        return int(self._read(_COUNT)[0][0])

    def check(self) -> None:
        """Raise Unavailable unless the table can be read."""
        try:
            self._read(_CHECK)
        except SQLAlchemyError as error:
            raise Unavailable(_tell(error)) from None

    def initialise(self, force: bool) -> None:
        """Make the table. Raise TableInUse if it holds users, unless forced to drop them."""
        if not force and (count := self.count()):
            raise TableInUse(f"the table holds {profiler.count_users(count)}: --force drops them, for good")
        if force:
            self._run(_METADATA.drop_all)
            self._made = False
        self.prepare()

    def prepare(self) -> None:
        """Make the table, unless this process has seen it before."""
        if self._made:
            return
        for attempt in range(1, MAKE_ATTEMPTS + 1):
            try:
                with self._connect() as connection:
                    _check_encoding(connection)
                    _METADATA.create_all(connection)
                break
            except DBAPIError as error:  # others made it meanwhile: what that is called varies, so look again
                if attempt == MAKE_ATTEMPTS:
                    raise Unavailable(_tell(error)) from None
            time.sleep(PAUSE)
        self._made = True

    def expect(self) -> None:
        """Make no table from now on. Raise Unavailable if there is none."""
        self._made = True
        self.check()

    def backup(self, path: str, progress: object = None) -> None:
        """Raise OSError: the server has its own program for that."""
        program = {"postgresql": "pg_dump", "mysql": "mariadb-dump or mysqldump"}[self._engine.dialect.name]
        raise OSError(f"a database server is not backed up from here: use {program}")

    def close(self) -> None:
        """Close this process's connections. The next use opens others."""
        self._engine.dispose()

    def renew(self) -> None:
        """Leave its connections to the parent, in a forked child: who used them too would read others' answers."""
        super().renew()
        self._engine.dispose(close=False)

    def _read(self, statement: Executable, **parameters: Any) -> Sequence[Any]:
        """Return the rows of a SELECT, which is tried again if its connection breaks."""
        return self._run(lambda connection: connection.execute(statement, parameters).all(), repeatable=True)

    def _write(self, statement: Executable, user_id: int, check: Check | None = None) -> int:
        """Return how many users a statement changed; none before `check` has seen the one that it is about."""

        def work(connection: Connection) -> int:
            if check is None:
                return connection.execute(statement).rowcount
            with _transaction(connection):
                row = connection.execute(_GET.with_for_update(), {"user_id": user_id}).first()
                check(None if row is None else _to_json([row]))
                return connection.execute(statement).rowcount

        return self._run(work)

    def _run(self, work: Callable[[Connection], Result], repeatable: bool = False) -> Result:
        """Return what the work on a connection returns. Raise EmailTaken, Busy, Unavailable.

        What the server rolled back for the sake of others is tried again. What was cut off is tried again only if it
        is repeatable: a write may have been committed.
        """
        attempt = 0
        while True:
            attempt += 1
            self.prepare()
            try:
                with self._connect() as connection:
                    return work(connection)
            except DBAPIError as error:
                again = _code(error) in ROLLED_BACK or (repeatable and error.connection_invalidated)
                if not again or attempt == ATTEMPTS:
                    raise self._translate(error) from None
            time.sleep(random.uniform(0, PAUSE))  # noqa: S311  # so that two do not meet again

    def _translate(self, error: DBAPIError) -> Exception:
        """Return what an error of the server means to profiler. An error that is somebody's mistake means itself."""
        code = _code(error)
        if code in TAKEN:
            return EmailTaken()
        if code in ROLLED_BACK:
            return Busy(_tell(error))
        if code in CHANGED:  # the connections are to what is a standby now, or a table was dropped: begin anew
            self._made = False
            self.close()
        elif not (isinstance(error, OperationalError) or error.connection_invalidated):
            return error
        return Unavailable(_tell(error))

    def _connect(self) -> Connection:
        """Return a connection of the pool. Raise Busy if it has none to spare."""
        try:
            return self._engine.connect()
        except sqlalchemy.exc.TimeoutError:
            raise Busy(f"all {POOL_SIZE} connections to the database are in use") from None
        except Exception as error:  # an option that the driver does not know is a TypeError, and there are others
            raise Unavailable(_tell(error)) from None


# -- copying -----------------------------------------------------------------------------------------------------------
# From a file to a server, back, or from one server to another.

# How each engine tells the highest id that it ever gave, which may be a deleted user's; and how it is told.
_LAST_ID = {
    "sqlite": "SELECT seq FROM sqlite_sequence WHERE name = 'user'",
    "postgresql": """SELECT last_value FROM pg_sequences
WHERE format('%I.%I', schemaname, sequencename) = pg_get_serial_sequence('"user"', 'id')""",
    "mysql": "SHOW CREATE TABLE user",
}
_SET_LAST_ID = {
    "sqlite": ("DELETE FROM sqlite_sequence WHERE name = 'user'", "INSERT INTO sqlite_sequence VALUES ('user', {0})"),
    "postgresql": ("SELECT setval(pg_get_serial_sequence('\"user\"', 'id'), {0})",),
    "mysql": ("ALTER TABLE user AUTO_INCREMENT = {1}",),
}


def copy(source: str, target: str) -> str:
    """Carry all users over, with their ids, password hashes and times, or none; return a sentence about both sides.

    Raise ValueError if the target holds users, or if the source was written to meanwhile; Unavailable, SQLAlchemyError.
    """
    if "://" not in source and not os.path.isfile(source):
        raise ValueError(f"{source}: no such file")
    with _opened(source) as (old_users, old), _opened(target) as (new_users, new):
        if new_users.place == old_users.place:
            raise ValueError(f"{new_users.place} is both source and target")
        if held := new.scalar(_COUNT):
            raise ValueError(f"{new_users.place} holds {profiler.count_users(held)} already: name a target without any")
        # First of all, because MySQL commits what comes before an ALTER TABLE.
        _set_last_id(new, max(_last_id(old), _last_id(new), old.scalar(select(func.max(_user.id))) or 0))
        _carry(old, new)
        read, written = old_users.count(), new.scalar(_COUNT)
        if read != written:
            raise ValueError(f"{old_users.place} was written to meanwhile: stop the service, and copy again")
    sides = ((old_users.place, read), (new_users.place, written))
    return "; ".join(f"{place} holds {profiler.count_users(count)}" for place, count in sides) + "."


@contextlib.contextmanager
def _opened(place: str) -> Iterator[tuple[profiler.Users, Connection]]:
    """Give the users in a place, and a connection to it that holds a transaction. Make the table if need be."""
    users: profiler.Users
    if "://" in place:
        users = SQLAlchemyUsers(place, 1, 1)
        engine = users._engine
    else:
        users = profiler.SQLiteUsers(place, 1, 1)
        engine = sqlalchemy.create_engine(URL.create("sqlite", database=place))
    try:
        users.prepare()
        users.check()
        with engine.connect() as connection, _transaction(connection):
            yield users, connection
    finally:
        engine.dispose()
        users.close()


def _carry(old: Connection, new: Connection) -> None:
    """Insert in one what is read of the other, with a progress bar on a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # only here

    with_key = new.dialect.name != "sqlite"
    rows = select(*_CARRIED).where(_user.id > 0).order_by(_user.id)
    with tqdm(total=old.scalar(_COUNT), unit=" users", disable=None) as progress:
        for batch in old.execute(rows, execution_options={"yield_per": COPY_BATCH}).partitions():
            users = [row._asdict() for row in batch]
            if with_key:
                users = [{**user, "email_key": _key(user["email"])} for user in users]
            new.execute(_USERS.insert(), users)
            progress.update(len(users))


def _last_id(connection: Connection) -> int:
    row = connection.execute(sqlalchemy.text(_LAST_ID[connection.dialect.name])).first()
    if row is None:
        return 0
    if connection.dialect.name == "mysql":  # the second column is the statement that would make the table
        match = re.search("AUTO_INCREMENT=([0-9]+)", row[1])
        return int(match[1]) - 1 if match else 0
    return row[0] or 0


def _set_last_id(connection: Connection, last_id: int) -> None:
    for statement in _SET_LAST_ID[connection.dialect.name] if last_id else ():
        connection.execute(sqlalchemy.text(statement.format(last_id, last_id + 1)))


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Copy users as the arguments say (default: sys.argv). Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiler_sqlalchemy", description="Move users between databases.")
    parser.add_argument("command", choices=["copy"], help="carry all users over, with ids and password hashes, or none")
    parser.add_argument("source", metavar="SOURCE", help="a path, or a URL of postgresql, mysql or mariadb")
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        default=os.environ.get("PROFILER_DATABASE"),
        help="the same, without users (default: PROFILER_DATABASE, where a password is not in the list of processes)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.target:
        parser.error("name a TARGET, or set PROFILER_DATABASE")
    logging.getLogger("psycopg").addHandler(logging.NullHandler())  # it would tell of a lost connection twice
    try:
        print(copy(arguments.source, arguments.target))
    except IntegrityError:  # whose text may hold what it is about
        return _fail("two of the users have one email, but for the case of its letters, or one lacks a field")
    except (ValueError, OSError, Unavailable, SQLAlchemyError, sqlite3.Error, ImportError) as error:
        return _fail(_tell(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _fail(message: str) -> int:
    print(f"profiler: {message.rstrip('.')}. Nothing was copied.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
