"""The tutorial's service on a database server, as one writes it with Flask-SQLAlchemy:
a model, a session, dicts."""

import os

from flask import Flask, jsonify, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError
from werkzeug.security import generate_password_hash

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["PEER_DATABASE"].replace(
    "postgresql://", "postgresql+psycopg://"
)
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_pre_ping": True, "pool_size": 8}
db = SQLAlchemy(app)
MISSING = {"error": "Required fields are missing"}, 400
TAKEN = {"error": "This email is already registered"}, 400


class User(db.Model):
    id = db.Column(db.BigInteger, primary_key=True)
    first_name = db.Column(db.String(255), nullable=False)
    last_name = db.Column(db.String(255), nullable=False)
    email = db.Column(db.String(254), unique=True, nullable=False)
    password = db.Column(db.Text, nullable=False)
    created_on = db.Column(db.DateTime, nullable=False, server_default=db.func.now())


def public(user):
    return {
        "id": user.id,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "email": user.email,
        "created_on": str(user.created_on),
    }


@app.post("/users/")
def create_user():
    fields = {
        name: request.json.get(name) for name in ("first_name", "last_name", "email", "password")
    }
    if not all(fields.values()):
        return MISSING
    fields["password"] = generate_password_hash(fields["password"], "pbkdf2:sha256:600000")
    user = User(**fields)
    db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        return TAKEN
    return jsonify({"id": user.id}), 201


@app.get("/users/")
def list_users():
    statement = db.select(User).order_by(User.id)
    if "limit" in request.args:
        statement = statement.where(User.id > int(request.args["after"])).limit(
            int(request.args["limit"])
        )
    return jsonify([public(user) for user in db.session.execute(statement).scalars()])


@app.get("/users/<int:user_id>/")
def get_user(user_id):
    user = db.session.get(User, user_id)
    if user is None:
        return {"error": "Invalid user id"}, 404
    return public(user)


@app.put("/users/<int:user_id>/")
def update_user(user_id):
    fields = {name: request.json.get(name) for name in ("first_name", "last_name", "email")}
    if not all(fields.values()):
        return MISSING
    try:
        db.session.execute(db.update(User).where(User.id == user_id).values(**fields))
        db.session.commit()
    except IntegrityError:
        return TAKEN
    return jsonify({"id": user_id})


@app.delete("/users/<int:user_id>/")
def delete_user(user_id):
    db.session.execute(db.delete(User).where(User.id == user_id))
    db.session.commit()
    return "", 204
