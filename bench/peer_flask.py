"""The tutorial's service, as one Flask module: a connection for each request, rows to
dicts to JSON."""

import os
import sqlite3

from flask import Flask, g, jsonify, request
from werkzeug.security import generate_password_hash

app = Flask(__name__)
MISSING = {"error": "Required fields are missing"}, 400
TAKEN = {"error": "This email is already registered"}, 400


def database():
    if "database" not in g:
        g.database = sqlite3.connect(os.environ["PEER_DATABASE"])
        g.database.row_factory = sqlite3.Row
    return g.database


@app.teardown_appcontext
def close(_):
    if "database" in g:
        g.pop("database").close()


def public(row):
    return {name: row[name] for name in ("id", "first_name", "last_name", "email", "created_on")}


@app.post("/users/")
def create_user():
    fields = [request.json.get(name) for name in ("first_name", "last_name", "email", "password")]
    if not all(fields):
        return MISSING
    fields[3] = generate_password_hash(fields[3], "pbkdf2:sha256:600000")
    statement = "INSERT INTO user (first_name, last_name, email, password) VALUES (?, ?, ?, ?)"
    try:
        cursor = database().execute(statement, fields)
        database().commit()
    except sqlite3.IntegrityError:
        return TAKEN
    return jsonify({"id": cursor.lastrowid}), 201


@app.get("/users/")
def list_users():
    return jsonify([public(row) for row in database().execute("SELECT * FROM user").fetchall()])


@app.get("/users/<int:user_id>/")
def get_user(user_id):
    row = database().execute("SELECT * FROM user WHERE id = ?", (user_id,)).fetchone()
    if row is None:
        return {"error": "Invalid user id"}, 404
    return public(row)


@app.put("/users/<int:user_id>/")
def update_user(user_id):
    fields = [request.json.get(name) for name in ("first_name", "last_name", "email")]
    if not all(fields):
        return MISSING
    statement = "UPDATE user SET first_name = ?, last_name = ?, email = ? WHERE id = ?"
    try:
        database().execute(statement, (*fields, user_id))
        database().commit()
    except sqlite3.IntegrityError:
        return TAKEN
    return jsonify({"id": user_id})


@app.delete("/users/<int:user_id>/")
def delete_user(user_id):
    database().execute("DELETE FROM user WHERE id = ?", (user_id,))
    database().commit()
    return "", 204
