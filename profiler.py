#!/usr/bin/env python3
"""User accounts over HTTP: a WSGI service on one SQLite file, without dependencies.

    GET, POST                  /users/                      list and search; create, import
    GET, PUT, PATCH, DELETE    /users/ID/                   get, update and delete a user
    PUT                        /users/ID/password/          change a password
    PUT                        /users/ID/password/reset/    replace a forgotten password
    POST                       /users/verify/               verify an email and a password
    GET                        /health/                     check that users can be served
    GET                        /, /openapi.json             an HTML page; the OpenAPI document

Run:    `python profiler.py` serves http://127.0.0.1:5000/ with the users in
        ./db.sqlite3. `--help` lists all options.
Embed:  `profiler:application` is a WSGI callable. `create_app()` returns one for
        another database. `Accounts` has the same rules for use without HTTP.
Copy:   this file and schema.sql are all you need, in one folder, with Python 3.9 or
        later and SQLite 3.27 or later. Optional files next to them are index.html,
        openapi.json, and profiler_sqlalchemy.py, which uses a database server.

The service keeps accounts and checks passwords. It has no sessions and no roles, and it
sends no email. It reimplements the service of "Building REST APIs with Python and
Flask", part 2, by Tony J, and keeps its name, paths, fields, messages and database:
tonyj.me/blog/building-rest-apis-with-python-and-flask-part-2
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import hmac
import io
import json
import math
import mmap
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import traceback
import unicodedata
from binascii import a2b_base64
from collections import OrderedDict
from hashlib import pbkdf2_hmac
from http import HTTPStatus
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any, Callable, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlencode
from weakref import ref
from wsgiref.handlers import CGIHandler, format_date_time

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    # A status, a body and extra headers. A dictionary is sent as JSON, an iterator is streamed.
    Body = bytes | dict[str, object] | Iterator[bytes] | None
    Response = tuple[int, Body, tuple[tuple[str, str], ...]]
    WSGIResponse = tuple[str, list[tuple[str, str]], Iterable[bytes]]
    # A check that a write calls inside its transaction. The argument is the JSON of the
    # user, or None if there is no such user. If the guard raises, nothing is written.
    Guard = Callable[[bytes | None], object]
    StrOrBytesPath = str | bytes | os.PathLike[str]
    # A generator that yields what it waits for.
    Steps = Generator[Any, Any, Any]

__all__ = [
    "Accounts",
    "Busy",
    "EmailTaken",
    "InvalidField",
    "NoSuchUser",
    "TooManyAttempts",
    "Unavailable",
    "Users",
    "WrongPassword",
    "app",
    "application",
    "create_app",
    "hash_password",
    "verify_password",
]
__version__ = "2.0.0"

# -- configuration ---------------------------------------------------------------------
# Defaults, and limits of fields, bodies and pages. Other limits stand at the head of the
# section that uses them.

HOST = "127.0.0.1"  # Flask's default, as in the tutorial
PORT = 5000  # Flask's default, as in the tutorial
DATABASE = "db.sqlite3"  # the tutorial's file
ITERATIONS = 600_000  # of PBKDF2-HMAC-SHA256: OWASP Password Storage Cheat Sheet
MIN_TOKEN = 16  # characters

MAX_BODY = 64 * 1024  # bytes
MAX_NAME = 255  # characters of a first or last name
MAX_EMAIL = 254  # characters: RFC 5321 4.5.3.1.3, without the angle brackets
# Python's NFC is quadratic: 1,024 combining characters take 1.5 ms, 32,000 take 3 s. NIST
# SP 800-63B 5.1.1.2 wants at least 64 characters to be allowed. There is no minimum: the
# passwords in the tutorial are short.
MAX_PASSWORD = 1024  # characters
MAX_ID = 2**63 - 1  # SQLite's largest integer
MAX_LIMIT = 1000  # users on a page
# A list of all users is streamed in parts. The first part is short, so that no worker thread
# is needed for most lists.
SHORT_PAGE = 100  # users in the first part, and by default on a page
BATCH = 500  # users in the other parts, and by default on a page of ?q=

# \d would match other digits, too. int() takes at most 4,300 digits.
DIGITS = re.compile("[0-9]{1,4000}")


class InvalidField(ValueError):
    """A value is not allowed for a field or a setting. The message starts with its name."""


def parse_number(text: str, name: str, low: int, high: int) -> int:
    """Return the number in a setting or a parameter.

    Raise InvalidField if it is no number or out of range.
    """
    if not DIGITS.fullmatch(text) or not low <= int(text) <= high:
        raise InvalidField(f"{name} must be a number from {low} to {high}")
    return int(text)


# -- passwords -------------------------------------------------------------------------
# A hash names its own algorithm and cost. New hashes have Werkzeug's PBKDF2 format. Hashes
# of the other formats below can be verified, too.

MAX_ITERATIONS = 10_000_000  # about 2-3 s on one core
MAX_SCRYPT_COST = 2**20  # n * r * p, 128 MiB: OWASP's costliest setting (2**17, 8, 1)
SALT_BYTES = 16  # 128 bits: NIST SP 800-132 5.1

_COST = "(?P<iterations>[1-9][0-9]{0,7})"
_N = "(?P<n>[1-9][0-9]{0,7})"
_R = "(?P<r>[1-9][0-9]?)"
_P = "(?P<p>[1-9][0-9]?)"
_SALT = "(?P<salt>[^$]{0,1024})"  # passlib's limit
_HASH_FORMATS = (
    # This service, and Werkzeug
    rf"pbkdf2:sha256:{_COST}\${_SALT}\$(?P<hex_digest>[0-9a-f]{{64}})",
    # Werkzeug
    rf"scrypt:{_N}:{_R}:{_P}\${_SALT}\$(?P<hex_digest>[0-9a-f]{{128}})",
    # Django
    rf"pbkdf2_sha256\${_COST}\${_SALT}\$(?P<digest>[0-9A-Za-z+/]{{43}}=)",
    rf"scrypt\${_N}\${_SALT}\${_R}\${_P}\$(?P<digest>[0-9A-Za-z+/]{{86}}==)",
    # passlib, whose base64 has "." for "+" and no padding
    rf"\$pbkdf2-sha256\${_COST}\$(?P<base64_salt>[0-9A-Za-z./]{{0,1368}})"
    r"\$(?P<digest>[0-9A-Za-z./]{43})",
)


def hash_password(password: str, iterations: int = ITERATIONS) -> str:
    """Hash a password with PBKDF2-HMAC-SHA256 and a random salt.

    :param password: at most 1,024 characters, without NUL
    :param iterations: the cost, from 1 to 10,000,000
    :return: `pbkdf2:sha256:ITERATIONS$SALT$DIGEST`
    :raises ValueError: if the password or the number of iterations is not allowed
    """
    iterations = parse_number(str(iterations), "iterations", 1, MAX_ITERATIONS)
    salt = os.urandom(SALT_BYTES).hex()
    digest = pbkdf2_hmac("sha256", _normalise(password), salt.encode(), iterations)
    return f"pbkdf2:sha256:{iterations}${salt}${digest.hex()}"


def verify_password(password_hash: str, password: str) -> bool:
    """Return True if a password matches a hash.

    :param password_hash: a hash in one of the formats of Werkzeug, Django and passlib. No
        password matches a hash that is malformed, unsupported or too costly.
    :param password: any text. One that `hash_password` refuses never matches.
    """
    # str(), because the column that a caller has read may contain NULL or a number.
    parsed = parse_hash(str(password_hash))
    if parsed is None:
        return False
    derive, digest = parsed
    try:
        # Other programs may have hashed the password without normalising it.
        candidates = {_normalise(password), password.encode()}
    except ValueError:
        return False
    return any(hmac.compare_digest(derive(candidate), digest) for candidate in candidates)


def parse_hash(password_hash: str) -> tuple[Callable[[bytes], bytes], bytes] | None:
    """Return a function from a password to its digest, and the digest that is stored.

    Return None if passwords cannot be verified with this hash here.
    """
    for pattern in _HASH_FORMATS:
        match = re.fullmatch(pattern, password_hash)
        if match:
            fields = match.groupdict()
            # No password can be verified if a field is malformed or too costly.
            with contextlib.suppress(ValueError):
                if "base64_salt" in fields:
                    salt = _decode(fields["base64_salt"])
                else:
                    salt = fields["salt"].encode()
                if "hex_digest" in fields:
                    digest = bytes.fromhex(fields["hex_digest"])
                else:
                    digest = _decode(fields["digest"])
                return _make_derivation(fields, salt), digest
    return None


def _decode(text: str) -> bytes:
    """Decode base64, also passlib's. Raise ValueError if it is malformed."""
    # Padding may be missing. More than needed is ignored.
    return a2b_base64(text.replace(".", "+") + "==")


def _make_derivation(fields: dict[str, str], salt: bytes) -> Callable[[bytes], bytes]:
    """Return a function that derives a digest from a password. Raise ValueError."""
    if "iterations" in fields:
        iterations = parse_number(fields["iterations"], "iterations", 1, MAX_ITERATIONS)
        return lambda password: pbkdf2_hmac("sha256", password, salt, iterations)
    n, r, p = [int(fields[name]) for name in "nrp"]
    # n must be a power of two and less than 2**(16 * r) (RFC 7914 2).
    is_valid = 2 <= n < 2 ** (16 * r) and n & (n - 1) == 0
    if not is_valid or n * r * p > MAX_SCRYPT_COST or not hasattr(hashlib, "scrypt"):
        raise ValueError
    # A build of OpenSSL for FIPS 140 refuses scrypt with a ValueError. Find that out here.
    hashlib.scrypt(b"", salt=b"", n=2, r=1, p=1)
    # OpenSSL needs this many bytes.
    maxmem = 128 * r * (n + p + 2)
    return functools.partial(hashlib.scrypt, salt=salt, n=n, r=r, p=p, maxmem=maxmem)


def needs_rehash(password_hash: str, iterations: int) -> bool:
    """Return True if a hash has another format than ours, or fewer iterations."""
    match = re.fullmatch(_HASH_FORMATS[0], password_hash)
    return match is None or int(match["iterations"]) < iterations


def _normalise(password: str) -> bytes:
    """Return the bytes to hash: NFC (NIST SP 800-63B 5.1.1.2), in UTF-8. Raise ValueError."""
    if len(password) > MAX_PASSWORD:
        raise ValueError(f"a password must have at most {MAX_PASSWORD} characters")
    if "\0" in password:
        raise ValueError(
            "a password must not contain NUL: HMAC ignores NULs at the end of its key"
        )
    return unicodedata.normalize("NFC", password).encode()


# -- database --------------------------------------------------------------------------
# One SQLite file with one table. Theory of operation: the threads of a process share a few
# connections, one for each kind of statement. A lock lets one thread at a time use a
# connection. A connection for each thread was tried: it served 0.88 to 1.17 times as many
# requests per second. No transaction stays open after a read. A write is a short
# transaction that takes the write lock first (BEGIN IMMEDIATE). Text is returned as bytes,
# because it goes straight into responses.
#
# Forks: SQLite's locks do not survive a fork, so all connections are closed before it.
# Afterwards both processes open new ones. A fork waits for the statements, transactions and
# backups that are running. Any thread may fork at any time, with two exceptions. A guard (see
# Guard) must not fork: it runs inside a transaction, for which the fork would wait forever.
# And no thread may fork while another one creates a Database and opens it: the child could
# inherit the new connection.

BUSY_TIMEOUT = 5.0  # seconds to wait for a lock: the default of sqlite3.connect
RETRY_INTERVAL = 0.001  # seconds between attempts to get a lock
WAL_TIMEOUT = 1.0  # seconds to try to switch a file to WAL mode
CLOSE_TIMEOUT = 1.0  # seconds to wait for running statements when closing, for all together
RETRY_AFTER = 1  # seconds, for the header Retry-After
MIN_DATABASE = 512  # bytes: SQLite's smallest page

_FIND_TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'user' COLLATE NOCASE"


class Unavailable(Exception):
    """The service is unavailable, because the database is missing, read-only, full or failing.

    The message is for the operator. Clients may try again after `retry_after` seconds.
    """

    retry_after = RETRY_AFTER


class Busy(Unavailable):
    """The service is busy. The same call may succeed in a moment."""


_fork_listeners: list[ref[Any]] = []


def register_for_forks(instance: object) -> None:
    """Call methods of an object at each fork of this process, while the object exists.

    They are before_fork, after_fork_in_parent and after_fork_in_child, where defined.
    """
    _fork_listeners.append(ref(instance, _fork_listeners.remove))


def _call_all(method: str) -> None:
    for reference in list(_fork_listeners):
        getattr(reference(), method, lambda: None)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _call_all("before_fork"),
        after_in_parent=lambda: _call_all("after_fork_in_parent"),
        after_in_child=lambda: _call_all("after_fork_in_child"),
    )


class CapacityLimiter:
    """Lets a number of threads in at the same time. Others wait for one to leave, or get Busy.

    Use it as a context manager. A forked child, which has only the thread that forked, can
    use it, too.
    """

    def __init__(
        self,
        resource: str,
        timeout: float,
        count: int = 1,
        max_waiting: int = sys.maxsize,
    ) -> None:
        """Set the limits.

        :param resource: what the threads wait for, for messages
        :param timeout: seconds to wait
        :param count: threads that are in at the same time
        :param max_waiting: if that many threads wait, more are refused at once
        """
        self._resource = resource
        self._count = count
        self._max_waiting = max_waiting
        self.timeout = timeout
        self.reset()
        register_for_forks(self)

    def reset(self) -> None:
        """Forget the threads that are in, and those that wait."""
        self._waiting_places = threading.BoundedSemaphore(self._max_waiting)
        # It has an item for each thread that may come in. A semaphore takes ten times as long.
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(self._count):
            self.leave()

    after_fork_in_child = reset

    def enter_within(self, timeout: float | None) -> bool:
        """Come in. Return False if that was not possible within `timeout` seconds.

        None stands for no limit.
        """
        try:
            self._free.get(timeout=timeout)
        except queue.Empty:
            return False
        return True

    def leave(self) -> None:
        """Leave."""
        self._free.put(None)

    def enter(self) -> None:
        """Come in. Raise Busy if that is not possible within the limits."""
        try:
            self._free.get_nowait()
        except queue.Empty:
            self._wait()

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _wait(self) -> None:
        if not self._waiting_places.acquire(blocking=False):
            raise Busy(f"too many requests wait for {self._resource}")
        try:
            if not self.enter_within(self.timeout):
                raise Busy(f"a request has waited too long for {self._resource}")
        finally:
            self._waiting_places.release()


