"""Tests of index.html in a browser: Debian's Chromium."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import HERE, TOKEN, execute, fill

import profiler

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
if not (shutil.which(CHROMIUM) and shutil.which(DRIVER)):
    pytest.skip(f"{CHROMIUM} and {DRIVER} are not installed", allow_module_level=True)

from selenium.common import exceptions  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PAGE = HERE / "index.html"
LIMIT = 50  # users per page
HARRY = ("Harry", "Potter", "harry@example.com", "1234")
RON = ("Ron", "Weasley", "ron@example.com", "abcd")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--disable-dev-shm-usage"""


def make_users(count):
    return [("User", str(number), f"{number}@example.com", "x") for number in range(count)]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS.split():
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
        listen = (
            "addEventListener('securitypolicyviolation', ({ blockedURI, effectiveDirective }) => {"
        )
        listen += " console.error('VIOLATION', blockedURI, effectiveDirective); });"
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": listen})
        yield browser


@contextlib.contextmanager
def serving(application, path=""):
    """Serve an application, or a function that calls one. Yield the address of the page."""
    if not hasattr(application, "may_wait"):
        application.may_wait = lambda environ: True
    with profiler.Server(
        socket.AF_INET, ("127.0.0.1", 0), application, access_log=False
    ) as server:
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{path}/"
        finally:
            server.stop()
            thread.join()


@pytest.fixture
def page(browser, application):
    """The page of an application, in a desktop window. The test fails if the console
    shows errors."""
    with serving(application) as address:
        page = Page(browser, address)
        page.size(1280, 900)
        page.prefer("light")
        yield page
        page.leave()


class Page:
    """What a user sees on the page and does with it."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, *users, application=None):
        """Create these users, open the page and wait for the list."""
        for user in users:
            application.accounts.create(*user)
        self.browser.get(self.address)
        self.until(lambda: self.rows or self.text("#empty"))
        return self

    def leave(self):
        self.script("sessionStorage.clear()")
        self.browser.get("about:blank")
        log = self.browser.get_log("browser")
        assert [
            entry for entry in log if entry["source"] not in ("network", "recommendation")
        ] == []

    def size(self, width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme, media="screen"):
        """Prefer light or dark colours, on the screen or in print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        emulated = {"media": media, "features": features}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)

    def until(self, condition):
        """Wait until a condition is true, and return its value."""
        ignored = (
            exceptions.StaleElementReferenceException,
            exceptions.NoSuchElementException,
            IndexError,
        )
        return WebDriverWait(self.browser, 10, 0.02, ignored).until(lambda _: condition())

    def until_rows(self, count):
        return self.until(lambda: len(self.rows) == count and self.rows)

    def script(self, source, *arguments):
        return self.browser.execute_script(source, *arguments)

    @property
    def rows(self):
        """The text of the table's cells, without the buttons."""
        source = "return [...document.querySelectorAll('tbody tr')].map("
        return self.script(
            source + "(row) => [...row.cells].slice(0, 4).map((cell) => cell.textContent))"
        )

    @property
    def emails(self):
        return [row[2] for row in self.rows]

    def text(self, selector):
        """The visible text of an element."""
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    def texts(self, selector):
        return [
            element.text
            for element in self.browser.find_elements(By.CSS_SELECTOR, selector)
            if element.text
        ]

    @property
    def focus(self):
        """The text of the focused button, or the name of the focused field."""
        source = "const { name, textContent } = document.activeElement;"
        return self.script(source + "return textContent.trim() || name")

    @property
    def top(self):
        """The topmost dialog, or the page if there is none."""
        return self.browser.find_elements(By.CSS_SELECTOR, "body, dialog")[-1]

    def press(self, text, row=None):
        """Click the button with this text, in the topmost dialog or in a row."""
        where = "" if row is None else f"//tbody/tr[{row + 1}]"
        path = f".{where}//button[normalize-space()='{text}' and not(@hidden)]"
        # The row may be replaced after it was found.
        self.until(lambda: self.top.find_element(By.XPATH, path).click() or True)

    def field(self, label):
        """The field with this label, in the topmost dialog or on the page."""
        source = """const top = [...document.querySelectorAll("body, dialog")].pop();
        const labels = [...top.querySelectorAll("label")];
        return labels.find(({ textContent }) => textContent.trim() === arguments[0])?.control"""
        return self.until(lambda: self.script(source, label))

    def type(self, **fields):
        """Replace the values of fields."""
        for name, text in fields.items():
            field = self.field(name.replace("_", " ").capitalize())
            field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
            if len(text) > 1000:
                self.script("arguments[0].value = arguments[1]", field, text)  # is faster
            else:
                field.send_keys(text)

    def value(self, label):
        return self.field(label).get_attribute("value")

    def message(self, label):
        """The message below a field, which a screen reader reads with the field."""
        field = self.field(label)
        return self.text(f"#{field.get_attribute('aria-describedby')}")

    def until_message(self, label):
        return self.until(lambda: self.message(label))

    def until_alert(self):
        return self.until(lambda: " ".join(self.texts("[role=alert]")))

    def until_dialog(self, title):
        return self.until(
            lambda: self.top.aria_role == "dialog" and self.top.accessible_name == title
        )

    def until_closed(self):
        return self.until(lambda: not self.browser.find_elements(By.TAG_NAME, "dialog"))

    def until_status(self, text):
        return self.until(lambda: self.text("#status") == text)


def record_requests(page):
    """Record the requests that the page sends; return a function that returns them:
    method, body, If-Match."""
    page.script("""window.requests = [];
    window.fetch = ((original) => (path, options) => {
      const { method, body, headers } = options;
      requests.push([method, body && JSON.parse(body), headers["If-Match"] ?? null]);
      return original(path, options);
    })(fetch)""")
    return lambda: page.script("return requests")


def hold_responses(page, part=""):
    """Keep the responses to requests whose path contains this from the page. Return two
    functions: one waits for this many such requests, the other hands over the first of
    their responses."""
    page.script(
        """window.held = [];
    window.fetch = ((original) => async (path, options) => {
      const response = await original(path, options);
      if (path.includes(arguments[0])) await new Promise((resolve) => held.push(resolve));
      return response;
    })(fetch)""",
        part,
    )

    def wait(count):
        page.until(lambda: page.script("return held.length") == count)

    return wait, lambda: page.script("held.shift()()")


# -- the list --------------------------------------------------------------------------


def test_table_shows_newest_users_first(page, application):
    page.open(HARRY, RON, application=application)
    assert [row[:3] for row in page.rows] == [list(RON[:3]), list(HARRY[:3])]
    assert all(re.fullmatch("[0-9-]{10} [0-9:]{8}", row[3]) for row in page.rows)
    heads = page.script(
        "return [...document.querySelectorAll('thead th')].map((cell) => cell.textContent)"
    )
    assert heads == ["First name", "Last name", "Email", "Created (UTC)", "Actions"]


