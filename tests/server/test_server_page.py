"""The page at ``/rag`` in a real headless Chromium, against the real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
DRIVER = shutil.which("chromedriver") or ""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not CHROMIUM or not DRIVER,
        reason="no chromium with chromedriver on this machine (Debian: chromium, chromium-driver)",
    ),
]

WAIT_S = 240


class Page:
    """The page as a person uses it."""

    def __init__(self, driver: Any, server: Any) -> None:
        self.driver = driver
        self.server = server

    def open(self, *, width: int = 1280, dark: bool = False) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = "dark" if dark else "light"
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        self.driver.get(f"{self.server.url}/rag")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def until(self, condition: Any, what: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_S).until(lambda _: condition(), what)

    def give_key(self, tenant: str = "operator") -> None:
        """Type the key into the settings; leaving the field sends it."""
        # The server's first refusal opens the settings; a click before that would close them.
        self.until(
            lambda: "API key" in self.find("#health").text, "the page does not ask for a key"
        )
        if not self.find("#settings").get_attribute("open"):
            self.find("#settings summary").click()
        box = self.find("#key")
        box.clear()
        box.send_keys(self.server.keys[tenant] + "\t")
        # One tenant of this server has an index that is hurt on purpose; the operator sees it, other tenants do not.
        state = "degraded" if tenant == "operator" else "ok"
        self.until(
            lambda: self.find("#health").get_attribute("data-state") == state,
            f"health is not {state}",
        )

    def ask(self, question: str) -> None:
        """Type a question and press Enter."""
        box = self.find("#question")
        box.clear()
        box.send_keys(question + "\n")
        self.until(
            lambda: self.find("#strip-card").is_displayed() or self.find("#problem").is_displayed(),
            "no answer",
        )

    def faults(self) -> list[str]:
        """What the browser complained about, content-security policy included."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and " 401 " not in entry["message"]
        ]

    def overflow(self) -> int:
        """Pixels that stick out sideways."""
        script = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
        return int(self.driver.execute_script(script))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield running
    running.quit()


@pytest.fixture
def page(driver: Any, rag_server: Any) -> Page:
    driver.get_log("browser")  # what it complained about in another test
    return Page(driver, rag_server)


def test_ask_read_the_sources_and_see_every_token(page: Page) -> None:
    page.open()
    page.give_key()
    assert "fusion on" in page.find("#health").text
    page.ask("What does the with statement do?")
    assert not page.find("#problem").is_displayed(), page.find("#problem").text
    sources = page.all("#sources button")
    assert [source.text.split()[0] for source in sources] == ["1", "2", "3", "4"]
    # A source opens its chunk, by keyboard alone, and Escape closes it.
    page.driver.execute_script("arguments[0].focus()", sources[1])
    page.driver.switch_to.active_element.send_keys("\n")
    assert page.find("#chunk").is_displayed()
    assert page.find("#chunk-title").text.startswith("2. ")
    assert len(page.find("#chunk-text").text) > 40
    page.driver.switch_to.active_element.send_keys("\ue00c")
    assert not page.find("#chunk").is_displayed()
    # The strip: a row a part, with as many tokens as the prompt has.
    rows = [row.text for row in page.all("#strip .part")]
    assert rows == ["System", "Chunk 1", "Chunk 2", "Chunk 3", "Chunk 4", "Question"]
    told = [row.get_attribute("aria-label") for row in page.all("#strip canvas")]
    tokens = sum(int(text.split(", ")[1].split()[0]) for text in told)
    numbers = dict(
        zip(
            [item.text for item in page.all("#numbers dt")],
            [item.text for item in page.all("#numbers dd")],
            strict=True,
        )
    )
    assert tokens == int(numbers["Prompt tokens"])
    assert numbers["Time to first token"].endswith(" s")
    assert numbers["Computed of the prompt"].endswith(" %")
    painted = page.driver.execute_script(
        "const c = document.querySelectorAll('#strip canvas')[1];"
        "return c.getContext('2d').getImageData(1, 1, 1, 1).data[3]"
    )
    assert painted == 255
    assert page.faults() == []


