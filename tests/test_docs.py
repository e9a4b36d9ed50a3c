"""The README and docs/: transcripts and scripts are run, and what is stated is compared
with the module."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import unicodedata
import urllib.request
from urllib.error import HTTPError

import pytest
from conftest import HARRY, HERE, RON, TOKEN, call, execute, fill, run_program, until

import profiler

PAGES = {
    page.relative_to(HERE).as_posix(): page.read_text("utf-8")
    for page in [
        HERE / "README.md",
        HERE / "CHANGELOG.md",
        HERE / "CONTRIBUTING.md",
        HERE / "SECURITY.md",
        *sorted(HERE.glob("docs/*.md")),
    ]
}
README, API, DEPLOY, OPERATE = (
    PAGES[name] for name in ("README.md", "docs/api.md", "docs/deploy.md", "docs/operate.md")
)
FILES = ("profiler.py", "schema.sql", "index.html", "openapi.json")
needs_bash = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is missing"
)


def needs(*programs):
    missing = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def blocks(page, language):
    """Return the code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def section(page, title):
    """Return the text below a heading, up to the next heading of any level."""
    return re.split(r"^#+ ", page.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def plain(page):
    """Return the text in one line, to find sentences that are wrapped."""
    return " ".join(page.split())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, folder, log="log", errors=subprocess.STDOUT, **environ):
    """Run a command in a process group of its own until the end of the block."""
    environ = {
        **os.environ,
        "PROFILER_ITERATIONS": "1",
        "PYTHONPATH": str(HERE),
        "PYTHONUNBUFFERED": "1",
        **environ,
    }
    with open(folder / log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        with contextlib.suppress(ProcessLookupError):  # what is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def serving(folder, *options, **environ):
    """Run profiler.py in a folder. Return its port, and the lines that it prints."""
    for name in FILES:
        shutil.copy(HERE / name, folder)
    command = [sys.executable, "profiler.py", "--port", "0", "--no-access-log", *options]
    log = folder / "log"
    with (
        open(folder / "errors", "w") as errors,
        running(command, folder, errors=errors, **environ) as process,
    ):
        until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, (folder / "errors").read_text()
        output = log.read_text()
        yield int(re.match(r"http://[^/]+:([0-9]+)/", output)[1]), output


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def ask(url, method="GET", fields=None, token=None, host=None, context=None, chunked=False):
    """Return the status, the headers and the body of a response."""
    headers = {"Content-Type": "application/json"}
    headers.update({"Authorization": f"Bearer {token}"} if token else {})
    headers.update({"Host": host} if host else {})
    body = None if fields is None else json.dumps(fields).encode()
    if chunked:
        body = iter([body])
    request = urllib.request.Request(url, body, headers, method=method)
    handlers = [urllib.request.ProxyHandler({})] + (
        [urllib.request.HTTPSHandler(context=context)] if context else []
    )
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=10) as response:
            return response.status, response.headers, response.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


# -- transcripts -----------------------------------------------------------------------


def steps(console):
    """Return the commands in a transcript, each with what it prints."""
    lines, found = console.splitlines(), []
    while lines:
        command = lines.pop(0).removeprefix("$ ")
        while command.endswith("\\") or command.count("'") % 2:
            command += "\n" + lines.pop(0)
        output = []
        while lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
        found.append((command, "\n".join(output)))
    return found


