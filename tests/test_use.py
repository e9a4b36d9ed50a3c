"""docs/use.md: the examples are written to files as they stand on the page, started as
the page says, and used as a browser would."""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import http.cookiejar
import http.server
import importlib.util
import inspect
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from unittest import mock
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit

import pytest
from conftest import HERE, TOKEN, call, copy_module, execute, run_program

import profiler

PAGE = (HERE / "docs/use.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# The first line of an example is a comment with the name of its file.
NAME = re.compile(r"(?:#|//|\{#|<!--|<\?php //) ([\w./]+)(?: #\}| -->)?\n")
FILES = {match[1]: text for _, text in BLOCKS if (match := NAME.match(text))}
COMMANDS = "".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", "")
PROFILE = {"first_name": "Harry", "last_name": "Potter", "email": "harry@example.com"}
HARRY = {**PROFILE, "password": "correct horse"}
NEW_TOKEN = "fedcba9876543210"


def needs(*programs, packages=()):
    """Skip a test unless these programs and Python packages are installed."""
    missing = [program for program in programs if not shutil.which(program)]
    missing += [package for package in packages if not importlib.util.find_spec(package)]
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
        "PYTHONPATH": f"{folder}:{os.environ.get('SHIM', HERE)}",
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
        deadline = time.monotonic() + 60
        while not listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
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
        ("app.py", "static/index.html", *SHARED),
        "flask --app app ",
        urlencode,
        marks=needs(packages=["flask", "requests"]),
    ),
    "fastapi": pytest.param(
        ("api.py", *SHARED),
        "uvicorn ",
        json.dumps,
        marks=needs(packages=["fastapi", "uvicorn", "itsdangerous", "requests"]),
    ),
    "express": pytest.param(
        ("server.mjs",),
        "node ",
        json.dumps,
        marks=needs_node("express", "express-session", "nodemailer"),
    ),
}


@contextlib.contextmanager
def serving(folder, files, command, encode, mailbox, **environ):
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
    with serving(tmp_path, files, command, encode, mailbox, **environ) as browser:
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
        assert harry.get("/me?again") == 200
        # A problem has been logged. Requests are logged once nevertheless, or not at all.
        [log] = tmp_path.glob("[0-9]*.log")
        assert log.read_text().count("/me?again") <= 1
        assert log.read_text().count("profiler: ") >= 3
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
    # Without an email, nobody gets a mail: the only one is read below.
    browser().post("/forgot", other="x")
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


@needs("bash", packages=["flask"])
def test_flask_in_the_same_process(tmp_path, mailbox):
    files, command = ("website.py", "mail.py"), "flask --app website "
    with serving(tmp_path, files, command, urlencode, mailbox) as browser:
        follow_story(browser, mailbox)
        harry = log_in(browser, "battery staple")
        (tmp_path / "accounts.sqlite3").rename(tmp_path / "moved")
        assert harry.post("/signup", **{**HARRY, "email": "ron@example.com"}) == 503
        (tmp_path / "moved").rename(tmp_path / "accounts.sqlite3")
        end_story(browser, harry)


# -- Django ----------------------------------------------------------------------------

DJANGO = ("accounts.py", "backend.py", "accountforms.py", "mysite/urls.py")
TEMPLATE = "templates/registration/login.html"


