"""The page in a real browser: most of it on made-up numbers, then on an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.browser import Browser, browsing, needs_browser
from support.status_page import NASTY, MadeUpServer, serving_made_up

pytestmark = [
    pytest.mark.engine,
    needs_browser,
    # SGLang's answers to who has no key.
    pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated"),
]

AA = 4.5
"""The least contrast of text by WCAG 2, level AA."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def made_up(browser) -> Iterator[MadeUpServer]:
    """A server without a key, its page open."""
    with serving_made_up() as (server, url):
        browser.looks()
        browser.open(f"{url}/conserve")
        browser.shows("#sentence", "12 online rows")
        yield server


# ------------------------------------------------------------------------------ what it shows


def test_it_is_there_within_a_second_and_asks_no_other_host(browser):
    with serving_made_up() as (_, url):
        times_ms = []
        for _ in range(3):  # the machine may be at something else; a slow page is slow each time
            browser.open(f"{url}/conserve")
            browser.shows("#sentence", "12 online rows")
            times_ms.append(browser.shown_ms())
        assert min(times_ms) < 1000
        browser.wait(lambda: sum("status?since=" in one for one in browser.asked) > 1)
        assert browser.hosts() == {url.removeprefix("http://")}
    assert browser.faults == []


@pytest.mark.usefixtures("made_up")
def test_what_the_server_says_can_be_read(browser):
    assert "slo.tpot 76 %, online prompts 18 %" in browser.text("#bounds")
    ttft, tpot, itl = (browser.text(f"#latencies tbody tr:nth-child({n})") for n in (1, 2, 3))
    assert ttft.startswith("TTFT 54.2 ms 158 ms 500 ms 100 %")
    assert tpot.startswith("TPOT 21.3 ms 23.0 ms 25.0 ms 100 %")
    assert itl.startswith("ITL 20.9 ms 52.6 ms 50.0 ms 98.7 %")
    late = browser.run("[...document.querySelectorAll('#latencies .bad')].map(e => e.innerText)")
    assert late == ["52.6 ms"]
    assert browser.text("#rate") == "14,366"
    assert browser.text("#alone") == "20,512"
    assert browser.text("#share") == "70 %"
    assert "checkpointed 120,000" in browser.text("#kv")
    assert "On the host: 1,000,000 tokens" in browser.text("#kv")
    assert "mmlu-nightly" in browser.text("#jobs")
    assert "in 21 min: late" in browser.text("#jobs")
    assert "without a name" not in browser.text("#jobs")
    assert "batch_0a1b2c in_progress" in browser.text("#batches")
    assert "9,100" in browser.text("#events")
    assert browser.run("document.querySelectorAll('#rate-chart canvas').length") == 1


@pytest.mark.usefixtures("made_up")
def test_the_strip_has_each_kind_of_step_with_its_share_of_time(browser):
    def shares() -> dict[str, int]:
        names = ("online-prompts", "online", "offline", "offline-prompts", "slices", "idle")
        return {name: int(browser.text(f"#share-{name}").removesuffix(" %")) for name in names}

    # Of ten seconds one is slices, and half a one is idle, as are 5 % between its steps.
    browser.wait(lambda: shares()["slices"] in (9, 10))
    assert shares()["online-prompts"] in (4, 5, 6)
    assert 70 <= shares()["online"] == shares()["offline"] <= 80
    assert 8 <= shares()["idle"] <= 11
    # Drawn, too: every lane has its own colour somewhere.
    drawn = browser.run(
        "() => { const c = document.getElementById('strip'), p = c.getContext('2d');"
        "return [0, 1, 2, 3, 4, 5].map((lane) => p.getImageData(0, lane * 26 + 13, c.width, 1)"
        ".data.some((v, i) => i % 4 === 3 && v > 0)); }"
    )
    assert drawn == [True] * 6


@pytest.mark.usefixtures("made_up")
def test_what_a_client_calls_its_job_is_text(browser):
    assert NASTY in browser.text("#jobs")
    assert browser.run("document.querySelectorAll('#jobs img').length") == 0


def test_it_says_when_the_server_no_longer_answers_and_comes_back_after_a_restart(browser, made_up):
    made_up.answers = False
    browser.shows("#freshness", "No answer for")
    made_up.answers, made_up.pid = True, 1
    made_up.started_s += 86_000  # counts its steps from 0 again
    browser.shows("#freshness", "Live")
    browser.shows("#server", "up 6 min")
    browser.wait(lambda: browser.text("#share-slices") in ("9 %", "10 %"))
    assert [fault for fault in browser.faults if "500" not in fault] == []


# --------------------------------------------------------------------------------- changing it


def test_pause_asks_first_and_then_pauses(browser, made_up):
    browser.click("#offline-switch")
    assert browser.is_asking()
    assert "Nothing is lost" in browser.text("#ask-text")
    browser.click("#ask-no")
    assert not browser.is_asking()
    assert made_up.changes == []

    browser.click("#offline-switch")
    browser.confirm()
    assert made_up.changes == [{"conserve_offline": 0}]
    browser.shows("#sentence", "paused")
    browser.shows("#offline-switch", "Resume offline work")
    browser.click("#offline-switch")
    browser.confirm()
    assert made_up.changes[1:] == [{"conserve_offline": 1}]
    browser.shows("#offline-switch", "Pause offline work")


def test_batches_are_held_sent_and_cancelled(browser, made_up):
    browser.click("#batches-switch")
    browser.confirm()
    browser.shows("#batches-switch", "Send batches")
    browser.click("#batches-switch")
    browser.confirm()
    assert made_up.changes == [{"conserve_batches": 0}, {"conserve_batches": 1}]
    browser.click("#batches button")
    assert "batch_0a1b2c" in browser.text("#ask-text")
    assert made_up.batches == {"batch_0a1b2c": "in_progress"}
    browser.confirm()
    assert made_up.batches == {"batch_0a1b2c": "cancelling"}
    browser.wait(lambda: not browser.page.is_enabled("#batches button"))