def test_empty_list_says_so(page):
    page.open()
    assert page.text("#empty") == "There are no users."
    assert page.texts("nav button") == []


def test_next_and_previous_change_the_page(page, application):
    users = make_users(2 * LIMIT + 1)
    page.open(*users, application=application)
    newest_first = [user[2] for user in reversed(users)]
    assert page.emails == newest_first[:LIMIT]
    assert page.texts("nav > *") == ["Previous", "Page 1", "Next"]
    page.press("Next")
    page.until(lambda: page.emails == newest_first[LIMIT : 2 * LIMIT])
    assert page.focus == "Next"
    page.press("Next")
    page.until(lambda: page.emails == newest_first[2 * LIMIT :])
    assert page.text("#page") == "Page 3"
    assert not page.browser.find_element(By.ID, "next").is_enabled()
    assert page.focus == "Users", "a disabled button cannot keep the focus"
    page.press("Previous")
    page.press("Previous")
    page.until(lambda: page.emails == newest_first[:LIMIT])
    assert not page.browser.find_element(By.ID, "previous").is_enabled()


# -- large ids -------------------------------------------------------------------------
# JavaScript rounds these numbers to others.

LARGE_ID, LARGEST_ID = 2**53 + 1, 2**63 - 1


def add_user(path, user_id, name):
    """Create a user with this id, as an imported table may have it."""
    columns = 'INSERT INTO "user" (id, first_name, last_name, email, password)'
    execute(
        path, f"{columns} VALUES (?, ?, ?, ?, '')", (user_id, name, "X", f"{name}@example.com")
    )


def ids(path):
    return [user_id for (user_id,) in execute(path, 'SELECT id FROM "user" ORDER BY id')]


@pytest.mark.parametrize("user_id", [LARGE_ID, LARGEST_ID])
def test_large_ids_are_exact(page, application, path, user_id):
    fill(path, 0)
    for number, name in ((user_id - 1, "Before"), (user_id, "It")):
        add_user(path, number, name)
    page.open()
    page.press("Edit", row=0)
    page.until_dialog("Edit It X")
    page.type(Last_name="Y")
    page.press("Save")
    page.until_status("It Y was saved.")
    page.until(lambda: page.rows[0][1] == "Y")
    assert page.focus == "Edit"
    page.press("Password", row=0)
    page.until_dialog("Password of It Y")
    page.type(Password="1234")
    page.press("Set password")
    page.until_status("The password of It Y was set.")
    assert application.accounts.verify("It@example.com", "1234") == user_id
    page.press("Delete", row=0)
    page.until_dialog("Delete It Y?")
    page.press("Delete")
    page.until_status("It Y was deleted.")
    assert ids(path) == [user_id - 1]


def test_pages_of_large_ids_are_exact(page, path):
    fill(path, 0)
    for number in range(2 * LIMIT + 1):
        add_user(path, LARGE_ID + 1 + number, str(number))
    page.open()
    page.press("Next")
    page.until(lambda: page.text("#page") == "Page 2")
    assert [row[0] for row in page.rows] == [str(number) for number in range(LIMIT, 0, -1)]
    page.press("Next")
    page.until(lambda: page.text("#page") == "Page 3")
    assert [row[0] for row in page.rows] == ["0"]


@pytest.mark.parametrize("name", ['"id":7', '\\"id": 7', '"id":"7"', '{"id":7}', "\\"])
def test_names_that_look_like_ids_are_unchanged(page, application, name):
    page.open((name, name, "harry@example.com", "x"), application=application)
    assert page.rows[0][:2] == [name, name]
    page.press("Edit", row=0)
    assert page.value("First name") == name


# -- search ----------------------------------------------------------------------------


def test_search_starts_while_typing(page, application):
    page.open(HARRY, RON, application=application)
    page.type(Search_by_name_or_email="POTT")
    page.until(lambda: page.emails == ["harry@example.com"])
    assert page.focus == "q"
    page.type(Search_by_name_or_email="ron@")
    page.until(lambda: page.emails == ["ron@example.com"])


def test_emptying_the_search_field_shows_all_users(page, application):
    page.open(HARRY, RON, application=application)
    page.type(Search_by_name_or_email="pott")
    page.until_rows(1)
    page.type(Search_by_name_or_email="")
    page.until_rows(2)


def test_search_without_a_match_says_so(page, application):
    page.open(HARRY, application=application)
    page.type(Search_by_name_or_email="a+b & 100%")
    page.until(lambda: page.text("#empty") == "No user matches.")


@pytest.mark.parametrize("text", ["100%", "a_b", "a+b", "Ö & ü", "=?#", "Tom Marvolo"])
def test_search_sends_special_characters_unchanged(page, application, text):
    page.open((text, "Riddle", "tom@example.com", "x"), HARRY, application=application)
    page.type(Search_by_name_or_email=text)
    page.until(lambda: [row[0] for row in page.rows] == [text])


def test_search_ignores_surrounding_spaces(page, application):
    page.open(HARRY, RON, application=application)
    page.type(Search_by_name_or_email=" potter ")
    page.until(lambda: page.emails == ["harry@example.com"])


def test_search_is_debounced(page, application):
    page.open(HARRY, application=application)
    requests = record_requests(page)
    page.script("""window.timers = [];
    window.setTimeout = (run, delay) => timers.push({ run, delay });
    window.clearTimeout = (id) => { if (id) delete timers[id - 1]; };""")
    page.type(Search_by_name_or_email="harry")
    assert page.script("return timers.filter(Boolean).map(({ delay }) => delay)") == [250]
    assert requests() == []
    page.script("timers.filter(Boolean).forEach(({ run }) => run())")
    assert len(requests()) == 1


def test_search_starts_at_once_on_enter(page, application):
    page.open(HARRY, RON, application=application)
    page.script("""const original = setTimeout;
    window.setTimeout = (run, delay) => original(run, delay ? 1e6 : 0)""")
    page.type(Search_by_name_or_email="potter")
    page.field("Search by name or email").send_keys(Keys.ENTER)
    page.until_rows(1)


@pytest.fixture
def delayed(application, monkeypatch):
    """Make searches for "slow" wait until the event is set."""
    original, started, go_on = application.users.page, threading.Event(), threading.Event()

    def wait(*arguments, **options):
        if "slow" in arguments:
            started.set()
            go_on.wait(10)
        return original(*arguments, **options)

    monkeypatch.setattr(application.users, "page", wait)
    yield started, go_on
    go_on.set()


def wait_for_responses(page, count):
    """Wait until the page has received this many lists."""
    received = """const entries = performance.getEntriesByType("resource");
    return entries.filter(({ responseEnd }) => responseEnd).length"""
    page.until(lambda: page.script(received) >= count)


