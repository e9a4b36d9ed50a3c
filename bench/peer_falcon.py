"""The same endpoints in Falcon."""

import falcon
import store


def fields(request, *names):
    values = [request.media.get(name) for name in names]
    if not all(values):
        raise falcon.HTTPBadRequest(title="Required fields are missing")
    return values


def taken():
    return falcon.HTTPBadRequest(title="This email is already registered")


class Users:
    def on_get(self, request, response):
        response.media = store.list_users()

    def on_post(self, request, response):
        user_id = store.create_user(
            *fields(request, "first_name", "last_name", "email", "password")
        )
        if user_id is None:
            raise taken()
        response.status, response.media = falcon.HTTP_201, {"id": user_id}


class User:
    def on_get(self, request, response, user_id):
        user = store.get_user(user_id)
        if user is None:
            raise falcon.HTTPNotFound(title="Invalid user id")
        response.media = user

    def on_put(self, request, response, user_id):
        if (
            store.update_user(user_id, *fields(request, "first_name", "last_name", "email"))
            is None
        ):
            raise taken()
        response.media = {"id": user_id}

    def on_delete(self, request, response, user_id):
        store.delete_user(user_id)
        response.status = falcon.HTTP_204


app = falcon.App()
app.add_route("/users/", Users())
app.add_route("/users/{user_id:int}/", User())