class ConnectionSlot(CapacityLimiter):
    """A place for one SQLite connection, which threads use in turn. It is opened on first use."""

    def __init__(self, max_waiting: int = sys.maxsize) -> None:
        self.connection: sqlite3.Connection | None = None
        # The id of the thread that has entered because it forks. Only the parent uses it.
        self._forking_thread = 0
        super().__init__("the database", BUSY_TIMEOUT, max_waiting=max_waiting)

    def close(self) -> None:
        """Close the connection, which no thread may be using. The next use opens a new one."""
        connection = self.connection
        self.connection = None
        if connection:
            connection.close()

    def before_fork(self) -> None:
        """Close the connection, and let no thread open a new one."""
        self.enter_within(None)
        self.close()
        self._forking_thread = threading.get_ident()

    def after_fork_in_parent(self) -> None:
        """Let the other threads in again. In the child, reset() does."""
        # Another thread may have created this slot since the calls of before_fork. Then this
        # thread has not entered it.
        if self._forking_thread == threading.get_ident():
            self._forking_thread = 0
            self.leave()


class Database:
    """One SQLite file with the table of schema.sql. Both are created on first use.

    Threads and, after a fork, processes may share the object.
    """

    def __init__(self, path: str) -> None:
        """Store the path. The file is opened on first use.

        :param path: a file; not `:memory:`, not a URL
        :raises ValueError: if the path is not the path of a file
        """
        if path in ("", ":memory:"):
            raise ValueError(f"the database must be a file: {path!r} would be lost at the end")
        if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", path):
            raise ValueError(
                "a database URL needs `python -m profiler_sqlalchemy` or "
                "profiler_sqlalchemy:application"
            )
        # SQLite puts its -wal file next to the file itself, not next to a symbolic link.
        self.location = os.path.realpath(path)
        self._wal_paths = [self.location + "-wal", self.location + "-shm"]
        self.created_table = False
        # The file in use, whether it is in WAL mode, and its -wal and -shm files.
        self._file_identity: tuple[int, int] | None = None
        self.is_wal = False
        self._wal_identities: list[tuple[int, int] | None] = []
        # The folder's time of change (st_mtime_ns) at the last look at these files.
        self._folder_time = 0
        # One for each kind of statement. Subclasses add those for reads. "backup" has no
        # connection: a backup enters it so that a fork waits for the backup.
        self.slots = {"write": ConnectionSlot(), "backup": ConnectionSlot()}

    def read(self, kind: str, statement: str, parameters: Any = ()) -> list[Any]:
        """Return all rows of a statement that changes nothing.

        Raise Busy, Unavailable, and sqlite3.Error for a damaged file.

        :param kind: the key of a slot
        """
        slot = self.slots[kind]
        # `with slot` would add 3 % to the instructions of a short read.
        slot.enter()
        try:
            connection = slot.connection or self._connect(slot)
            return _execute(connection, statement, parameters).fetchall()
        except sqlite3.Error as error:
            # The error may have left the connection in any state. The next use opens a new one.
            slot.close()
            raise self._translate(error) from None
        finally:
            slot.leave()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock during the block. Commit at its end; roll back if it raises.

        Raise Busy, Unavailable, and sqlite3.Error for a damaged file.
        """
        slot = self.slots["write"]
        with slot:
            try:
                self.check_files()
                # If the block raises, the connection, as a context manager, rolls back.
                with slot.connection or self._connect(slot) as connection:
                    # Take the write lock first. SQLite refuses at once to turn a read
                    # transaction into a write transaction while another process writes.
                    _execute(connection, "BEGIN IMMEDIATE")
                    yield connection
                    # Unlike the context manager, _execute tries again while the file is locked.
                    _execute(connection, "COMMIT")
            except sqlite3.Error as error:
                slot.close()
                raise self._translate(error) from None

    def check_files(self) -> None:
        """Raise Unavailable if the file, or its -wal or -shm file, was moved, replaced or deleted.

        Writes, backups, /health/ and each opening of the file check this. For each read, it would
        cost too much. Without this check, an empty file would be created in place of one that was
        moved, and what is written to a deleted file would be lost.
        """
        is_lost = self._file_identity is not None and self._file_identity != _identify(
            self.location
        )
        if is_lost or (self.is_wal and self._has_lost_wal_files()):
            raise Unavailable(
                "the file or its -wal file was moved, replaced or deleted: put it back, or restart"
            )

    def _has_lost_wal_files(self) -> bool:
        was_open = self._is_open()
        # On Linux 6.18 a commit takes 40 us longer to sync after a stat() of the -wal file. So
        # call it only if the folder has changed, or access() does not find the file.
        folder_time = os.stat(os.path.dirname(self.location)).st_mtime_ns
        is_unchanged = folder_time == self._folder_time
        if is_unchanged and all(os.access(path, os.F_OK) for path in self._wal_paths):
            return False
        # SQLite itself deletes both when the last connection is closed, and creates new ones
        # later. So they are lost only if a connection was open before, and still is.
        files = [_identify(path) for path in self._wal_paths]
        is_lost = was_open and files != self._wal_identities and self._is_open()
        if not is_lost:
            self._folder_time = folder_time
        return is_lost

    def _is_open(self) -> bool:
        return any(slot.connection for slot in self.slots.values())

    def check_access(self) -> None:
        """Raise Unavailable if this process may not write to the file or to its folder."""
        folder = os.path.dirname(self.location)
        if not os.path.isdir(folder):
            raise Unavailable(f"create the folder {folder}")
        needed = {folder: os.W_OK | os.X_OK}
        for path in (self.location, *self._wal_paths):
            needed[path] = os.R_OK | os.W_OK
        for path, mode in needed.items():
            # SQLite may create or delete the file between two of these looks.
            if os.path.exists(path) and not os.access(path, mode) and os.path.exists(path):
                raise Unavailable(f"this user may not read and write {path}")

    def backup(self, path: str) -> None:
        """Copy the database to a new file that only its owner may read.

        The copy is complete and on disk before the file gets its name.

        :raises OSError: if the new file exists or cannot be written, or the database cannot
            be read
        :raises Unavailable: if the database was moved or deleted
        :raises Busy: if other backups take longer than BUSY_TIMEOUT
        """
        folder, name = os.path.split(path)
        path = os.path.join(os.path.realpath(folder), name)
        part = f"{path}.{os.urandom(4).hex()}.part"
        try:
            if os.path.lexists(path) or path in (self.location + "-journal", *self._wal_paths):
                raise FileExistsError(
                    "choose another name: this file exists, or SQLite would use it"
                )
            self.check_files()
            if not os.path.exists(self.location):
                raise FileNotFoundError("there is no such database")
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            # Not _connect(), which may change the journal mode and create the table: to copy a
            # database must not change it.
            with self.slots["backup"], contextlib.closing(self._open()) as connection:
                if not _execute(connection, _FIND_TABLE).fetchall():
                    raise FileNotFoundError("there is no table of users in it")
                _execute(connection, "VACUUM INTO ?", (part,))
            _sync(part, os.O_RDWR)
            _publish(part, path)
        except (OSError, UnicodeError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cannot copy {self.location} to {path}: {reason}") from None
        finally:
            for leftover in (part, part + "-journal"):
                with contextlib.suppress(OSError):
                    os.unlink(leftover)

    def close(self) -> None:
        """Close the connections, except those that are still busy after CLOSE_TIMEOUT."""
        for slot in self.slots.values():
            if slot.enter_within(CLOSE_TIMEOUT / len(self.slots)):
                slot.close()
                slot.leave()

    def _connect(self, slot: ConnectionSlot) -> sqlite3.Connection:
        """Open the file. Create the file and the table if they do not exist.

        Raise sqlite3.Error, Unavailable.
        """
        self.check_files()
        if not os.path.exists(self.location):
            # If there is no schema, fail before there is an empty file.
            _read_schema()
            # Only its owner may read the file. SQLite would let others read it.
            with contextlib.suppress(OSError):
                # Do not close this descriptor. Closing any descriptor of a file releases all
                # POSIX locks that the process holds on the file, including SQLite's
                # (sqlite.org/howtocorrupt.html, 2.2).
                os.open(self.location, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        connection = self._open()
        try:
            self._set_journal_mode(connection)
            # Sync every commit. In other modes than WAL, EXTRA also syncs the folder.
            _execute(connection, "PRAGMA synchronous = EXTRA")
            if not _execute(connection, _FIND_TABLE).fetchall():
                with connection:
                    _execute(connection, "BEGIN IMMEDIATE")
                    self.create_table(connection)
                    _execute(connection, "COMMIT")
        except BaseException:
            connection.close()
            raise
        self._file_identity = self._file_identity or _identify(self.location)
        # Remember the -wal and -shm files when the first connection is opened. If that one could
        # not switch to WAL mode, they are None, and each later connection looks again.
        if not self._is_open() or None in self._wal_identities:
            self._wal_identities = [_identify(path) for path in self._wal_paths]
        slot.connection = connection
        return connection

    def _open(self) -> sqlite3.Connection:
        """Open the file. Raise sqlite3.Error."""
        if os.path.isfile(self.location) and 0 < os.path.getsize(self.location) < MIN_DATABASE:
            # SQLite would take it for an empty database.
            raise sqlite3.DatabaseError("file is not a database")
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(self.location))}?mode=rw",
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        connection.text_factory = bytes
        return connection

    def _set_journal_mode(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL mode, where readers and a writer do not wait for each other.

        Where files cannot be mapped into memory, switch to DELETE mode.
        """
        if not _can_map_files(os.path.dirname(self.location)):
            # Without mapped files, SQLite can leave WAL mode only while it has an exclusive lock
            # on the file (sqlite.org/wal.html, 8). Afterwards, go back to normal locking: the
            # next read releases the lock.
            for setting in (
                "locking_mode = EXCLUSIVE",
                "journal_mode = DELETE",
                "locking_mode = NORMAL",
            ):
                _execute(connection, f"PRAGMA {setting}").fetchall()
        else:
            # Another process that is using the file can prevent the change. Then the old
            # mode stays.
            with contextlib.suppress(sqlite3.OperationalError):
                _execute(connection, "PRAGMA journal_mode = WAL", timeout=WAL_TIMEOUT).fetchall()
        [(mode,)] = _execute(connection, "PRAGMA journal_mode")
        self.is_wal = mode == b"wal"

    def create_table(self, connection: sqlite3.Connection) -> None:
        """Execute schema.sql in the caller's transaction.

        Raise Unavailable if it does not create the table.
        """
        schema = _read_schema()
        problem: object = 'it does not create the table "user"'
        try:
            connection.execute(schema)
        # Before Python 3.11, a second statement is an sqlite3.Warning, and NUL a ValueError.
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            problem = error
        if not connection.execute(_FIND_TABLE).fetchall():
            # A read-only file is no fault of schema.sql.
            self.check_access()
            raise Unavailable(
                f"schema.sql must be one statement that creates the table of users: {problem}. "
                "Copy the file that belongs to profiler.py"
            )
        self.created_table = True

    def _translate(self, error: sqlite3.Error) -> Exception:
        """Return Busy or Unavailable for an operational error, and others unchanged.

        The others are bugs and damaged files. Their traceback is logged.
        """
        if not isinstance(error, sqlite3.OperationalError):
            return error
        if "is locked" in str(error):
            return Busy(str(error))
        try:
            # SQLite's own message does not name the path.
            self.check_access()
        except Unavailable as obstacle:
            return Unavailable(f"{error}: {obstacle}")
        hint = f", or no id is left because {MAX_ID} was used" if "full" in str(error) else ""
        return Unavailable(f"{error}{hint}")


def read_installed_file(name: str) -> bytes:
    """Return a file that is installed with this module. Raise OSError.

    The module may be a plain file, or come from a wheel or a zip archive.
    """
    # mod_wsgi loads a module without a loader.
    loader = globals().get("__loader__")
    get_data = getattr(loader, "get_data", SourceFileLoader("", "").get_data)
    # If the module is a symbolic link, look next to its target, too.
    for module in (__file__, os.path.realpath(__file__)):
        here = os.path.dirname(module)
        # A wheel has the files in a folder, where no other package overwrites them.
        for folder in ("profiler_users", ""):
            with contextlib.suppress(OSError):
                return bytes(get_data(os.path.join(here, folder, name)))
    here = os.path.dirname(os.path.abspath(__file__))
    raise FileNotFoundError(f"{name} is missing: copy it to {here}, next to this module")


def _read_schema() -> str:
    try:
        return read_installed_file("schema.sql").decode()
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"cannot read schema.sql: {error}") from None


def _execute(
    connection: sqlite3.Connection,
    statement: str,
    parameters: Any = (),
    timeout: float | None = None,
) -> sqlite3.Cursor:
    """Execute a statement. While another connection holds the lock, try again.

    Give up after `timeout` seconds, by default BUSY_TIMEOUT. Raise sqlite3.Error.
    """
    deadline = None
    while True:
        try:
            return connection.execute(statement, parameters)
        except sqlite3.OperationalError as error:
            now = time.monotonic()
            deadline = deadline or now + (BUSY_TIMEOUT if timeout is None else timeout)
            if "is locked" not in str(error) or now > deadline:
                raise
        # SQLite's own busy handler sleeps up to 100 ms between attempts, so it would lose to
        # writers that try more often.
        time.sleep(RETRY_INTERVAL)


