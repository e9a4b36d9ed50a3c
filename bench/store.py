"""What the services in Bottle, Falcon and FastAPI share: the tutorial's statements, on one
connection for each thread.

That is kinder to them than the tutorial, which connects for each request.
"""

import os
import sqlite3
import threading

from werkzeug.security import generate_password_hash

PUBLIC = ("id", "first_name", "last_name", "email", "created_on")
_local = threading.local()


def database():
    if not hasattr(_local, "connection"):
        _local.connection = sqlite3.connect(os.environ["PEER_DATABASE"])
        _local.connection.row_factory = sqlite3.Row
    return _local.connection


def list_users():
    rows = database().execute("SELECT id, first_name, last_name, email, created_on FROM user")
    return [dict(row) for row in rows]


def get_user(user_id):
    statement = "SELECT id, first_name, last_name, email, created_on FROM user WHERE id = ?"
    row = database().execute(statement, (user_id,)).fetchone()
    return None if row is None else dict(row)


def write(statement, parameters):
    """Execute and commit; return the cursor, or None if the email is taken."""
    try:
        with database() as connection:
            return connection.execute(statement, parameters)
    except sqlite3.IntegrityError:
        return None


def create_user(first_name, last_name, email, password):
    password_hash = generate_password_hash(password, "pbkdf2:sha256:600000")
    statement = "INSERT INTO user (first_name, last_name, email, password) VALUES (?, ?, ?, ?)"
    cursor = write(statement, (first_name, last_name, email, password_hash))
    return cursor and cursor.lastrowid


def update_user(user_id, first_name, last_name, email):
    statement = "UPDATE user SET first_name = ?, last_name = ?, email = ? WHERE id = ?"
    return write(statement, (first_name, last_name, email, user_id))


def delete_user(user_id):
    write("DELETE FROM user WHERE id = ?", (user_id,))
