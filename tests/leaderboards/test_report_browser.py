"""The report in headless Chromium, as a reviewer uses it; skipped where there is no Chromium."""

import os
import re
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from cwdpo_bench.evaluate.results import TaskResult, signature_of, write_run
from cwdpo_bench.leaderboards import build_report

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

WORDS = tuple(f"word{n}" for n in range(17))
HOSTILE = (
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "\"quotes\" and 'others' & <b>bold</b>",
    "left \u202ethgir\u202c left",
    "مرحبا بالعالم",
)


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(chromium, path, **settings):
    """A page on the report; the console and the network must have stayed quiet."""
    heard, asked = [], []
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, **settings)
    context.set_default_timeout(5000)
    page = context.new_page()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert heard == []
    outside = [url for url in asked if url != path.as_uri() and not url.startswith("data:")]
    assert outside == []


@pytest.fixture(scope="module")
def report(make, tmp_path_factory):
    """Two systems on captions and choices, with failures, over-confidence and hostile texts."""
    root = tmp_path_factory.mktemp("report")
    for name, skill in (("base", 0.4), ("ours", 0.7)):
        captions, choices = make.captions(skill), make.choices(skill)
        captions.loc[: len(HOSTILE) - 1, "prediction"] = list(HOSTILE)
        choices.loc[:2, "parsed"] = None
        choices.loc[:2, "correct"] = False
        if name == "ours":
            for place in range(5, 9):
                wrong = (ord(choices.loc[place, "gold"]) - ord("A") + 1) % 4
                odds = np.where(np.arange(4) == wrong, 0.94, 0.02)
                choices.at[place, "option_log_probabilities"] = np.log(odds)
                choices.at[place, "option_correct"] = False
        captions["hallucinated_objects"] = [["dog"] if n < skill * 10 else [] for n in range(60)]
        tasks = {"coco": make.task(captions), "mmmu": make.task(choices, "mmmu")}
        make.save(root / name, f"{name} <script>", tasks)
    path = root / "report.html"
    ids = [*captions["id"], *choices["id"]]
    path.write_text(
        build_report([root / "base", root / "ours"], pictures=make.pictures(ids), data_root=root)
    )
    return path


def count(page):
    """How many samples the list says it holds."""
    return int(page.inner_text("#count").split(" ")[0].replace(",", ""))


def wait_for_count(page, number):
    sync_api.expect(page.locator("#count")).to_have_text(re.compile(f"^{number} of"))


def choose(page, task):
    page.select_option("#task", label=task)


def test_filters_show_what_they_say(chromium, report) -> None:
    with opened(chromium, report) as page:
        choose(page, "mmmu")
        assert count(page) == 120
        page.click("[data-filter=failure]")
        assert count(page) == 3
        assert "could not be parsed" in page.inner_text("#detail")
        assert page.get_attribute("[data-filter=failure]", "aria-pressed") == "true"
        page.click("[data-filter=loss]")
        worse = count(page)
        page.click("[data-filter=win]")
        better = count(page)
        assert better > worse
        gains = page.locator("#list .gain").all_inner_texts()
        assert set(gains) == {"▲"}
        assert not page.locator("[data-filter=invented]").is_visible()
        page.click("[data-filter=confident]")
        assert count(page) == 4
        assert "94.0 %" in page.locator("#detail .answer").nth(1).inner_text()


def test_captions_that_name_what_is_not_there_are_found(chromium, report) -> None:
    with opened(chromium, report) as page:
        assert not page.locator("[data-filter=confident]").is_visible()
        page.click("[data-filter=invented]")
        assert count(page) == 7
        assert "not in the picture: dog" in page.locator("#detail .answer").nth(1).inner_text()
        # A filter that the next task has not is let go.
        choose(page, "mmmu")
        assert count(page) == 120
        assert page.get_attribute("[data-filter=all]", "aria-pressed") == "true"


def test_samples_are_sorted_by_the_difference(chromium, report) -> None:
    with opened(chromium, report) as page:

        def gains():
            return [
                float(text.replace("▲ ", "").replace("▼ ", "").replace("=", "0").replace("−", "-"))
                for text in page.locator("#list .gain").all_inner_texts()
            ]

        assert gains() == sorted(gains(), reverse=True)
        page.select_option("#order", "down")
        assert gains() == sorted(gains())


def test_the_search_finds_words_ids_and_groups(chromium, report) -> None:
    with opened(chromium, report) as page:
        page.fill("#search", "onerror")
        wait_for_count(page, 1)
        page.fill("#search", "out-domain")
        wait_for_count(page, 20)
        page.fill("#search", "nothing like this")
        wait_for_count(page, 0)
        assert "No sample" in page.inner_text("#detail")


def test_the_keyboard_reaches_every_sample(chromium, report) -> None:
    with opened(chromium, report) as page:
        first = page.inner_text("#detail h3")
        page.keyboard.press("j")
        second = page.inner_text("#detail h3")
        assert second != first
        page.keyboard.press("k")
        assert page.inner_text("#detail h3") == first
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.type("square j")
        assert page.input_value("#search") == "square j"
        wait_for_count(page, 0)
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "list"
        page.fill("#search", "")
        wait_for_count(page, 60)
        page.focus("#list")
        page.keyboard.press("End")
        assert page.get_attribute("#list", "aria-activedescendant") == "sample-59"
        page.keyboard.press("ArrowUp")
        assert page.get_attribute("#list", "aria-activedescendant") == "sample-58"
        page.keyboard.press("Home")
        assert page.get_attribute("#sample-0", "aria-selected") == "true"