def _identify(path: str) -> tuple[int, int] | None:
    """Return the device and the inode of a file, or None if it does not exist."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def _can_map_files(folder: str) -> bool:
    """Return False if files in a folder cannot be mapped into memory.

    This happens on 9p (WSL 2's /mnt/c), and on some FUSE file systems and shared folders.
    The test creates a small file and deletes it, once for each connection.
    """
    path = os.path.join(folder, f".{os.urandom(8).hex()}.profiler")
    is_refused = False
    # If no file can be created, opening the database says why.
    with contextlib.suppress(OSError), open(path, "xb+") as file:
        file.write(b"x")
        file.flush()
        try:
            mmap.mmap(file.fileno(), 1).close()
        except OSError:
            is_refused = True
    with contextlib.suppress(OSError):
        os.unlink(path)
    return not is_refused


def _sync(path: str, flags: int) -> None:
    """Write a file or a folder to the disk. Raise OSError."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(old: str, new: str) -> None:
    """Give a file a new name. The old name may stay.

    Raise OSError, and FileExistsError if a file has the new name. Without links (FAT), that file
    is replaced, so the caller must look first.
    """
    try:
        # link() fails if there is a file of that name, rename() would replace it.
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:
        # FAT has no links.
        os.rename(old, new)
    # Write the name to the disk, too, where the system can open and sync a folder.
    with contextlib.suppress(OSError):
        _sync(os.path.dirname(new), os.O_RDONLY)


# -- users -----------------------------------------------------------------------------
# The storage: a table of users in SQLite. To write another storage, implement `Storage`. A
# storage also counts wrong passwords, so that another one can do that in its database.

MAX_WAITING_SEARCHES = 64  # searches that wait for their turn: a quarter of the server's WORKERS
MAX_TRACKED = 10_000  # accounts whose wrong passwords are counted in memory
# OWASP ASVS 6.3.1 asks for such a limit. Attempts are slowed down, however many fail: with the
# cap of NIST SP 800-63B 5.2.2, 100 failures, anybody could lock out a user for good.
MAX_FAILURES = 10  # consecutive wrong passwords of an account
ATTEMPT_INTERVAL = 60.0  # seconds between attempts after that
PROFILE = ("first_name", "last_name", "email")


class EmailTaken(Exception):
    """Another user has this email, or one that differs only in the case of ASCII letters."""


class NoSuchUser(Exception):
    """No user has this id."""


class TooManyAttempts(Exception):
    """Too many wrong passwords. Try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__()
        self.retry_after = retry_after


class Storage(Protocol):
    """A storage of users. profiler_sqlalchemy.py has another one.

    A user is a JSON object in UTF-8, with the members id, first_name, last_name, email and
    created_on (`YYYY-MM-DD HH:MM:SS`, in UTC). Ids are from 1 to MAX_ID. The id of a deleted
    user is not used again. Emails are compared ignoring the case of ASCII letters. Any
    number of threads may call the methods. Each of them may also raise Unavailable, or Busy
    if the same call may succeed in a moment; for a damaged database, it raises what its
    library raises. The values of fields have been checked: see Accounts.
    """

    location: str  # the path or the URL, for people, without a password
    failures: Failures  # counts wrong passwords, in memory or in the database

    @property
    def short_reads_may_wait(self) -> bool:
        """True if a short read may have to wait.

        Short reads are get, ping, and page for at most SHORT_PAGE users without email or text.
        """

    def find_credentials(self, key: int | str) -> tuple[int, str] | None:
        """Return the id and the password hash of the user with an id or an email, or None.

        The email may be any text without lone surrogates.
        """

    def get(self, user_id: int) -> bytes:
        """Return a user. Raise NoSuchUser."""

    def page(
        self,
        limit: int,
        after: int | None = None,
        descending: bool = False,
        email: str | None = None,
        text: str = "",
    ) -> tuple[bytes, int | None]:
        """Return at most `limit` users in the order of their ids, separated by commas.

        The second value is the `after` of the next page, or None on the last page.

        :param after: start after this id
        :param email: return only the user with this email
        :param text: return only users whose names or email contain this text, ignoring the
            case of ASCII letters
        """

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """Change the fields that are given, of first_name, last_name and email.

        Raise NoSuchUser, EmailTaken, and what the guard raises.
        """

    def delete(self, user_id: int, guard: Guard | None = None) -> None:
        """Delete the user with an id, if there is one. Raise what the guard raises."""

    def replace_password_hash(
        self, user_id: int, expected: str | None, new: str, guard: Guard | None = None
    ) -> bool:
        """Replace a user's password hash. Raise what the guard raises.

        `expected` is the hash that must still be stored; None replaces any hash. Return
        False if the user or the expected hash is gone.
        """

    def count(self) -> int:
        """Return the number of users."""

    def ping(self) -> None:
        """Raise Unavailable unless users can be served."""

    def initialise(self, force: bool = False) -> bool:
        """Create the table, and return True. If an empty one exists, keep it and return False.

        Raise FileExistsError if it holds users. With `force`, drop it and create a new one, in
        which ids begin at 1 again.
        """

    def backup(self, path: str) -> None:
        """Copy all users to a new file. Raise OSError."""

    def close(self) -> None:
        """Close all connections. The next call opens new ones."""


def check_failure_count(count: int, elapsed: float) -> None:
    """Raise TooManyAttempts if this number of wrong passwords forbids another attempt now.

    :param elapsed: seconds since the last one
    """
    if count >= MAX_FAILURES and elapsed < ATTEMPT_INTERVAL:
        raise TooManyAttempts(math.ceil(ATTEMPT_INTERVAL - elapsed))


class Failures:
    """Counts the consecutive wrong passwords of each account, in the memory of a process.

    An account is the id of a user, or the digest of an unknown email. Each process counts for
    itself. A CGI program, which is a new process for each request, counts nothing.
    """

    def __init__(self) -> None:
        # A fork could leave a threading.Lock locked in the child.
        self._lock = CapacityLimiter("the counts of wrong passwords", BUSY_TIMEOUT)
        # For each account, the number of wrong passwords and the time of the last one. The
        # account whose last one is oldest comes first.
        self._counts: dict[int | bytes, tuple[int, float]] = {}

    def check(self, account: int | bytes) -> int:
        """Return the count. Raise TooManyAttempts if another attempt must wait."""
        count, last = self._counts.get(account, (0, 0.0))
        check_failure_count(count, time.monotonic() - last)
        return count

    def check_early(self, account: int | bytes) -> None:
        """Do the same before a password is hashed, so that none is hashed in vain.

        A subclass may leave this out where it takes long.
        """
        self.check(account)

    def add(self, account: int | bytes) -> None:
        """Add one to the count, or raise TooManyAttempts."""
        with self._lock:
            # Not self.check: a subclass that also counts in a database reads that count there.
            count = Failures.check(self, account)
            # Insert it anew, as the most recent one.
            self._counts.pop(account, None)
            self._counts[account] = count + 1, time.monotonic()
            if len(self._counts) > MAX_TRACKED:
                del self._counts[next(iter(self._counts))]

    def clear(self, account: int | bytes) -> None:
        """Set the count to 0."""
        with self._lock:
            self._counts.pop(account, None)


# Cast, because another program may have stored anything: json_object takes no BLOB, and
# created_on may be a number.
_USER_JSON = """json_object('id', id, 'first_name', CAST(first_name AS TEXT),
    'last_name', CAST(last_name AS TEXT), 'email', CAST(email AS TEXT),
    'created_on', CAST(created_on AS TEXT))"""
_PASSWORD_HASH = "coalesce(CAST(password AS TEXT), '')"
# It names all columns, so that a missing one is an error.
_CHECK_COLUMNS = f'SELECT {_USER_JSON}, password FROM "user" LIMIT 1'
_SELECT_USER = f'SELECT {_USER_JSON} FROM "user" WHERE id = ?'
_CONTAINS = r"""AND (first_name LIKE :text ESCAPE '\' OR last_name LIKE :text ESCAPE '\'
    OR email LIKE :text ESCAPE '\')"""


@functools.cache
def _page_statement(descending: bool, by_email: bool, by_text: bool) -> str:
    """Return a SELECT of the users on a page, the id of the last, and whether more follow."""
    beyond, outermost, order = ("<", "min", "DESC") if descending else (">", "max", "ASC")
    conditions = "AND email = :email COLLATE NOCASE " if by_email else ""
    if by_text:
        conditions += _CONTAINS
    # Only a full page may have a next one. Looking for it can take another scan of the table.
    # CASE avoids this. AND would not, because SQLite may evaluate both sides of it.
    # SQLite does not document the order of group_concat over a subquery. In practice it is
    # the order of the subquery, which tests check. To join rows in Python makes lists 1.5
    # times slower.
    return f"""
WITH page AS (
    SELECT group_concat(user, ',') AS users, {outermost}(id) AS last,
        count(*) = :limit AS is_full
    FROM (
        SELECT id, {_USER_JSON} AS user FROM "user"
        WHERE id {beyond} :after {conditions}
        ORDER BY id {order} LIMIT :limit
    )
)
SELECT users, last,
    CASE WHEN is_full THEN EXISTS (SELECT 1 FROM "user" WHERE id {beyond} last {conditions}) END
FROM page
"""


class Users(Database):
    """The users in an SQLite file: a Storage.

    SQLite produces the JSON, so a read builds no objects in Python.
    """

    def __init__(self, path: StrOrBytesPath | None = None) -> None:
        """Store the path. The file is opened, and if necessary created, on first use.

        :param path: the SQLite file; default: PROFILER_DATABASE, or else ./db.sqlite3
        :raises ValueError: if it is not the path of a file
        """
        if path is None:
            path = os.environ.get("PROFILER_DATABASE") or DATABASE
        super().__init__(os.fsdecode(path))
        self.failures = Failures()
        # One for each kind of read. A server may run short reads in the thread that serves all
        # clients: in their own slot, they never wait for a slow statement. To look up an email
        # may be slow: in a table of the tutorial, no index of the emails ignores case.
        self.slots["short read"] = ConnectionSlot()
        self.slots["look-up"] = ConnectionSlot()
        self.slots["list"] = ConnectionSlot()
        self.slots["search"] = ConnectionSlot(MAX_WAITING_SEARCHES)

    @property
    def short_reads_may_wait(self) -> bool:
        """See Storage."""
        # A read waits while the file is opened and, outside WAL mode, for a writer.
        return self.slots["short read"].connection is None or not self.is_wal

    def find_credentials(self, key: int | str) -> tuple[int, str] | None:
        """See Storage."""
        condition = "id = :key"
        if isinstance(key, str):
            # The table that the tutorial created may have emails that differ in case only.
            condition = "email = :key COLLATE NOCASE ORDER BY email = :key COLLATE BINARY DESC"
        statement = f'SELECT id, {_PASSWORD_HASH} FROM "user" WHERE {condition}'
        rows = self.read("look-up", statement, {"key": key})
        return (rows[0][0], rows[0][1].decode(errors="replace")) if rows else None

    def get(self, user_id: int) -> bytes:
        """See Storage."""
        rows = self.read("short read", _SELECT_USER, (user_id,))
        if not rows:
            raise NoSuchUser
        return _to_utf8(rows[0][0])

    def page(
        self,
        limit: int,
        after: int | None = None,
        descending: bool = False,
        email: str | None = None,
        text: str = "",
    ) -> tuple[bytes, int | None]:
        """See Storage."""
        start = math.inf if descending else -math.inf
        parameters = {
            "after": start if after is None else after,
            "limit": limit,
            "email": email,
            "text": "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%",
        }
        statement = _page_statement(descending, email is not None, bool(text))
        if text:
            kind = "search"
        elif email is not None:
            kind = "look-up"
        elif limit > SHORT_PAGE:
            kind = "list"
        else:
            kind = "short read"
        [(users, last, more)] = self.read(kind, statement, parameters)
        return _to_utf8(users or b""), last if more else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """See Storage."""
        # The table that the tutorial created allows emails that differ in case only.
        statement = """
INSERT INTO "user" (first_name, last_name, email, password)
SELECT :first_name, :last_name, :email, :password_hash
WHERE NOT EXISTS (SELECT 1 FROM "user" WHERE email = :email COLLATE NOCASE)
"""
        fields = {
            "first_name": first_name,
            "last_name": last_name,
            "email": email,
            "password_hash": password_hash,
        }
        with self.transaction() as connection:
            cursor = connection.execute(statement, fields)
            if cursor.rowcount == 0:
                raise EmailTaken
            # After an insert it is not None. The type checker does not know that.
            return cursor.lastrowid or 0

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """See Storage."""
        statement = """
UPDATE "user" SET first_name = coalesce(:first_name, first_name),
    last_name = coalesce(:last_name, last_name), email = coalesce(:email, email)
WHERE id = :id
    AND NOT EXISTS (SELECT 1 FROM "user" WHERE email = :email COLLATE NOCASE AND id <> :id)
"""
        parameters = {**dict.fromkeys(PROFILE), **fields, "id": user_id}
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            if connection.execute(statement, parameters).rowcount == 0:
                exists = connection.execute(_SELECT_USER, (user_id,)).fetchall()
                raise EmailTaken if exists else NoSuchUser

    def delete(self, user_id: int, guard: Guard | None = None) -> None:
        """See Storage."""
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            connection.execute('DELETE FROM "user" WHERE id = ?', (user_id,))

    def replace_password_hash(
        self, user_id: int, expected: str | None, new: str, guard: Guard | None = None
    ) -> bool:
        """See Storage."""
        statement = f"""
UPDATE "user" SET password = :new
WHERE id = :id AND (:expected IS NULL OR {_PASSWORD_HASH} = :expected)
"""
        parameters = {"id": user_id, "expected": expected, "new": new}
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            return connection.execute(statement, parameters).rowcount > 0

    def count(self) -> int:
        """See Storage."""
        [(count,)] = self.read("list", 'SELECT count(*) FROM "user"')
        return int(count)

    def ping(self) -> None:
        """See Storage."""
        self.check_files()
        self.check_access()
        # Forget what was read, so that a damaged file is noticed.
        self.read("short read", "PRAGMA shrink_memory")
        self.read("short read", _CHECK_COLUMNS)

    def initialise(self, force: bool = False) -> bool:
        """See Storage."""
        self.created_table = False
        # This opens the file, which creates a missing table.
        with self.transaction() as connection:
            [(count,)] = connection.execute('SELECT count(*) FROM "user"')
            if count and not force:
                raise FileExistsError(f"the table holds users ({count}): --force deletes them")
            if force:
                connection.execute('DROP TABLE "user"')
                self.create_table(connection)
            connection.execute(_CHECK_COLUMNS)
        if force:
            # Ids begin at 1 again. Do not count against new users what others failed.
            self.failures = Failures()
        return self.created_table


def _to_utf8(text: bytes) -> bytes:
    # Another program may have stored invalid UTF-8.
    return text if text.isascii() else text.decode(errors="replace").encode()


def _run_guard(connection: sqlite3.Connection, user_id: int, guard: Guard | None) -> None:
    if guard:
        rows = connection.execute(_SELECT_USER, (user_id,)).fetchall()
        guard(_to_utf8(rows[0][0]) if rows else None)


# -- accounts --------------------------------------------------------------------------
# The rules: which values a field may have, how passwords are hashed and verified, and how
# many wrong ones an account may have. Methods that create or change a user check the fields.
# Methods that verify or find one only compare, so that users whose emails were stored under
# other rules can log in.

HASH_TIMEOUT = 10.0  # seconds to wait for a core to hash on
MAX_WAITING_HASHES = 128  # requests that wait for a core: half of the server's WORKERS

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SURROGATE = re.compile("[\ud800-\udfff]")
# Unicode's property Default_Ignorable_Code_Point (DerivedCoreProperties.txt).
_INVISIBLE = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BLANK = re.compile(rf"(?:\s|{_INVISIBLE})*")
_EMAIL = re.compile(rf"(?:(?!{_INVISIBLE})[^@\s])+@(?:(?!{_INVISIBLE})[^@\s])+")


class WrongPassword(Exception):
    """The password is wrong, or no user has the email.

    The message, if there is one, is for the operator.
    """


def is_blank(value: object) -> bool:
    """Return True for a text without visible characters."""
    return isinstance(value, str) and bool(_BLANK.fullmatch(value))


def check_text(name: str, value: object) -> str:
    """Return a value if it can be compared with stored ones. Raise InvalidField."""
    if not isinstance(value, str):
        problem = "must be a string"
    elif _SURROGATE.search(value):
        problem = "must not contain a lone surrogate"
    elif "\0" in value:
        # Most fields may not contain any control character, so do not name NUL only.
        kind = "the NUL character" if "password" in name else "control characters"
        problem = f"must not contain {kind}"
    else:
        return value
    raise InvalidField(f"{name} {problem}")


def check_field(name: str, value: object) -> str:
    """Return the value of a field if it may be stored. Raise InvalidField.

    The rules for `q`, the text of a search, are those for first_name, but it may be blank.
    """
    text = check_text(name, value)
    is_password = name in ("password", "new_password")
    max_length = MAX_PASSWORD if is_password else MAX_NAME
    if is_blank(text) and name != "q":
        problem = "must not be blank"
    elif name == "password_hash":
        if parse_hash(text):
            return text
        problem = (
            "must be a PBKDF2-SHA256 or scrypt hash of Werkzeug, Django or passlib, of moderate "
            "cost: others, such as bcrypt, cannot be verified here"
        )
    elif not is_password and _CONTROL.search(text):
        problem = "must not contain control characters"
    elif name == "email" and not (len(text) <= MAX_EMAIL and _EMAIL.fullmatch(text)):
        problem = (
            f"must be an address such as harry@example.com, of at most {MAX_EMAIL} visible "
            "characters"
        )
    elif len(text) > max_length:
        problem = f"must have at most {max_length} characters"
    else:
        return text
    raise InvalidField(f"{name} {problem}")


def check_fields(**fields: str) -> None:
    """Raise InvalidField unless all values may be stored."""
    for name, value in fields.items():
        check_field(name, value)


class Accounts:
    """The rules of accounts, on a storage of users. Any number of threads may call it.

    Every method may also raise what the methods of the storage raise: Unavailable, or Busy
    if the same call may succeed in a moment. For what has no rules, call the storage:
    `accounts.users.get(1)`.
    """

    def __init__(self, users: Storage, iterations: int | str | None = None) -> None:
        """Use a storage. Nothing is opened yet.

        :param users: the storage, such as `Users("accounts.sqlite3")`
        :param iterations: of PBKDF2 for new passwords; default: PROFILER_ITERATIONS, or
            else 600,000
        :raises ValueError: if the number is not from 1 to 10,000,000
        """
        if iterations is None:
            iterations = os.environ.get("PROFILER_ITERATIONS") or ITERATIONS
        self.users = users
        self.iterations = parse_number(str(iterations), "iterations", 1, MAX_ITERATIONS)
        # If there is no user or no usable hash, the password is verified with this hash, so that
        # the response takes as long as for a wrong password.
        self._dummy_hash = f"pbkdf2:sha256:{self.iterations}${'0' * 2 * SALT_BYTES}${'0' * 64}"
        self._cores = CapacityLimiter(
            "a core to hash a password", HASH_TIMEOUT, count_cores(), MAX_WAITING_HASHES
        )

    def create(self, first_name: str, last_name: str, email: str, password: str) -> int:
        """Store a new user.

        :param first_name: at most 255 characters, without control characters, not blank
        :param last_name: the same
        :param email: an address of at most 254 characters
        :param password: at most 1,024 characters, without NUL, not blank
        :return: the id
        :raises InvalidField: if a value is not allowed
        :raises EmailTaken: if another user has the email
        """
        check_fields(first_name=first_name, last_name=last_name, email=email, password=password)
        # Do not hash for an email that is taken. Only the insert decides whether it is free.
        if self.users.find_credentials(email):
            raise EmailTaken
        with self._cores:
            password_hash = hash_password(password, self.iterations)
        return self.users.insert(first_name, last_name, email, password_hash)

    def import_user(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user with a password that is hashed already.

        :param password_hash: a hash in one of the formats of Werkzeug, Django and passlib
        :return: the id
        :raises InvalidField: if a value is not allowed
        :raises EmailTaken: if another user has the email
        """
        check_fields(
            first_name=first_name,
            last_name=last_name,
            email=email,
            password_hash=password_hash,
        )
        return self.users.insert(first_name, last_name, email, password_hash)

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """Change names and email of a user.

        :param fields: new values of first_name, last_name and email, or of some of them
        :param guard: a check inside the transaction: see Guard
        :raises InvalidField: if a value is not allowed, or `fields` has another key
        :raises NoSuchUser: if no user has the id
        :raises EmailTaken: if another user has the email
        """
        for name in fields:
            if name not in PROFILE:
                raise InvalidField(f"{name} cannot be updated: allowed are {', '.join(PROFILE)}")
        check_fields(**fields)
        self.users.update(user_id, fields, guard)

    def verify(self, email: str, password: str) -> int:
        """Verify a password, and replace a hash that is weak or of another format.

        :return: the id of the user
        :raises WrongPassword: if the password is wrong, or no user has the email
        :raises TooManyAttempts: if the account had too many wrong passwords
        :raises InvalidField: if a value is no text, or contains NUL or a lone surrogate
        """
        check_text("email", email)
        check_text("password", password)
        while True:
            found = self.users.find_credentials(email)
            # bytes.lower() changes ASCII letters only.
            email_digest = hashlib.sha256(email.encode().lower()).digest()
            account, password_hash = found or (email_digest, self._dummy_hash)
            with self._cores:
                self._check_password(account, password_hash, password)
                new_hash = None
                if needs_rehash(password_hash, self.iterations):
                    new_hash = hash_password(password, self.iterations)
            # No password is known to match the dummy hash. If one did, it would end here.
            if found is None:
                raise WrongPassword
            user_id = found[0]
            # If the new hash cannot be stored, the next login tries again.
            with contextlib.suppress(Unavailable):
                if new_hash and self.users.replace_password_hash(user_id, password_hash, new_hash):
                    return user_id
            # During the hash, the user may have been deleted, or the password changed.
            if self.users.find_credentials(email) == found:
                return user_id

    def change_password(
        self, user_id: int, old_password: str, new_password: str, guard: Guard | None = None
    ) -> None:
        """Replace a user's password if the old one is right.

        :param new_password: at most 1,024 characters, without NUL, not blank
        :param guard: a check inside the transaction: see Guard
        :raises InvalidField: if the new password is not allowed, or the old one is no text, or
            contains NUL or a lone surrogate
        :raises NoSuchUser: if no user has the id
        :raises WrongPassword: if the old password is wrong
        :raises TooManyAttempts: if the account had too many wrong passwords
        """
        check_text("old_password", old_password)
        check_field("new_password", new_password)
        while True:
            password_hash = self._get_password_hash(user_id)
            with self._cores:
                self._check_password(user_id, password_hash, old_password)
                new_hash = hash_password(new_password, self.iterations)
            if self.users.replace_password_hash(user_id, password_hash, new_hash, guard):
                return
            # Meanwhile the hash was replaced, or the user deleted. Start again.

    def reset_password(self, user_id: int, new_password: str, guard: Guard | None = None) -> None:
        """Replace a user's password, whatever it is, and forget wrong passwords.

        :param new_password: at most 1,024 characters, without NUL, not blank
        :param guard: a check inside the transaction: see Guard
        :raises InvalidField: if the new password is not allowed
        :raises NoSuchUser: if no user has the id
        """
        check_field("new_password", new_password)
        # Do not hash for a user who does not exist.
        self._get_password_hash(user_id)
        with self._cores:
            new_hash = hash_password(new_password, self.iterations)
        if not self.users.replace_password_hash(user_id, None, new_hash, guard):
            raise NoSuchUser
        self.users.failures.clear(user_id)

    def _get_password_hash(self, user_id: int) -> str:
        """Return the password hash of the user with an id. Raise NoSuchUser."""
        found = self.users.find_credentials(user_id)
        # A caller may have passed an email, which finds a user, too.
        if found is None or found[0] != user_id:
            raise NoSuchUser
        return found[1]

    def _check_password(self, account: int | bytes, password_hash: str, password: str) -> None:
        """Return if the password is right, and count it if it is wrong.

        Raise WrongPassword, TooManyAttempts. For an unknown email or an unusable hash this takes
        as long as for a hash with the current iterations, so that the time reveals neither.
        """
        if len(password) > MAX_PASSWORD:
            # No hash can match. If such cheap attempts counted, a flood of them would push
            # the counts of others out of the memory.
            raise WrongPassword
        failures = self.users.failures
        failures.check_early(account)
        is_usable = parse_hash(password_hash) is not None
        is_right = verify_password(password_hash if is_usable else self._dummy_hash, password)
        # Meanwhile, other attempts may have reached the limit. Then add() and check() raise
        # TooManyAttempts, whether this password is right or not.
        if not (is_right and is_usable):
            failures.add(account)
            if is_usable:
                raise WrongPassword
            raise WrongPassword(
                f"the password hash of user {account!r} is malformed or cannot be verified here"
            )
        if failures.check(account):
            failures.clear(account)


def count_cores() -> int:
    """Return the number of cores that this process may use, within its CPU quota.

    The quota is that of its own cgroup (Linux, cgroup v2), not of those above.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup") as file:
            cgroup = file.read().partition("0::")[2].strip()
        with open(f"/sys/fs/cgroup{cgroup}/cpu.max") as file:
            quota, period = map(int, file.read().split())
        cores = min(cores, max(1, round(quota / period)))
    return cores


# -- HTTP ------------------------------------------------------------------------------
# Requests and responses, independent of the endpoints.

# Python's JSON parser fails at about 1,000 levels. To count all brackets is simpler than to
# find the depth.
MAX_BRACKETS = 500  # [ and { in a body, also in strings
MAX_TAGS = 100  # entity tags in If-Match and If-None-Match; others are ignored
MAX_PARAMETERS = 20  # of a query; there are five

JSON_TYPE = ("Content-Type", "application/json")
# Sent with every response. no-store keeps responses out of caches. A client that keeps an
# entity tag itself can still send it in If-Match or If-None-Match. Without X-Frame-Options,
# another website could find out which ids exist, by embedding them as <object data>.
_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
)
# The values for start_response: `200 OK`.
_STATUSES = {int(status): f"{status.value} {status.phrase}" for status in HTTPStatus}
_OTHER_CHARSET = re.compile(";charset=(?!utf-?8(;|$))")
# Our entity tag, also as compressing proxies change it: W/ in front (nginx), or -gzip before
# the closing quote (Apache).
_ENTITY_TAG = re.compile(r'^(?:W/)?("[0-9a-f]{32})(?:-[a-z]+)?"\Z')


class HTTPError(Exception):
    """An error response: its status, a message for the client, extra headers."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def to_wsgi(response: Response) -> WSGIResponse:
    """Return the status, all headers and the body for a WSGI server.

    A complete body is a tuple of one part. The built-in server streams any other iterable.
    """
    status, body, extra = response
    if isinstance(body, dict):
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        body = text.encode() + b"\n"
        extra = (JSON_TYPE, *extra)
    if isinstance(body, bytes):
        length = ("Content-Length", f"{len(body)}")
        return _STATUSES[status], [*_HEADERS, *extra, length], (body,)
    # Send one empty part. Without any, hypercorn never sends the head.
    return _STATUSES[status], [*_HEADERS, *extra], body or (b"",)


def read_object(environ: WSGIEnvironment, *media_types: str) -> dict[str, Any]:
    """Return the JSON object in the body. Raise HTTPError: 400, 411, 413, 415.

    Its media type must be application/json or one of `media_types`.
    """
    content_type = re.sub(r'[\s"]', "", environ.get("CONTENT_TYPE", "").lower())
    media_type = content_type.partition(";")[0]
    has_other_charset = _OTHER_CHARSET.search(content_type)
    if media_type not in ("application/json", *media_types) or has_other_charset:
        raise HTTPError(415, "Send the body as Content-Type: application/json, in UTF-8")
    body = _read_body(environ)
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise HTTPError(400, f"The body must have at most {MAX_BRACKETS} opening brackets")
    try:
        # Some programs put a byte order mark in front.
        text = body.decode().removeprefix("\ufeff")
        # parse_int=float avoids the quadratic cost of huge integers. No field needs an int.
        value = json.loads(text, parse_int=float)
    except UnicodeDecodeError:
        raise HTTPError(400, "The body must be UTF-8") from None
    except ValueError as error:
        raise HTTPError(400, f"The body must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPError(400, "The body must be a JSON object")
    return value


def require_fields(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the named members of an object.

    Raise HTTPError: 400 if one is missing, blank, or false in Python (null, 0, [] and so on).
    """
    if any(is_blank(fields.get(name) or "") for name in names):
        raise HTTPError(400, "Required fields are missing")
    return {name: fields[name] for name in names}


def parse_query(environ: WSGIEnvironment) -> dict[str, str]:
    """Return the query parameters. The last of repeated ones wins. Raise HTTPError: 400."""
    query = environ.get("QUERY_STRING", "").encode("latin-1", "replace").decode("utf-8", "replace")
    if query.count("&") >= MAX_PARAMETERS:
        raise HTTPError(400, f"Send at most {MAX_PARAMETERS} parameters")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if "email" in parameters:
        # HTML forms write a space as "+", but in an address "+" stands for itself.
        literal = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))
        parameters["email"] = literal["email"]
    return parameters