def django_environment(folder, url="http://127.0.0.1:9", mail_port=9):
    return {
        **os.environ,
        "PROFILER_URL": url,
        "PROFILER_TOKEN": TOKEN,
        "SECRET_KEY": "secret",
        "MAIL_HOST": f"127.0.0.1:{mail_port}",
        "MAIL_FROM": "accounts@example.com",
        "PYTHONPATH": str(folder),
        "no_proxy": "*",
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a project of Django, made as the page says."""
    folder = tmp_path_factory.mktemp("project")
    settings = folder / "mysite/settings.py"

    def run(start):
        module = {"django-admin": ["-m", "django"], "python": []}
        program, *words = find_command(start).split()
        command = [sys.executable, *module[program], *words]
        subprocess.run(command, cwd=folder, env=django_environment(folder), check=True)

    run("django-admin startproject")
    created = settings.read_text()
    write(folder, *DJANGO, TEMPLATE, "mysite/settings.py")
    settings.write_text(created + settings.read_text())
    run("python manage.py migrate")
    return folder


@pytest.fixture
def site(tmp_path, project, service, mailbox):
    """Serve a copy of the project. Return a function that returns a new browser."""
    port = free_port()
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    environ = django_environment(tmp_path, service.url, mailbox.server_address[1])
    environ.pop("PATH")
    command = find_command("python manage.py runserver") + " --noreload"
    with running(command, tmp_path, port, **environ):
        yield lambda: Browser(port)


def fill(browser, path, **fields):
    """Send the form on a page, with its token against CSRF. Return the path of the page
    that follows, and its text."""
    text = browser.request(path)[2]
    fields["csrfmiddlewaretoken"] = re.search('csrfmiddlewaretoken" value="(.*?)"', text)[1]
    text = browser.request(path, fields)[2]
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


@needs("bash", packages=["django", "requests"])
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
    django_log_in(site, "correct horse", "Too many wrong passwords: try again later (in ")
    fill(site(), "/password_reset/", email=HARRY["email"])
    link = re.search(r"http://[^/]+(/reset/\S+)", mailbox.messages.get(timeout=10).get_content())[
        1
    ]
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


@needs("bash", packages=["django", "requests"])
def test_django_forgets_users_who_are_gone_after_a_restore(tmp_path, service, site):
    def count():
        return execute(tmp_path / "db.sqlite3", "SELECT count(*) FROM auth_user")[0][0]

    fill(site(), "/signup/", **HARRY)
    service.stop()
    shutil.copy(tmp_path / "service.sqlite3", tmp_path / "backup.sqlite3")
    service.start(TOKEN)
    ginny = site()
    fill(ginny, "/signup/", **{**HARRY, "email": "ginny@example.com"})
    service.stop()
    shutil.copy(tmp_path / "backup.sqlite3", tmp_path / "service.sqlite3")
    service.start(TOKEN)
    assert (count(), is_logged_in(ginny)) == (2, True)
    write(tmp_path, "forget.py")
    assert "`python manage.py shell < forget.py`" in PAGE
    with open(tmp_path / "forget.py") as file:
        subprocess.run(
            [sys.executable, "manage.py", "shell"],
            cwd=tmp_path,
            env=django_environment(tmp_path, service.url),
            stdin=file,
            check=True,
        )
    assert (count(), is_logged_in(ginny)) == (1, False)


# -- Python ----------------------------------------------------------------------------

PYTHON = PAGE.partition("## From Python")[2].partition("\n## ")[0]
CALLS = re.findall(
    r"^\| `accounts\.((?:users\.)?\w+)\((.*)\)` \| .* \| (.*)\|$", PYTHON, re.MULTILINE
)


def test_example_in_python_runs(tmp_path):
    output = run_program(FILES["accounts_example.py"], tmp_path, PROFILER_ITERATIONS="1")
    assert (output.returncode, output.stderr) == (0, "")


def test_calls_in_python_are_those_of_the_module():
    for name, parameters, _ in CALLS:
        owner = profiler.Users if name.startswith("users.") else profiler.Accounts
        signature = inspect.signature(getattr(owner, name.removeprefix("users.")))
        names = [name for name in signature.parameters if name not in ("self", "guard")]
        assert parameters == ", ".join(names)


def test_exceptions_of_accounts_are_documented():
    raised = {name: set(re.findall(r"`(\w+)`", raises)) for name, _, raises in CALLS}
    raised["change_password"] |= raised["verify"] - {"verify"}
    for name, exceptions in raised.items():
        if not name.startswith("users."):
            docstring = getattr(profiler.Accounts, name).__doc__
            documented = set(re.findall(r":raises (\w+):", docstring))
            assert (exceptions - {"verify"}) | {"InvalidField"} == documented, name


def test_statuses_of_exceptions_are_those_of_the_service(application, monkeypatch):
    rows = re.findall(r"^\| `(\w+)`.*? \| ([0-9]+) \|", PYTHON, re.MULTILINE)
    classes = {name for name in profiler.__all__ if name[0].isupper()} - {"Accounts", "Users"}
    assert {name for name, _ in rows} == classes
    login = {"email": HARRY["email"], "password": HARRY["password"]}
    for name, status in rows:
        error = getattr(profiler, name)(*([60] if name == "TooManyAttempts" else []))
        monkeypatch.setattr(application.accounts, "verify", mock.Mock(side_effect=error))
        assert call(application, "POST", "/users/verify/", fields=login).status == int(status)


# -- in front of a website -------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """The module basic.py, on a database with one user."""
    monkeypatch.setenv("PROFILER_DATABASE", str(tmp_path / "db.sqlite3"))
    monkeypatch.setenv("PROFILER_ITERATIONS", "1")
    write(tmp_path, "basic.py")
    spec = importlib.util.spec_from_file_location("basic", tmp_path / "basic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.closing(module.app.users):
        module.app.accounts.create(**HARRY)
        yield module


def authorization(email, password):
    return "Basic " + base64.b64encode(f"{email}:{password}".encode()).decode()


def ask_adapter(adapter, **environ):
    answer = call(adapter.application, path="/", **environ)
    return answer.status, answer.headers.get("X-User-Id")


def test_adapter_answers_401_403_and_the_id(adapter):
    right = authorization(HARRY["email"], HARRY["password"])
    wrong = authorization(HARRY["email"], "guess")
    assert ask_adapter(adapter) == (401, None)
    for header in ("Basic", "Basic !", "Basic /w==", "Bearer " + right.split()[1]):
        assert ask_adapter(adapter, HTTP_AUTHORIZATION=header) == (401, None)
    assert ask_adapter(adapter, HTTP_AUTHORIZATION=wrong) == (401, None)
    assert ask_adapter(adapter, HTTP_AUTHORIZATION=right) == (200, "1")
    for _ in range(10):
        assert ask_adapter(adapter, HTTP_AUTHORIZATION=wrong) == (401, None)
    assert ask_adapter(adapter, HTTP_AUTHORIZATION=wrong) == (403, None)
    # A browser that has logged in goes on. The name of the scheme may have any case.
    assert ask_adapter(adapter, HTTP_AUTHORIZATION=right.replace("B", "b", 1)) == (200, "1")


@pytest.fixture
def hashes(adapter, monkeypatch):
    """The logins for which the adapter lets the service compute a hash."""
    hashes, verify = [], adapter.app.accounts.verify
    monkeypatch.setattr(
        adapter.app.accounts, "verify", lambda *login: hashes.append(login) or verify(*login)
    )
    return hashes


def test_adapter_hashes_once_for_concurrent_requests(adapter, hashes):
    login = HARRY["email"], HARRY["password"]
    threads = [threading.Thread(target=adapter.verify, args=login) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert adapter.verify(*login) == 1
    assert hashes == [login]


@pytest.mark.parametrize("change", ["password", "email", "delete"])
def test_adapter_notices_at_once_what_has_changed(adapter, change):
    assert adapter.verify(HARRY["email"], HARRY["password"]) == 1
    if change == "password":
        adapter.app.accounts.reset_password(1, "battery staple")
    elif change == "email":
        adapter.app.accounts.update(1, {"email": "potter@example.com"})
    else:
        adapter.app.users.delete(1)
    with pytest.raises(profiler.WrongPassword):
        adapter.verify(HARRY["email"], HARRY["password"])


def test_adapter_keeps_digests_with_a_key_in_a_limited_number_of_places(
    adapter, hashes, monkeypatch
):
    login = HARRY["email"], HARRY["password"]
    assert adapter.verify(*login) == 1
    [(place, (digest, user_id))] = adapter.known.items()
    assert (len(place), len(digest), user_id) == (2, 32, 1)
    # What another login has left in the same place does not count.
    adapter.known[place] = bytes(32), 2
    assert adapter.verify(*login) == 1
    assert adapter.known == {place: (digest, 1)}
    monkeypatch.setattr(adapter, "key", bytes(32))
    assert adapter.verify(*login) == 1
    assert hashes == [login] * 3


@pytest.mark.parametrize("method", ["find_credentials", "verify"])
def test_adapter_does_not_report_a_failing_database_as_a_wrong_password(
    adapter, method, monkeypatch
):
    owner = adapter.app.users if method == "find_credentials" else adapter.app.accounts
    monkeypatch.setattr(owner, method, mock.Mock(side_effect=profiler.Unavailable))
    right = authorization(HARRY["email"], HARRY["password"])
    answer = call(adapter.application, path="/", HTTP_AUTHORIZATION=right)
    assert (answer.status, answer.headers) == (403, {"Retry-After": "1"})


class Website(http.server.BaseHTTPRequestHandler):
    """Answer with the id of the user that the proxy sends."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(self.headers.get_all("X-User-Id")).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def website():
    """The port of a website without a login of its own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Website) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def gunicorn(tmp_path, adapter):
    """The port of the adapter."""
    port = free_port()
    command = find_command("gunicorn ").replace("5020", str(port))
    with running(command, tmp_path, port, PROFILER_DATABASE=str(tmp_path / "db.sqlite3")):
        yield port


NGINX = """
pid {folder}/pid; error_log {folder}/error.log; daemon off; events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:8000; {example} }}
}}
"""
CADDY = """
{{
    admin off
}}
http://127.0.0.1:8000 {{
    bind 127.0.0.1
    {example}
}}
"""
PROXIES = {
    "nginx": pytest.param("nginx.conf", NGINX, "nginx -c $PWD/nginx.conf", marks=needs("nginx")),
    "caddy": pytest.param(
        "Caddyfile",
        CADDY,
        "caddy run --adapter caddyfile --config Caddyfile",
        marks=needs("caddy"),
    ),
}


@needs("bash", packages=["gunicorn"])
@pytest.mark.parametrize(("name", "frame", "command"), PROXIES.values(), ids=PROXIES)
def test_proxy_asks_for_a_password(tmp_path, gunicorn, website, name, frame, command):
    port = free_port()
    write(tmp_path, name, **{"5020": gunicorn, "8080": website})
    path = tmp_path / name
    path.write_text(
        frame.format(folder=tmp_path, example=path.read_text()).replace("8000", str(port))
    )
    right = authorization(HARRY["email"], HARRY["password"])
    wrong = authorization(HARRY["email"], "guess")
    with running(command, tmp_path, port, HOME=str(tmp_path)):
        browser, forged = Browser(port), {"X-User-Id": "999"}
        status, headers, _ = browser.request("/", **forged)
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="accounts"')
        assert browser.get("/", Authorization=wrong, **forged) == 401
        status, _, text = browser.request("/image.png?size=1", Authorization=right, **forged)
        assert (status, text) == (200, "['1']")
        assert browser.post("/", field="x") == 401
        for _ in range(10):
            browser.get("/", Authorization=wrong)
        assert browser.get("/", Authorization=wrong) == 403


APACHE = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/pid
ErrorLog {folder}/error.log
DocumentRoot {folder}/html
Listen 127.0.0.1:{port}
User www-data
Group www-data
{modules}
{example}
"""
MODULES = "mpm_event authn_core authz_core authz_user auth_basic wsgi"