def test_a_link_behind_a_sentence_opens_its_chunk(page: Page) -> None:
    """A random model's answers share no words with the chunks, so the page's own function is called."""
    page.open()
    marks = page.driver.execute_async_script(
        "const done = arguments[0];"
        "import('./rag/ask.js').then((page) => {"
        "  page.showMarks('Zażółć 🦊 done. More.', [{start: 0, end: 14, number: 2}],"
        "    [{number: 2, title: 'fox', path: null, score: 1, tokens: [0, 9], text: 'the fox'}]);"
        "  done(document.getElementById('answer').textContent);"
        "});"
    )
    assert marks == "Zażółć 🦊 done.2 More."
    page.driver.execute_script("document.getElementById('answer-card').hidden = false")
    page.find("#answer .mark").click()
    assert page.find("#chunk-text").text == "the fox"


def test_upload_with_progress_and_delete(page: Page, tmp_path: Path) -> None:
    page.open()
    page.give_key("globex")
    page.driver.execute_script(
        "const s = document.getElementById('index'); s.value = 'fresh';"
        "s.dispatchEvent(new Event('change'))"
    )
    good = tmp_path / "Otters.md"
    good.write_text("# Otters\n\nThe otter of Lake Umbra collects blue pebbles.")
    bad = tmp_path / "broken.pdf"
    bad.write_bytes(b"%PDF-1.4 nothing")
    page.find("#files").send_keys(f"{good}\n{bad}")
    page.until(lambda: "Otters.md" in page.find("#docs").text, "the document does not appear")
    page.until(
        lambda: any("1 documents" in job.text for job in page.all("#jobs li")),
        "the job is not done",
    )
    assert "broken.pdf" in page.find("#jobs").text
    page.ask("What does the otter collect?")
    assert "Otters" in page.find("#sources").text
    entry = next(item for item in page.all("#docs li") if "Otters" in item.text)
    button = entry.find_element("css selector", "button")
    button.click()
    assert button.text == "Sure?"
    button.click()
    page.until(lambda: "Otters" not in page.find("#docs").text, "the document does not go")
    page.ask("What does the otter collect?")
    page.until(lambda: page.find("#problem").is_displayed(), "no word about the empty index")
    assert "is empty" in page.find("#problem").text


def test_the_chunk_cache_by_tier(page: Page) -> None:
    page.open()
    page.give_key()
    page.find("#cache summary").click()
    page.until(lambda: page.all("#cache-rows tr"), "no tiers")
    names = [cell.text for cell in page.all("#cache-names th")]
    assert names == ["Tier", "memory", "disk"]
    rows = [row.text.split() for row in page.all("#cache-rows tr")]
    figures = ["Chunks", "Size", "Hits", "Misses", "Dropped", "Failed"]
    assert [row[0] for row in rows] == figures
    # All of it is in sight: nobody looks for what stands behind an edge.
    assert page.driver.execute_script(
        "const e = document.querySelector('.wide-table'); return e.scrollWidth <= e.clientWidth"
    )
    with page.server.client("operator") as client:
        told = client.get("/v1/rag/cache").json()["tiers"]
    assert rows[0][2] == f"{told[1]['chunks']:,}"
    assert {cell.get_attribute("scope") for cell in page.all("#cache th")} == {"col", "row"}
    assert page.overflow() == 0
    assert page.faults() == []
    # A tenant sees its own chunks, and no column that is everybody's.
    page.open()
    page.give_key("acme")
    page.find("#cache summary").click()
    page.until(lambda: page.all("#cache-rows tr"), "no tiers")
    rows = [row.text.split()[0] for row in page.all("#cache-rows tr")]
    assert rows == ["Chunks", "Size", "Hits"]


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page, dark: bool) -> None:
    page.open(width=340, dark=dark)
    page.give_key()
    page.ask("How are lambda expressions written?")
    assert page.overflow() == 0
    back, ink = page.driver.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )

    def brightness(colour: str) -> float:
        parts = colour[colour.index("(") + 1 : -1].split(",")[:3]
        return sum(float(part) for part in parts) / 3

    assert (brightness(back) < brightness(ink)) == dark
    assert abs(brightness(back) - brightness(ink)) > 120
    page.find("#theme").click()
    turned = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (brightness(turned) > 128) == dark
