"""The same endpoints in Bottle."""

import json

import bottle
import store

app = bottle.Bottle()


def answer(status, value):
    bottle.response.status = status
    bottle.response.content_type = "application/json"
    return json.dumps(value)


def fields(*names):
    body = bottle.request.json or {}
    return [body.get(name) for name in names]


@app.post("/users/")
def create_user():
    values = fields("first_name", "last_name", "email", "password")
    if not all(values):
        return answer(400, {"error": "Required fields are missing"})
    user_id = store.create_user(*values)
    if user_id is None:
        return answer(400, {"error": "This email is already registered"})
    return answer(201, {"id": user_id})


@app.get("/users/")
def list_users():
    return answer(200, store.list_users())


@app.get("/users/<user_id:int>/")
def get_user(user_id):
    user = store.get_user(user_id)
    return answer(404, {"error": "Invalid user id"}) if user is None else answer(200, user)


@app.put("/users/<user_id:int>/")
def update_user(user_id):
    values = fields("first_name", "last_name", "email")
    if not all(values):
        return answer(400, {"error": "Required fields are missing"})
    if store.update_user(user_id, *values) is None:
        return answer(400, {"error": "This email is already registered"})
    return answer(200, {"id": user_id})


@app.delete("/users/<user_id:int>/")
def delete_user(user_id):
    store.delete_user(user_id)
    bottle.response.status = 204