def test_search_ignores_stale_answers(page, application, delayed):
    started, go_on = delayed
    page.open(HARRY, ("Slow", "Worm", "slow@example.com", "x"), application=application)
    page.type(Search_by_name_or_email="slow")
    page.until(started.is_set)
    page.type(Search_by_name_or_email="harry")
    page.until(lambda: page.emails == ["harry@example.com"])
    go_on.set()
    wait_for_responses(page, 3)
    assert page.emails == ["harry@example.com"]
    assert page.texts("nav button") == []


def test_search_ignores_stale_errors(page, application, delayed, monkeypatch):
    started, go_on = delayed
    page.open(HARRY, application=application)
    original = application.users.page

    def fail(*arguments, **options):
        answer = original(*arguments, **options)
        if "slow" in arguments:
            raise profiler.Busy("for this test")
        return answer

    monkeypatch.setattr(application.users, "page", fail)
    page.type(Search_by_name_or_email="slow")
    page.until(started.is_set)
    page.type(Search_by_name_or_email="harry")
    page.until(lambda: page.script("return document.querySelector('main').ariaBusy") == "false")
    go_on.set()
    wait_for_responses(page, 3)
    assert page.emails == ["harry@example.com"]
    assert page.texts("[role=alert]") == []


def test_search_and_paging_combine(page, application):
    users = [
        ("User", "even" if number % 2 else "odd", f"{number}@example.com", "x")
        for number in range(2 * LIMIT + 4)
    ]
    page.open(*users, application=application)
    page.press("Next")
    page.until(lambda: page.text("#page") == "Page 2")
    page.type(Search_by_name_or_email="even")
    odd_numbers = [f"{number}@example.com" for number in range(2 * LIMIT + 3, 0, -2)]
    page.until(lambda: page.emails == odd_numbers[:LIMIT])
    assert page.text("#page") == "Page 1"
    page.press("Next")
    page.until(lambda: page.emails == odd_numbers[LIMIT:])
    page.press("Previous")
    page.until(lambda: page.emails == odd_numbers[:LIMIT])


def test_next_pressed_twice_skips_no_page(page, application):
    page.open(*make_users(3 * LIMIT), application=application)
    page.script("document.querySelector('#next').click(); document.querySelector('#next').click()")
    page.until(lambda: page.text("#page") == "Page 2")
    page.press("Next")
    page.until(lambda: page.text("#page") == "Page 3")
    assert page.emails == [f"{number}@example.com" for number in range(LIMIT - 1, -1, -1)]


def test_invalid_search_text_is_reported_next_to_the_field(page, application):
    page.open(HARRY, application=application)
    page.type(Search_by_name_or_email="x" * 256)
    assert page.until_message("Search by name or email") == "Must have at most 255 characters"
    assert page.field("Search by name or email").get_attribute("aria-invalid") == "true"
    page.type(Search_by_name_or_email="harry")
    page.until(lambda: page.message("Search by name or email") == "")


# -- create ----------------------------------------------------------------------------


def test_new_user_is_shown_at_once(page, application):
    page.open(*make_users(LIMIT), application=application)
    page.type(Search_by_name_or_email="11@example.com")
    page.until_rows(1)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.press("Create user")
    page.until_status("Harry Potter was created.")
    page.until(lambda: page.rows[0][:3] == list(HARRY[:3]))
    assert page.focus == "New user"
    assert application.accounts.verify("harry@example.com", "1234") == LIMIT + 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Last_name", "", "This field is required."),
        ("Password", "  ", "This field is required."),
        ("First_name", "x" * 256, "Must have at most 255 characters"),
        ("Last_name", "x" * 256, "Must have at most 255 characters"),
        (
            "Email",
            "harry",
            "Must be an address such as harry@example.com, of at most 254 visible characters",
        ),
        ("Email", "RON@example.com", "This email is already registered"),
        ("Password", "x" * 1025, "Must have at most 1024 characters"),
    ],
)
def test_error_is_shown_next_to_its_field(page, application, name, value, message):
    page.open(RON, application=application)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.type(**{name: value})
    page.press("Create user")
    label = name.replace("_", " ")
    assert page.until_message(label) == message
    assert page.texts("dialog .problem") == [message]
    assert page.field(label).get_attribute("aria-invalid") == "true"
    assert page.focus == name.lower()
    for other, typed in zip(("First name", "Last name", "Email", "Password"), HARRY):
        assert page.value(other) == (value if other == label else typed)


def marked_fields(page):
    """The labels of the fields that are marked as invalid."""
    fields = page.browser.find_elements(By.CSS_SELECTOR, "dialog [aria-invalid=true]")
    return [field.accessible_name for field in fields]


def test_every_empty_field_is_marked(page):
    page.open()
    page.press("New user")
    page.type(Last_name=" ")
    page.press("Create user")
    page.until_message("First name")
    assert marked_fields(page) == ["First name", "Last name", "Email", "Password"]
    assert page.texts("dialog .problem") == ["This field is required."] * 4
    assert page.focus == "first_name"


def test_every_emptied_field_is_marked(page, application):
    page.open(HARRY, application=application)
    page.press("Edit", row=0)
    page.type(Last_name="", Email=" ")
    page.press("Save")
    page.until_message("Last name")
    assert marked_fields(page) == ["Last name", "Email"]
    assert page.texts("dialog .problem") == ["This field is required."] * 2
    assert page.focus == "last_name"


def test_error_disappears_with_its_cause(page):
    page.open()
    page.press("New user")
    page.press("Create user")
    page.until_message("First name")
    page.type(First_name="Harry")
    page.press("Create user")
    page.until(lambda: marked_fields(page) == ["Last name", "Email", "Password"])
    assert page.message("First name") == ""


def test_phones_show_a_keyboard_for_emails(page, application):
    page.open(HARRY, application=application)
    for button in ("New user", "Edit"):
        page.press(button)
        field = page.field("Email")
        assert field.get_attribute("inputmode") == "email"
        assert field.get_attribute("autocapitalize") == "none"
        assert page.field("First name").get_attribute("autocapitalize") != "none"
        page.press("Cancel")
        page.until_closed()
    search = page.field("Search by name or email")
    assert search.get_attribute("autocapitalize") == "none"


def test_double_submit_creates_one_user(page, application, monkeypatch):
    page.open(application=application)
    create, asked, go_on = application.accounts.create, [], threading.Event()

    def wait(**fields):
        asked.append(fields)
        go_on.wait(10)
        return create(**fields)

    monkeypatch.setattr(application.accounts, "create", wait)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.field("Password").send_keys(Keys.ENTER, Keys.ENTER)
    page.until(lambda: asked)
    go_on.set()
    page.until_closed()
    page.until_rows(1)
    assert len(asked) == 1


# -- edit ------------------------------------------------------------------------------


def test_edit_is_saved(page, application):
    page.open(HARRY, RON, application=application)
    page.press("Edit", row=1)
    page.until_dialog("Edit Harry Potter")
    assert [page.value(label) for label in ("First name", "Last name", "Email")] == list(HARRY[:3])
    page.type(First_name="Harry James")
    page.press("Save")
    page.until_status("Harry James Potter was saved.")
    page.until(lambda: page.rows[1][0] == "Harry James")
    assert page.focus == "Edit"