def make_entity_tag(user: bytes) -> str:
    """Return the strong entity tag of a user's JSON (RFC 9110 8.8.3)."""
    return f'"{hashlib.sha256(user).hexdigest()[:32]}"'


def evaluate_preconditions(environ: WSGIEnvironment, user: bytes | None) -> bool:
    """Evaluate the preconditions (RFC 9110 13.2.2). Return True if the response is a 304.

    Raise HTTPError: 412 if one is false. Raise NoSuchUser.
    """
    # An unknown user is a 404 before any precondition (13.2.1). DELETE has no such 404.
    if user is None and environ["REQUEST_METHOD"] != "DELETE":
        raise NoSuchUser
    if_match = environ.get("HTTP_IF_MATCH")
    if_none_match = environ.get("HTTP_IF_NONE_MATCH")
    if if_match is not None and not _has_tag(if_match, user):
        changed = "The user has changed: get it again, then decide"
        raise HTTPError(412, changed if user else "No user has this id")
    if if_none_match is None or not _has_tag(if_none_match, user):
        return False
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise HTTPError(412, "The user matches If-None-Match")
    return True


def make_guard(environ: WSGIEnvironment) -> Guard | None:
    """Return a guard that evaluates the preconditions, or None if there are none."""
    if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
        return functools.partial(evaluate_preconditions, environ)
    return None


