"""The page in a real browser, on an engine without a model, and what its notice says."""

import base64
import re
import shutil

import pytest
from playwright import sync_api

from emollama_jax.serve import page
from emollama_jax.serve.limits import Limits
from tests.helpers.fake_engine import CLASSES, FakeEngine, serving, settings
from tests.serve.test_endpoint import picture_uri

sync_api.expect.set_options(timeout=60_000)  # a slow machine is no defect
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PICTURE = base64.b64decode(picture_uri((700, 420)).split(",")[1])
EXAMPLES = tuple(page.Example(name, PICTURE) for name in CLASSES)


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(pace=0.002)


@pytest.fixture(scope="module")
def url(engine):
    how = settings(examples=EXAMPLES, trained_on=("ferplus", "actionfaces/clips"), measured=True)
    with serving(engine, how) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium or Chrome on this machine")
    with sync_api.sync_playwright() as playwright:
        # Tests may run as root in a container, where Chromium's sandbox does not start.
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def tab(request, browser, url):
    """The page at two widths; anything that it complains of, or asks of another host, fails."""
    context = browser.new_context(viewport={"width": request.param, "height": 844})
    context.set_default_timeout(60_000)
    tab = context.new_page()
    complaints, asked = [], []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    # Refused requests are told on the console too; what counts there is the page's own policy.
    tab.on(
        "console",
        lambda told: complaints.append(told.text) if "Security Policy" in told.text else None,
    )
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.goto(url)
    sync_api.expect(tab.locator(".thumb")).to_have_count(len(CLASSES))
    yield tab
    wide = tab.evaluate("() => document.documentElement.scrollWidth")
    assert wide <= request.param, "the page scrolls sideways"
    assert complaints == []
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    context.close()


def drop(tab, data, name, mime):
    """Drops a file onto the page."""
    text = base64.b64encode(data).decode()
    files = tab.evaluate_handle(
        """([text, name, type]) => {
            const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
            const moved = new DataTransfer();
            moved.items.add(new File([bytes], name, { type }));
            return moved;
        }""",
        [text, name, mime],
    )
    tab.dispatch_event("body", "drop", {"dataTransfer": files})


def answers(tab):
    """What stands in the conversation."""
    return tab.locator(".said").all_text_contents()


def test_drop_choose_a_face_ask_twice(tab, engine):
    expect = sync_api.expect
    drop(tab, PICTURE, "us.png", "image/png")
    expect(tab.locator("#found")).to_have_text("2 faces found. Click one to ask about it.")
    expect(tab.locator("#bar-list li")).to_have_count(len(CLASSES))
    expect(tab.locator("#bar-list li").first).to_contain_text("happiness")
    expect(tab.locator("#bar-list li .value").first).to_have_text("56 %")
    expect(tab.locator("#status")).to_contain_text("Likeliest word: happiness, 56 %")

    # The second face's box, from pixels of the picture to those of the canvas.
    area = tab.locator("#canvas").bounding_box()
    spot = {"x": 60 * area["width"] / 700, "y": 20 * area["height"] / 420}
    tab.locator("#canvas").click(position=spot)
    expect(tab.get_by_role("radio", name="Face 2 of 2")).to_be_checked()

    tab.get_by_role("textbox", name="Question").fill("Who is this?")
    tab.keyboard.press("Enter")
    expect(tab.locator(".said.it").first).to_have_text("Who is this?")
    assert engine.questions[-1].face == 1
    tab.get_by_role("textbox", name="Question").fill("Are you sure?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.locator(".said.it")).to_have_count(2)
    expect(tab.locator("#status")).to_have_text("Answer: Are you sure? ")
    assert len(engine.questions[-1].earlier) == 1
    assert answers(tab) == ["Who is this?", "Who is this? ", "Are you sure?", "Are you sure? "]

    tab.get_by_role("button", name="Another picture").click()
    expect(tab.locator("#drop")).to_be_visible()
    assert answers(tab) == []


def test_with_the_keyboard_alone(tab):
    expect = sync_api.expect
    tab.get_by_role("button", name="Drawn face: happiness").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("radio", name="Face 1 of 2")).to_be_checked()
    expect(tab.get_by_role("textbox", name="Question")).to_be_focused()
    tab.get_by_role("radio", name="Face 1 of 2").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_role("radio", name="Face 2 of 2")).to_be_checked()
    tab.get_by_role("button", name="Describe the face").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator(".said.it")).to_have_text(
        "Describe the face in the image and name the emotion."
    )


def test_an_answer_can_be_stopped_and_faults_are_told(tab, engine, monkeypatch):
    monkeypatch.setattr(engine, "pace", 0.05)
    expect = sync_api.expect
    tab.locator(".thumb").first.click()
    expect(tab.locator("#found")).to_contain_text("faces found")
    freed = engine.freed
    box = tab.get_by_role("textbox", name="Question")
    box.fill("word " * 390)
    tab.keyboard.press("Enter")
    expect(tab.locator(".said.it")).to_contain_text("word word")
    tab.get_by_role("button", name="Stop").click()
    expect(tab.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    box.fill("say this, then break")
    tab.keyboard.press("Enter")
    expect(tab.locator(".said.bad")).to_contain_text("the server failed")
    expect(tab.locator(".said.it").last).to_contain_text("say this")
    assert engine.freed >= freed + 1
    drop(tab, b"nonsense", "x.png", "image/png")
    expect(tab.get_by_role("alert")).to_contain_text("not a picture")


def test_dark_mode_and_a_key(browser):
    with serving(FakeEngine(), settings(key="s3cret", examples=EXAMPLES)) as (url, _):
        context = browser.new_context(color_scheme="dark")
        tab = context.new_page()
        tab.goto(url)
        colour = "() => getComputedStyle(document.body).backgroundColor"
        assert tab.evaluate(colour) == "rgb(14, 18, 24)"
        tab.locator(".thumb").first.click()
        tab.get_by_label("API key").fill("s3cret")
        tab.get_by_role("button", name="Use it").click()
        sync_api.expect(tab.locator("#found")).to_contain_text("faces found")
        context.close()


def test_the_notice_tells_what_was_measured(root):
    results = (root / "docs" / "results.md").read_text()
    shares = [round(100 * float(x)) for x in re.findall(r"\b0\.\d{2,3}\b", results)]
    told = " ".join((page.KNOWN_FIRST, *page.KNOWN))
    for number in re.findall(r"(\d+)(?: of 100)?[;)]|\bin (\d+) of 100", told):
        assert int("".join(number)) in shares, number
    assert "3,573 test pictures" in told and "3,573" in results
    about = page.About("x", CLASSES, (), ("ferplus", "raf_db", "own/mine"), Limits(), False)
    text = page.load(about).about.decode()
    assert "FERPlus (28,558" in text and "RAF-DB" in text and "“own”" in text
    assert page.KNOWN_FIRST not in text
    notice = page.FILE.read_text()
    for words in (
        "Article&nbsp;5(1)(f)",
        "Article&nbsp;50(3)",
        "in education",
        "medical or safety",
    ):
        assert words in notice
