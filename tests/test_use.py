"""docs/use.md: the examples are written to files as they stand on the page, started as
the page says, and used as a browser would."""

from __future__ import annotations

import contextlib
import email
import email.policy
import http.cookiejar
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.request
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit

import pytest
from conftest import HERE, TOKEN, until

PAGE = (HERE / "docs/use.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# The first line of an example is a comment with the name of its file.
NAME = re.compile(r"(?:#|//|\{#|<\?php //) ([\w./]+)(?: #\})?\n")
FILES = {match[1]: text for _, text in BLOCKS if (match := NAME.match(text))}
COMMANDS = "".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", "")
PROFILE = {"first_name": "Harry", "last_name": "Potter", "email": "harry@example.com"}
HARRY = {**PROFILE, "password": "correct horse"}
NEW_TOKEN = "fedcba9876543210"


def needs(*names):
    """Skip a test unless these programs and Python packages are installed."""
    missing = [
        name for name in names if not (shutil.which(name) or importlib.util.find_spec(name))
    ]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def needs_node(*names):
    missing = [name for name in names if not (HERE / "node_modules" / name).exists()]
    reason = f"not installed: npm install {' '.join(missing)}, in {HERE}"
    return pytest.mark.skipif(bool(missing) or not shutil.which("node"), reason=reason)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def write(folder, *names, **replacements):
    """Write examples to their files."""
    for name in names:
        text = FILES[name]
        for old, new in replacements.items():
            text = text.replace(old, str(new))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def find_command(start):
    """Return the only command on the page that starts with these words."""
    [command] = [line for line in COMMANDS.splitlines() if line.startswith(start)]
    return command


@contextlib.contextmanager
def running(command, folder, port, **environ):
    """Run a shell command, which serves this port instead of 8000, until the end of the
    block."""
    environ = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{HERE}",
        "PROFILER_ITERATIONS": "1",
        "no_proxy": "*",
        **environ,
    }
    log = folder / f"{port}.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            ["bash", "-c", command.replace("8000", str(port))],
            cwd=folder,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: listens(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        with contextlib.suppress(ProcessLookupError):  # what is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Service:
    """The service with a token, on one port and one database, to be started and stopped."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, *tokens):
        self.stop()
        (self.folder / "token").write_text("\n".join(tokens))
        options = {
            "--port": self.port,
            "--database": self.folder / "service.sqlite3",
            "--token-file": self.folder / "token",
            "--iterations": 1,
        }
        words = [str(word) for option in options.items() for word in option]
        with open(self.folder / "service.log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "profiler.py", *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        # It prints its address once it listens.
        assert self.process.stdout.readline(), (self.folder / "service.log").read_text()

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    service.start(TOKEN)
    yield service
    service.stop()


class MailHandler(socketserver.StreamRequestHandler):
    """Take one message by SMTP (RFC 5321)."""

    def handle(self):
        self.wfile.write(b"220 test\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                message = email.message_from_bytes(b"".join(lines), policy=email.policy.default)
                self.server.messages.put(message)
            self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
            if verb == b"QUIT":
                return


@pytest.fixture
def mailbox():
    """A mail server. Its messages are in `messages`."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailHandler) as server:
        server.daemon_threads = True
        server.messages = queue.Queue()
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Browser:
    """A client that keeps cookies."""

    def __init__(self, port, encode=None):
        self.url, self.encode = f"http://127.0.0.1:{port}", encode
        self.cookies = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self.cookies)
        )

    def request(self, path, fields=None, **headers):
        """Return the status, the headers and the text of a response, after redirects.
        With fields, send POST."""
        body = None
        if fields is not None and self.encode is json.dumps:
            body, headers["Content-Type"] = json.dumps(fields).encode(), "application/json"
        elif fields is not None:
            body = urlencode(fields).encode()
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with self.opener.open(request, timeout=20) as response:
                self.path = urlsplit(response.url).path
                return response.status, response.headers, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.headers, error.read().decode()

    def get(self, path, **headers):
        return self.request(path, **headers)[0]

    def post(self, path, **fields):
        return self.request(path, fields)[0]

    def cookie_values(self):
        return [cookie.value for cookie in self.cookies]


def read_link(mailbox):
    """Return the path of the link in the next message."""
    message = mailbox.messages.get(timeout=10)
    assert message["To"] == "harry@example.com"
    [path] = re.findall(r"http://app\.example(/\S+)", message.get_content())
    return path


# -- applications with the same routes -------------------------------------------------

SHARED = ("accounts.py", "tickets.py", "mail.py")
APPLICATIONS = {
    "flask": pytest.param(
        ("app.py", *SHARED), "flask --app app ", urlencode, marks=needs("flask", "requests")
    ),
    "fastapi": pytest.param(
        ("api.py", *SHARED),
        "uvicorn ",
        json.dumps,
        marks=needs("fastapi", "uvicorn", "itsdangerous", "requests"),
    ),
    "express": pytest.param(
        ("server.mjs",),
        "node ",
        json.dumps,
        marks=needs_node("express", "express-session", "nodemailer"),
    ),
}