def _has_tag(field: str, user: bytes | None) -> bool:
    """Return True if a list has the user's entity tag, or is "*" and there is a user."""
    # Our own tags contain no comma.
    listed = field.split(",")[:MAX_TAGS]
    tags = [_ENTITY_TAG.sub(r'\1"', tag.strip(" \t")) for tag in listed]
    return user is not None and (tags == ["*"] or make_entity_tag(user) in tags)


def parse_length(text: str) -> int:
    """Return the value of Content-Length (RFC 9110 8.6). Raise HTTPError: 400, 413."""
    if not DIGITS.fullmatch(text):
        raise HTTPError(400, "Content-Length must be a number in decimal digits")
    if int(text) > MAX_BODY:
        raise HTTPError(413, f"The body must be at most {MAX_BODY} bytes")
    return int(text)


def _read_body(environ: WSGIEnvironment) -> bytes:
    """Read Content-Length bytes. Raise HTTPError: 400, 411, 413.

    Without a length, read to the end if the server sets wsgi.input_terminated.
    """
    is_terminated = environ.get("wsgi.input_terminated", False)
    is_chunked = "HTTP_TRANSFER_ENCODING" in environ
    if is_chunked and not is_terminated:
        raise HTTPError(411, "This server takes no chunked body: send a Content-Length")
    size = 0 if is_chunked else parse_length(environ.get("CONTENT_LENGTH") or "0")
    limit = size or (MAX_BODY + 1 if is_terminated else 0)
    body = b""
    try:
        while len(body) < limit and (part := environ["wsgi.input"].read(limit - len(body))):
            body += part
    except Exception:
        # Each server has its own exceptions for a broken body.
        raise HTTPError(400, "The body could not be read to its end") from None
    if len(body) > MAX_BODY:
        raise HTTPError(413, f"The body must be at most {MAX_BODY} bytes")
    if len(body) < size:
        raise HTTPError(400, "The body is shorter than its Content-Length")
    return body


# -- endpoints -------------------------------------------------------------------------
# A handler takes the accounts, the environ and, if its path contains one, the id of a user.
# It raises HTTPError for a bad request, and what the methods of accounts and users raise.
# See HANDLERS.

NOTHING_HERE = "Nothing is here: the users are at /users/"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/openapi.json": ("openapi.json", "application/json"),
}


def create_user(accounts: Accounts, environ: WSGIEnvironment) -> Response:
    """Return 201 with the new id and the user's location.

    The body has a password or, to import a user, a password_hash.
    """
    fields = read_object(environ)
    if "password_hash" not in fields:
        user_id = accounts.create(**require_fields(fields, *PROFILE, "password"))
    elif "password" in fields:
        raise HTTPError(400, "password_hash and password exclude each other: send one of them")
    else:
        user_id = accounts.import_user(**require_fields(fields, *PROFILE, "password_hash"))
    location = ("Location", _make_path(environ, f"users/{user_id}/"))
    return 201, {"id": user_id}, (location,)


def list_users(accounts: Accounts, environ: WSGIEnvironment) -> Response:
    """Return 200 with an array of users. The query may have limit, after, sort, email and q.

    With limit, email or q, the response is one page, with a link to the next one. Otherwise it
    has all users, and is streamed if they are many.
    """
    query = parse_query(environ)
    limit, after, descending, email, text = parse_selection(query)
    page, next_after = accounts.users.page(limit, after, descending, email, text)
    if next_after is None:
        return 200, b"[%b]\n" % page, (JSON_TYPE,)
    if "limit" not in query and not text and email is None:
        return 200, _stream_users(accounts.users, page, next_after, descending), (JSON_TYPE,)
    position = {"limit": limit, "after": next_after}
    # limit and after come first, and replace those of this request.
    following = urlencode({**position, **query, **position}, quote_via=quote)
    url = f"{_make_path(environ, 'users/')}?{following}"
    return 200, b"[%b]\n" % page, (JSON_TYPE, ("Link", f'<{url}>; rel="next"'))  # RFC 8288


