"""Create page.png: a screenshot of the page with some users, in light colours.

Needs Selenium, Chromium and its driver: `python bench/screenshot.py`.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import profiler  # noqa: E402  # the one in this repository

WIDTH, HEIGHT = 1120, 700  # pixels
NAMES = """Harry Potter, Hermione Granger, Ron Weasley, Neville Longbottom, Ginny Weasley,
Luna Lovegood, Draco Malfoy, Cedric Diggory, Minerva McGonagall"""


@contextlib.contextmanager
def serve(folder: str) -> Iterator[str]:
    """Serve a database with users on any port; yield the address."""
    application = profiler.create_app(f"{folder}/db.sqlite3", iterations=1)
    for name in NAMES.split(","):
        first_name, last_name = name.split()
        application.accounts.create(
            first_name, last_name, f"{first_name}.{last_name}@example.com".lower(), "alohomora"
        )
    address = ("127.0.0.1", 0)
    with (
        contextlib.closing(application),
        profiler.Server(socket.AF_INET, address, application, False) as server,
    ):
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.stop()
            thread.join()


def main() -> None:
    """Start the service and the browser, wait for the table, and take the screenshot."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(flag)
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(folder) as address,
        webdriver.Chrome(options=options, service=service) as browser,
    ):
        metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1.25, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        light = [{"name": "prefers-color-scheme", "value": "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
        browser.get(address)
        WebDriverWait(browser, 10).until(
            lambda _: browser.find_elements(By.CSS_SELECTOR, "tbody tr")
        )
        browser.save_screenshot(str(HERE / "page.png"))


if __name__ == "__main__":
    main()