@contextlib.contextmanager
def application(folder, files, command, encode, mailbox, **environ):
    """Start an application. Return a function that returns a new browser."""
    port = free_port()
    write(folder, *files, **{"8000": port})
    if (HERE / "node_modules").exists():
        (folder / "node_modules").symlink_to(HERE / "node_modules")
    environ = {
        "SECRET_KEY": "secret",
        "PUBLIC_URL": "http://app.example",
        "MAIL_HOST": f"127.0.0.1:{mailbox.server_address[1]}",
        "MAIL_FROM": "accounts@example.com",
        **environ,
    }
    with running(find_command(command), folder, port, **environ):
        yield lambda: Browser(port, encode)


@needs("bash")
@pytest.mark.parametrize(("files", "command", "encode"), APPLICATIONS.values(), ids=APPLICATIONS)
def test_application_over_http(tmp_path, service, mailbox, files, command, encode):
    environ = {"PROFILER_URL": service.url, "PROFILER_TOKEN": TOKEN}
    with application(tmp_path, files, command, encode, mailbox, **environ) as browser:
        follow_story(browser, mailbox)
        harry = log_in(browser, "battery staple")
        service.start(TOKEN, NEW_TOKEN)
        assert harry.get("/me") == 200
        service.start(NEW_TOKEN)
        # 401 would mean that the user has to log in.
        assert harry.get("/me") == 503
        service.stop()
        assert harry.get("/me") == 503
        assert browser().post("/login", email=HARRY["email"], password="battery staple") == 503
        service.start(TOKEN)
        assert harry.get("/me") == 200
        end_story(browser, harry)


def log_in(browser, password, status=200):
    """Return a new browser, which has logged in."""
    client = browser()
    assert client.post("/login", email=HARRY["email"], password=password) == status
    return client


def follow_story(browser, mailbox):
    """Sign up, change the password, forget it, and guess it until logins are limited."""
    harry = browser()
    assert harry.get("/me") == 401
    assert harry.post("/signup", **{**HARRY, "email": "harry"}) == 400
    assert harry.post("/signup", **HARRY) == 201
    status, _, text = harry.request("/me")
    assert (status, json.loads(text)["email"]) == (200, HARRY["email"])
    status, _, text = browser().request("/signup", HARRY)
    assert (status, json.loads(text)) == (400, {"error": "This email is already registered"})

    other = log_in(browser, HARRY["password"])
    assert log_in(browser, "guess", 403).get("/me") == 401
    assert harry.post("/password", old_password="guess", new_password="changed") == 403
    assert browser().post("/password", old_password="guess", new_password="changed") == 401
    assert harry.post("/password", old_password="correct horse", new_password="changed") == 200
    assert (harry.get("/me"), other.get("/me")) == (200, 401)
    assert harry.post("/logout") == 200
    assert harry.get("/me") == 401

    harry = log_in(browser, "changed")
    answers = [browser().request("/forgot", {"email": name + "@example.com"}) for name in "xy"]
    answers += [browser().request("/forgot", {"email": "HARRY@example.com"})]
    assert len({(status, text) for status, _, text in answers}) == 1
    link = read_link(mailbox)
    assert mailbox.messages.empty()
    if browser().encode is urlencode:
        assert "new_password" in browser().request(link)[2]
    assert browser().post(link, new_password="") == 400
    assert browser().post(link[:-1], new_password="stolen") == 403
    assert harry.get("/me") == 200
    assert browser().post(link, new_password="battery staple") == 200
    assert harry.get("/me") == 401
    assert browser().post(link, new_password="again") == 403

    for _ in range(10):
        log_in(browser, "guess", 403)
    log_in(browser, "battery staple", 429)
    assert browser().post("/forgot", email=HARRY["email"]) == 200
    assert browser().post(read_link(mailbox), new_password="battery staple") == 200


def end_story(browser, harry):
    """Replace one session by another user's, then delete the first user."""
    other = log_in(browser, "battery staple")
    before = other.cookie_values()
    assert other.post("/signup", **{**HARRY, "email": "ginny@example.com"}) == 201
    assert other.cookie_values() != before
    assert harry.post("/delete") == 200
    assert harry.get("/me") == 401
    log_in(browser, "battery staple", 403)
    assert other.get("/me") == 200


# -- Django ----------------------------------------------------------------------------

DJANGO = ("accounts.py", "backend.py", "accountforms.py", "mysite/urls.py")
TEMPLATE = "templates/registration/login.html"