def get_user(accounts: Accounts, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 200 with the user, or 304 if the client has the same."""
    user = accounts.users.get(user_id)
    entity_tag = ("ETag", make_entity_tag(user))
    is_not_modified = evaluate_preconditions(environ, user)
    if is_not_modified:
        return 304, None, (entity_tag,)
    return 200, user + b"\n", (JSON_TYPE, entity_tag)


def update_user(accounts: Accounts, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 200 with the id.

    PUT needs all fields of a profile. PATCH changes those in the body (RFC 7396). Members of
    the body that are no fields of a profile are ignored.
    """
    if environ["REQUEST_METHOD"] == "PUT":
        changes = require_fields(read_object(environ), *PROFILE)
    else:
        fields = read_object(environ, "application/merge-patch+json")
        changes = {name: fields[name] for name in PROFILE if name in fields}
    accounts.update(user_id, changes, make_guard(environ))
    return 200, {"id": user_id}, ()


def delete_user(accounts: Accounts, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204, whether the user existed or not. An id above MAX_ID is 404 for all methods."""
    accounts.users.delete(user_id, make_guard(environ))
    return 204, None, ()


def change_password(accounts: Accounts, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204 if the old password was right."""
    fields = require_fields(read_object(environ), "old_password", "new_password")
    accounts.change_password(user_id, **fields, guard=make_guard(environ))
    return 204, None, ()


def reset_password(accounts: Accounts, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204. The old password is not needed: any client that has access may do this."""
    fields = require_fields(read_object(environ), "new_password")
    accounts.reset_password(user_id, **fields, guard=make_guard(environ))
    return 204, None, ()


def verify_user(accounts: Accounts, environ: WSGIEnvironment) -> Response:
    """Return 200 with the user's id, or 403.

    401 would ask the client for another token (RFC 9110 15.5.2).
    """
    user_id = accounts.verify(**require_fields(read_object(environ), "email", "password"))
    return 200, {"id": user_id}, ()


def get_health(accounts: Accounts, environ: WSGIEnvironment) -> Response:
    """Return 200 if users can be served."""
    accounts.users.ping()
    return 200, {"status": "ok"}, ()


def get_file(accounts: Accounts, environ: WSGIEnvironment) -> Response:
    """Return 200 with the page or the OpenAPI document, or 404 if it is not installed.

    Return 308 for the page at /mount, where the service is mounted.
    """
    path = environ.get("PATH_INFO")
    name, media_type = FILES[path or "/"]
    try:
        content = read_installed_file(name)
    except OSError:
        raise HTTPError(404, NOTHING_HERE) from None
    if not path:
        # The page's links are relative to /mount/. At /mount they would be wrong.
        return 308, b"", (("Content-Type", media_type), ("Location", _make_path(environ)))
    return 200, content, (("Content-Type", media_type),)


_USER_PATH = "/users/([0-9]{1,19})"  # MAX_ID has 19 digits.
HANDLERS: dict[str, dict[str, Callable[..., Response]]] = {
    f"{_USER_PATH}/?": {
        "GET": get_user,
        "PUT": update_user,
        "PATCH": update_user,
        "DELETE": delete_user,
    },
    "/users/?": {"GET": list_users, "POST": create_user},
    f"{_USER_PATH}/password/?": {"PUT": change_password},
    f"{_USER_PATH}/password/reset/?": {"PUT": reset_password},
    "/users/verify/?": {"POST": verify_user},
    "/health/?": {"GET": get_health},
    "/?": {"GET": get_file},
    "/openapi[.]json": {"GET": get_file},
}
ROUTES = [(re.compile(pattern), handlers) for pattern, handlers in HANDLERS.items()]
# These need no token: health checks and browsers do not send one.
TOKENLESS_PATHS = re.compile("/health/?|/?|/openapi[.]json")


def parse_selection(query: Mapping[str, str]) -> tuple[int, int | None, bool, str | None, str]:
    """Return the arguments of Storage.page for a query. Raise InvalidField."""
    email = check_text("email", query["email"]) if "email" in query else None
    text = check_field("q", query["q"]) if "q" in query else ""
    limit = BATCH if text else SHORT_PAGE
    after = None
    if "limit" in query:
        limit = parse_number(query["limit"], "limit", 1, MAX_LIMIT)
    if "after" in query:
        after = parse_number(query["after"], "after", 0, MAX_ID)
    sort = query.get("sort", "id")
    if sort not in ("id", "-id"):
        raise InvalidField("sort must be id or -id")
    return limit, after, sort == "-id", email, text


def may_take_long(environ: WSGIEnvironment) -> bool:
    """Return True for a GET whose first read is no short read (see Storage).

    The server runs the other reads of a streamed list in worker threads, anyway.
    """
    if not environ.get("QUERY_STRING") or environ["PATH_INFO"].rstrip("/") != "/users":
        return False
    try:
        limit, _, _, email, text = parse_selection(parse_query(environ))
    except (HTTPError, InvalidField):
        return False
    return limit > SHORT_PAGE or email is not None or text != ""


def _stream_users(
    users: Storage, page: bytes, next_after: int | None, descending: bool
) -> Iterator[bytes]:
    """Yield a JSON array of the users on a page and of all that follow.

    Each part is a separate read, so that a slow client holds no transaction.
    """
    yield b"[" + page
    while next_after is not None:
        page, next_after = users.page(BATCH, next_after, descending)
        if page:
            yield b"," + page
    yield b"]\n"


def _make_path(environ: WSGIEnvironment, rest: str = "") -> str:
    """Return an absolute path below SCRIPT_NAME."""
    mount_point = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
    # A Location that starts with two slashes names another host.
    return "/" + f"{mount_point}/{rest}".lstrip("/")


# -- application -----------------------------------------------------------------------
# The WSGI callable (PEP 3333), and one table from exception to response, which the server
# uses, too.

# An empty message stands for the exception's own. The last row is for bugs. The statuses are
# those of the tutorial, where it has one.
ERRORS: dict[type[Exception], tuple[int, str]] = {
    InvalidField: (400, ""),
    EmailTaken: (400, "This email is already registered"),
    NoSuchUser: (404, "Invalid user id"),
    WrongPassword: (403, "Wrong email or password"),
    TooManyAttempts: (429, "Too many wrong passwords: try again later"),
    Busy: (503, "The service is busy: try again"),
    Unavailable: (503, "The database is unavailable: see the server log"),
    Exception: (500, "Internal server error"),
}
# Some tools keep the quotes around a value (docker run --env-file).
_TOKEN = re.compile(f"(?![\"'])[!-~]{{{MIN_TOKEN},}}(?<![\"'])")
_LOOPBACK_HOST = re.compile(r"(?i)(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?")
LOOPBACK_ADDRESS = re.compile(r"(::ffff:)?127\.|::1\Z")


# Without the cache, a short read would have 8 % more instructions.
@functools.lru_cache(maxsize=64)
def _is_loopback(address: str, host: str) -> bool:
    return bool(LOOPBACK_ADDRESS.match(address) and _LOOPBACK_HOST.fullmatch(host))


class Application:
    """The WSGI callable. Any number of threads may call it. See create_app."""

    def __init__(
        self, accounts: Accounts, token: str | None = None, anonymous: bool | None = None
    ) -> None:
        if token is None:
            # If it is set but empty, that is an error: somebody wanted a token.
            token = os.environ.get("PROFILER_TOKEN")
        if anonymous is None:
            setting = os.environ.get("PROFILER_ANONYMOUS") or "0"
            anonymous = parse_number(setting, "PROFILER_ANONYMOUS", 0, 1) == 1
        self.accounts = accounts
        self.users = accounts.users
        self.anonymous = anonymous
        self.tokens = [] if token is None else _parse_tokens(token)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Respond as PEP 3333 defines."""
        try:
            response = self._respond(environ)
        except Exception as error:
            response = make_error_response(error, environ)
        status, headers, body = to_wsgi(response)
        start_response(status, headers)
        return (b"",) if environ["REQUEST_METHOD"] == "HEAD" else body

    def may_wait(self, environ: WSGIEnvironment) -> bool:
        """Return True if a response may have to wait for a lock, a core, a commit or a scan.

        A server with a single thread should then run the application in another one.
        """
        is_read = environ["REQUEST_METHOD"] in ("GET", "HEAD")
        return not is_read or self.users.short_reads_may_wait or may_take_long(environ)

    def close(self) -> None:
        """Close the database. The next request opens it again."""
        self.users.close()

    def _respond(self, environ: WSGIEnvironment) -> Response:
        """Return the response of a handler.

        Raise what it raises, and HTTPError: 401, 404, 405, 421.
        """
        method = environ["REQUEST_METHOD"]
        path = environ.get("PATH_INFO", "")
        if self.tokens:
            self._check_token(environ, path)
        elif not self.anonymous:
            self._check_loopback(environ)
        for pattern, handlers in ROUTES:
            match = pattern.fullmatch(path)
            if not match:
                continue
            handler = handlers.get("GET" if method == "HEAD" else method)
            if not handler:
                return _answer_other_method(method, handlers)
            if not pattern.groups:
                return handler(self.accounts, environ)
            user_id = int(match[1])
            if user_id > MAX_ID:
                # No user can have this id. sqlite3 would raise OverflowError.
                raise NoSuchUser
            return handler(self.accounts, environ, user_id)
        raise HTTPError(404, NOTHING_HERE)

    def _check_token(self, environ: WSGIEnvironment, path: str) -> None:
        """Raise HTTPError: 401 without a valid token (RFC 6750)."""
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = credentials.strip(" ").encode("utf-8", "surrogatepass")
        # Compare with all tokens, each in constant time.
        count = sum(hmac.compare_digest(given, token) for token in self.tokens)
        is_valid = count > 0 and scheme.lower() == "bearer"
        if not is_valid and not TOKENLESS_PATHS.fullmatch(path):
            challenge = ("WWW-Authenticate", "Bearer")
            message = "Send a valid token in the header Authorization: Bearer TOKEN"
            raise HTTPError(401, message, challenge)

    def _check_loopback(self, environ: WSGIEnvironment) -> None:
        """Raise HTTPError: 421 for another machine, or a Host that is no loopback name.

        The second check prevents DNS rebinding: a website can point its own name at 127.0.0.1,
        and browsers would send its requests here. The clients of a proxy on this machine cannot be
        told from the machine itself: behind a proxy, set a token.
        """
        # With a Unix socket, the address is empty. Clients without a Host are no browsers.
        address = environ.get("REMOTE_ADDR") or "127.0.0.1"
        if not _is_loopback(address, environ.get("HTTP_HOST", "localhost")):
            raise HTTPError(
                421,
                "Without a token, only this machine is served, as localhost or 127.0.0.1. Set "
                "PROFILER_TOKEN, or PROFILER_ANONYMOUS=1 to serve everybody",
            )


def _parse_tokens(text: str) -> list[bytes]:
    """Return the tokens in a text, separated by white space. Raise ValueError."""
    tokens = text.split()
    if not tokens or not all(map(_TOKEN.fullmatch, tokens)):
        raise ValueError(
            f"tokens (--token-file, PROFILER_TOKEN) must be at least {MIN_TOKEN} characters of "
            "visible ASCII, without quotes around them"
        )
    return [token.encode() for token in tokens]


def _answer_other_method(method: str, handlers: Mapping[str, object]) -> Response:
    """Return the response to OPTIONS. Raise HTTPError: 405 for another method."""
    methods = {*handlers, "OPTIONS"}
    if "GET" in handlers:
        methods.add("HEAD")
    allow = ("Allow", ", ".join(sorted(methods)))
    if method == "OPTIONS":
        return 204, None, (allow,)
    raise HTTPError(405, f"The method must be one of: {allow[1]}", allow)


def create_app(
    database: StrOrBytesPath | None = None,
    *,
    iterations: int | None = None,
    token: str | None = None,
    anonymous: bool | None = None,
) -> Application:
    """Return a WSGI application. Nothing is opened before the first request.

    :param database: the SQLite file, which the first request creates if necessary;
        default: PROFILER_DATABASE, or else ./db.sqlite3
    :param iterations: of PBKDF2 for new passwords; default: PROFILER_ITERATIONS, or else
        600,000
    :param token: one or several tokens, separated by white space. Requests must have one of
        them. Default: PROFILER_TOKEN, or else none
    :param anonymous: True serves every host if there is no token; use it where the
        application around this one checks access. Otherwise, without a token, only this
        machine is served. Default: PROFILER_ANONYMOUS, or else False
    :raises ValueError: for an invalid setting
    """
    return Application(Accounts(Users(database), iterations), token, anonymous)


def create_on_first_use(create: Callable[[], Application]) -> WSGIApplication:
    """Return a WSGI callable that creates its application at the first request.

    So the import of a module reads no settings, and cannot fail.
    """
    created: list[Application] = []

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Pass a request to the application.

        An invalid setting raises ValueError. Then servers answer 500 and log the message.
        """
        # Two first requests may both create an application, which opens nothing. All use the
        # first one.
        if not created:
            created.append(create())
        return created[0](environ, start_response)

    return application


application = app = create_on_first_use(create_app)


def make_error_response(error: Exception, environ: WSGIEnvironment) -> Response:
    """Return the response for an exception. Log what its client is not told.

    That is the traceback of a bug, or a message for the operator.
    """
    if isinstance(error, HTTPError):
        return error.status, {"error": str(error)}, error.headers
    # The row of the nearest base class.
    status, message = next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)
    headers = []
    if isinstance(error, (TooManyAttempts, Unavailable)):
        headers.append(("Retry-After", str(error.retry_after)))
    text = f"profiler: {status}: {error}\n" if message and str(error) else ""
    if status == 500:
        text = f"profiler: 500: {type(error).__name__}: {error}\n"
        # A traceback needs modules and source files, which may be gone if Python was
        # upgraded under this process.
        with contextlib.suppress(Exception):
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    # The log may be full or closed.
    with contextlib.suppress(OSError, ValueError):
        if text:
            environ["wsgi.errors"].write(text)
    return status, {"error": message or str(error)}, tuple(headers)


# -- server: parsing -------------------------------------------------------------------
# From bytes to an environ, without a socket. Requests that a proxy could parse differently
# are rejected, because they allow request smuggling (RFC 9112 11.2). http.server is too
# lenient for that.

MAX_REQUEST_LINE = 8 * 1024  # bytes: the default of nginx and Apache
MAX_HEAD = 32 * 1024  # bytes: nginx's four buffers of 8 KiB
MAX_HEADER_FIELDS = 100  # Apache's, and http.client's
MAX_CHUNK_LINE = 64  # bytes
MAX_FRAMING = 16 * 1024  # bytes of size lines and line ends: thousands of chunks take long

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
_HOST_CHARACTER = r"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]"  # RFC 9110 7.2
# RFC 9112 3. A target is a path, or `*`, or a URL with an authority, which overrides Host
# (3.2.2).
_TARGET = rf"(?:(?i:https?)://({_HOST_CHARACTER}+)(?=[/?# ])|(?=/|\* ))([\x21-\x7e\x80-\xff]*)"
_HOST_VALUE = re.compile(f"{_HOST_CHARACTER}*")  # RFC 9112 3.2
REQUEST_LINE = re.compile(rf"({_NAME}) {_TARGET} (HTTP/[0-9A-Za-z.]+)\r")
# The beginning of a request line. Anything else cannot become valid.
_REQUEST_START = re.compile(rf"({_NAME}( [\x21-\x7e\x80-\xff]*( [0-9A-Za-z./]*\r?)?)?)?")
# No space before the colon, no folding, no bare CR or LF, no control character (RFC 9112
# 5.1, 5.2, 2.2; RFC 9110 5.5).
_FIELD_LINE = re.compile(rf"({_NAME}):([\t\x20-\x7e\x80-\xff]*)")
# RFC 9112 7.1.2. Trailers are header lines, or none, and an empty line.
_TRAILERS = re.compile(rf"({_FIELD_LINE.pattern}\r\n)*\r\n".encode())
_TRAILERS_END = re.compile(rb"(\A|\n)\r?\n")
_LINE_END = re.compile(b"\n")
# RFC 9112 7.1. Extensions are ignored.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
# Bare LFs end a head, too, so that parse_head rejects them without waiting for more.
HEAD_END = re.compile(rb"\n\r?\n")


def parse_head(head: bytes) -> WSGIEnvironment:
    """Return the environ for a request head.

    Raise HTTPError: 400, 413, 414, 417, 431, 501, 505.
    """
    environ, authority = parse_request_line(head)
    check_head_size(head)
    _, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    if len(lines) > MAX_HEADER_FIELDS:
        raise HTTPError(431, f"Send at most {MAX_HEADER_FIELDS} headers")
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise HTTPError(
                400, "A header must be one line, `Name: value`, without control characters"
            )
        name = match[1].upper()
        value = match[2].strip(" \t")
        # Drop it, because X_Y and X-Y would have the same key.
        if "_" in name:
            continue
        key = "HTTP_" + name.replace("-", "_")
        # RFC 9110 5.3. A repeated Host or Content-Length becomes "a, b", which is refused
        # below.
        environ[key] = f"{environ[key]}, {value}" if key in environ else value
    _check_headers(environ)
    environ["PATH_INFO"] = unquote(environ["PATH_INFO"], "latin-1")
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "")
    if authority:
        environ["HTTP_HOST"] = authority
    return environ


def _check_headers(environ: WSGIEnvironment) -> None:
    """Check Host, Expect and the length of the body. Raise HTTPError: 400, 413, 417, 501."""
    is_http_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    lacks_host = is_http_1_1 and "HTTP_HOST" not in environ
    if lacks_host or not _HOST_VALUE.fullmatch(environ.get("HTTP_HOST", "")):
        raise HTTPError(400, "Send one Host, such as localhost:5000")
    expect = environ.get("HTTP_EXPECT", "100-continue")
    if is_http_1_1 and expect.lower() != "100-continue":  # RFC 9110 10.1.1
        raise HTTPError(417, "The only supported Expect is 100-continue")
    if "HTTP_CONTENT_LENGTH" in environ:
        parse_length(environ["HTTP_CONTENT_LENGTH"])
    if "HTTP_TRANSFER_ENCODING" in environ:  # RFC 9112 6.1 and 6.3
        if "HTTP_CONTENT_LENGTH" in environ:
            raise HTTPError(400, "Send either a Content-Length or a Transfer-Encoding")
        if environ["HTTP_TRANSFER_ENCODING"].lower() != "chunked":
            raise HTTPError(501, "The only supported Transfer-Encoding is chunked")
        if not is_http_1_1:
            raise HTTPError(400, "Send a Content-Length: HTTP/1.0 has no Transfer-Encoding")


def parse_request_line(head: bytes) -> tuple[WSGIEnvironment, str | None]:
    """Return the environ of the request line, and the authority of its target, if any.

    PATH_INFO is still percent-encoded. Raise HTTPError: 400, 414, 505.
    """
    line = head.partition(b"\n")[0]
    if len(line) > MAX_REQUEST_LINE:
        raise HTTPError(414, f"Send a request line of at most {MAX_REQUEST_LINE} bytes")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if not match:
        raise HTTPError(
            400, "The request line must be `METHOD /path HTTP/1.1`. TLS is not supported"
        )
    method, authority, target, protocol = match.groups()
    if protocol not in ("HTTP/1.0", "HTTP/1.1"):  # RFC 9110 15.6.6
        raise HTTPError(505, "Use HTTP/1.1 or HTTP/1.0")
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "SERVER_PROTOCOL": protocol,
        "QUERY_STRING": query,
        "PATH_INFO": path or "/",
    }
    return environ, authority


def check_head_size(head: bytes) -> None:
    """Raise HTTPError: 431 for a head, or for trailers, of too many bytes."""
    if len(head) > MAX_HEAD:
        raise HTTPError(431, f"Send a head, and trailers, of at most {MAX_HEAD} bytes")


def _cut(received: bytearray, size: int) -> bytes:
    """Remove bytes from the front, and return them."""
    removed = bytes(received[:size])
    del received[:size]
    return removed


# The take functions remove bytes from the front of `received`, and return them or what they
# encode. They are generators, and yield when they need more bytes.


def take_head(received: bytearray) -> Steps:
    """Take a request head. Of one that is too long, take MAX_HEAD + 1 bytes.

    Raise HTTPError: 400, 414, 505.
    """
    # Do not wait for the rest of a head whose request line is invalid. parse_head checks a head
    # that has arrived as a whole.
    if not received.endswith(b"\r\n\r\n"):
        # Wait for the end of the request line only while it can be valid. A client that speaks
        # TLS does not send a line.
        while (
            b"\n" not in received
            and len(received) <= MAX_REQUEST_LINE
            and _REQUEST_START.fullmatch(received.decode("latin-1"))
        ):
            yield
        parse_request_line(bytes(received))
    return (yield from take_until(received, HEAD_END, MAX_HEAD + 1))


def take(received: bytearray, size: int) -> Steps:
    """Take a number of bytes."""
    while len(received) < size:
        yield
    return _cut(received, size)


def take_until(received: bytearray, end: re.Pattern[bytes], limit: int) -> Steps:
    """Take the bytes up to the end of a match, or `limit` bytes if they contain no match."""
    searched = 0
    while not (match := end.search(received, searched, limit)) and len(received) < limit:
        # The last two bytes may be the beginning of the match.
        searched = max(0, len(received) - 2)
        yield
    return _cut(received, match.end() if match else limit)


def take_chunked_body(received: bytearray) -> Steps:
    """Take a chunked body, and decode it (RFC 9112 7.1). Raise HTTPError: 400, 413, 431."""
    body = bytearray()
    framing = 0
    size = -1
    while size != 0:
        line = yield from take_until(received, _LINE_END, MAX_CHUNK_LINE)
        match = _CHUNK_LINE.fullmatch(line)
        if not match:
            raise HTTPError(
                400,
                f"A chunk must start with its size in hexadecimal digits, in a line of at most "
                f"{MAX_CHUNK_LINE} bytes",
            )
        size = int(match[1], 16)
        framing += len(line) + 2
        if len(body) + size > MAX_BODY or framing > MAX_FRAMING:
            raise HTTPError(413, f"Send at most {MAX_BODY} bytes, and not in so many chunks")
        if size:
            chunk = yield from take(received, size + 2)
            if not chunk.endswith(b"\r\n"):
                raise HTTPError(400, "A chunk must end with CR LF")
            body += chunk[:-2]
    # Take up to one byte too many, so that check_head_size notices it.
    trailers = yield from take_until(received, _TRAILERS_END, MAX_HEAD + 1)
    check_head_size(trailers)
    if not _TRAILERS.fullmatch(trailers):
        raise HTTPError(400, "Trailers must be lines, `Name: value`, without control characters")
    return bytes(body)


# -- server: connections ---------------------------------------------------------------
# Theory of operation: one process. Two kinds of threads share the work.
#
# The I/O thread owns all sockets and the selector. Each connection is a generator that
# reads like blocking code. It yields what it waits for: an event of its socket, a function
# to run in a worker thread, or its turn (LATER). The server resumes it with the result of
# the function, or throws HTTPError into it when its deadline has passed.
#
# The I/O thread also runs short reads, because to hand one to another thread takes longer
# than the read. Everything that may have to wait runs in a pool of worker threads: writes
# wait for the disk, logins for a core, searches for a scan of the table. The application
# says beforehand which requests may wait. A worker touches no client's socket. It puts its
# result into a queue and writes a byte to a socket pair, which wakes the selector.
#
# The I/O thread computes the responses to several requests first, and then sends them
# together. To send may wake the process of the client, which costs more than to send. This
# way, a client with many connections is woken only once.
#
# One more thread writes the log. The server never forks.

# Seconds unless stated otherwise.
IDLE_TIMEOUT = 15  # between requests; sent as Keep-Alive
HEAD_TIMEOUT = 15.0  # from the first byte of a head to its last
BODY_TIMEOUT = 30.0  # from the end of the head to the end of the body
SEND_TIMEOUT = 60.0  # without the client reading anything: nginx's send_timeout
LINGER_TIMEOUT = 2.0  # after the last response, without the client sending anything
MAX_LINGER = 30.0  # after the last response, until the client closes
DRAIN_TIMEOUT = 8.0  # for requests in flight at shutdown: docker stop kills after 10
CHECK_INTERVAL = 0.2  # between checks of the deadlines and signals
ACCEPT_PAUSE = 0.01  # when no connection can be accepted
RETRY_PAUSE = 0.2  # after a 503, before the next request of the connection is read
LOG_INTERVAL = 0.1  # between writes to the log
LOG_TIMEOUT = 1.0  # for the rest of the log at shutdown
WORKERS = 256  # threads at most
MAX_CONNECTIONS = 20_000  # fewer if the limit of open files is lower
MAX_SELECT_SOCKETS = 512  # sockets that select() takes on Windows, which has no better selector
RESERVED_FILES = 32  # file descriptors for the database, the log and the like
ACCEPTS = 32  # connections accepted in a round
EVENTS_PER_TURN = 32  # events that are handled before the responses to them are sent
RECEIVE_SIZE = 64 * 1024  # bytes per read
MAX_PENDING = 10_000  # log entries that wait to be written
MAX_LOGGED = 512  # bytes of a request line in the log

_CLOSE = re.compile(r"(?i)(^|,)[ \t]*close[ \t]*(,|$)")  # RFC 9112 9.3
_CHUNKED = ("Transfer-Encoding", "chunked")
# What a connection waits for. A `yield` without a value stands for READ. `yield NO_EVENT` waits
# until the deadline.
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
NO_EVENT = 0
LATER = object()


class Server(socketserver.TCPServer):
    """An HTTP/1.1 server for an Application, in one process.

    TCPServer binds the listening socket, which is also closed if binding fails.
    """

    request_queue_size = 1024  # connections that wait to be accepted
    # On Windows, it would let a second server listen on the same port.
    allow_reuse_address = os.name != "nt"

    def __init__(
        self, family: int, address: Any, app: Application, access_log: bool = True
    ) -> None:
        """Listen on an address of getaddrinfo. Raise OSError if it cannot be bound."""
        self.address_family = family
        super().__init__(address, None)  # type: ignore[arg-type]
        # The sockets of connections inherit this.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.server_port = int(self.server_address[1])
        self.application = app
        self.log = Log()
        self.base_environ = self._make_base_environ()
        self.access_log = access_log
        self.stopping = False
        # All connections. The one that was resumed least recently is the first.
        self.connections: OrderedDict[Connection, None] = OrderedDict()
        # Connections that have a response and wait for their turn to send it.
        self.senders: dict[Connection, None] = {}
        self.max_connections = _find_max_connections()
        self.selector = selectors.DefaultSelector()
        self._worker_count = 0
        self._unfinished_count = 0
        self._next_check = 0.0
        # A job is a function, and the connection to resume with its result.
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Connection]] = (
            queue.SimpleQueue()
        )
        self._finished: queue.SimpleQueue[tuple[Connection, object]] = queue.SimpleQueue()
        self._woken, self._waker = socket.socketpair()
        # On Windows the pair is a TCP connection, which would delay the next byte until the
        # last one is acknowledged.
        with contextlib.suppress(OSError):
            self._waker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for end in (self.socket, self._woken, self._waker):
            end.setblocking(False)
        self.selector.register(self.socket, READ, self._accept)
        self.selector.register(self._woken, READ, self._resume_finished)

    def _make_base_environ(self) -> WSGIEnvironment:
        """Return the part of the environ that all requests share (PEP 3333)."""
        return {
            "SCRIPT_NAME": "",
            "SERVER_NAME": str(self.server_address[0]),
            "SERVER_PORT": str(self.server_port),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": self.log,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def stop(self, *_: object) -> None:
        """Make serve() return soon. Further calls change nothing. It can be a signal handler."""
        self.stopping = True

    def serve(self) -> None:
        """Serve until stop() is called, then close everything.

        Requests that have arrived by then get DRAIN_TIMEOUT to finish.
        """
        while not self.stopping:
            self._serve_round()
        # Clients whose connection waits to be accepted may have sent a request, too.
        self._accept(limit=self.request_queue_size)
        self.selector.unregister(self.socket)
        self.socket.close()
        now = time.monotonic()
        for connection in self.connections:
            if connection.is_idle:
                # It is closed at the next check, unless a request has arrived.
                connection.deadline = now
        while self.connections and time.monotonic() < now + DRAIN_TIMEOUT:
            self._serve_round()
        for connection in list(self.connections):
            connection.close()
        for resource in (self.selector, self._woken, self._waker):
            resource.close()
        self.log.stop()

    def submit(self, function: Callable[[], object], connection: Connection) -> None:
        """Run a function in a worker, then resume the connection in this thread.

        If not even one worker can be started, resume it with Busy. Otherwise the function waits
        until a worker is free.
        """
        if self._worker_count < min(self._unfinished_count + 1, WORKERS):
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._work, daemon=True).start()
                self._worker_count += 1
        if self._worker_count:
            self._unfinished_count += 1
            self._jobs.put((function, connection))
        else:
            connection.resume(Busy("no worker thread could be started"))

    def _work(self) -> None:
        while True:
            function, connection = self._jobs.get()
            try:
                result = function()
            except Exception as error:
                # resume() treats an OSError as a lost connection, and would not log it.
                result = Unavailable(str(error)) if isinstance(error, OSError) else error
            self._finished.put((connection, result))
            # Otherwise an idle worker would keep the connection and its request body alive.
            del function, connection, result
            # The socket may be closed. If its buffer is full, the I/O thread wakes up anyway.
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")

    def _resume_finished(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(RECEIVE_SIZE)
        while not self._finished.empty():
            self._unfinished_count -= 1
            connection, result = self._finished.get()
            connection.resume(result)

    def _serve_round(self) -> None:
        """Wait for events, and handle them. Then look whose deadline has passed."""
        # With a timeout, because a signal does not end select() (PEP 475).
        self._handle_events(0 if self.senders else CHECK_INTERVAL)
        now = time.monotonic()
        if now > self._next_check:
            # The process may have been suspended. What has arrived meanwhile comes first.
            self._handle_events(0)
            self._next_check = now + CHECK_INTERVAL
            for connection in [each for each in self.connections if each.deadline < now]:
                # The client sees this message only if it has sent a part of a request.
                connection.resume(HTTPError(408, "The request took too long to arrive"))

    def _handle_events(self, timeout: float) -> None:
        """Resume the connections that have an event, then those whose turn it is."""
        for number, (key, events) in enumerate(self.selector.select(timeout), 1):
            key.data(events)
            # Count events, because the number of senders may stay high: a client that pipelines
            # becomes a sender again as soon as its response is sent.
            if number % EVENTS_PER_TURN == 0:
                self._resume_senders()
        self._resume_senders()

    def _resume_senders(self) -> None:
        senders = self.senders
        self.senders = {}
        for connection in senders:
            connection.resume()

    def _accept(self, events: int = READ, limit: int = ACCEPTS) -> None:
        """Accept connections. At the limit of connections, close others for them."""
        for _ in range(limit):
            try:
                client, address = self.socket.accept()
            except BlockingIOError:
                # No client waits.
                return
            except ConnectionError:
                # The client has gone.
                continue
            except OSError:
                # No file descriptor is left. Without a pause, this would be tried again at once.
                if not self._make_room():
                    time.sleep(ACCEPT_PAUSE)
                return
            is_full = len(self.connections) >= self.max_connections
            if is_full and not self._make_room():
                client.close()
                continue
            client.setblocking(False)
            connection = Connection(self, client, address[0])
            self.connections[connection] = None
            connection.resume()
            if is_full:
                # First read what has arrived on the connections. Otherwise one with an unread
                # request could be closed for the next client.
                return

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client or in a pause.

        Return False if there is no such connection.
        """
        waiting = (each for each in self.connections if each.deadline < math.inf)
        longest = next(waiting, None)
        if longest:
            longest.close()
        return longest is not None


def _find_max_connections() -> int:
    """Return how many connections the limit of open files allows."""
    files = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else MAX_SELECT_SOCKETS
    # -1 stands for no limit.
    return MAX_CONNECTIONS if files < 0 else max(1, min(MAX_CONNECTIONS, files - RESERVED_FILES))


@functools.lru_cache(maxsize=1)
def format_times(second: int) -> tuple[str, str]:
    """Return a time for the header Date, and for the log in Common Log Format."""
    local = time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))
    return format_date_time(second), local


class Connection:
    """One connection and its requests: see the theory of operation.

    The deadline is infinite while the connection waits for a worker, or for its turn to send.
    """

    def __init__(self, server: Server, client: socket.socket, address: str) -> None:
        self.server = server
        self.socket = client
        self.address = address
        # Bytes that were received but not used yet, and the head of the current request.
        self.received = bytearray()
        self.head = b""
        self.is_idle = False
        self.is_last_request = False
        self.deadline = math.inf
        # The events that the selector watches.
        self._events = NO_EVENT
        self._steps = self._serve()

    def resume(self, result: object = None) -> None:
        """Continue until the next wait, with the result of the last one, or its exception."""
        if self not in self.server.connections:
            return
        self.server.connections.move_to_end(self)
        try:
            if isinstance(result, Exception):
                wanted = self._steps.throw(result)
            else:
                wanted = self._steps.send(result)
            if wanted is LATER:
                # _handle_event ignores events until then. This is faster than _watch(NO_EVENT).
                self.deadline = math.inf
                self.server.senders[self] = None
            elif callable(wanted):
                self.deadline = math.inf
                self._watch(NO_EVENT)
                self.server.submit(wanted, self)
            else:
                self._watch(READ if wanted is None else wanted)
        except Exception as error:
            # An OSError is a lost connection. An HTTPError is a client that closed, was idle, or
            # stopped reading. Others are logged: make_error_response is called for its log only.
            if not isinstance(error, OSError):
                make_error_response(error, self.server.base_environ)
            self.close()

    def close(self) -> None:
        """Close the connection and forget it."""
        self.server.connections.pop(self, None)
        self._steps.close()
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._watch(NO_EVENT)
        with contextlib.suppress(OSError):
            self.socket.close()

    def _handle_event(self, events: int) -> None:
        """Receive what has arrived, and resume. If the client has closed, throw HTTPError."""
        # Since select() returned, the connection may have begun to wait for something else.
        if self in self.server.senders or not events & self._events:
            return
        problem = None
        if events & READ:
            try:
                more = self.socket.recv(RECEIVE_SIZE)
            except BlockingIOError:
                # select() may be wrong (select(2), BUGS).
                return
            except OSError:
                self.close()
                return
            self.received += more
            if not more:
                problem = HTTPError(400, "The request ends too early")
        self.resume(problem)

    def _watch(self, events: int) -> None:
        if events == self._events:
            return
        previous = self._events
        # If register() fails, the socket must not be unregistered later.
        self._events = NO_EVENT
        if previous:
            self.server.selector.unregister(self.socket)
        if events:
            self.server.selector.register(self.socket, events, self._handle_event)
        self._events = events

    def _serve(self) -> Steps:
        """Answer requests until either side closes the connection. Raise HTTPError, OSError."""
        while not self.is_last_request:
            # At shutdown, a request that has arrived already is answered.
            timeout = 0 if self.server.stopping else IDLE_TIMEOUT
            self.deadline = time.monotonic() + timeout
            # Empty lines before a request are ignored (RFC 9112 2.2).
            while not (rest := self.received.lstrip(b"\r\n")):
                self.received.clear()
                self.is_idle = True
                yield
                self.is_idle = False
            self.received = rest
            yield from self._answer_request()
        # Read until the client closes. To close with unread input may lose the response
        # (RFC 9112 9.6).
        self.socket.shutdown(socket.SHUT_WR)
        last_deadline = time.monotonic() + MAX_LINGER
        while True:
            self.deadline = min(last_deadline, time.monotonic() + LINGER_TIMEOUT)
            self.received.clear()
            yield

    def _answer_request(self) -> Steps:
        """Receive a request, run the application and send its response.

        Raise OSError, and HTTPError if the client stops reading.
        """
        try:
            environ = yield from self._receive_request()
            run = functools.partial(self._run_application, environ)
            may_wait = self.server.application.may_wait(environ)
            status, headers, body = (yield run) if may_wait else run()
            is_http_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
            has_close = _CLOSE.search(environ.get("HTTP_CONNECTION", ""))
            if not is_http_1_1 or self.server.stopping or has_close:
                self.is_last_request = True
            if is_http_1_1 and not isinstance(body, tuple):
                headers.append(_CHUNKED)
        # The application raises neither. HTTPError comes from _receive_request, and Busy from
        # submit(), which resumes with it if no worker could be started.
        except (HTTPError, Unavailable) as error:
            self.is_last_request = True
            # For the log, and to recognise HEAD.
            self.head = self.head or bytes(self.received)
            status, headers, body = to_wsgi(make_error_response(error, self.server.base_environ))
            if self.head.startswith(b"HEAD "):
                body = (b"",)
        yield from self._send_response(status, headers, body)
        if status.startswith("503") and not self.is_last_request:
            # Clients that try again at once would take the threads that others need.
            self.deadline = time.monotonic() + RETRY_PAUSE
            # The HTTPError of the deadline ends the pause.
            with contextlib.suppress(HTTPError):
                yield NO_EVENT

    def _run_application(self, environ: WSGIEnvironment) -> WSGIResponse:
        started: list[Any] = []

        def start_response(*given: Any) -> Any:
            """Keep the status and the headers."""
            started.extend(given)

        body = self.server.application(environ, start_response)
        status, headers = started
        return status, headers, body

    def _receive_request(self) -> Steps:
        """Return the environ of the next request, whose body has arrived. Raise HTTPError."""
        self.deadline = time.monotonic() + HEAD_TIMEOUT
        self.head = b""
        self.head = yield from take_head(self.received)
        environ = {
            **self.server.base_environ,
            **parse_head(self.head),
            "REMOTE_ADDR": self.address,
        }
        if "HTTP_EXPECT" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
            yield from self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.deadline = time.monotonic() + BODY_TIMEOUT
        body = b""
        if "HTTP_TRANSFER_ENCODING" in environ:
            # The application gets the decoded body, with its length.
            del environ["HTTP_TRANSFER_ENCODING"]
            body = yield from take_chunked_body(self.received)
            environ["CONTENT_LENGTH"] = str(len(body))
        elif environ["CONTENT_LENGTH"]:
            body = yield from take(self.received, int(environ["CONTENT_LENGTH"]))
        environ["wsgi.input"] = io.BytesIO(body)
        return environ

    def _send(self, message: bytes) -> Steps:
        """Send a message. Raise OSError, and HTTPError if the client stops reading."""
        rest = memoryview(message)
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                self.deadline = time.monotonic() + SEND_TIMEOUT
                yield WRITE

    def _send_response(
        self, status: str, headers: list[tuple[str, str]], body: Iterable[bytes]
    ) -> Steps:
        """Send a response and log it. Raise OSError, HTTPError, and what a streamed body raises.

        If the response breaks off, reset the connection, so that no client takes a part for
        the whole.
        """
        date, local_time = format_times(int(time.time()))
        persistence = f"Keep-Alive: timeout={IDLE_TIMEOUT}"
        if self.is_last_request:
            persistence = "Connection: close"
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
        start = f"HTTP/1.1 {status}\r\nDate: {date}\r\nServer: profiler/{__version__}\r\n"
        head = f"{start}{fields}{persistence}\r\n\r\n".encode("latin-1")
        size = 0
        try:
            if isinstance(body, tuple):
                size = len(body[0])
                message = head + body[0]
                # Others have a turn first. Their responses are sent together with this one.
                yield LATER
                yield from self._send(message)
            else:
                is_chunked = _CHUNKED in headers
                next_part = functools.partial(next, iter(body), None)
                part = yield next_part
                while part is not None:
                    chunk = b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part
                    yield from self._send(head + chunk)
                    head = b""
                    size += len(part)
                    part = yield next_part
                if is_chunked:
                    yield from self._send(b"0\r\n\r\n")  # RFC 9112 7.1
        except BaseException:
            # With l_onoff = 1 and l_linger = 0, close resets the connection.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
            raise
        finally:
            if self.server.access_log:
                self._log_request(local_time, status, size)

    def _log_request(self, local_time: str, status: str, size: int) -> None:
        """Log a request in Common Log Format, without control characters."""
        line = self.head.partition(b"\n")[0].decode("latin-1")
        # Log only request lines. Anything else may be a body with a password.
        text = line[:MAX_LOGGED].rstrip("\r") if REQUEST_LINE.fullmatch(line) else ""
        entry = f"{self.address} - - [{local_time}] {json.dumps(text)} {status[:3]} {size}\n"
        self.server.log.write(entry)


class Log(io.TextIOBase):
    """wsgi.errors: a thread writes its entries to stderr. What stderr does not take is dropped."""

    def __init__(self) -> None:
        self.entries: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_entries, daemon=True)
        # If the system has no more threads, nothing is written.
        with contextlib.suppress(RuntimeError):
            self._writer.start()

    def write(self, text: str) -> int:
        """Keep an entry until it is written."""
        if self.entries.qsize() < MAX_PENDING:
            self.entries.put(text)
        return len(text)

    def stop(self) -> None:
        """Write the rest, for at most LOG_TIMEOUT."""
        self.entries.put(None)
        if self._writer.is_alive():
            self._writer.join(LOG_TIMEOUT)

    def _write_entries(self) -> None:
        entries: list[str | None] = []
        while None not in entries:
            entries = [self.entries.get()]
            time.sleep(LOG_INTERVAL)
            entries += [self.entries.get() for _ in range(self.entries.qsize())]
            text = "".join(filter(None, entries))
            # Python would wait at its exit to flush a full sys.stderr, so write to its
            # descriptor. There may be none.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                os.write(sys.stderr.fileno(), text.encode("utf-8", "backslashreplace"))