@needs("bash", "apache2")
@pytest.mark.skipif(
    not os.path.exists("/usr/lib/apache2/modules/mod_wsgi.so"),
    reason="not installed: libapache2-mod-wsgi-py3",
)
def test_apache_asks_for_a_password(adapter):
    # Apache's own user must reach the files, which pytest's folder does not allow.
    with tempfile.TemporaryDirectory() as name:
        folder, port = pathlib.Path(name), free_port()
        copy_module(folder)
        write(folder, "basic.py", "apache_auth.py", "apache.conf", **{"/opt/profiler": folder})
        (folder / "html").mkdir()
        (folder / "html/page").write_text("hello")
        modules = [
            f"LoadModule {module}_module /usr/lib/apache2/modules/mod_{module}.so"
            for module in MODULES.split()
        ]
        config = folder / "apache.conf"
        config.write_text(
            APACHE.format(
                folder=folder,
                port=port,
                modules="\n".join(modules),
                example=config.read_text(),
            )
        )
        database = folder / "db.sqlite3"
        adapter.app.users.backup(database)
        if os.getuid() == 0:
            for path in (folder, database):
                shutil.chown(path, "www-data", "www-data")
        command = f"exec apache2 -f {config} -X"
        with running(command, folder, port, PROFILER_DATABASE=str(database)) as log:
            browser = Browser(port)
            wrong = authorization(HARRY["email"], "guess")
            assert browser.get("/page") == 401
            assert browser.get("/page", Authorization=wrong) == 401, log.read_text()
            right = authorization(HARRY["email"], HARRY["password"])
            assert browser.get("/page", Authorization=right) == 200, log.read_text()