@pytest.fixture
def site(tmp_path, service, mailbox):
    """A project of Django, made as the page says. Return a function that returns a new
    browser."""
    port = free_port()
    settings = tmp_path / "mysite/settings.py"
    environ = {
        "PROFILER_URL": service.url,
        "PROFILER_TOKEN": TOKEN,
        "SECRET_KEY": "secret",
        "MAIL_HOST": f"127.0.0.1:{mailbox.server_address[1]}",
        "MAIL_FROM": "accounts@example.com",
    }
    run = [sys.executable, "-m", "django"]
    words = find_command("django-admin startproject").split()[1:]
    subprocess.run([*run, *words], cwd=tmp_path, check=True)
    created = settings.read_text()
    write(tmp_path, *DJANGO, TEMPLATE, "mysite/settings.py")
    settings.write_text(created + settings.read_text())
    migrate, serve = map(find_command, ("python manage.py migrate", "python manage.py runserver"))
    command = f"{migrate} && exec {serve} --noreload"
    with running(command, tmp_path, port, **environ):
        yield lambda: Browser(port)


def fill(browser, path, **fields):
    """Send the form on a page, with its token against CSRF. Return the path of the page
    that follows, and its text."""
    text = browser.request(path)[2]
    fields["csrfmiddlewaretoken"] = re.search('csrfmiddlewaretoken" value="(.*?)"', text)[1]
    _, headers, text = browser.request(path, fields)
    return browser.path, text


def django_log_in(site, password, text):
    """Return a new browser, after an attempt to log in that is answered with this text."""
    browser = site()
    answer = fill(browser, "/login/", username=HARRY["email"], password=password)
    assert text in answer[1]
    return browser


def is_logged_in(browser):
    browser.request("/password_change/")
    return browser.path == "/password_change/"


def new_passwords(password):
    return {"new_password1": password, "new_password2": password}


@needs("bash", "django", "requests")
def test_django(site, service, mailbox):
    harry, problem = site(), "Please enter a correct"
    assert "email address" in fill(harry, "/signup/", **{**HARRY, "email": "harry"})[1]
    assert fill(harry, "/signup/", **HARRY) == ("/", '{"username": "profiler-1"}')
    assert "already registered" in fill(site(), "/signup/", **HARRY)[1]
    other = django_log_in(site, HARRY["password"], "profiler-1")
    assert not is_logged_in(django_log_in(site, "guess", problem))

    fields = {"old_password": "guess", **new_passwords("battery staple")}
    assert "Wrong email or password" in fill(harry, "/password_change/", **fields)[1]
    fields["old_password"] = HARRY["password"]
    assert fill(harry, "/password_change/", **fields)[0] == "/password_change/done/"
    assert (is_logged_in(harry), is_logged_in(other)) == (True, False)

    for address in ("nobody@example.com", HARRY["email"]):
        assert fill(site(), "/password_reset/", email=address)[0] == "/password_reset/done/"
    message = mailbox.messages.get(timeout=10)
    assert (message["To"], mailbox.messages.empty()) == (HARRY["email"], True)
    link = re.search(r"http://[^/]+(/reset/\S+)", message.get_content())[1]
    first, second = site(), site()
    first.request(link)
    second.request(link)
    assert fill(first, first.path, **new_passwords("correct horse"))[0] == "/reset/done/"
    assert not is_logged_in(harry)
    assert "csrfmiddlewaretoken" not in second.request(second.path)[2]
    assert "csrfmiddlewaretoken" not in site().request(link)[2]

    for _ in range(10):
        django_log_in(site, "guess", problem)
    django_log_in(site, "correct horse", "Too many wrong passwords")
    fill(site(), "/password_reset/", email=HARRY["email"])
    link = re.search(r"http://[^/]+(/reset/\S+)", mailbox.messages.get(timeout=10).get_content())[1]
    first.request(link)
    fill(first, first.path, **new_passwords("battery staple"))

    harry = django_log_in(site, "battery staple", "profiler-1")
    other = django_log_in(site, "battery staple", "profiler-1")
    service.start(NEW_TOKEN)
    django_log_in(site, "battery staple", "Try again later")
    service.stop()
    django_log_in(site, "battery staple", "Try again later")
    assert "Try again later" in fill(site(), "/password_reset/", email=HARRY["email"])[1]
    assert "Try again later" in fill(harry, "/delete/")[1]
    assert is_logged_in(harry)
    service.start(TOKEN)
    assert fill(harry, "/delete/") == ("/", '{"username": ""}')
    assert not is_logged_in(other)
    django_log_in(site, "battery staple", problem)


# -- the page --------------------------------------------------------------------------


def test_every_variable_that_an_example_reads_is_documented():
    rows = re.findall(r"^\| (`[A-Z_]+`.*?) \|", PAGE, re.MULTILINE)
    documented = set(re.findall("`([A-Z_]+)`", "".join(rows)))
    used = set(re.findall(r'environ\["([A-Z_]+)"\]', PAGE))
    used |= set(re.findall(r"[A-Z_]+", re.search(r"const \{(.*)\} = process.env", PAGE)[1]))
    assert used == documented