@pytest.mark.parametrize(
    "changes",
    [{"First_name": "Harry James"}, {"Last_name": "Evans", "Email": "evans@example.com"}, {}],
)
def test_edit_sends_only_changed_fields(page, application, changes):
    page.open(HARRY, application=application)
    with urllib.request.urlopen(f"{page.address}users/1/", timeout=10) as response:
        etag = response.headers["ETag"]
    requests = record_requests(page)
    page.press("Edit", row=0)
    page.until_dialog("Edit Harry Potter")
    page.type(**changes)
    page.press("Save")
    page.until_closed()
    assert requests()[1] == [
        "PATCH",
        {name.lower(): value for name, value in changes.items()},
        etag,
    ]


def test_edit_shows_the_stored_user_instead_of_the_listed_one(page, application):
    page.open(HARRY, application=application)
    application.accounts.update(1, {"first_name": "Harry James"})
    page.press("Edit", row=0)
    page.until_dialog("Edit Harry James Potter")


def conflict(page, application):
    """Edit a user who is changed by somebody else before the edit is saved."""
    page.open(HARRY, application=application)
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.accounts.update(1, {"first_name": "Theirs", "last_name": "Snape"})
    page.press("Save")
    page.until(lambda: page.message("First name"))


def test_conflict_shows_the_stored_values_and_keeps_the_input(page, application):
    conflict(page, application)
    assert page.until_alert() == "Somebody else has changed this user. Save yours, or take theirs."
    assert page.texts("dialog [role=alert] + footer button") == [
        "Save yours",
        "Take theirs",
        "Cancel",
    ], "the buttons follow the message"
    assert marked_fields(page) == []
    assert page.message("First name") == "Stored now: Theirs"
    assert page.message("Last name") == "Stored now: Snape"
    assert page.message("Email") == ""
    assert [page.value(label) for label in ("First name", "Last name", "Email")] == [
        "Mine",
        *HARRY[1:3],
    ]
    assert b'"Theirs"' in application.users.get(1)


def test_conflict_can_be_resolved_by_saving_mine(page, application):
    conflict(page, application)
    page.press("Save yours")
    page.until_status("Mine Potter was saved.")
    assert b'"Mine","last_name":"Potter"' in application.users.get(1)


def test_conflict_can_be_resolved_by_taking_theirs(page, application):
    conflict(page, application)
    requests = record_requests(page)
    page.press("Take theirs")
    page.until_status("Theirs Snape was not changed.")
    page.until(lambda: page.rows[0][:2] == ["Theirs", "Snape"])
    assert [method for method, *_ in requests()] == ["GET"]


def test_second_conflict_is_reported_again(page, application):
    conflict(page, application)
    application.accounts.update(1, {"last_name": "Riddle"})
    page.press("Save yours")
    page.until(lambda: page.message("Last name") == "Stored now: Riddle")
    assert b'"Riddle"' in application.users.get(1)


def test_edit_of_a_deleted_user_keeps_the_input(page, application):
    page.open(HARRY, application=application)
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.users.delete(1)
    page.press("Save")
    assert page.until_alert() == "This user no longer exists."
    assert page.value("First name") == "Mine"


def test_button_of_a_deleted_user_shows_the_error_in_the_row(page, application):
    page.open(HARRY, RON, application=application)
    application.users.delete(1)
    page.press("Edit", row=1)
    assert page.until_alert() == "This user no longer exists."
    assert page.texts("tbody tr:nth-child(2) [role=alert]") == ["This user no longer exists."]


def test_late_response_opens_no_dialog_over_another(page, application):
    page.open(HARRY, application=application)
    wait, release = hold_responses(page, "users/1/")
    page.press("Edit", row=0)
    wait(1)
    page.press("New user")
    page.until_dialog("New user")
    release()
    is_busy = "return document.querySelector('tbody td:last-child').ariaBusy"
    page.until(lambda: page.script(is_busy) == "false")
    assert len(page.browser.find_elements(By.TAG_NAME, "dialog")) == 1
    page.press("Cancel")
    page.until_closed()
    page.press("Edit", row=0)
    wait(1)
    release()
    page.until_dialog("Edit Harry Potter")


# -- delete ----------------------------------------------------------------------------