class Session:
    """A folder with the service, in which the transcripts of a page run one after
    another, as in a shell."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.port, self.server = None, contextlib.ExitStack()
        self.tags = {}  # from an ETag on the page to the one of this run
        for name in FILES:
            shutil.copy(HERE / name, folder)

    def serve(self, *options):
        self.server.close()
        self.port, output = self.server.enter_context(serving(self.folder, *options))
        self.stack.push(self.server)
        return output

    def run(self, command):
        """Return what a command prints. A server that it starts is stopped by the next one."""
        words = shlex.split(command)
        if words[:2] == ["python3", "profiler.py"] and not {"backup", "initialise-database"} & set(
            words
        ):
            return self.serve(*words[2:])
        if "curl" in words and self.port is None:
            self.serve()
        command = command.replace("127.0.0.1:5000", f"127.0.0.1:{self.port}")
        for documented, actual in self.tags.items():
            command = command.replace(documented, actual)
        functions = 'curl() { command curl --silent "$@"; }; python3() { "$PYTHON" "$@"; };'
        environ = {**os.environ, "PYTHON": sys.executable, "no_proxy": "*"}
        output = subprocess.run(
            ["bash", "-c", f"{functions} {command}"],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
        )
        return output.stdout

    def check(self, command, expected):
        output = self.run(command).replace(f":{self.port}/", ":5000/")
        tag = re.compile('"[0-9a-f]{32}"')
        self.tags.update(zip(tag.findall(expected), tag.findall(output)))
        assert self.comparable(output) == self.comparable(expected), command

    def comparable(self, text):
        """Return a text without what differs in each run: times, ETags and the folder."""
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|(?<=Date: ).*", "TIME", text)
        return re.sub(r"(?<=Database: )\S+/", "", re.sub('"[0-9a-f]{32}"', "TAG", text)).strip()


@needs_bash
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "console")])
def test_transcripts_are_what_happens(tmp_path, name):
    with contextlib.ExitStack() as stack:
        session = Session(tmp_path, stack)
        if name == "docs/operate.md":  # its reader has a user and a token
            with contextlib.closing(
                profiler.create_app(tmp_path / "db.sqlite3", iterations=1)
            ) as application:
                assert call(application, "POST", fields=HARRY).status == 201
            (tmp_path / "token").write_text(f"a-token-to-replace\n{TOKEN}\n")
            session.serve("--token-file", "token")
        commands = [step for console in blocks(PAGES[name], "console") for step in steps(console)]
        assert commands
        for command, expected in commands:
            session.check(command, expected)


@needs_bash
def test_restore_steps_bring_the_users_back_and_keep_the_old_files(tmp_path):
    folder, backups = tmp_path / "lib", tmp_path / "backup"
    folder.mkdir(), backups.mkdir()
    fill(backups / "users-2026-11-27.sqlite3", 3)
    fill(folder / "db.sqlite3", 1)
    (folder / "db.sqlite3-wal").write_bytes(b"of the old database")
    [script] = blocks(section(OPERATE, "Restore"), "sh")
    script = script.replace("/var/lib/profiler", str(folder)).replace("/srv/backup", str(backups))
    script = re.sub("^systemctl .*\n", "", script, flags=re.MULTILINE)
    subprocess.run(["bash", "-euc", script], check=True)
    assert execute(folder / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(3,)]
    assert (folder / "db.sqlite3").stat().st_mode & 0o777 == 0o600
    [replaced] = folder.glob("replaced-*/db.sqlite3")
    assert execute(replaced, 'SELECT count(*) FROM "user"') == [(1,)]


@needs_bash
def test_command_for_a_new_token_appends_a_valid_one(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    command = re.search("^ *(python3 -c .*)$", section(OPERATE, "Tokens"), re.MULTILINE)[1]
    subprocess.run(
        ["bash", "-euc", command.replace("python3", sys.executable)], cwd=tmp_path, check=True
    )
    old, new = profiler.create_app(
        tmp_path / "db.sqlite3", token=(tmp_path / "token").read_text()
    ).tokens
    assert old == TOKEN.encode()
    assert len(new) >= profiler.MIN_TOKEN


@needs_bash
def test_cron_lines_write_a_backup_and_delete_those_of_more_than_30_days(tmp_path):
    fill(tmp_path / "db.sqlite3", 2)
    for days in (29, 32):
        earlier = tmp_path / f"users-{days}.sqlite3"
        earlier.touch()
        os.utime(earlier, (time.time() - days * 24 * 60 * 60,) * 2)
    [crontab] = blocks(section(OPERATE, "Back up"), "crontab")
    for line in crontab.splitlines():
        command = line.split(None, 5)[5].replace("\\%", "%")
        assert "%" not in line.replace("\\%", "")
        for name, replacement in (
            ("python3 /opt/profiler", f"{sys.executable} {HERE}"),
            ("/var/lib/profiler", tmp_path),
        ):
            command = command.replace(name, str(replacement))
        subprocess.run(["bash", "-euc", command.replace("/srv/backup", str(tmp_path))], check=True)
    assert not (tmp_path / "users-32.sqlite3").exists()
    (tmp_path / "users-29.sqlite3").unlink()
    [backup] = tmp_path.glob("users-*.sqlite3")
    assert execute(backup, 'SELECT count(*) FROM "user"') == [(2,)]


def test_index_for_a_case_sensitive_column_is_used_to_find_an_email(tmp_path):
    [statement] = blocks(section(PAGES["docs/databases.md"], "Databases of the tutorial"), "sql")
    schema = (HERE / "schema.sql").read_text("utf-8").replace(" COLLATE NOCASE", "")
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as connection:
        connection.executescript(schema + statement)
        query = 'EXPLAIN QUERY PLAN SELECT id FROM "user" WHERE email = ? COLLATE NOCASE'
        assert "INDEX user_email_nocase" in str(
            connection.execute(query, ("harry@example.com",)).fetchall()
        )
    with contextlib.closing(
        profiler.create_app(tmp_path / "db.sqlite3", iterations=1)
    ) as application:
        assert call(application, "POST", fields=HARRY).status == 201


# -- programs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "python")])
def test_python_on_a_page_is_valid(name):
    for number, block in enumerate(blocks(PAGES[name], "python")):
        compile(block, f"{name}, block {number}", "exec")


def test_python_in_the_readme_runs(tmp_path):
    [example] = blocks(README, "python")
    output = run_program(f"{example}\nassert application.users.count() == 1", tmp_path)
    assert (output.returncode, output.stderr) == (0, "")


def test_commands_for_postman_use_the_files_of_the_commands_before():
    [script] = [block for block in blocks(API, "sh") if "newman" in block]
    [(downloaded, source, written, run)] = re.findall(
        r"/([\w.]+)\n.* -s ([\w.]+) -o ([\w.]+) .*\n.* run ([\w.]+) ", script
    )
    assert (source, run) == (downloaded, written)


def test_generated_client_calls_operations_of_the_document():
    [example] = blocks(API, "python")
    operations = set(
        re.findall(r'"operationId": "(\w+)"', (HERE / "openapi.json").read_text("utf-8"))
    )
    [names] = re.findall(r"api\.users import (.*)", example)
    assert {
        re.sub("_(.)", lambda match: match[1].upper(), name) for name in names.split(", ")
    } <= operations


def test_module_for_a_stripped_prefix_adds_it_to_urls(tmp_path, monkeypatch):
    fill(tmp_path / "db.sqlite3", 2)
    monkeypatch.setenv("PROFILER_DATABASE", str(tmp_path / "db.sqlite3"))
    namespace = {}
    exec(blocks(section(DEPLOY, "A path prefix"), "python")[0], namespace)
    answer = call(namespace["application"], QUERY_STRING="limit=1")
    assert answer.headers["Link"] == '</accounts/users/?limit=1&after=1>; rel="next"'


def test_mount_inside_another_application_works(tmp_path, monkeypatch):
    pytest.importorskip("flask")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "site"}
    exec(blocks(section(DEPLOY, "Inside another application"), "python")[0], namespace)
    site = namespace["site"]
    site.route("/")(lambda: "the site itself")
    with contextlib.closing(namespace["accounts"]):
        environ = {"path": "/accounts/users/", "HTTP_HOST": "accounts.example.com"}
        assert call(site, **environ).status == 403
        assert call(site, **environ, REMOTE_USER="admin").json == []
        assert call(site, path="/").body == b"the site itself"


@needs_bash
def test_command_for_another_application_serves_it(tmp_path):
    pytest.importorskip("flask")
    pytest.importorskip("gunicorn")
    text, port = section(DEPLOY, "Inside another application"), free_port()
    (tmp_path / "website.py").write_text(blocks(text, "python")[0])
    environ = {
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    with running(["bash", "-c", blocks(text, "sh")[0]], tmp_path, **environ):
        until(lambda: listens(port))
        assert ask(f"http://127.0.0.1:{port}/accounts/users/")[::2] == (403, b"Log in as admin\n")


# -- import ----------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path):
    """The scripts of docs/move-in.md in a folder: helper, django, flask, csv."""
    names = ("profiler_import", "import_django", "import_flask", "import_csv")
    for name, block in zip(names, blocks(PAGES["docs/move-in.md"], "python")):
        (tmp_path / f"{name}.py").write_text(block)
    return tmp_path


def run_import(folder, script, port, status=0, **environ):
    """Return what an import script writes to stdout and to stderr."""
    environ = {
        **os.environ,
        "PROFILER_URL": f"http://127.0.0.1:{port}",
        "PROFILER_TOKEN": TOKEN,
        **environ,
    }
    output = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={**environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
    )
    assert output.returncode == status, output.stderr
    return output.stdout, output.stderr


def verify(port, email, password):
    url = f"http://127.0.0.1:{port}/users/verify/"
    return ask(url, "POST", {"email": email, "password": password}, TOKEN)[0]


def test_users_of_a_csv_file_are_imported(scripts, tmp_path):
    (tmp_path / "users.csv").write_text(
        "\ufeff" + blocks(PAGES["docs/move-in.md"], "csv")[0].strip() + ",password_hash\n"
        "7,Jo,Müller,jo@example.com,s3cret,\n8,Al,,al@example.com,s3cret,,too many\n",
        encoding="utf-8",
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        assert run_import(tmp_path, "import_csv.py", port) == (
            "7,1\n",
            "8,al@example.com,Required fields are missing\n",
        )
        assert verify(port, "jo@example.com", "s3cret") == 200


def test_import_stops_at_a_wrong_token(scripts, tmp_path):
    (tmp_path / "users.csv").write_text(
        "id,first_name,last_name,email,password\n7,Jo,Bo,jo@example.com,s3cret\n"
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        output = run_import(tmp_path, "import_csv.py", port, status=1, PROFILER_TOKEN="wrong")
    url, message = (
        f"http://127.0.0.1:{port}/users/",
        "Send a valid token in the header Authorization: Bearer TOKEN",
    )
    assert output == ("", f'{url}: 401 {{"error":"{message}"}}\n\n')


def test_users_of_a_flask_application_are_imported(scripts, tmp_path):
    security = pytest.importorskip("werkzeug.security")
    (tmp_path / "instance").mkdir()
    users = [
        (
            i,
            f"user{i}",
            f"user{i}@example.com",
            security.generate_password_hash(f"pass-{i}", method),
        )
        for i, method in enumerate(("scrypt", "pbkdf2:sha256:1000"), 11)
    ]
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "instance/app.db")) as connection,
        connection,
    ):
        connection.execute(
            "CREATE TABLE user (id INTEGER PRIMARY KEY, username, email, password_hash)"
        )
        connection.executemany(
            "INSERT INTO user VALUES (?, ?, ?, ?)",
            [*users, (13, "bc", "bc@example.com", "$2b$12$x")],
        )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        output = run_import(
            tmp_path, "import_flask.py", port, PROFILER_URL=f"http://127.0.0.1:{port}/"
        )
        assert output == ("11,1\n12,2\n13,3\n", "13,bc@example.com,needs a reset\n")
        again, problems = run_import(tmp_path, "import_flask.py", port)
        assert (
            again,
            problems.count("This email is already registered"),
            "reset" in problems,
        ) == ("", 3, False)
        assert [verify(port, f"user{i}@example.com", f"pass-{i}") for i in (11, 12)] == [200, 200]
        assert [verify(port, f"user{i}@example.com", "guess") for i in (11, 12)] == [403, 403]


def test_users_of_a_django_project_are_imported(scripts, tmp_path):
    pytest.importorskip("django")
    (tmp_path / "settings.py").write_text(
        "INSTALLED_APPS = ['django.contrib.auth', 'django.contrib.contenttypes']\n"
        "DATABASES = {\n"
        "    'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': 'django.sqlite3'}\n"
        "}\n"
        "DEFAULT_AUTO_FIELD = 'django.db.models.AutoField'\n"
    )
    (tmp_path / "fill.py").write_text(
        "import django; django.setup()\n"
        "from django.core.management import call_command; call_command('migrate', verbosity=0)\n"
        "from django.contrib.auth import hashers\n"
        "from django.contrib.auth.models import User\n"
        "passwords = [\n"
        "    hashers.PBKDF2PasswordHasher().encode('pass-1', 'salt', 1000),\n"
        "    hashers.ScryptPasswordHasher().encode('pass-2', 'salt'),\n"
        "    hashers.make_password(None),\n"
        "]\n"
        "for i, password in enumerate(passwords, 1):\n"
        "    email = f'user{i}@example.com'\n"
        "    User.objects.create(username=f'user{i}', email=email, password=password)\n"
        "User.objects.create(username='left', email='left@example.com', is_active=False)\n"
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        run_import(tmp_path, "fill.py", port, DJANGO_SETTINGS_MODULE="settings")
        output = run_import(tmp_path, "import_django.py", port, DJANGO_SETTINGS_MODULE="settings")
        assert output == ("1,1\n2,2\n3,3\n", "3,user3@example.com,needs a reset\n")
        assert [verify(port, f"user{i}@example.com", f"pass-{i}") for i in (1, 2)] == [200, 200]
        assert [verify(port, f"user{i}@example.com", "guess") for i in (1, 2)] == [403, 403]
    hashes = execute(tmp_path / "db.sqlite3", 'SELECT password FROM "user"')
    assert all(password.startswith("pbkdf2:sha256:1$") for (password,) in hashes)


# -- deployment ------------------------------------------------------------------------


def test_health_check_of_the_dockerfile_ignores_http_proxy(tmp_path):
    [dockerfile] = blocks(DEPLOY, "dockerfile")
    [check] = re.findall(r"HEALTHCHECK CMD (\[.*\])", dockerfile.replace("\\\n", ""))
    environ = {
        **os.environ,
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    program = json.loads(check)[2]

    def status(port):
        command = [sys.executable, "-c", program.replace("5000", str(port))]
        return subprocess.run(command, env=environ, capture_output=True).returncode

    with serving(tmp_path) as (port, _):
        assert status(port) == 0
    assert status(port) != 0
    [(names, folder)] = re.findall("^COPY (.*) (.*)$", dockerfile, re.MULTILINE)
    assert all((HERE / name).exists() for name in names.split())
    [command] = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert json.loads(command)[1] in [folder + name for name in names.split()]


@pytest.fixture
def certificate(tmp_path):
    """A certificate and its key in files."""
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        "-subj /CN=localhost -keyout accounts.key -out accounts.crt && "
        "cat accounts.key accounts.crt > accounts.pem",
        shell=True,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return tmp_path / "accounts.pem"


def trusting():
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@contextlib.contextmanager
def nginx(folder, servers):
    """Run nginx with this content of its http block."""
    temporary = "".join(
        f"{name}_temp_path {folder}; "
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        # Only root may write to the folder. Who is not root needs no `user`: it is ignored.
        f"user root; pid {folder}/pid; error_log {folder}/error.log; daemon off; events {{}}\n"
        f"http {{ access_log off; {temporary} {servers} }}"
    )
    with running(["nginx", "-c", str(folder / "nginx.conf")], folder, log="nginx"):
        yield


@needs("nginx", "openssl")
def test_nginx_forwards_requests_and_a_bare_proxy_pass_admits_everybody(tmp_path, certificate):
    servers = blocks(section(DEPLOY, "nginx"), "nginx")[0].replace(
        "/etc/ssl/accounts", str(tmp_path / "accounts")
    )
    front, bare = free_port(), free_port()
    with serving(tmp_path) as (port, _):
        servers = servers.replace("listen 443", f"listen 127.0.0.1:{front}").replace(
            "127.0.0.1:5000", f"127.0.0.1:{port}"
        )
        servers += (
            f"server {{ listen 127.0.0.1:{bare}; "
            f"location / {{ proxy_pass http://127.0.0.1:{port}; }} }}"
        )
        with nginx(tmp_path, servers):
            until(lambda: listens(front) and listens(bare))
            url = f"https://127.0.0.1:{front}/users/"
            assert ask(url, host="accounts.example.com", context=trusting())[0] == 421
            assert ask(f"http://127.0.0.1:{bare}/users/", host="accounts.example.com")[0] == 200
            # The limit of nginx is not below the module's.
            padding = profiler.MAX_BODY - len(json.dumps({**HARRY, "ignored": ""}))
            large = {**HARRY, "ignored": "x" * padding}
            assert ask(url, "POST", large, context=trusting())[0] == 201
            assert json.loads(ask(url, context=trusting())[2])[0]["first_name"] == "Harry"


@needs("haproxy", "openssl")
def test_haproxy_forwards_requests_to_a_service_with_a_token(tmp_path, certificate):
    front = free_port()
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        [config] = blocks(section(DEPLOY, "haproxy"), "haproxy")
        config = config.replace(":443", f"127.0.0.1:{front}").replace(
            "/etc/ssl/accounts.pem", str(certificate)
        )
        (tmp_path / "haproxy.cfg").write_text(
            config.replace("127.0.0.1:5000", f"127.0.0.1:{port}")
        )
        with running(["haproxy", "-f", "haproxy.cfg"], tmp_path, log="haproxy"):
            until(lambda: listens(front))
            url = f"https://127.0.0.1:{front}/users/"
            assert ask(url, host="accounts.example.com", context=trusting())[0] == 401
            assert ask(url, "POST", HARRY, TOKEN, "accounts.example.com", trusting())[0] == 201
            assert ask(url, "POST", RON, TOKEN, None, trusting(), chunked=True)[0] == 201


SERVERS = {
    "gunicorn": ("GUNICORN_CMD_ARGS", "--bind 127.0.0.1:{}"),
    "granian": ("GRANIAN_PORT", "{}"),
    "waitress": (None, None),
    "cheroot": (None, None),
    "uwsgi": (None, None),
}


@needs_bash
@pytest.mark.parametrize("server", SERVERS)
def test_wsgi_server_serves_the_application(tmp_path, server):
    text = section(DEPLOY, "gunicorn") + section(DEPLOY, "Other WSGI servers")
    lines = "".join(blocks(text, "sh"))
    [line] = [line for line in lines.replace("\\\n", "").splitlines() if server in line]
    folder = os.path.dirname(sys.executable)
    if not (importlib.util.find_spec(server) or os.path.exists(f"{folder}/{server}")):
        pytest.skip(f"not installed: {server}")
    port = free_port()
    variable, value = SERVERS[server]
    environ = {variable: value.format(port)} if variable else {}
    (tmp_path / "token").write_text(TOKEN)
    line = line.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("python3", sys.executable)
    environ.update(PATH=f"{folder}:{os.environ['PATH']}", PROFILER_TOKEN=TOKEN)
    url = f"http://127.0.0.1:{port}/users/"
    with running(["bash", "-c", line], tmp_path, **environ):
        until(lambda: listens(port))
        assert ask(url)[0] == 401
        assert ask(url, "POST", HARRY, TOKEN)[0] == 201
        assert verify(port, "harry@example.com", "1234") == 200
        decodes = server not in re.findall("`?([a-z]+)`? does not: they get 411", text.lower())
        status = 201 if decodes else 411

        def send_chunks():
            # uWSGI may close the connection before it has read the body.
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                return ask(url, "POST", RON, TOKEN, chunked=True)[0]

        assert until(send_chunks) == status


@needs("nginx")
def test_prefix_that_nginx_keeps_is_known_to_gunicorn(tmp_path):
    pytest.importorskip("gunicorn")
    front, port = free_port(), free_port()
    location = blocks(section(DEPLOY, "A path prefix"), "nginx")[0].replace(
        "127.0.0.1:8000", f"127.0.0.1:{port}"
    )
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        f"127.0.0.1:{port}",
        "--threads",
        "4",
        "profiler:application",
    ]
    server = nginx(tmp_path, f"server {{ listen 127.0.0.1:{front}; {location} }}")
    with running(command, tmp_path, SCRIPT_NAME="/accounts", PROFILER_TOKEN=TOKEN), server:
        until(lambda: listens(front) and listens(port))
        status, headers, _ = ask(f"http://127.0.0.1:{front}/accounts/users/", "POST", HARRY, TOKEN)
        assert (status, headers["Location"]) == (201, "/accounts/users/1/")


# -- statements ------------------------------------------------------------------------

SOURCE = (HERE / "profiler.py").read_text("utf-8")
DOCUMENT = json.loads((HERE / "openapi.json").read_bytes())
OPERATIONS = {
    f"{method.upper()} {path.replace('{id}', '1')}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}
PARSER, COMMANDS = profiler.make_parser()
# The help of each option of the server, without "-h, --help".
OPTIONS = dict(
    re.findall(r"^  (--[a-z-]+)(.*?)(?=^  -|^$)", PARSER.format_help(), re.MULTILINE | re.DOTALL)
)
del OPTIONS["--version"]


def find_variables(text):
    """Return the environment variables in a text."""
    return re.findall(r"\b(?:PROFILER_[A-Z_]+|PORT)\b", text)


def table(page, first):
    """Return the other cells of each row whose first cell begins with this pattern."""
    lines = re.findall(rf"^\| {first}.* \|$", page, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 1
    return {first: others for first, *others in rows}


settings_tables = pytest.mark.parametrize("name", ["README.md", "docs/operate.md"])


@settings_tables
def test_every_option_is_documented_with_its_variables(name):
    rows = table(PAGES[name], "`--")
    assert {option.strip("`") for option in rows} == set(OPTIONS)
    for option, text in OPTIONS.items():
        variables = find_variables("".join(re.findall(r"\(.*\)", text, re.DOTALL)))
        assert find_variables(rows[f"`{option}`"][0]) == variables
        assert bool(variables) == (option != "--no-access-log")


@settings_tables
def test_defaults_are_those_of_the_module(name):
    rows = table(PAGES[name], "`--")
    for option in ("host", "port", "database", "iterations"):
        default = getattr(profiler, option.upper())
        assert re.match(rf"`?{default}\b", rows[f"`--{option}`"][1].replace(",", "")), option


@pytest.mark.parametrize("name", PAGES)
def test_commands_on_a_page_use_options_and_variables_that_exist(name):
    known = {*OPTIONS, "--version", "--help"}
    for command in COMMANDS.choices.values():
        known |= set(re.findall("--[a-z-]+", command.format_help()))
    lines = PAGES[name].replace("\\\n", "")
    for arguments in re.findall(r"profiler[.]py\b([^`|;&>\n]*)", lines):
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", arguments)) <= known
    own = {"PROFILER_URL"}  # of the scripts that import users
    assert {*find_variables(lines)} <= {*find_variables(str(OPTIONS)), *own}


@pytest.mark.parametrize("command", COMMANDS.choices)
def test_every_command_is_documented(command):
    assert f"python3 profiler.py {command}" in OPERATE


def test_exit_statuses_are_as_documented(tmp_path):
    sentence = "exit status is ([0-9]) for an invalid setting, ([0-9]) for a failure"
    for documented, arguments in zip(
        re.search(sentence, plain(OPERATE)).groups(), ("'--port', 'x'", "'backup', 'copy'")
    ):
        program = f"import profiler; profiler.main([{arguments}])"
        assert run_program(program, tmp_path).returncode == int(documented)


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_every_endpoint_is_documented(name):
    documented = set(re.findall(r"^\| `([A-Z]+ /\S*)`", PAGES[name], re.MULTILINE))
    paths = (
        (pattern.pattern.replace("([0-9]{1,19})", "1"), handlers)
        for pattern, handlers in profiler.ROUTES
    )
    assert documented == {
        f"{method} {path.replace('/?', '/').replace('[.]', '.')}"
        for path, handlers in paths
        for method in handlers
    }


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_statuses_of_endpoints_are_those_of_openapi(name):
    rows = table(PAGES[name], "`[A-Z]+ /")
    assert len(OPERATIONS) >= 10
    for request, operation in OPERATIONS.items():
        first, *others = re.findall(r"\b[1-5][0-9]{2}\b", rows[f"`{request}`"][1])
        assert first == min(operation["responses"]), request
        assert {*others} <= {*operation["responses"]}, request


def test_statuses_are_those_of_openapi():
    """tests/test_openapi.py compares these with the module's."""
    text = section(API, "Statuses")
    rows = set(re.findall(r"^\| ([0-9]{3}) \|", text, re.MULTILINE))
    [server] = re.findall("The built-in server also answers ([^.]*)", text)
    mentioned = set(re.findall(r"\b[1-5][0-9]{2}\b", server))
    assert (len(rows) >= 15, len(mentioned) >= 5) == (True, True)
    documented = {status for operation in OPERATIONS.values() for status in operation["responses"]}
    general = DOCUMENT["info"]["description"].partition("**Postman.**")[0]
    documented |= set(re.findall(r"\b[2-5][0-9]{2}\b", general))
    # The table of endpoints has the others.
    assert rows | mentioned == documented - {"200", "201", "204", "304"}