def test_hostile_captions_are_text(chromium, report) -> None:
    with opened(chromium, report) as page:
        page.select_option("#order", "id")
        for place, text in enumerate(HOSTILE):
            page.click(f"#sample-{place}")
            shown = page.inner_text("#detail .answer pre >> nth=0")
            spelt = text.replace("\u202e", "\\u202e").replace("\u202c", "\\u202c")
            assert shown == spelt
        assert page.evaluate("window.ran") is None
        assert page.locator("#detail img").count() == 1
        assert page.locator("#scores th", has_text="base <script>").count() > 0


def test_pictures_are_made_when_their_sample_is_near(chromium, report) -> None:
    with opened(chromium, report) as page:
        # Two pages of 60 stand in a list of 120: pictures of the second are not there yet.
        choose(page, "mmmu")
        assert page.locator("#list img").count() == 60
        page.focus("#list")
        page.keyboard.press("End")
        assert page.locator("#list img").count() == 120
        assert (
            page.evaluate(
                "document.querySelector('#detail img').decode().then(() => "
                "document.querySelector('#detail img').naturalWidth)"
            )
            == 32
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_in_both_themes(chromium, report, scheme, tmp_path) -> None:
    with opened(chromium, report, color_scheme=scheme) as page:
        for task in ("coco", "mmmu"):
            choose(page, task)
            page.evaluate(
                "for (const node of document.querySelectorAll('details')) node.open = true"
            )
            found = axe.Axe().run(page).response["violations"]
            told = [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found]
            assert told == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shot = page.screenshot(path=tmp_path / f"{scheme}.png")
        assert len(shot) > 20_000
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_it_prints_light_with_everything_open(chromium, report) -> None:
    with opened(chromium, report, color_scheme="dark") as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.locator("details:not([open])").count() == 0
        assert not page.locator("#controls").is_visible()
        assert page.locator("#detail").is_visible()
        ground = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() > 0
        assert len(page.pdf()) > 20_000


def test_without_javascript_all_but_the_samples_is_there(chromium, report) -> None:
    with opened(chromium, report, java_script_enabled=False) as page:
        assert page.locator("#verdict .card").count() == 1
        assert page.locator("#differences svg").count() >= 4
        assert not page.locator("#browser").is_visible()


def test_one_run_and_replies_with_scores_of_their_own_open_too(chromium, make, tmp_path) -> None:
    samples = make.choices().drop(columns=["parsed", "correct"])
    samples["lmms:score"] = np.linspace(0, 5, len(samples))
    run = make.save(tmp_path / "a", "a", {"lmms:x": make.task(samples, "lmms:x")})
    path = tmp_path / "report.html"
    path.write_text(build_report([run]))
    with opened(chromium, path) as page:
        assert page.locator("#list .gain").nth(0).inner_text() == "5.000"
        assert "lmms:score 5.000" in page.inner_text("#detail .answer")
        assert count(page) == 120
        assert not page.locator("[data-filter=win]").is_visible()
    found = build_report([make.save(tmp_path / "b", "b", {"coco": make.task(make.captions())})])
    path.write_text(found)
    with opened(chromium, path) as page:
        assert count(page) == 60
        assert axe.Axe().run(page).response["violations"] == []


def large_run(folder, name, size, seed):
    """Captions as long as real ones, with scores that no text earned."""
    random = np.random.default_rng(seed)

    def sentences(count):
        return [" ".join(random.permutation(WORDS)[:11]) for _ in range(count)]

    captions = pd.DataFrame(
        {
            "id": [f"{391895 + n}" for n in range(size)],
            "cluster": [f"{n}" for n in range(size)],
            "groups": [[]] * size,
            "prompt": "Provide a one-sentence caption for the provided image.",
            "prediction": sentences(size),
            "references": [
                [f"{WORDS[n % 9]} number {n} reference {k} of the image" for k in range(5)]
                for n in range(size)
            ],
            "CIDEr": random.gamma(2.0, 0.6, size),
        }
    )
    signature = signature_of({"task": "coco", "split": "test", "prompt": "a", "scorer": "x"})
    write_run(folder, {"name": name}, {"coco": TaskResult(captions, signature)}, {}, "engine:x")
    return folder


def test_five_thousand_samples_open_in_two_seconds_and_thirty_megabytes(
    chromium, make, tmp_path_factory
) -> None:
    root, size = tmp_path_factory.mktemp("large"), 5000
    runs = [large_run(root / n, n, size, seed) for seed, n in enumerate(("base", "a", "b"))]
    ids = [f"{391895 + n}" for n in range(size)]
    path = root / "report.html"
    # Noise, which no encoder shrinks: nearly all that pictures may take.
    pictures = make.pictures(ids, size=(80, 60))
    path.write_text(build_report(runs, pictures=pictures, data_root=root))
    assert 20_000_000 < path.stat().st_size < 30_000_000
    with opened(chromium, path) as page:
        taken = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        # `loadEventEnd` is after the list stands and the first sample is shown.
        assert page.locator("#detail h3").count() == 1
        assert count(page) == size
        print(f"{path.stat().st_size / 1e6:.1f} MB open in {taken:.0f} ms")
        assert 0 < taken < 2000
        started = time.monotonic()
        page.fill("#search", ids[-1])
        wait_for_count(page, 1)
        assert time.monotonic() - started < 2
        assert page.locator("#detail img").count() in (0, 1)