def write(browser: Browser, **settings: str) -> None:
    for name, text in settings.items():
        browser.write(f"#{name}", text)


def test_the_dial_changes_what_was_changed_and_nothing_else(browser, made_up):
    write(browser, tpot="1.25x", yield_ms="2.5")
    browser.click("#dial button")
    assert "tpot from 25ms to 1.25x, yield_ms from 5 to 2.5" in browser.text("#ask-text")
    browser.confirm()
    assert made_up.changes == [{"conserve_tpot_x": 1.25, "conserve_yield_ms": 2.5}]
    browser.wait(lambda: browser.page.input_value("#tpot") == "1.25x")
    assert browser.page.input_value("#ttft") == "500ms"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tpot": "fast"}, "tpot: fast is not an objective"),
        ({"ttft": "200"}, "ttft: 200 is not an objective"),
        ({"ttft": ""}, "ttft: nothing is not an objective"),
        ({"yield_ms": "5ms"}, "yield_ms: 5ms is not a number"),
        ({}, "nothing is different"),
    ],
)
def test_what_the_dial_does_not_take_is_said_and_not_sent(browser, made_up, settings, said):
    write(browser, **settings)
    browser.click("#dial button")
    assert said in browser.text("#dial-fault")
    assert not browser.is_asking()
    assert made_up.changes == []


def test_a_change_that_the_server_does_not_take_is_told(browser, made_up):
    made_up.takes = False
    browser.click("#offline-switch")
    browser.click("#ask-yes")
    browser.shows("#ask-fault", "the server did not take it")
    assert browser.is_asking()


# ---------------------------------------------------------------------------------------- keys


def test_a_server_with_a_key_shows_nothing_without_it_and_refuses_a_wrong_one(browser):
    with serving_made_up(api_key="right") as (made_up, url):
        browser.looks()
        browser.open(f"{url}/conserve")
        browser.wait(lambda: browser.page.is_visible("#key"))
        assert not browser.page.is_visible("#content")
        assert "gpu-7" not in browser.text("body")
        browser.write("#key", "wrong")
        browser.press("Enter")
        browser.shows("#key-refused", "does not take this key")
        assert browser.run("sessionStorage.length") == 0
        browser.write("#key", "schlüssel")
        browser.press("Enter")
        browser.shows("#key-refused", "No key has such characters")
        browser.write("#key", "right")
        browser.press("Enter")
        browser.shows("#sentence", "12 online rows")
        browser.click("#offline-switch")
        browser.confirm()
        assert made_up.changes == [{"conserve_offline": 0}]
        # In this tab alone, and in no address.
        assert browser.run("localStorage.length") == 0
        assert browser.run("document.cookie") == ""
        assert not [one for one in browser.asked if "right" in one]


def test_a_server_with_two_keys_asks_for_the_second_when_something_is_to_change(browser):
    with serving_made_up(api_key="see", admin_api_key="change") as (made_up, url):
        browser.looks()
        browser.open(f"{url}/offline/conserve")
        browser.wait(lambda: browser.page.is_visible("#key"))
        browser.write("#key", "see")
        browser.press("Enter")
        browser.shows("#sentence", "12 online rows")
        browser.click("#offline-switch")
        browser.click("#ask-yes")
        browser.shows("#ask-fault", "its key for changes")
        assert made_up.changes == []
        browser.write("#admin-key", "change")
        browser.confirm()
        assert made_up.changes == [{"conserve_offline": 0}]


# ----------------------------------------------------------------------------------- for everyone


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.usefixtures("made_up")
def test_it_fits_and_can_be_read(browser, width, dark):
    browser.looks(width=width, dark=dark)
    browser.wait(lambda: browser.run("document.documentElement.clientWidth") == width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 22, 26)") is dark
    browser.click("#offline-switch")  # what asks is read, too
    read = browser.contrasts()
    assert len(read) > 60
    assert {text for text, ratio in read if ratio < AA} == set()


CONTROLS = "a[href], button, input, [tabindex='0']"


@pytest.mark.usefixtures("made_up")
def test_everything_is_reached_by_the_keyboard_and_seen_where_it_is(browser):
    there = browser.run(
        f'[...document.querySelectorAll("{CONTROLS}")]'
        ".filter((e) => e.checkVisibility() && !e.disabled && !e.closest('dialog'))"
        ".map((e) => e.outerHTML)"
    )
    browser.run("document.activeElement.blur()")
    reached = []
    for _ in there:
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.outerHTML"))
        outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
    assert reached == there


def test_a_change_by_the_keyboard_alone(browser, made_up):
    def focused() -> str:
        return browser.run("document.activeElement.id")

    browser.run("document.getElementById('offline-switch').focus()")
    browser.press("Enter")
    assert browser.is_asking()
    assert focused() == "ask-no"  # a hasty Enter changes nothing
    browser.press("Escape")
    browser.wait(lambda: not browser.is_asking())
    assert focused() == "offline-switch"
    browser.press("Enter")
    browser.press("Tab")
    assert focused() == "ask-yes"
    browser.press("Enter")
    browser.wait(lambda: not browser.is_asking())
    assert made_up.changes == [{"conserve_offline": 0}]


def test_the_focus_stays_on_a_batch_while_its_numbers_change(browser, made_up):
    browser.run("document.querySelector('#batches button').focus()")
    made_up.batches["batch_new"] = "validating"
    browser.shows("#batches", "batch_new")
    assert browser.run("document.activeElement.ariaLabel") == "Cancel batch_0a1b2c"