def find_fields(schema):
    """Return the names of the fields of a schema in the OpenAPI document."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    alternatives = map(find_fields, schema.get("oneOf", ()))
    return set(schema.get("properties", ())).union(*alternatives)


def test_fields_are_those_of_openapi():
    rows, known = table(API, "`[A-Z]+ /"), set()
    for request, operation in OPERATIONS.items():
        media_types = operation.get("requestBody", {}).get("content", {}).values()
        fields = set().union(*(find_fields(media["schema"]) for media in media_types))
        assert set(re.findall("`([a-z_]+)`", rows[f"`{request}`"][0])) == fields, request
        known |= fields
    rules = re.findall(r"^\| (`[a-z_]+`.*?) \|", section(API, "Users"), re.MULTILINE)
    assert set(re.findall("`([a-z_]+)`", "".join(rules))) == known
    assert len(known) >= 7


def test_parameters_are_those_of_openapi():
    components = DOCUMENT["components"]["parameters"]
    references = [value["$ref"] for value in OPERATIONS["GET /users/"]["parameters"]]
    names = {components[reference.rpartition("/")[2]]["name"] for reference in references}
    assert names >= {"limit", "after", "email"}
    assert {row.strip("`").partition("=")[0] for row in table(API, "`[a-z]+=")} == names
    [text] = [cells[1] for row, cells in table(README, "`GET /").items() if "/users/`" in row]
    assert set(re.findall("`([a-z]+)`", text)) == names


def test_headers_of_every_response_are_as_documented(application):
    headers = call(application, path="/health/").headers
    del headers["Content-Type"], headers["Content-Length"]
    [sentence] = re.findall(r"Every response has (.*?)\.", plain(API))
    assert dict(re.findall("`([^:`]+): ([^`]+)`", sentence)) == headers


def test_quoted_messages_are_in_the_module():
    strings = {
        node.value for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Constant)
    }
    quoted = []
    for name in sorted({*PAGES} - {"CHANGELOG.md"}):
        text = re.sub("^```.*?^```$", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
        # In the tables of an upgrade the first cell is about the older version.
        text = re.sub(r"^\| [^|]* \|", "|", text, flags=re.MULTILINE)
        quoted += re.findall("`([A-Z][a-z]+ [^`]*)`", plain(text))
    assert len(quoted) >= 5
    assert set(quoted) <= strings


@pytest.mark.parametrize("password", ["e\u0301", "\u212b", "\ufb01", "x\u00b2"])
def test_passwords_are_normalised_as_documented(password):
    [form] = re.findall(r"normalised to (NF\w+)", plain(API))
    _, salt, digest = profiler.hash_password(password, 1).split("$")
    normalised = unicodedata.normalize(form, password).encode()
    assert hashlib.pbkdf2_hmac("sha256", normalised, salt.encode(), 1).hex() == digest


def test_documented_formats_of_hashes_can_be_imported(application):
    formats = re.findall(r"^\| .* \| `([^`]*SALT[^`]*)` \|$", API, re.MULTILINE)
    assert len(formats) >= 5
    for number, password_hash in enumerate(formats):
        is_scrypt = "scrypt" in password_hash
        digest = bytes(64 if is_scrypt else 32)
        encoded = base64.b64encode(digest).decode()
        values = {
            "ITERATIONS": "1000",
            "SALT": "NaCl",
            "HEX": digest.hex(),
            # passlib writes no padding.
            "BASE64": encoded.rstrip("=") if password_hash.startswith("$") else encoded,
        }
        values.update(N="16", R="8", P="1")
        for name, value in values.items():
            password_hash = re.sub(rf"\b{name}\b", value, password_hash)
        fields = {"first_name": "F", "last_name": "L", "email": f"{number}@example.com"}
        answer = call(application, "POST", fields={**fields, "password_hash": password_hash})
        assert answer.status == 201, answer


def test_versions_of_python_and_sqlite_are_those_of_the_package():
    project = (HERE / "pyproject.toml").read_text("utf-8")
    [python] = re.findall('^requires-python = ">=(.*)"$', project, re.MULTILINE)
    text = plain(f"{profiler.__doc__} {README} {PAGES['docs/deploy.md']}")
    stated = re.findall(r"\bC?Python ([0-9.]*[0-9]) (?:and|or) later", text)
    assert len(stated) >= 3
    assert {*stated} == {python}
    stated = re.findall(r"\bSQLite ([0-9.]*[0-9]) or later", text)
    assert len(stated) >= 2
    assert len({*stated}) == 1


def test_sections_are_those_of_the_module():
    rows = re.findall(
        r"^\| ([a-zA-Z: ]+) \|", section(PAGES["docs/design.md"], "The module"), re.M
    )
    assert rows[0] == "section"
    assert rows[1:] == re.findall("^# -- (.+?) -+$", SOURCE, re.MULTILINE)


SQL = r"\b(SELECT|INSERT|UPDATE|DELETE) |\.execute"
HTTP = r"HTTPError|HTTP_|\benviron\[|WSGI|REQUEST_METHOD"
IGNORANCE = {
    "passwords": f"{SQL}|{HTTP}|socket",
    "database": f"{HTTP}|selector|socket|first_name|email|EmailTaken|NoSuchUser",
    "users": f"{HTTP}|selector|socket",
    "accounts": f"{SQL}|{HTTP}|selector|socket|sqlite3",
    "HTTP": f"{SQL}|sqlite3|selector|socket",
    "endpoints": f"{SQL}|sqlite3|selector|socket",
    "application": f"{SQL}|sqlite3|selector|socket",
    "server: parsing": f"{SQL}|sqlite3|selector|socket|accounts",
    "server: connections": f"{SQL}|sqlite3|accounts|[uU]sers",
}


@pytest.mark.parametrize("name", IGNORANCE)
def test_section_does_not_know_what_is_not_its_business(name):
    """The third column of the table in docs/design.md."""
    parts = re.split("^# -- (.+?) -+\n", SOURCE, flags=re.MULTILINE)
    code = dict(zip(parts[1::2], parts[2::2]))[name]
    code = re.sub(r'(?m)^ *("""(.|\n)*?"""|#.*)$|  # .*$', "", code)
    assert len(code) > 1000
    assert [match[0] for match in re.finditer(IGNORANCE[name], code)] == []


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("docs/operate.md", f"at most {profiler.MAX_ITERATIONS}"),
        ("docs/operate.md", f"at least {profiler.MIN_TOKEN} characters"),
        ("docs/operate.md", f"up to {profiler.MAX_PENDING:,} entries wait"),
        ("docs/deploy.md", f"within {profiler.DRAIN_TIMEOUT:.0f} seconds"),
        ("docs/deploy.md", f"up to {profiler.MAX_CONNECTIONS:,} connections"),
        ("docs/deploy.md", f"{profiler.RESERVED_FILES} fewer than it may have open files"),
        (
            "docs/deploy.md",
            f"the {profiler.IDLE_TIMEOUT} seconds after which the service closes idle",
        ),
        (
            "docs/api.md",
            f"at most {profiler.MAX_BODY // 1024} KiB and {profiler.MAX_BRACKETS} brackets",
        ),
        ("docs/api.md", f"at most {profiler.MAX_NAME} characters"),
        ("docs/api.md", f"at most {profiler.MAX_EMAIL} characters"),
        ("docs/api.md", f"at most {profiler.MAX_PASSWORD:,} characters, without NUL"),
        ("docs/api.md", f"if {profiler.MAX_WAITING_SEARCHES} wait already"),
        ("docs/api.md", f"at most this many users, 1 to {profiler.MAX_LIMIT}"),
        ("docs/api.md", f"up to {profiler.BATCH} users"),
        ("docs/api.md", f"After {profiler.MAX_FAILURES} consecutive wrong passwords"),
        ("docs/api.md", f"the {profiler.MAX_TRACKED:,} accounts"),
        ("docs/api.md", f"at most {profiler.MAX_ITERATIONS:,} iterations"),
        ("docs/api.md", f"n·r·p of at most {profiler.MAX_SCRYPT_COST:,}"),
        ("docs/api.md", f"with {profiler.ITERATIONS:,} iterations"),
        ("docs/api.md", f"waits up to {profiler.HASH_TIMEOUT:.0f} seconds for a free core"),
        ("docs/api.md", f"if {profiler.MAX_WAITING_HASHES} requests hash or wait already"),
        ("docs/api.md", f"idle for {profiler.IDLE_TIMEOUT} seconds"),
        ("docs/api.md", f"`Keep-Alive: timeout={profiler.IDLE_TIMEOUT}`"),
        ("docs/api.md", f"A head must arrive within {profiler.HEAD_TIMEOUT:.0f} seconds"),
        ("docs/api.md", f"a body within {profiler.BODY_TIMEOUT:.0f}"),
        ("docs/api.md", f"every {profiler.SEND_TIMEOUT:.0f} seconds"),
        ("docs/design.md", f"batches of {profiler.BATCH}"),
        ("docs/design.md", f"Up to {profiler.WORKERS} workers"),
        ("docs/design.md", f"pages of more than {profiler.SHORT_PAGE} users"),
        ("docs/design.md", f"a writer's lock, up to {profiler.BUSY_TIMEOUT:.0f} seconds"),
    ],
)
def test_stated_limits_are_those_of_the_module(name, statement):
    assert statement in plain(PAGES[name])


def test_attempts_are_one_per_minute_as_stated():
    assert "one attempt per minute" in plain(API)
    assert profiler.ATTEMPT_INTERVAL == 60


def test_attempts_are_counted_in_each_process_as_stated():
    sentence = "with ([0-9]+) workers an attacker has up to ([0-9]+) times as many attempts"
    workers, times = re.search(sentence, plain(API)).groups()
    assert workers == times


def test_exports_are_documented():
    assert not {name for name in profiler.__all__ if not re.search(rf"\b{name}\b", README)}


def test_version_is_that_of_the_module():
    assert set(re.findall("profiler/([0-9.]+)", "".join(PAGES.values()))) == {profiler.__version__}
    assert re.search("^## (.*)$", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == profiler.__version__


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 900


def test_readme_links_the_tutorial_once():
    assert (
        README.count("https://tonyj.me/blog/building-rest-apis-with-python-and-flask-part-2") == 1
    )


def test_readme_has_one_test_command():
    """.ci/run runs it."""
    assert len(blocks(section(README, "Test"), "sh")) == 1


@pytest.mark.parametrize("name", PAGES)
def test_lines_have_at_most_120_characters(name):
    assert [line for line in PAGES[name].splitlines() if len(line) > 120] == []


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(
        "^#+ (.*)$", re.sub("^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[name])
    assert links or name == "CHANGELOG.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (HERE / name).parent / path if path else HERE / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def test_pages_are_linked_from_the_readme():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert not set(PAGES) - {"README.md"} - links