# -- command line ----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, by default that of sys.argv.

    Exit with 2 for an invalid setting, with 1 for a failure. As a CGI program, answer one
    request.
    """
    if argv is None and os.environ.get("GATEWAY_INTERFACE", "").startswith("CGI/"):
        # The arguments come from the client (RFC 3875 4.4). Ignore them.
        CGIHandler().run(application)
    else:
        run_command(make_parser()[0], argv, Users)


def make_parser(
    prog: str = "profiler", database_help: str = "the SQLite file"
) -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of the command line, and its subparsers.

    Each command sets `run`, a function of the parsed arguments and the storage.
    """
    parser = argparse.ArgumentParser(
        prog,
        description="User accounts over HTTP. Without a command, serve them. Each option "
        "overrides its environment variable.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", help=f"the address to listen on (PROFILER_HOST; default: {HOST})")
    add(
        "--port",
        help=f"the port to listen on; 0 picks a free one (PROFILER_PORT, else PORT; "
        f"default: {PORT})",
    )
    add("--database", help=f"{database_help} (PROFILER_DATABASE; default: {DATABASE})")
    add(
        "--token-file",
        metavar="PATH",
        help="a file of tokens, one per line, of which requests must send one "
        "(PROFILER_TOKEN: the tokens themselves)",
    )
    add(
        "--anonymous",
        action="store_true",
        default=None,
        help="without a token, serve other machines, too (PROFILER_ANONYMOUS=1)",
    )
    add(
        "--iterations",
        help=f"of PBKDF2 for new passwords (PROFILER_ITERATIONS; default: {ITERATIONS})",
    )
    add("--no-access-log", action="store_true", help="do not log each request to stderr")
    add("--version", action="version", version=f"profiler {__version__}")
    parser.set_defaults(run=_run_server)
    # profiler_sqlalchemy.py adds commands of its own.
    return parser, _add_commands(parser, database_help)


