"""Tests of index.html in a browser: Debian's Chromium. A name is a claim; a docstring says why, if it must."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.request

import pytest

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

PAGE = pathlib.Path(__file__).parent / "index.html"
LIMIT = 50  # users of a page
TOKEN = "0123456789abcdef"
HARRY = ("Harry", "Potter", "harry@example.com", "1234")
RON = ("Ron", "Weasley", "ron@example.com", "abcd")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage"""


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
        listen = "addEventListener('securitypolicyviolation', ({ blockedURI, effectiveDirective }) => {"
        listen += " console.error('VIOLATION', blockedURI, effectiveDirective); });"
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": listen})
        yield browser


@pytest.fixture
def application(tmp_path):
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3", iterations=1)) as application:
        yield application


@contextlib.contextmanager
def serving(application, path=""):
    """Serve an application; yield the address of the page."""
    with profiler.Server("127.0.0.1", 0, application, access_log=False, check_host=True) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{path}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def page(browser, application):
    """The page of an application, in a window as a desk has it. Nothing may be left in the console."""
    with serving(application) as address:
        page = Page(browser, address)
        page.size(1280, 900)
        page.prefer("light")
        yield page
        page.leave()


class Page:
    """What a person sees of the page, and does to it."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, *users, application=None):
        """Open the page where there are these users, and wait for the list."""
        for user in users:
            application.users.create(*user)
        self.browser.get(self.address)
        self.until(lambda: self.rows or self.text("#nobody"))
        return self

    def leave(self):
        self.script("sessionStorage.clear()")
        self.browser.get("about:blank")
        log = self.browser.get_log("browser")
        assert [entry for entry in log if entry["source"] not in ("network", "recommendation")] == []

    def size(self, width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, condition):
        """Wait until a condition holds, and return what it gave."""
        ignored = (exceptions.StaleElementReferenceException, exceptions.NoSuchElementException, IndexError)
        return WebDriverWait(self.browser, 10, 0.02, ignored).until(lambda _: condition())

    def until_rows(self, count):
        return self.until(lambda: len(self.rows) == count and self.rows)

    def script(self, source, *arguments):
        return self.browser.execute_script(source, *arguments)

    @property
    def rows(self):
        """The cells of the table, but for the buttons."""
        source = "return [...document.querySelectorAll('tbody tr')].map("
        return self.script(source + "(row) => [...row.cells].slice(0, 4).map((cell) => cell.textContent))")

    @property
    def emails(self):
        return [row[2] for row in self.rows]

    def text(self, selector):
        """The text of an element as it is seen."""
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    def texts(self, selector):
        return [element.text for element in self.browser.find_elements(By.CSS_SELECTOR, selector) if element.text]

    @property
    def focus(self):
        """What has the focus: the text of a button, the name of a field."""
        return self.script("const { name, textContent } = document.activeElement; return textContent.trim() || name")

    @property
    def top(self):
        """What can be clicked: the dialog on top, else the page."""
        return self.browser.find_elements(By.CSS_SELECTOR, "body, dialog")[-1]

    def press(self, text, row=None):
        """Click the button that has this text: in the dialog, if there is one, or in a row."""
        where = "" if row is None else f"//tbody/tr[{row + 1}]"
        path = f".{where}//button[normalize-space()='{text}' and not(@hidden)]"
        self.until(lambda: self.top.find_element(By.XPATH, path)).click()

    def field(self, label):
        """The field with this label, in the dialog, if there is one."""
        source = """const [text] = arguments, top = [...document.querySelectorAll("body, dialog")].pop();
        return [...top.querySelectorAll("label")].find((label) => label.textContent.trim() === text)?.control"""
        return self.until(lambda: self.script(source, label))

    def type(self, **fields):
        """Put texts into fields, in place of what is there."""
        for name, text in fields.items():
            field = self.field(name.replace("_", " ").capitalize())
            field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)

    def value(self, label):
        return self.field(label).get_attribute("value")

    def beside(self, label):
        """The message below a field, which is the one that a screen reader reads with it."""
        field = self.field(label)
        return self.text(f"#{field.get_attribute('aria-describedby')}")

    def until_beside(self, label):
        return self.until(lambda: self.beside(label))

    def until_alert(self):
        return self.until(lambda: " ".join(self.texts("[role=alert]")))

    def until_dialog(self, title):
        return self.until(lambda: self.top.aria_role == "dialog" and self.top.accessible_name == title)

    def until_closed(self):
        return self.until(lambda: not self.browser.find_elements(By.TAG_NAME, "dialog"))

    def until_told(self, text):
        return self.until(lambda: self.text("#status") == text)


# -- the list --------------------------------------------------------------------------------------------------------


def test_the_table_shows_the_newest_user_first(page, application):
    page.open(HARRY, RON, application=application)
    assert [row[:3] for row in page.rows] == [list(RON[:3]), list(HARRY[:3])]
    assert all(re.fullmatch("[0-9-]{10} [0-9:]{8}", row[3]) for row in page.rows)
    heads = page.script("return [...document.querySelectorAll('thead th')].map((cell) => cell.textContent)")
    assert heads == ["First name", "Last name", "Email", "Created (UTC)", "Actions"]


def test_without_users_the_page_says_so(page):
    page.open()
    assert page.text("#nobody") == "There are no users."
    assert page.texts("nav button") == []


def test_next_and_previous_lead_through_the_pages(page, application):
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
    assert page.focus == "Users", "what had the focus can no longer have it"
    page.press("Previous")
    page.press("Previous")
    page.until(lambda: page.emails == newest_first[:LIMIT])
    assert not page.browser.find_element(By.ID, "previous").is_enabled()


def test_an_email_finds_its_user_whatever_its_case(page, application):
    page.open(HARRY, RON, application=application)
    page.type(Find_by_email="HARRY@example.com")
    page.press("Find")
    page.until(lambda: page.emails == ["harry@example.com"])
    page.press("Show all")
    page.until_rows(2)
    assert page.value("Find by email") == ""


def test_an_email_that_nobody_has_is_told(page, application):
    page.open(HARRY, application=application)
    page.type(Find_by_email="a+b@example.com")
    page.press("Find")
    page.until(lambda: page.text("#nobody") == "No user has this email.")


def test_what_is_no_email_is_told_beside_the_field(page, application):
    page.open(HARRY, application=application)
    page.type(Find_by_email="Harry Potter")
    page.press("Find")
    message = page.until_beside("Find by email")
    assert message == "email must be an address such as harry@example.com, of at most 254 characters"
    assert page.field("Find by email").get_attribute("aria-invalid") == "true"


# -- create ----------------------------------------------------------------------------------------------------------


def test_a_new_user_is_seen_at_once(page, application):
    page.open(*make_users(LIMIT), application=application)
    page.type(Find_by_email="1@example.com")
    page.press("Find")
    page.until_rows(1)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.press("Create user")
    page.until_told("Harry Potter is created.")
    page.until(lambda: page.rows[0][:3] == list(HARRY[:3]))
    assert page.focus == "New user"
    assert application.users.verify("harry@example.com", "1234") == LIMIT + 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Last_name", "", "Required fields are missing"),
        ("Password", "  ", "Required fields are missing"),
        ("First_name", "x" * 256, "first_name must have at most 255 characters"),
        ("Last_name", "x" * 256, "last_name must have at most 255 characters"),
        ("Email", "harry", "email must be an address such as harry@example.com, of at most 254 characters"),
        ("Email", "RON@example.com", "This email is already registered"),
    ],
)
def test_the_services_message_stands_beside_the_field_that_it_is_about(page, application, name, value, message):
    page.open(RON, application=application)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.type(**{name: value})
    page.press("Create user")
    label = name.replace("_", " ")
    assert page.until_beside(label) == message
    assert page.texts("dialog .problem") == [message]
    assert page.field(label).get_attribute("aria-invalid") == "true"
    assert page.focus == name.lower()
    for other, typed in zip(("First name", "Last name", "Email", "Password"), HARRY):
        assert page.value(other) == (value if other == label else typed)


def test_a_message_goes_when_its_cause_does(page, application):
    page.open(application=application)
    page.press("New user")
    page.press("Create user")
    assert page.until_beside("First name") == "Required fields are missing"
    page.type(First_name="Harry")
    page.press("Create user")
    assert page.until_beside("Last name") == "Required fields are missing"
    assert page.beside("First name") == ""


def test_enter_twice_creates_once(page, application, monkeypatch):
    page.open(application=application)
    create, asked, go_on = application.users.create, [], threading.Event()

    def wait(*fields):
        asked.append(fields)
        go_on.wait(10)
        return create(*fields)

    monkeypatch.setattr(application.users, "create", wait)
    page.press("New user")
    page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
    page.field("Password").send_keys(Keys.ENTER, Keys.ENTER)
    page.until(lambda: asked)
    go_on.set()
    page.until_closed()
    page.until_rows(1)
    assert len(asked) == 1


# -- edit ------------------------------------------------------------------------------------------------------------


def test_an_edit_is_saved(page, application):
    page.open(HARRY, RON, application=application)
    page.press("Edit", row=1)
    page.until_dialog("Edit Harry Potter")
    assert [page.value(label) for label in ("First name", "Last name", "Email")] == list(HARRY[:3])
    page.type(First_name="Harry James")
    page.press("Save")
    page.until_told("Harry James Potter is saved.")
    page.until(lambda: page.rows[1][0] == "Harry James")
    assert page.focus == "Edit"


def test_an_edit_begins_with_what_is_stored_not_with_what_the_list_showed(page, application):
    page.open(HARRY, application=application)
    application.users.update(1, "Harry James", "Potter", "harry@example.com")
    page.press("Edit", row=0)
    page.until_dialog("Edit Harry James Potter")


def be_too_late(page, application):
    """Let two edit one user; return when the second is told."""
    page.open(HARRY, application=application)
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.users.update(1, "Theirs", "Snape", "harry@example.com")
    page.press("Save")
    page.until(lambda: page.beside("First name"))


def test_who_was_too_late_is_told_sees_what_is_there_now_and_loses_nothing(page, application):
    be_too_late(page, application)
    assert page.until_alert() == "The user has changed since: get it again, then decide"
    assert page.beside("First name") == "Stored now: Theirs"
    assert page.beside("Last name") == "Stored now: Snape"
    assert page.beside("Email") == ""
    assert [page.value(label) for label in ("First name", "Last name", "Email")] == ["Mine", *HARRY[1:3]]
    assert b'"Theirs"' in application.users.get(1)


def test_who_was_too_late_may_save_all_the_same(page, application):
    be_too_late(page, application)
    page.press("Save mine")
    page.until_told("Mine Potter is saved.")
    assert b'"Mine","last_name":"Potter"' in application.users.get(1)


def test_who_was_too_late_may_take_what_is_there_and_go_on(page, application):
    be_too_late(page, application)
    page.press("Take theirs")
    page.until(lambda: page.value("First name") == "Theirs")
    assert (page.value("Last name"), page.beside("First name"), page.texts("dialog .problem")) == ("Snape", "", [])
    page.type(First_name="Ours")
    page.press("Save mine")
    page.until_told("Ours Snape is saved.")


def test_who_is_too_late_twice_is_told_twice(page, application):
    be_too_late(page, application)
    application.users.update(1, "Theirs", "Riddle", "harry@example.com")
    page.press("Save mine")
    page.until(lambda: page.beside("Last name") == "Stored now: Riddle")
    assert b'"Riddle"' in application.users.get(1)


def test_an_edit_of_who_is_gone_by_then_loses_nothing_either(page, application):
    page.open(HARRY, application=application)
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.users.delete(1)
    page.press("Save")
    assert page.until_alert() == "Invalid user id"
    assert page.value("First name") == "Mine"


def test_a_button_of_who_is_gone_says_so_beside_it(page, application):
    page.open(HARRY, RON, application=application)
    application.users.delete(1)
    page.press("Edit", row=1)
    assert page.until_alert() == "Invalid user id"
    assert page.texts("tbody tr:nth-child(2) [role=alert]") == ["Invalid user id"]


# -- delete ----------------------------------------------------------------------------------------------------------


def test_a_deletion_is_asked_for_before_it_happens(page, application):
    page.open(HARRY, RON, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Ron Weasley?")
    assert "ron@example.com" in page.top.text
    assert page.focus == "Cancel"
    page.press("Cancel")
    page.until_closed()
    assert page.focus == "Delete"
    assert len(page.rows) == 2
    page.press("Delete", row=0)
    page.until_dialog("Delete Ron Weasley?")
    page.press("Delete")
    page.until_told("Ron Weasley is deleted.")
    page.until(lambda: page.emails == ["harry@example.com"])
    assert page.focus == "Users"


def test_who_would_delete_another_than_was_shown_is_told_and_asked_again(page, application):
    page.open(HARRY, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Harry Potter?")
    application.users.update(1, "Tom", "Riddle", "tom@example.com")
    page.press("Delete")
    assert page.until_alert() == "The user has changed since: get it again, then decide"
    assert "Stored now: Tom Riddle, tom@example.com" in page.top.text
    assert application.users.count() == 1
    page.press("Delete")
    page.until_told("Tom Riddle is deleted.")


def test_when_the_last_page_is_emptied_previous_leads_back(page, application):
    page.open(*make_users(LIMIT + 1), application=application)
    page.press("Next")
    page.until_rows(1)
    page.press("Delete", row=0)
    page.until_dialog("Delete User 0?")
    page.press("Delete")
    page.until(lambda: page.text("#nobody") == "There are no more users.")
    page.press("Previous")
    page.until_rows(LIMIT)


# -- passwords -------------------------------------------------------------------------------------------------------


def test_a_password_is_checked(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.until_dialog("Password of Harry Potter")
    page.type(Password="12345")
    page.press("Check password")
    assert page.until_beside("Password") == "Wrong email or password"
    page.type(Password="1234")
    page.press("Check password")
    page.until(lambda: page.beside("Password") == "This is the password.")
    assert page.field("Password").get_attribute("aria-invalid") == "false"


def test_a_password_is_changed_by_who_knows_it(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.type(Password="12345", New_password="5678")
    page.press("Change password")
    assert page.until_beside("Password") == "Wrong password"
    assert page.value("New password") == "5678"
    page.type(Password="1234")
    page.press("Change password")
    page.until_told("The password of Harry Potter is changed.")
    assert application.users.verify("harry@example.com", "5678") == 1


def test_a_new_password_that_is_missing_is_told_beside_its_field(page, application):
    page.open(HARRY, application=application)
    page.press("Password", row=0)
    page.type(Password="1234")
    page.field("Password").send_keys(Keys.ENTER)
    assert page.until_beside("New password") == "Required fields are missing"


def test_a_password_is_nowhere_to_be_read(page, application):
    page.open(application=application)
    page.press("New user")
    assert page.field("Password").get_attribute("type") == "password"
    assert page.field("Password").get_attribute("autocomplete") == "new-password"


# -- trouble ---------------------------------------------------------------------------------------------------------


def fail_once(monkeypatch, users, name):
    """Let a method of the users be busy at its first call."""
    method, calls = getattr(users, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise profiler.Busy("as the test wants it")
        return method(*arguments, **options)

    monkeypatch.setattr(users, name, fail)


def test_a_busy_list_offers_to_try_again(page, application, monkeypatch):
    application.users.create(*HARRY)
    fail_once(monkeypatch, application.users, "page")
    page.browser.get(page.address)
    assert page.until_alert() == "The service is busy: try again Try again"
    assert page.focus == "Try again"
    page.press("Try again")
    page.until_rows(1)
    assert page.texts("[role=alert]") == []


def test_a_busy_row_offers_to_try_again(page, application, monkeypatch):
    page.open(HARRY, application=application)
    fail_once(monkeypatch, application.users, "get")
    page.size(1000, 740)
    page.press("Edit", row=0)
    assert page.until_alert() == "The service is busy: try again Try again"
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    page.press("Try again")
    page.until_dialog("Edit Harry Potter")


@pytest.mark.parametrize(
    ("button", "method", "submit", "told"),
    [
        ("Edit", "update", "Save", "Harry Potter is saved."),
        ("Delete", "delete", "Delete", "Harry Potter is deleted."),
        ("Password", "change_password", "Change password", "The password of Harry Potter is changed."),
        ("Password", "verify", "Check password", None),
    ],
)
def test_a_busy_dialog_offers_to_try_again_and_loses_nothing(
    page, application, monkeypatch, button, method, submit, told
):
    page.open(HARRY, application=application)
    fail_once(monkeypatch, application.users, method)
    page.press(button, row=0)
    page.until(lambda: page.top.aria_role == "dialog")
    if button == "Password":
        page.type(Password="1234", New_password="5678")
    page.press(submit)
    assert page.until_alert() == "The service is busy: try again Try again"
    page.press("Try again")
    if told:
        page.until_told(told)
    else:
        assert page.until_beside("Password") == "This is the password."


def test_a_service_that_is_not_there_is_told_and_tried_again(page, application):
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
    page.until_told("Ron Weasley is created.")


def test_a_dialog_that_is_left_while_it_waits_leaves_nothing_behind(page, application, monkeypatch):
    page.open(application=application)
    asked, go_on = [], threading.Event()

    def refuse(*fields):
        asked.append(fields)
        go_on.wait(10)
        raise profiler.EmailTaken

    monkeypatch.setattr(application.users, "create", refuse)
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


# -- the token -------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded_page(browser, tmp_path):
    with contextlib.closing(
        profiler.create_app(tmp_path / "guarded.sqlite3", iterations=1, token=TOKEN)
    ) as application:
        application.users.create(*HARRY)
        with serving(application) as address:
            page = Page(browser, address)
            browser.get(address)
            page.until_dialog("Token")
            yield page
            page.leave()


def test_a_token_is_asked_for_once_a_tab_and_a_wrong_one_again(guarded_page):
    page = guarded_page
    page.type(Token="wröng token")
    page.press("Continue")
    page.until(lambda: "This token was not accepted." in page.top.text)
    assert page.rows == []
    page.type(Token=f" {TOKEN} ")
    page.field("Token").send_keys(Keys.ENTER)
    page.until_rows(1)
    assert page.script("return [sessionStorage.token, localStorage.length, document.cookie]") == [TOKEN, 0, ""]
    page.browser.refresh()
    page.until_rows(1)
    first, browser = page.browser.current_window_handle, page.browser
    browser.switch_to.new_window("tab")
    browser.get(page.address)
    page.until_dialog("Token")
    browser.close()
    browser.switch_to.window(first)


def test_who_has_no_token_is_told_and_may_come_back_to_it(guarded_page):
    page = guarded_page
    page.field("Token").send_keys(Keys.ESCAPE)
    assert page.until_alert() == "Send the header Authorization: Bearer TOKEN Try again"
    page.press("Try again")
    page.type(Token=TOKEN)
    page.press("Continue")
    page.until_rows(1)


def test_a_token_that_is_asked_for_in_the_middle_loses_nothing(guarded_page):
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
    page.until_told("Ron Weasley is created.")


# -- for everybody ---------------------------------------------------------------------------------------------------


def test_all_can_be_done_by_keyboard(page, application):
    page.open(HARRY, application=application)
    keys = ActionChains(page.browser)
    keys.send_keys(Keys.TAB).perform()
    assert page.focus == "New user"
    keys.send_keys(Keys.ENTER).perform()
    page.until_dialog("New user")
    assert page.focus == "first_name"
    keys.send_keys("Ron", Keys.TAB, "Weasley", Keys.TAB, "ron@example.com", Keys.TAB, "abcd", Keys.ENTER).perform()
    page.until_rows(2)
    assert page.focus == "New user"
    keys.send_keys(*[Keys.TAB] * 3).perform()
    assert page.focus == "Edit"
    keys.send_keys(Keys.ENTER).perform()
    page.until_dialog("Edit Ron Weasley")
    keys.send_keys(Keys.ESCAPE).perform()
    page.until_closed()
    assert page.focus == "Edit"


def test_a_dialog_keeps_the_focus_to_itself(page, application):
    page.open(HARRY, application=application)
    page.press("Delete", row=0)
    page.until_dialog("Delete Harry Potter?")
    inside = "return !document.activeElement.matches('body > :not(dialog) *')"
    for _ in range(5):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        assert page.script(inside)


def test_each_button_of_a_row_says_whom_it_is_about(page, application):
    page.open(HARRY, application=application)
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "tbody button")
    assert [button.accessible_name for button in buttons] == [
        "Edit: Harry Potter",
        "Password: Harry Potter",
        "Delete: Harry Potter",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(page, application, scheme, width):
    axe_core = pytest.importorskip("axe_core_python", reason="axe is not installed")
    source = (pathlib.Path(axe_core.__file__).parent / "axe.min.js").read_text("utf-8")
    page.size(width, 740, mobile=width < 500)
    page.prefer(scheme)
    page.open(*make_users(LIMIT + 1), application=application)
    page.browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source})  # which no policy stops

    def violations():
        run = "axe.run().then(({ violations }) => arguments[0](violations), arguments[0])"
        return [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in page.browser.execute_async_script(run)
        ]

    assert violations() == []
    page.type(Find_by_email="1@example.com")
    page.press("Find")
    page.until_rows(1)
    page.press("New user")
    page.press("Create user")
    page.until_beside("First name")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Edit", row=0)
    page.type(First_name="Mine")
    application.users.update(2, "Theirs", "Snape", "1@example.com")
    page.press("Save")
    page.until_beside("First name")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Password", row=0)
    page.type(Password="x")
    page.press("Check password")
    page.until(lambda: page.beside("Password") == "This is the password.")
    assert violations() == []
    page.press("Cancel")
    page.until_closed()
    page.press("Delete", row=0)
    page.until_dialog("Delete Theirs Snape?")
    assert violations() == []
    page.press("Delete")
    page.until_told("Theirs Snape is deleted.")
    page.until(lambda: page.text("#nobody"))
    assert violations() == []


def test_dark_is_dark_and_light_is_light(page):
    page.open()
    brightness = "return getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/)[0]"
    assert int(page.script(brightness)) > 200
    page.prefer("dark")
    page.until(lambda: int(page.script(brightness)) < 50)


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_screen(page, application, width):
    page.size(width, 740, mobile=width < 500)
    page.open(("H" * 255, "P" * 255, "h" * 242 + "@example.com", "x"), HARRY, application=application)
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    assert page.script(fits)
    for button in ("Edit", "Password", "Delete"):
        page.press(button, row=1)
        page.until(lambda: page.top.aria_role == "dialog")
        assert page.script(fits)
        page.press("Cancel")
        page.until_closed()


# -- safety ----------------------------------------------------------------------------------------------------------


def test_markup_in_a_name_is_text(page, application):
    markup = "<img src=x onerror=\"document.title='run'\">"
    page.open((markup, "<script>document.title='run'</script>", "harry@example.com", "x"), application=application)
    assert page.rows[0][0] == markup
    page.press("Edit", row=0)
    page.until_dialog(f"Edit {markup} <script>document.title='run'</script>")
    assert page.value("First name") == markup
    page.press("Save")
    page.until_told(f"{markup} <script>document.title='run'</script> is saved.")
    page.press("Delete", row=0)
    page.until(lambda: markup in page.top.text)
    assert page.script("return [document.images.length, document.scripts.length, document.title]") == [0, 1, "Users"]


def test_the_policy_allows_this_script_and_this_style_alone(page):
    sources = []
    for name in ("script", "style"):
        [text] = re.findall(f"<{name}>(.*?)</{name}>", PAGE.read_text("utf-8"), re.DOTALL)
        sources.append(f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    with urllib.request.urlopen(page.address, timeout=10) as response:
        headers, content = response.headers, response.read()
    assert content == PAGE.read_bytes()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    assert headers["Content-Security-Policy"] == "; ".join(["default-src 'none'", *sources, rest])
    page.open()


def test_nothing_comes_from_elsewhere(page, application):
    page.open(HARRY, application=application)
    urls = page.script("return performance.getEntriesByType('resource').map(({ name }) => name)")
    assert urls == [f"{page.address}users/?sort=-id&limit={LIMIT}"]
    assert "//" not in re.sub("(?m)(^|  )// .*$", "", PAGE.read_text("utf-8"))


def test_text_goes_in_as_text_and_nothing_is_kept():
    source = PAGE.read_text("utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "localStorage",
        "cookie",
        "eval",
        "style=",
    ):
        assert word not in source
    assert not re.search(r"\son[a-z]+=", source[: source.index("<script>")])


def test_the_page_can_be_read_at_a_sitting():
    lines = PAGE.read_text("utf-8").splitlines()
    assert len(lines) < 300
    assert max(map(len, lines)) <= 120


# -- elsewhere -------------------------------------------------------------------------------------------------------


def test_behind_a_mount_point_all_is_the_same(browser, application):
    def mounted(environ, start_response):
        name, path = environ["PATH_INFO"][:9], environ["PATH_INFO"][9:]
        assert name == "/accounts"
        return application({**environ, "SCRIPT_NAME": name, "PATH_INFO": path}, start_response)

    with serving(mounted, "/accounts") as address:
        browser.get(address.rstrip("/"))
        page = Page(browser, address)
        page.until(lambda: page.text("#nobody") == "There are no users.")
        assert browser.current_url == address
        for user in make_users(LIMIT + 1):
            application.users.create(*user)
        page.press("New user")
        page.type(First_name="Harry", Last_name="Potter", Email="harry@example.com", Password="1234")
        page.press("Create user")
        page.until_rows(LIMIT)
        page.press("Next")
        page.until_rows(2)
        page.press("Delete", row=1)
        page.until_dialog("Delete User 0?")
        page.press("Delete")
        page.until_rows(1)
        page.leave()


def test_a_proxy_that_marks_the_tag_hinders_no_edit(browser, application):
    """Apache's mod_deflate makes `"tag"` into `"tag-gzip"`, nginx's gzip into `W/"tag"`: neither would match again."""

    def marked(environ, start_response):
        def start(status, headers, exc_info=None):
            tags = {"ETag": 'W/"%s-gzip"'}
            start_response(status, [(n, tags[n] % v.strip('"') if n in tags else v) for n, v in headers])

        return application(environ, start)

    with serving(marked) as address:
        page = Page(browser, address).open(HARRY, application=application)
        page.press("Edit", row=0)
        page.type(First_name="Harry James")
        page.press("Save")
        page.until_told("Harry James Potter is saved.")
        page.leave()


def test_without_the_file_the_address_names_what_is_there(tmp_path):
    """Two files copied are enough, as ever."""
    for name in ("profiler.py", "schema.sql"):
        shutil.copy(PAGE.parent / name, tmp_path)
    program = """if True:
        import io, profiler, wsgiref.util
        for path in ("/", "", "/openapi.json", "/users/"):
            environ = {"wsgi.errors": io.StringIO()}
            wsgiref.util.setup_testing_defaults(environ)
            print(*profiler.app({**environ, "PATH_INFO": path}, lambda status, headers: print(status)))
    """
    output = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert output.stdout.count("404 Not Found") == 3
    assert output.stdout.count("/users/") == 3
    assert output.stdout.endswith("200 OK\nb'[]\\n'\n")
