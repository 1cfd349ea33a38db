"""The page in headless Chromium, against the shipped model and against a script that says what it is told."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glm52.engine import AsyncEngine
from glm52.hub import NANO
from glm52.server.limits import Keys
from glm52.server.service import Service
from glm52.session import Session
from tests.serving import Script, running, scripted_service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no browser: install playwright (pip) and chromium (the system's package)",
)
Open = Callable[..., Any]
HOSTILE = (
    "<img src=x onerror=document.title='bad'><script>document.title='bad'</script> [x](javascript:alert(1)) **bold**"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a page; what it complains of fails the test."""
    contexts, complaints = [], []

    def opened(url: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 900, "height": 700}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security" in m.text else None)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def scripted() -> Iterator[tuple[Script, str]]:
    script = Script()
    with running(scripted_service(script)) as url:
        yield script, url


def send(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    page.locator("#log[aria-busy=false] .turn:last-child .facts").wait_for()


def test_the_page_is_served_with_a_strict_policy(scripted: tuple[Script, str]) -> None:
    _, url = scripted
    for path in ("/", "/page/chat.js", "/page/style.css"):
        reply = httpx.get(url + path)
        policy = reply.headers["content-security-policy"]
        assert reply.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert httpx.get(f"{url}/page/__init__.py").status_code == 404
    assert httpx.get(f"{url}/page/../app.py").status_code == 404
    folder = Path(__file__).parents[2] / "src" / "glm52" / "server" / "page"
    sources = {f.name: f.read_text() for f in folder.iterdir() if f.suffix in (".js", ".html", ".css")}
    assert all(httpx.get(f"{url}/page/{name}").status_code == 200 for name in sources if name != "index.html")
    assert not any(word in text for text in sources.values() for word in ("innerHTML", "eval(", "//cdn", 'style="'))


@needs_browser
def test_a_conversation_with_the_shipped_model(open_page: Open) -> None:
    """Send, stream, reasoning that folds, figures, thinking off, a second turn from the cache."""
    session = Session.open(NANO, context=2048)
    backend = AsyncEngine(session.engine)
    service = Service(backend, session.tokenizer, session.template, name="nano", defaults={},
                      context_length=session.engine.context_length)  # fmt: skip
    with running(service) as url:
        page = open_page(url)
        send(page, "What is 3+4?")
        finished(page)
        thought, answer = page.locator(".thought"), page.locator(".answer")
        assert "7" in answer.inner_text() and "Thought for" in thought.inner_text()
        assert not thought.locator("p").is_visible()
        thought.locator("summary").click()
        assert thought.locator("p").is_visible() and thought.locator("p").inner_text()
        assert "tokens/s" in page.locator(".facts").inner_text()
        page.get_by_label("Thinking", exact=True).uncheck()
        assert page.get_by_label("Effort").is_disabled()
        send(page, "And 5+4?")
        finished(page)
        assert page.locator(".turn").count() == 4 and page.locator(".thought:not([hidden])").count() == 1
    backend.close()


@needs_browser
def test_reasoning_is_live_and_a_reply_can_be_stopped_and_retried(
    open_page: Open, scripted: tuple[Script, str]
) -> None:
    script, url = scripted
    script.text, script.delay_s = "Let me see. " * 20 + "</think>" + "word " * 300, 0.02
    page = open_page(url)
    send(page, "Hi")
    page.locator(".thought[data-live] summary", has_text="words").wait_for()
    page.locator(".thought summary").click()
    assert "Let me see." in page.locator(".thought p").inner_text(), "it is read while it grows"
    page.locator(".answer", has_text="word").wait_for()
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.locator(".facts").inner_text() and script.ended == 1
    script.text, script.delay_s = "</think>A better one.", 0.0
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("A better one.").wait_for()
    finished(page)
    assert page.locator(".turn").count() == 2 and page.get_by_text("word word").count() == 0


@needs_browser
def test_what_the_model_says_stays_text(open_page: Open, scripted: tuple[Script, str]) -> None:
    script, url = scripted
    script.text = f"{HOSTILE}</think>{HOSTILE}\n\n```html\n{HOSTILE}\n```\n\n- one\n- two `{HOSTILE}`\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    page = open_page(url)
    send(page, HOSTILE)
    finished(page)
    assert "<img src=x" in page.locator(".answer > p").first.inner_text() and page.title() == "nano"
    assert page.locator("main :is(img, script, [onerror])").count() == page.locator("main a").count() == 0
    assert page.locator(".answer strong").count() == 1 and page.locator(".answer pre code").inner_text() == HOSTILE
    assert page.locator(".answer li").count() == 2 and page.locator(".answer td").count() == 2


@needs_browser
def test_tool_calls_are_cards(open_page: Open, scripted: tuple[Script, str]) -> None:
    """One the page answers by itself, and one that the user answers."""
    script, url = scripted
    page = open_page(url)
    page.get_by_text("Tools and key").click()
    page.get_by_label("Demo tools").check()
    page.get_by_label("More tools").fill('[{"type": "function", "function": {"name": "look"}}]')
    script.text = ("</think>I ask.<tool_call>calculate<arg_key>expression</arg_key><arg_value>2*(3+4)</arg_value></tool_call>"
                   "<tool_call>look</tool_call>")  # fmt: skip
    send(page, "Hi")
    card = page.locator(".call", has_text="calculate")
    card.get_by_text("14", exact=True).wait_for()
    script.text = "</think>It is done."
    page.get_by_label("Result of look").fill("a cat")
    page.keyboard.press("Enter")
    page.get_by_text("It is done.").wait_for()
    assert "14" in script.prompts[-1] and "a cat" in script.prompts[-1]


@needs_browser
def test_errors_are_said_in_words(open_page: Open) -> None:
    script = Script("</think>half an answer")
    with running(scripted_service(script, keys=Keys(["secret"]))) as url:
        page = open_page(url)
        send(page, "Hi")
        page.locator(".error", has_text="Tools and key").wait_for()
        page.get_by_text("Tools and key", exact=True).click()
        page.get_by_label("API key").fill("secret")
        script.error = "the model is ill"
        page.get_by_role("button", name="Retry").click()
        page.locator(".error", has_text="the model is ill").wait_for()
        assert "half an answer" in page.locator(".answer").inner_text()
    page.get_by_role("button", name="Retry").click()
    page.locator(".error", has_text="cannot be reached").wait_for()


@needs_browser
def test_dark_and_narrow(open_page: Open, scripted: tuple[Script, str]) -> None:
    script, url = scripted
    script.text = "</think>" + "a" * 300 + "\n\n```\n" + "x" * 300 + "\n```"
    back = {}
    for scheme in ("light", "dark"):
        page = open_page(url, color_scheme=scheme, viewport={"width": 360, "height": 640})
        back[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_label("Message").press("Shift+Enter")
        send(page, "one\ntwo")
        finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.get_by_role("button", name="Send").bounding_box()["x"] < 330
    assert back["light"] != back["dark"]