# -- tests of an application, and other languages --------------------------------------


@needs(packages=["flask", "requests"])
def test_fixture_starts_the_service_for_tests_of_an_application(tmp_path):
    write(tmp_path, "conftest.py", "test_app.py", "app.py", *SHARED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE}", "no_proxy": "*"}
    output = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert "2 passed" in output.stdout, output.stdout


LANGUAGES = {
    "go": pytest.param("verify.go", "go run verify.go", marks=needs("go")),
    "java": pytest.param("Verify.java", "java Verify.java", marks=needs("javac")),
    "php": pytest.param("verify.php", "php verify.php", marks=needs("php")),
}


@pytest.mark.parametrize(("name", "command"), LANGUAGES.values(), ids=LANGUAGES)
def test_program_verifies_a_password(tmp_path, service, name, command):
    assert f"`{command}`" in PAGE
    if name == "verify.php" and b"curl" not in subprocess.check_output(["php", "-m"]):
        pytest.skip("not installed: php-curl")
    fields, headers = {**PROFILE, "password": "1234"}, {"Authorization": f"Bearer {TOKEN}"}
    assert Browser(service.port, json.dumps).request("/users/", fields, **headers)[0] == 201
    environ = {**os.environ, "PROFILER_URL": service.url, "no_proxy": "*"}
    environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # start fast
    programs = []
    for password, token in (("1234", TOKEN), ("guess", TOKEN), ("1234", NEW_TOKEN)):
        folder = tmp_path / str(len(programs))
        folder.mkdir()
        write(folder, name, **{'"1234"': f'"{password}"'})
        program = subprocess.Popen(
            command.split(),
            cwd=folder,
            env={**environ, "PROFILER_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        programs.append(program)
    right, wrong, refused = [(*program.communicate(), program.returncode) for program in programs]
    assert (right[0], right[2]) == ("1\n", 0), right[1]
    assert (wrong[0], wrong[2]) == ("0\n", 0), wrong[1]
    assert refused[0] != "0\n"
    assert refused[2] != 0


# -- the page --------------------------------------------------------------------------


def variables_of_examples():
    """Return the names of the variables that the examples read."""
    names = re.findall(r'environ\["([A-Z_]+)"\]', PAGE)
    return {*names, *re.findall("[A-Z_]+", re.search(r"const \{(.*)\} = process.env", PAGE)[1])}


def test_every_variable_that_an_example_reads_is_documented():
    rows = re.findall(r"^\| (`[A-Z_]+`.*?) \|", PAGE, re.MULTILINE)
    assert set(re.findall("`([A-Z_]+)`", "".join(rows))) == variables_of_examples()


def test_forms_have_the_fields_of_the_routes():
    rows = re.findall(r"^\| `POST (/\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
    routes = {path: set(re.findall(r"`(\w+)`", fields)) for path, fields in rows}
    forms = re.findall(r'action="(.*?)">(.*?)</form>', FILES["static/index.html"], re.DOTALL)
    assert routes == {path: set(re.findall(r'name="(\w+)"', form)) for path, form in forms}


@needs("bash")
def test_commands_before_the_start_set_every_variable(tmp_path):
    (tmp_path / "token").write_text(f"old-token-of-the-file\n{TOKEN}\n")
    exports = "\n".join(line for line in COMMANDS.splitlines() if line.startswith("export "))
    script = f"{exports}\nenv --null"
    names = set(re.findall("([A-Z_]+)=", exports))
    output = subprocess.run(
        ["bash", "-euc", script.replace("python3", sys.executable)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    values = dict(line.split("=", 1) for line in output.split("\0") if line)
    assert values["PROFILER_TOKEN"] == TOKEN
    assert len(values["SECRET_KEY"]) > 40
    assert names == variables_of_examples()
