"""The floor: callables that run one statement on an open connection, or nothing at all,
and answer."""

import sqlite3

ONE_USER = """
SELECT json_object('id', id, 'first_name', first_name, 'last_name', last_name, 'email', email,
    'created_on', created_on)
FROM user WHERE id = ?
"""


def make_app(database):
    connection = sqlite3.connect(database, check_same_thread=False)
    connection.text_factory = bytes

    def app(environ, start_response):
        [body] = connection.execute(ONE_USER, (environ["PATH_INFO"][7:-1],)).fetchone()
        start_response(
            "200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        )
        return [body]

    return app


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]