def _add_commands(parser: argparse.ArgumentParser, database_help: str) -> Any:
    """Add the commands to the parser, and return its subparsers."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    initialise = commands.add_parser(
        "initialise-database", help="create the table of users", allow_abbrev=False
    )
    initialise.add_argument("--force", action="store_true", help="delete all users in it")
    initialise.set_defaults(run=_initialise_database)
    backup = commands.add_parser(
        "backup", help="copy the database while it is served", allow_abbrev=False
    )
    backup.add_argument("path", metavar="PATH", help="a new file")
    backup.set_defaults(run=_backup)
    # Without SUPPRESS, a default would replace a --database that stands before the command.
    for command in (initialise, backup):
        command.add_argument("--database", default=argparse.SUPPRESS, help=database_help)
    return commands


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    open_storage: Callable[[str | None], Storage],
) -> None:
    """Run the command of the arguments on a storage. Exit as main does."""
    # sys.stderr is None if the caller has closed the descriptor.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may have characters that the encoding of a redirected stdout lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = parser.parse_args(argv)
    try:
        with contextlib.closing(open_storage(arguments.database)) as users:
            # The server is a command, too. It catches the exceptions of its connections itself.
            try:
                arguments.run(arguments, users)
            except (Unavailable, sqlite3.Error) as error:
                sys.exit(f"profiler: {users.location}: {error}")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"profiler: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run_server(arguments: argparse.Namespace, users: Storage) -> None:
    """Serve until a signal. Raise ValueError for a setting, OSError, Unavailable."""
    family, address = _find_address(arguments)
    token = None
    if arguments.token_file is not None:
        token = _read_token_file(arguments.token_file)
    app = Application(Accounts(users, arguments.iterations), token, arguments.anonymous)
    ip = str(address[0])
    if not (app.tokens or app.anonymous or LOOPBACK_ADDRESS.match(ip)):
        raise ValueError(
            f"others can reach {ip}: set a token (--token-file, PROFILER_TOKEN) or --anonymous"
        )
    users.ping()
    count = users.count()
    # The count has filled a cache of up to 2 MB. Free its memory.
    users.close()
    try:
        server = Server(family, address, app, not arguments.no_access_log)
    except OSError as error:
        raise OSError(
            f"port {address[1]} of {ip}: {error.strerror}: choose another --port or --host"
        ) from None
    signals = _list_signals()
    with server:
        iterations = app.accounts.iterations
        if iterations < ITERATIONS:
            server.log.write(
                f"profiler: {iterations} iterations are fewer than OWASP's {ITERATIONS}\n"
            )
        for signum in signals:
            signal.signal(signum, server.stop)
        _print(f"http://{f'[{ip}]' if ':' in ip else ip}:{server.server_port}/")
        _print(f"Database: {users.location} (users: {count}). Press Ctrl-C to stop.")
        server.serve()
        # Another signal must not change the exit status.
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)


def _find_address(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Return the address family and the address to listen on. Raise ValueError."""
    own_port = os.environ.get("PROFILER_PORT", "")
    if own_port.startswith("tcp://"):
        # Kubernetes sets this for a Service that is named "profiler".
        own_port = ""
    port_setting = arguments.port or own_port or os.environ.get("PORT") or str(PORT)
    port = parse_number(port_setting, "port", 0, 65535)
    host = arguments.host or os.environ.get("PROFILER_HOST") or HOST
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"invalid host {host!r}: {error}") from None
    family, _, _, _, address = found[0]
    return family, address


def _read_token_file(path: str) -> str:
    """Return the text of a token file. Raise ValueError."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        # PowerShell 5.1 writes UTF-16, and Notepad a byte order mark.
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--token-file: {error}") from None


def _list_signals() -> list[signal.Signals]:
    """Return the signals that stop the server."""
    # Only Windows has SIGBREAK, which is Ctrl-Break, and it has no SIGHUP.
    names = ["SIGTERM", "SIGINT", "SIGBREAK"]
    # A process that nohup started ignores SIGHUP. Leave that so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _initialise_database(arguments: argparse.Namespace, users: Storage) -> None:
    created = users.initialise(arguments.force)
    _print("Successfully created database schema." if created else "The database schema exists.")


def _backup(arguments: argparse.Namespace, users: Storage) -> None:
    users.backup(arguments.path)
    _print(f"Backup written to {arguments.path}.")


def _print(line: str) -> None:
    """Print a line. If stdout is full or closed, go on without it."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):
        # Otherwise Python fails when it flushes stdout at its exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
