"""The report in a real browser: on a phone, on a desk, and on paper."""

import numpy as np
import pytest
from browser import Browser, find
from PIL import Image
from test_compare_report import results

from uva_jax.eval.compare_report import write_comparison_report
from uva_jax.eval.report import write_report
from uva_jax.eval.report_data import ReportData
from uva_jax.eval.statistics import verdict
from uva_jax.eval.video import write_mp4, write_strip

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")

PHONE, DESK = 390, 1200


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find(), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every section, and with long names."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    clips = [write_mp4(folder / f"{i}.mp4", clip) for i, clip in enumerate(moving(rng, 2))]
    write_strip(clips[0].with_suffix(".png"), next(moving(rng, 1))[::4])
    scores = {name: rng.beta(5, 1, 120) for name in ("teacher", "graft")}
    names = ("teacher", "graft_stage1", "graft", "graft_shortened")
    steps = list(range(0, 4000, 40))
    falling = [float(np.exp(-step / 900) + rng.random() / 20) for step in steps]
    accuracy = {"0.02": 0.2, "0.05": 0.5, "0.1": 0.8, "0.2": 0.97}
    data = ReportData(
        title="Graft of pusht: a_rather_long_name_of_a_working_folder_without_any_space",
        verdict=verdict(scores["graft"] - scores["teacher"], 0.02).as_json(),
        config={"teacher.checkpoint": "/a/long/path/" * 8 + "x.ckpt", "seed": 0},
        hashes=[{"name": "capture", "config": "a1b2" * 16, "inputs": "c3d4" * 16}],
        versions={"python": "3.11", "jax": "0.10"},
        stages=[{"name": "capture", "seconds": 71.0, "done": True, "memory": 2**31}],
        architecture=[{"part": "action_head", "teacher": 123456789, "graft": 234567890}],
        costs=[
            {"policy": name, "seconds": 0.0675, "steps": 100, "parameters": 12345678}
            for name in names
        ],
        operators=[
            {
                "operator": "cross_attn",
                "block": i,
                "raw": 1e-5,
                "scaled": 0.01,
                "shuffled": 1.2,
                "fvu": 0.02,
            }
            for i in range(3)
        ],
        timesteps={"0 to 200": 0.03, "200 to 400": 0.01, "400 to 1000": 0.004},
        curves=[
            {"title": "Stage 1", "series": {f"block{i}": (steps, falling) for i in range(6)}},
            {"title": "With a gap", "series": {"loss": ([1, 2, 3], [1.0, None, 0.9])}},
        ],
        scores=[
            {
                "policy": name,
                "score": 0.9,
                "ci": (0.8, 1.0),
                "success": 0.7,
                "success_ci": (0.6, 0.8),
                "episodes": 120,
            }
            for name in names
        ],
        comparisons=[
            {
                "policy": name,
                "difference": -0.05,
                "ci": (-0.09, -0.01),
                "mcnemar": 0.04,
                "verdict": "The graft is not worse.",
            }
            for name in names[1:]
        ],
        sampling=[
            {"policy": name, "steps": steps, "score": 0.9, "ci": (0.85, 0.95)}
            for name in ("teacher", "graft")
            for steps in (100, 20, 10, 5, 2)
        ],
        actions=[
            {"policy": name, "mse": 0.012, "map": 0.81, "accuracy": accuracy} for name in names
        ],
        per_seed={"names": ("teacher", "graft"), "scores": tuple(scores.values())},
        videos=[{"path": clip, "caption": f"seed {i}"} for i, clip in enumerate(clips)],
        frames=[
            {
                "policy": "teacher",
                "fvd": 123.4,
                "ci": (100.0, 150.0),
                "psnr": 24.1,
                "ssim": 0.9,
                "videos": 256,
            }
        ],
        notes=["A note."],
    )
    return write_report(folder / "report.html", data)


def moving(rng, count):
    """Clips in which something moves, so that a video that plays differs from a blank one."""
    for _ in range(count):
        clip = np.full((12, 48, 96, 3), 255, np.uint8)
        for frame, x in enumerate(rng.integers(0, 80) + np.arange(12)):
            clip[frame, 16:32, x : x + 12] = (200, 40, 40)
        yield clip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_everything_loads_and_nothing_needs_sideways_scrolling(
    browser, page, tmp_path, width, dark
):
    found = browser.open(page, width, dark=dark)
    assert browser.errors == []
    assert found["title"].startswith("Graft of pusht")
    assert len(found["pictures"]) == 7 and all(size > 290 for size in found["pictures"])
    assert found["videos"] == [96, 96]
    assert found["overflow"] == 0 and found["wide"] == []
    browser.screenshot(tmp_path / "page.png")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert picture.shape == (found["height"], width)
    assert (np.median(picture) < 60) == dark
    # No long stretch of the page is blank, as it would be if plots had no size.
    inked = np.flatnonzero(np.ptp(picture, axis=1) > 40)
    assert np.diff(inked).max() < 150


def test_a_comparison_of_long_paths_fits_a_phone(browser, tmp_path):
    path = "/a/long/path/of/folders/without/spaces/" * 3
    found = results((f"{path}one.ckpt", "100"), ("embedded", "100"), ("/else/two/three", "ddim10"))
    page = browser.open(write_comparison_report(tmp_path / "report.html", found), PHONE)
    assert browser.errors == [] and page["overflow"] == 0 and page["wide"] == []


def test_the_browser_notices_what_a_reader_would(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><main>'
        '<img src="gone.png"><video src="data:video/mp4;base64,AAAA"></video>'
        '<p style="width: 900px">wide</p><script>console.error("a message")</script></main>'
    )
    found = browser.open(broken, PHONE)
    assert found["pictures"] == [0] and found["videos"] != [0]
    assert found["overflow"] > 400 and len(found["wide"]) == 1
    assert any("a message" in error for error in browser.errors)
    assert any("ERR_FILE_NOT_FOUND" in error for error in browser.errors)


def test_it_is_printed_in_few_pages(browser, page):
    browser.open(page, DESK)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert 2 <= printed.count(b"/Type /Page\n") <= 9
    shown = "getComputedStyle(document.querySelectorAll('.paper, video')[{}]).display"
    assert [browser.evaluate(shown.format(i)) for i in range(3)] == ["block", "none", "block"]
    browser.media("print")
    assert [browser.evaluate(shown.format(i)) for i in range(3)] == ["none", "block", "block"]
    browser.media("")