def test_delete_asks_for_confirmation(page, application):
    page.open(HARRY, RON, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Ron Weasley?")
    assert "ron@example.com" in page.top.text
    buttons = page.top.find_elements(By.TAG_NAME, "button")
    assert [button.text for button in buttons if button.is_displayed()] == ["Delete", "Cancel"]
    assert page.focus == "Cancel"
    page.press("Cancel")
    page.until_closed()
    assert page.focus == "Delete"
    assert len(page.rows) == 2
    page.press("Delete", row=0)
    page.until_dialog("Delete Ron Weasley?")
    page.press("Delete")
    page.until_status("Ron Weasley was deleted.")
    page.until(lambda: page.emails == ["harry@example.com"])
    assert page.focus == "Users"


def test_delete_asks_again_if_the_user_has_changed(page, application):
    page.open(HARRY, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Harry Potter?")
    application.accounts.update(
        1, {"first_name": "Tom", "last_name": "Riddle", "email": "tom@example.com"}
    )
    page.press("Delete")
    assert page.until_alert() == "Somebody else has changed this user. Delete the user, or cancel."
    text = " ".join(page.text("dialog .text").split())
    assert text == "Stored now: Tom Riddle tom@example.com"
    assert application.users.count() == 1
    page.press("Delete")
    page.until_status("Tom Riddle was deleted.")


def test_previous_works_on_an_emptied_last_page(page, application):
    page.open(*make_users(LIMIT + 1), application=application)
    page.press("Next")
    page.until_rows(1)
    page.press("Delete", row=0)
    page.until_dialog("Delete User 0?")
    page.press("Delete")
    page.until(lambda: page.text("#empty") == "There are no more users.")
    page.press("Previous")
    page.until_rows(LIMIT)


# -- passwords -------------------------------------------------------------------------


def test_password_is_checked(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.until_dialog("Password of Harry Potter")
    page.type(Password="12345")
    page.press("Check password")
    assert page.until_message("Password") == "Wrong email or password"
    page.type(Password="1234")
    page.press("Check password")
    page.until(lambda: page.message("Password") == "This password is correct.")
    assert page.field("Password").get_attribute("aria-invalid") == "false"
    assert application.accounts.verify("harry@example.com", "1234") == 1


def test_password_is_set_without_the_old_one(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.until_dialog("Password of Harry Potter")
    assert len(page.top.find_elements(By.TAG_NAME, "input")) == 1
    page.type(Password="5678")
    page.press("Set password")
    page.until_status("The password of Harry Potter was set.")
    assert application.accounts.verify("harry@example.com", "5678") == 1
    with pytest.raises(profiler.WrongPassword):
        application.accounts.verify("harry@example.com", "1234")


@pytest.mark.parametrize("button", ["Set password", "Check password"])
def test_missing_password_is_reported_next_to_the_field(page, application, button):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.press(button)
    assert page.until_message("Password") == "This field is required."
    assert application.accounts.verify("harry@example.com", "1234") == 1


def test_password_of_a_deleted_user_shows_the_error(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    application.users.delete(1)
    page.type(Password="5678")
    page.press("Set password")
    assert page.until_alert() == "This user no longer exists."


def test_long_password_is_reported_next_to_the_field(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.type(Password="x" * 1025)
    page.press("Set password")
    assert page.until_message("Password") == "Must have at most 1024 characters"
    assert marked_fields(page) == ["Password"]
    assert application.accounts.verify("harry@example.com", "1234") == 1
    page.type(Password="x" * 1024)
    page.press("Set password")
    page.until_status("The password of Harry Potter was set.")


def test_rate_limit_shows_when_to_try_again(page, application):
    page.open(HARRY, application=application)
    for _ in range(profiler.MAX_FAILURES):
        with pytest.raises(profiler.WrongPassword):
            application.accounts.verify("harry@example.com", "wrong")
    page.press("Password", row=0)
    page.type(Password="1234")
    earliest = page.script("return Date.now()")
    page.press("Check password")
    message = page.until_alert()
    latest = page.script(
        "return Date.now() + arguments[0] * 1000 + 1000", profiler.ATTEMPT_INTERVAL
    )
    times = """const [from, to] = arguments;
    return Array.from({ length: (to - from) / 1000 }, (_, second) =>
      new Date(from + second * 1000).toLocaleTimeString())"""
    text, _, shown = message.partition(", at ")
    assert text == profiler.ERRORS[profiler.TooManyAttempts][1]
    assert shown in page.script(
        times, earliest + profiler.ATTEMPT_INTERVAL * 1000 - 5000, latest + 1000
    )
    page.press("Set password")
    page.until_status("The password of Harry Potter was set.")


def test_rate_limit_without_retry_after_shows_no_time(browser, application):
    """Such as one that a proxy applies."""

    def limited(environ, start_response):
        if environ["PATH_INFO"] != "/users/verify/":
            return application(environ, start_response)
        start_response(
            "429 Too Many Requests", [("Content-Type", "text/html"), ("Content-Length", "0")]
        )
        return [b""]

    with serving(limited) as address:
        page = Page(browser, address).open(HARRY, application=application)
        page.press("Password", row=0)
        page.type(Password="1234")
        page.press("Check password")
        assert page.until_alert() == "429 Too Many Requests"
        page.leave()


def test_passwords_are_masked(page, application):
    page.open(HARRY, application=application)
    for button in ("New user", "Password"):
        page.press(button)
        assert page.field("Password").get_attribute("type") == "password"
        assert page.field("Password").get_attribute("autocomplete") == "new-password"
        page.press("Cancel")
        page.until_closed()


# -- errors ----------------------------------------------------------------------------


def fail_once(monkeypatch, target, name):
    """Make the first call of a method fail."""
    method, calls = getattr(target, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise profiler.Busy("for this test")
        return method(*arguments, **options)

    monkeypatch.setattr(target, name, fail)


def test_busy_list_offers_to_try_again(page, application, monkeypatch):
    application.accounts.create(*HARRY)
    fail_once(monkeypatch, application.users, "page")
    page.browser.get(page.address)
    assert page.until_alert() == "The service is busy: try again Try again"
    assert page.focus == "Try again"
    page.press("Try again")
    page.until_rows(1)
    assert page.texts("[role=alert]") == []


def test_failed_search_does_not_take_the_focus(page, application, monkeypatch):
    page.open(HARRY, application=application)
    fail_once(monkeypatch, application.users, "page")
    page.type(Search_by_name_or_email="harry")
    assert page.until_alert() == "The service is busy: try again Try again"
    assert page.focus == "q"


def test_busy_row_offers_to_try_again(page, application, monkeypatch):
    page.open(HARRY, application=application)
    fail_once(monkeypatch, application.users, "get")
    page.size(1000, 740)
    page.press("Edit", row=0)
    assert page.until_alert() == "The service is busy: try again Try again"
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    page.press("Try again")
    page.until_dialog("Edit Harry Potter")


@pytest.mark.parametrize(
    ("button", "method", "submit", "status"),
    [
        ("Edit", "update", "Save", "Harry Potter was saved."),
        ("Delete", "delete", "Delete", "Harry Potter was deleted."),
        ("Password", "reset_password", "Set password", "The password of Harry Potter was set."),
        ("Password", "verify", "Check password", None),
    ],
)
def test_busy_dialog_offers_to_try_again(
    page, application, monkeypatch, button, method, submit, status
):
    page.open(HARRY, application=application)
    is_rule = hasattr(application.accounts, method)
    fail_once(monkeypatch, application.accounts if is_rule else application.users, method)
    page.press(button, row=0)
    page.until(lambda: page.top.aria_role == "dialog")
    if button == "Password":
        page.type(Password="1234")
    page.press(submit)
    assert page.until_alert() == "The service is busy: try again Try again"
    page.press("Try again")
    if status:
        page.until_status(status)
    else:
        assert page.until_message("Password") == "This password is correct."


def test_unreachable_service_is_reported_and_tried_again(page, application):
    page.open(HARRY, application=application)
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.press("New user")
    page.type(First_name="Ron", Last_name="Weasley", Email="ron@example.com", Password="abcd")
    page.press("Create user")
    message = page.until_alert()
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    assert message == "The service cannot be reached Try again"
    page.press("Try again")
    page.until_status("Ron Weasley was created.")


def test_cancelled_dialog_ignores_its_response(page, application, monkeypatch):
    page.open(application=application)
    asked, go_on = [], threading.Event()

    def refuse(**fields):
        asked.append(fields)
        go_on.wait(10)
        raise profiler.EmailTaken

    monkeypatch.setattr(application.accounts, "create", refuse)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.press("Create user")
    page.until(lambda: asked)
    page.press("Cancel")
    page.until_closed()
    go_on.set()
    page.press("New user")
    page.until_dialog("New user")
    assert page.value("Email") == ""


# -- the token -------------------------------------------------------------------------


@pytest.fixture
def guarded_page(browser, tmp_path):
    with contextlib.closing(
        profiler.create_app(tmp_path / "guarded.sqlite3", iterations=1, token=TOKEN)
    ) as application:
        application.accounts.create(*HARRY)
        with serving(application) as address:
            page = Page(browser, address)
            browser.get(address)
            page.until_dialog("Token")
            yield page
            page.leave()


def stored_items(page):
    return page.script("return Object.entries(sessionStorage)")


def test_token_is_asked_for_once_per_tab_and_again_if_wrong(guarded_page):
    page = guarded_page
    page.type(Token="wröng token")
    page.press("Continue")
    page.until(lambda: "This token was not accepted." in page.top.text)
    assert page.rows == []
    page.type(Token=f" {TOKEN} ")
    page.field("Token").send_keys(Keys.ENTER)
    page.until_rows(1)
    assert stored_items(page) == [["profiler token of /", TOKEN]]
    assert page.script("return [localStorage.length, document.cookie]") == [0, ""]
    page.browser.refresh()
    page.until_rows(1)
    first, browser = page.browser.current_window_handle, page.browser
    browser.switch_to.new_window("tab")
    browser.get(page.address)
    page.until_dialog("Token")
    browser.close()
    browser.switch_to.window(first)


def test_cancelled_token_dialog_can_be_reopened(guarded_page):
    page = guarded_page
    page.field("Token").send_keys(Keys.ESCAPE)
    assert page.until_alert() == "This page needs a valid token. Try again"
    page.press("Try again")
    page.type(Token=TOKEN)
    page.press("Continue")
    page.until_rows(1)


def test_token_dialog_keeps_the_dialog_below(guarded_page):
    page = guarded_page
    page.type(Token=TOKEN)
    page.press("Continue")
    page.until_rows(1)
    page.press("New user")
    page.type(First_name="Ron", Last_name="Weasley", Email="ron@example.com", Password="abcd")
    page.script("sessionStorage.clear()")
    page.press("Create user")
    page.until_dialog("Token")
    page.type(Token=TOKEN)
    page.press("Continue")
    page.until_status("Ron Weasley was created.")


def enter_token(page):
    page.type(Token=TOKEN)
    page.press("Continue")


def replace_stored_token(page, token):
    page.script("sessionStorage.setItem(Object.keys(sessionStorage)[0], arguments[0])", token)


def test_token_is_masked_while_it_is_typed(guarded_page):
    assert guarded_page.field("Token").get_attribute("type") == "password"


def test_searches_with_a_rejected_token_share_one_dialog(guarded_page):
    page = guarded_page
    enter_token(page)
    page.until_rows(1)
    replace_stored_token(page, "replaced")
    wait, release = hold_responses(page)
    for count, letter in enumerate("pot", 1):
        page.field("Search by name or email").send_keys(letter)
        wait(count)
    for _ in "pot":
        release()
    page.until_dialog("Token")
    page.script(
        "const q = document.querySelector('#q'); q.value = 'zz'; q.oninput(new Event('input'))"
    )
    wait(1)
    release()
    enter_token(page)
    page.until_closed()
    wait(4)
    for _ in range(4):
        release()
    page.until(lambda: page.text("#empty") == "No user matches.")
    assert page.texts("[role=alert]") == []


def test_response_to_a_replaced_token_opens_no_dialog(guarded_page):
    page = guarded_page
    enter_token(page)
    page.until_rows(1)
    replace_stored_token(page, "replaced")
    wait, release = hold_responses(page, "users/1/")
    page.press("Edit", row=0)
    wait(1)
    page.type(Search_by_name_or_email="potter")
    page.until_dialog("Token")
    enter_token(page)
    page.until_closed()
    release()
    wait(1)
    release()
    page.until_dialog("Edit Harry Potter")


def test_token_is_not_shared_with_other_mount_points(browser, tmp_path):
    with contextlib.ExitStack() as stack:
        applications = {}
        for name, token in (("/a", TOKEN), ("/b", TOKEN[::-1])):
            application = profiler.create_app(
                tmp_path / f"{name[1:]}.sqlite3", iterations=1, token=token
            )
            applications[name] = stack.enter_context(contextlib.closing(application))

        def mounted(environ, start_response):
            name, path = environ["PATH_INFO"][:2], environ["PATH_INFO"][2:]
            return applications[name](
                {**environ, "SCRIPT_NAME": name, "PATH_INFO": path}, start_response
            )

        address = stack.enter_context(serving(mounted))
        for name, application in applications.items():
            page = Page(browser, f"{address}{name[1:]}/")
            browser.get(page.address)
            page.until_dialog("Token")
            assert "This token was not accepted." not in page.top.text
            page.type(Token=application.tokens[0].decode())
            page.press("Continue")
            page.until(lambda page=page: page.text("#empty"))
        assert sorted(stored_items(page)) == [
            ["profiler token of /a/", TOKEN],
            ["profiler token of /b/", TOKEN[::-1]],
        ]
        page.leave()


# -- accessibility ---------------------------------------------------------------------


def test_everything_works_by_keyboard(page, application):
    page.open(HARRY, application=application)
    keys = ActionChains(page.browser)
    keys.send_keys(Keys.TAB).perform()
    assert page.focus == "New user"
    keys.send_keys(Keys.ENTER).perform()
    page.until_dialog("New user")
    assert page.focus == "first_name"
    keys.send_keys(
        "Ron", Keys.TAB, "Weasley", Keys.TAB, "ron@example.com", Keys.TAB, "abcd", Keys.ENTER
    ).perform()
    page.until_rows(2)
    assert page.focus == "New user"
    keys.send_keys(*[Keys.TAB] * 2).perform()
    assert page.focus == "Edit"
    keys.send_keys(Keys.ENTER).perform()
    page.until_dialog("Edit Ron Weasley")
    keys.send_keys(Keys.ESCAPE).perform()
    page.until_closed()
    assert page.focus == "Edit"


def test_dialog_traps_the_focus(page, application):
    page.open(HARRY, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Harry Potter?")
    inside = "return !document.activeElement.matches('body > :not(dialog) *')"
    for _ in range(5):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        assert page.script(inside)


def test_row_buttons_name_their_user(page, application):
    page.open(HARRY, application=application)
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "tbody button")
    assert [button.accessible_name for button in buttons] == [
        "Edit: Harry Potter",
        "Password: Harry Potter",
        "Delete: Harry Potter",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_violations(page, application, scheme, width):
    axe_core = pytest.importorskip("axe_core_python", reason="axe is not installed")
    source = (pathlib.Path(axe_core.__file__).parent / "axe.min.js").read_text("utf-8")
    page.size(width, 740, mobile=width < 500)
    page.prefer(scheme)
    page.open(*make_users(LIMIT + 1), application=application)
    page.browser.execute_cdp_cmd(
        "Runtime.evaluate", {"expression": source}
    )  # not subject to the CSP

    def violations():
        run = """const done = arguments[0];
        axe.run().then(({ passes, violations }) => done({ passes: passes.length, violations }),
          (error) => done(String(error)))"""
        result = page.browser.execute_async_script(run)
        assert isinstance(result, dict), result
        assert result["passes"] > 10, "too few rules were checked"
        return [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in result["violations"]
        ]

    assert violations() == []
    page.type(Search_by_name_or_email="11@example.com")
    page.until_rows(1)
    page.press("New user")
    page.press("Create user")
    page.until_message("First name")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.accounts.update(12, {"first_name": "Theirs", "last_name": "Snape"})
    page.press("Save")
    page.until_message("First name")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Password", row=0)
    page.type(Password="x")
    page.press("Check password")
    page.until(lambda: page.message("Password") == "This password is correct.")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Delete", row=0)
    page.until_dialog("Delete Theirs Snape?")
    assert violations() == []
    page.press("Delete")
    page.until_status("Theirs Snape was deleted.")
    page.until(lambda: page.text("#empty"))
    assert violations() == []
    page.type(Search_by_name_or_email="x" * 256)
    page.until_message("Search by name or email")
    assert violations() == []
    page.script("document.querySelector('#q').parentElement.before(document.querySelector('#q'))")
    assert "label" in dict(violations()), "a field without its label"


def test_colours_follow_the_colour_scheme(page):
    page.open()
    brightness = (
        "return getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/)[0]"
    )
    assert int(page.script(brightness)) > 200
    page.prefer("dark")
    page.until(lambda: int(page.script(brightness)) < 50)


def fits(page, width):
    """Return True if the page does not scroll sideways, and nothing sticks out of the table."""
    source = """const edges = (element) => element.getBoundingClientRect();
    const outer = edges(document.querySelector("main"));
    const inner = [...document.querySelectorAll("tbody *")].map(edges);
    return document.documentElement.scrollWidth <= arguments[0]
      && inner.every(({ left, right }) => left >= outer.left && right <= outer.right)"""
    return page.script(source, width)


LONG = ("H" * 255, "P" * 255, "h" * 242 + "@example.com", "x")
WIDTHS = [320, 360, 390, 768, 961, 1280]


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_the_window(page, application, width):
    page.size(width, 740, mobile=width < 500)
    page.open(LONG, HARRY, application=application)
    assert fits(page, width)
    for button in ("Edit", "Password", "Delete"):
        page.press(button, row=1)
        page.until(lambda: page.top.aria_role == "dialog")
        assert fits(page, width)
        page.press("Cancel")
        page.until_closed()


def heights(page, selector):
    """The number of lines that elements have, and the number that their text needs."""
    source = """return [...document.querySelectorAll(arguments[0])].map((element) => {
      const height = parseFloat(getComputedStyle(element).lineHeight);
      return [element.clientHeight, element.scrollHeight].map((size) => Math.round(size / height));
    })"""
    return page.script(source, selector)


def test_long_user_does_not_squeeze_the_others(page, application):
    hermione = ("Hermione", "Granger", "hermione.granger@example.com", "x")
    page.open(hermione, LONG, application=application)
    assert heights(page, "tr:nth-child(2) bdi") == [[1, 1]] * 4
    long_user = heights(page, "tr:nth-child(1) bdi")
    assert [shown for shown, _ in long_user] == [3, 3, 3, 1]
    assert min(needed for _, needed in long_user[:3]) > 3


def test_phones_show_the_heads_of_the_table(page, application):
    page.size(320, 740, mobile=True)
    page.open(HARRY, application=application)
    source = """return [...document.querySelectorAll("tbody [data-label]")].map((cell) => [
      cell.dataset.label, getComputedStyle(cell, "::before").content])"""
    labels = [label for label, content in page.script(source) if content not in ("none", "normal")]
    heads = (
        "return [...document.querySelectorAll('thead th')].map(({ textContent }) => textContent)"
    )
    assert labels == page.script(heads)[:4]
    assert labels[3] == "Created (UTC)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_is_a_plain_table(page, application, scheme):
    page.open(LONG, *make_users(LIMIT), application=application)
    page.press("Next")
    page.until_rows(1)
    page.press("Edit", row=0)
    page.until(lambda: page.top.aria_role == "dialog")
    page.size(700, 1000)  # the width of paper
    page.prefer(scheme, "print")
    display = "return getComputedStyle(document.querySelector(arguments[0])).display"
    assert page.script(display, "thead") == "table-header-group"
    assert page.script(display, "tbody tr") == "table-row"
    assert page.script(display, "tbody td") == "table-cell"
    assert page.texts("button, input, label, nav, dialog, dialog *") == []
    assert page.texts("thead th") == ["First name", "Last name", "Email", "Created (UTC)"]
    assert page.text("tbody").split()[:3] == list(LONG[:3])
    assert all(shown == needed for shown, needed in heights(page, "tbody bdi"))
    colour = "return getComputedStyle(document.querySelector('td')).color.match(/[0-9]+/)[0]"
    assert int(page.script(colour)) < 100, "dark on light, in dark mode, too"
    assert fits(page, 700)


# -- security --------------------------------------------------------------------------


def test_markup_in_a_name_is_shown_as_text(page, application):
    markup = "<img src=x onerror=\"document.title='run'\">"
    page.open(
        (markup, "<script>document.title='run'</script>", "harry@example.com", "x"),
        application=application,
    )
    assert page.rows[0][0] == markup
    page.press("Edit", row=0)
    page.until_dialog(f"Edit {markup} <script>document.title='run'</script>")
    assert page.value("First name") == markup
    page.press("Save")
    page.until_status(f"{markup} <script>document.title='run'</script> was saved.")
    page.press("Delete", row=0)
    page.until(lambda: markup in page.top.text)
    assert page.script(
        "return [document.images.length, document.scripts.length, document.title]"
    ) == [0, 1, "Users"]


# RIGHT-TO-LEFT OVERRIDE; POP DIRECTIONAL ISOLATE, which would end the isolation of an
# inline element; Arabic.
@pytest.mark.parametrize(
    "first_name", ["\u202eevE", "\u2069\u202eevE", "\u2067\u2069\u202eevE", "\u0627\u0628"]
)
def test_names_do_not_reorder_the_text_around_them(page, application, first_name):
    page.open((first_name, "Potter", "eve@example.com", "x"), application=application)
    position = """const [selector, text] = arguments, range = new Range();
    const parent = document.querySelector(selector);
    const walker = document.createTreeWalker(parent, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const start = walker.currentNode.data.indexOf(text);
      if (start < 0) continue;
      const edge = (index) => {
        range.setStart(walker.currentNode, index);
        range.setEnd(walker.currentNode, index + 1);
        return range.getBoundingClientRect().left;
      };
      return edge(start) < edge(start + text.length - 1) ? "left to right" : "right to left";
    }"""
    page.press("Delete", row=0)
    page.until_dialog(f"Delete {first_name} Potter?")
    for selector, text in (("h2", "Delete"), (".text", "@example"), (".text", "permanently")):
        assert page.script(position, f"dialog {selector}", text) == "left to right"
    order = """const { childNodes } = document.querySelector("dialog .text");
    return [...childNodes].map(({ nodeName }) => nodeName)"""
    assert page.script(order) == ["BDI", "#text"]
    application.accounts.update(1, {"last_name": "\u202eretteP"})
    page.press("Delete")
    page.until_alert()
    for text in ("Stored", "@example"):
        assert page.script(position, "dialog .text", text) == "left to right"
    page.press("Delete")
    page.until_closed()
    page.until(lambda: page.text("#status"))
    assert page.script(position, "#status", "deleted") == "left to right"


def policy_of(source):
    """Return the directives of the page's CSP."""
    [content] = re.findall('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', source)
    return dict(directive.split(maxsplit=1) for directive in content.split(";"))


@pytest.mark.parametrize("name", ["script", "style"])
def test_csp_has_the_hash_of_the_inline_element(name):
    source = PAGE.read_text("utf-8")
    [text] = re.findall(f"<{name}>(.*?)</{name}>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy_of(source)[f"{name}-src"] == f"'sha256-{digest}'"


def test_csp_allows_nothing_else_but_requests_to_the_service():
    policy = policy_of(PAGE.read_text("utf-8"))
    others = {
        name: sources
        for name, sources in policy.items()
        if name not in ("script-src", "style-src")
    }
    assert others == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_csp_is_before_everything_that_it_restricts():
    source = PAGE.read_text("utf-8")
    assert source.index("Content-Security-Policy") < min(
        source.index(f"<{name}") for name in ("link", "style", "script")
    )


def test_csp_blocks_injected_scripts_and_styles(page):
    page.open()
    page.script("""for (const name of ["script", "style"]) {
      const element = document.createElement(name);
      element.textContent = name === "script" ? "document.title = 'run'" : "h1 { display: none }";
      document.head.append(element);
    }""")
    assert page.text("h1") == "Users"
    assert page.browser.title == "Users"
    blocked = page.until(lambda: page.browser.get_log("browser"))
    assert any("VIOLATION" in entry["message"] for entry in blocked)


def test_page_is_served_unchanged_and_cannot_be_framed(page):
    page.open()
    with urllib.request.urlopen(page.address, timeout=10) as response:
        headers, content = response.headers, response.read()
    assert content == PAGE.read_bytes()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Frame-Options"] == "DENY"
    assert "Content-Security-Policy" not in headers


@pytest.mark.parametrize(
    ("tag", "attribute"),
    [
        ("object", "data"),
        ("embed", "src"),
        ("iframe", "src"),
        ("img", "src"),
        ("script", "src"),
        ("link", "href"),
        ("video", "src"),
    ],
)
def test_other_origins_cannot_detect_which_ids_exist(browser, application, tag, attribute):
    """A website that the user visits may embed URLs of a service without a token. Load
    or error, size, frames."""

    def website(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/html")])
        return [b"<!DOCTYPE html><title>Website</title><body></body>"]

    application.accounts.create(*HARRY)
    observe = """const [tag, attribute, address, ids, done] = arguments;
    const observe = (id) => new Promise((resolve) => {
      const element = document.createElement(tag);
      const see = ({ type }) =>
        resolve([type, element.offsetWidth, element.offsetHeight, frames.length]);
      [element.onload, element.onerror, element.rel] = [see, see, "stylesheet"];
      element[attribute] = `${address}users/${id}/`;
      document.body.replaceChildren(element);
    });
    (async () => {
      const seen = [];
      for (const id of ids) seen.push(await observe(id));
      done(seen);
    })();"""
    with serving(application) as address, serving(website) as other:
        browser.get(other.replace("127.0.0.1", "localhost"))
        existing, missing = browser.execute_async_script(observe, tag, attribute, address, [1, 2])
        browser.get("about:blank")
        browser.get_log("browser")
    assert existing == missing


def test_page_loads_nothing_but_the_list(page, application):
    page.open(HARRY, application=application)
    urls = page.script("return performance.getEntriesByType('resource').map(({ name }) => name)")
    assert urls == [f"{page.address}users/?sort=-id&limit={LIMIT}"]
    references = re.compile(r"""https?:|(src|href)=(?!"data:,")|url\(|@import""")
    for control in ('"https://x"', "<img src=x>", '<a href="x">', "url(x)", "@import 'x'"):
        assert references.search(control)
    assert not references.search(PAGE.read_text("utf-8"))


def test_page_uses_no_dangerous_api():
    source = PAGE.read_text("utf-8")
    forbidden = (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "localStorage",
        "cookie",
        "eval",
        "style=",
    )
    assert [word for word in forbidden if word in source] == []
    handlers = re.compile(r"\son[a-z]+=")
    assert handlers.search('<p onclick="x">')
    assert not handlers.search(source[: source.index("<script>")])


def test_page_is_short():
    lines = PAGE.read_text("utf-8").splitlines()
    assert len(lines) <= 350
    assert max(map(len, lines)) <= 120


# -- deployment ------------------------------------------------------------------------


def test_page_works_below_a_mount_point(browser, application):
    def mounted(environ, start_response):
        name, path = environ["PATH_INFO"][:9], environ["PATH_INFO"][9:]
        assert name == "/accounts"
        return application({**environ, "SCRIPT_NAME": name, "PATH_INFO": path}, start_response)

    with serving(mounted, "/accounts") as address:
        browser.get(address.rstrip("/"))
        page = Page(browser, address)
        page.until(lambda: page.text("#empty") == "There are no users.")
        assert browser.current_url == address
        for user in make_users(LIMIT + 1):
            application.accounts.create(*user)
        page.press("New user")
        page.type(
            First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234"
        )
        page.press("Create user")
        page.until_rows(LIMIT)
        page.press("Next")
        page.until_rows(2)
        page.press("Delete", row=1)
        page.until_dialog("Delete User 0?")
        page.press("Delete")
        page.until_rows(1)
        page.leave()


def test_edit_works_behind_a_compressing_proxy(browser, application):
    """Apache's mod_deflate changes `"tag"` to `"tag-gzip"`, nginx's gzip to `W/"tag"`."""

    def marked(environ, start_response):
        def start(status, headers, exc_info=None):
            tags = {"ETag": 'W/"%s-gzip"'}
            start_response(
                status, [(n, tags[n] % v.strip('"') if n in tags else v) for n, v in headers]
            )

        return application(environ, start)

    with serving(marked) as address:
        page = Page(browser, address).open(HARRY, application=application)
        page.press("Edit", row=0)
        page.type(First_name="Harry James")
        page.press("Save")
        page.until_status("Harry James Potter was saved.")
        page.leave()


def test_page_and_document_are_optional(tmp_path):
    for name in ("profiler.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    program = """if True:
        import io, profiler, wsgiref.util
        for path in ("/", "", "/openapi.json", "/users/"):
            environ = {"wsgi.errors": io.StringIO()}
            wsgiref.util.setup_testing_defaults(environ)
            environ["PATH_INFO"] = path
            print(*profiler.app(environ, lambda status, headers: print(status)))
    """
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert output.stdout.count("404 Not Found") == 3
    assert output.stdout.count("/users/") == 3
    assert output.stdout.endswith("200 OK\nb'[]\\n'\n")
