"""The scorer's page of `lapa robot-session` in a real browser, and a kill in the middle of a session."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from lapa.evaluation.robot_session_policy import SessionClient

SESSION = """
rollouts: 2
seed: 1
policies: {secret-alpha: models/alpha-folder, secret-beta: models/beta-folder, secret-gamma: "http://localhost:9/act"}
tasks:
  cover:
    credits: {0.33: takes the towel, 0.66: covers a part, 1: covers it}
    types:
      unseen_objects:
        instruction: cover the sponge with the towel
        positions: [{text: sponge left, photo: left.png}, sponge right]
"""
SECRETS = ("secret-", "alpha-folder", "beta-folder", "localhost:9")
# For a browser as root, without a screen, that asks nobody anything.
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
           "--disable-background-networking", "--disable-component-update"]  # fmt: skip


class Program:
    """`lapa robot-session` in a process of its own."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "lapa.cli", "robot-session", "--session", str(folder / "session.yaml"),
                   "--output", str(folder / "out"), "--port", "0"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.told = "".join(self.process.stdout.readline() for _ in range(4))
        self.url = re.search(r"page: +(\S+)", self.told)[1]
        self.robot = SessionClient(self.url, re.search(r"token: +(\S+)", self.told)[1])

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def program(tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 40), "orange").save(tmp_path / "left.png")
    (tmp_path / "session.yaml").write_text(SESSION)
    programs = []

    def start():
        programs.append(Program(tmp_path))
        return programs[-1]

    yield start
    for one in programs:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (`pip install lapa[dev]`)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that remembers what passed between it and the program, and what it complained of."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20000)
    page.passed, page.complaints = [], []
    page.on("request", lambda request: page.passed.append(f"{request.url} {request.headers} {request.post_data}"))
    page.on("response", lambda response: page.passed.append(f"{response.headers} {_text(response)}"))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    context.close()


def _text(response):
    """Body of an answer; a page that the browser has left already has none to give (what it showed is in `press`)."""
    from playwright.sync_api import Error

    kind = response.headers.get("content-type", "")
    if "text/html" not in kind and "json" not in kind:
        return ""
    try:
        return response.text()
    except Error:
        return ""


def press(page, key):
    """Presses a key and waits for the page that it leads to."""
    before = page.get_attribute("body", "data-version")
    page.keyboard.press(key)
    page.wait_for_selector(f'body[data-version]:not([data-version="{before}"])')
    page.wait_for_load_state()
    page.passed.append(f"data:{page.content()}")


def heading(page):
    return page.inner_text("h1")


def test_a_session_is_scored_with_the_keyboard_through_a_kill_without_learning_who_plays(program, page, tmp_path):
    first = program()
    page.goto(first.url)
    assert heading(page) == "Run A Set the scene"
    assert "cover the sponge with the towel" in page.inner_text("main") and "sponge left" in page.inner_text("main")
    assert page.evaluate("document.querySelector('.position img').naturalWidth") == 60
    press(page, "s")
    assert heading(page) == "Run A How far did it come?"
    assert page.inner_text("#robot") == "The robot’s program has not asked for this run yet."
    told = first.robot.next()
    page.wait_for_selector("#robot:has-text('has taken')")
    first.robot.finished(told["run"])
    page.wait_for_selector("#robot:has-text('has finished')")
    # Every button can be reached and read without a mouse; digits in a note are no scores.
    assert page.get_by_role("button", name="0.66 covers a part").get_attribute("aria-keyshortcuts") == "2"
    page.get_by_label("Note (optional)").fill("twice")
    page.keyboard.press("1")
    assert page.input_value("#note") == "twice1"
    page.get_by_role("button", name="0.66 covers a part").focus()
    press(page, "Enter")
    assert heading(page) == "Run B Set the scene" and "0.66, covers a part (“twice1”)" in page.inner_text("footer")
    press(page, "s")
    press(page, "0")
    press(page, "u")
    assert heading(page) == "Run B How far did it come?"
    press(page, "3")
    press(page, "s")
    press(page, "p")
    assert heading(page) == "Paused" and first.robot.next() == {"status": "wait", "reason": "paused"}
    first.kill()

    second = program()
    assert "2 of 6 runs are scored" in second.told
    assert second.robot._token == first.robot._token
    page.goto(second.url)
    assert heading(page) == "Paused" and page.get_attribute("progress", "value") == "2"
    press(page, "p")
    assert heading(page) == "Run C How far did it come?"
    press(page, "r")
    assert "begun 1 time before" in page.inner_text("main")
    for key in ("1", "0", "2"):
        press(page, "s")
        press(page, key)
    # Another window is behind: it is told, and nothing is scored twice.
    press(page, "s")
    other = page.context.new_page()
    other.goto(second.url)
    other.get_by_label("Note").fill("keeps this page as it is")
    press(page, "3")
    other.get_by_role("button", name="0 nothing of these").click()
    assert "This was about run 002C, but all runs are scored" in other.inner_text("[role=alert]")
    other.close()
    assert heading(page) == "All 6 runs are scored"
    # Up to here neither a page, nor a request, nor an answer, nor the terminal has named a policy.
    assert len(page.passed) > 60 and any("sponge right" in text for text in page.passed)
    assert all(text.split()[0].startswith(("http://127.0.0.1", "{", "data:")) for text in page.passed)
    for secret in SECRETS:
        assert not any(secret in text for text in [*page.passed, first.told, second.told])
    assert not (tmp_path / "out" / "report.json").exists()

    page.get_by_role("button", name="End the session").click()
    page.get_by_role("link", name="Read the report").click()
    page.wait_for_selector("text=In pairs, on the same initial positions")
    assert "secret-alpha against secret-beta" in page.inner_text("body")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["credit"] for row in report["rows"]] == [0.66, 1, 0.33, 0, 0.66, 1]
    assert report["rows"][0]["note"] == "twice1"
    assert (report["scores_taken_back"], report["runs_repeated"]) == (1, {"001C": 1})
    # While the program was dead the page asked in vain.
    assert [text for text in page.complaints if "ERR_CONNECTION_REFUSED" not in text] == []


def test_killed_between_and_within_writes_no_score_is_lost(program, tmp_path):
    """Without a browser: whatever was answered is there afterwards."""
    credits = (0.33, 0, 1)
    for number, credit in enumerate(credits):
        one = program()
        assert f"{number} of 6 runs are scored" in one.told
        with (tmp_path / "out" / "events.jsonl").open("rb") as file:
            assert file.read().count(b'"score"') == 2 * number
        _post(one, "start")
        _post(one, "score", score=credit)
        one.kill()
        with (tmp_path / "out" / "events.jsonl").open("ab") as file:
            file.write(b'{"event": "undo", "run"')
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_bytes().splitlines()[:-1]]
    assert [event["score"] for event in events if event["event"] == "score"] == list(credits)


def _post(program, action, **form):
    """What the page's buttons send, from a page that was read just now."""
    import urllib.parse
    import urllib.request

    text = urllib.request.urlopen(program.url, timeout=10).read().decode()
    token, run = (re.search(rf'name="{name}" value="([^"]+)"', text)[1] for name in ("token", "run"))
    body = urllib.parse.urlencode({"token": token, "run": run, **form}).encode()
    with urllib.request.urlopen(f"{program.url}{action}", body, timeout=10) as answer:
        assert answer.status == 200
