"""The report page, its videos, and the metrics of frames."""

import base64
import os
import re
import resource
from html.parser import HTMLParser

import imageio.v2 as imageio
import numpy as np
import pytest

from uva_jax.eval import report_html
from uva_jax.eval.report import write_report
from uva_jax.eval.report_data import ReportData, curve_series, hash_rows, stage_rows
from uva_jax.eval.video import psnr, ssim, tile, write_mp4
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.atomic import write_json

VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, headings and every address."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.headings, self.addresses = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def clip(frames=5, height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), np.uint8)


def full_data(tmp_path):
    steps = list(range(0, 400, 4))
    return ReportData(
        title="Graft <tiny> & co",
        config={"head.depth": 3, "path": "<script>alert(1)</script>"},
        stages=[{"name": "capture", "seconds": 71.0, "done": True}],
        architecture=[{"part": "aggregator", "teacher": 812345, "graft": None}],
        operators=[
            {
                "operator": "mlp",
                "block": 0,
                "raw": 1e-5,
                "scaled": 0.01,
                "shuffled": 1.2,
                "fvu": 0.02,
            }
        ],
        curves=[{"title": "Distillation", "series": {"mlp": (steps, np.exp(-np.array(steps)))}}],
        scores=[
            {"policy": "teacher", "score": 0.9, "ci": (0.8, 1.0), "success": 0.7, "episodes": 9}
        ],
        verdict={"kind": "worse", "sentence": "The graft is worse <than> its teacher."},
        comparisons=[{"policy": "graft", "difference": -0.05, "ci": (-0.09, -0.01)}],
        per_seed={"names": ("teacher", "graft"), "scores": ([0.9, 0.8, 1.0], [0.8, 0.9, 1.0])},
        videos=[{"path": write_mp4(tmp_path / "a.mp4", clip()), "caption": "seed 1"}],
    )


def test_the_page_nests_escapes_and_asks_the_network_nothing(tmp_path):
    path = write_report(tmp_path / "eval" / "report.html", full_data(tmp_path))
    html = path.read_text()
    page = Page(html)
    assert len(page.addresses) == 3 * 2 + 1  # three plots in two themes, one video
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http" not in html and "@import" not in html and "<script" not in html
    assert "Graft <tiny> & co" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_the_page_shows_every_table(tmp_path):
    page = Page(write_report(tmp_path / "r.html", full_data(tmp_path)).read_text())
    shown = "|".join(page.text)
    for text in ("812,345", "1.00e-05", "0.0100", "1.2000", "2.0 %", "1 min 11 s", "0.900"):
        assert f"|{text}|" in shown
    assert "−0.050" in shown and "−0.090 to −0.010" in shown


def test_the_verdict_is_the_first_sentence(tmp_path):
    html = write_report(tmp_path / "r.html", full_data(tmp_path)).read_text()
    sentence = "The graft is worse <than> its teacher."
    page = Page(html)
    assert page.text.index(sentence) < page.text.index("Scores")
    assert '<p class="verdict worse">' in html


def test_sections_without_data_are_left_out(tmp_path):
    path = write_report(tmp_path / "r.html", ReportData(title="Empty"))
    assert Page(path.read_text()).headings == []
    stages = [{"name": "capture", "done": False, "seconds": None}]
    path = write_report(tmp_path / "r.html", ReportData(title="Stages", stages=stages))
    assert Page(path.read_text()).headings == ["Time and memory"]


def test_an_embedded_video_is_the_file(tmp_path):
    data = full_data(tmp_path)
    html = write_report(tmp_path / "r.html", data).read_text()
    (encoded,) = re.findall(r"data:video/mp4;base64,([^\"]+)", html)
    assert base64.b64decode(encoded) == (tmp_path / "a.mp4").read_bytes()


def test_videos_beyond_the_limit_and_missing_ones_are_named_not_embedded(tmp_path, monkeypatch):
    first, second = (write_mp4(tmp_path / f"{n}.mp4", clip()) for n in "ab")
    monkeypatch.setattr(report_html, "MAX_VIDEO_BYTES", first.stat().st_size + 10)
    videos = [{"path": p, "caption": p.name} for p in (first, second, tmp_path / "gone.mp4")]
    page = Page(write_report(tmp_path / "r.html", ReportData("Videos", videos=videos)).read_text())
    assert len(page.addresses) == 1
    assert str(second) in page.text and "not embedded" in "".join(page.text)
    assert str(tmp_path / "gone.mp4") in page.text and "(missing)" in "".join(page.text)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = write_report(tmp_path / "r.html", ReportData(title="Old"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_report(path, ReportData(title="New"))
    assert "Old" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_curves_come_from_the_metrics_file(tmp_path):
    with MetricsWriter(tmp_path, "distill") as writer:
        writer.log(1, mlp=1.0)
        writer.log(2, mlp=float("nan"), held_out=3.0)
    series = curve_series(tmp_path, "distill", ["mlp", "held_out", "absent"])
    assert series == {"mlp": ([1, 2], [1.0, None]), "held_out": ([2], [3.0])}
    curves = [{"title": "With a gap", "series": series}]
    write_report(tmp_path / "r.html", ReportData(title="Curves", curves=curves))


def test_stage_rows_come_from_done_json(tmp_path):
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "done.json", {"seconds": 2.5, "resumed": False})
    rows = stage_rows({"capture": tmp_path / "a", "distill": tmp_path / "b"})
    assert [(r["name"], r["done"], r["seconds"]) for r in rows] == [
        ("capture", True, 2.5),
        ("distill", False, None),
    ]


def test_hashes_come_from_what_a_stage_recorded(tmp_path):
    record = {"config_hash": "aa", "inputs_hash": "bb", "inputs": {"capture": "cc", "file x": "dd"}}
    write_json(tmp_path / "done" / "done.json", record)
    write_json(tmp_path / "begun" / "started.json", record | {"inputs": {}})
    folders = {name: tmp_path / name for name in ("done", "begun", "missing")}
    assert hash_rows(folders) == [
        {"name": "done", "config": "aa", "inputs": "bb"},
        {"name": "done: file x", "inputs": "dd"},
        {"name": "begun", "config": "aa", "inputs": "bb"},
    ]


def test_an_mp4_comes_back_with_its_frames_even_of_odd_size(tmp_path):
    ramp = np.linspace(0, 255, 33).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (7, 25, 33, 3))
    path = write_mp4(tmp_path / "sub" / "x.mp4", frames, fps=5)
    back = np.stack(imageio.mimread(path, memtest=False))
    assert back.shape == (7, 26, 34, 3)
    assert np.abs(back[:, :25, :33].astype(int) - frames).max() < 12
    assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]


def test_an_mp4_that_cannot_be_written_whole_is_an_error_and_no_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="x.mp4 cannot be written.*File too large"):
            write_mp4(tmp_path / "x.mp4", frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_clip_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8 array"):
        write_mp4(tmp_path / "x.mp4", np.zeros((3, 8, 8, 3)))
    with pytest.raises(ValueError, match="uint8 array"):
        write_mp4(tmp_path / "x.mp4", np.zeros((0, 8, 8, 3), np.uint8))


def test_tiles_stand_side_by_side_and_hold_their_last_frame():
    first, second = clip(5), clip(3, seed=1)
    sheet = tile([first, second], gap=2, scale=2)
    assert sheet.shape == (5, 48, 2 * 64 + 2, 3)
    np.testing.assert_array_equal(sheet[:, ::2, :64:2], first)
    np.testing.assert_array_equal(sheet[4, ::2, 66::2], second[2])


def test_tiles_wrap_into_rows_and_carry_labels():
    sheet = tile([clip(2)] * 3, columns=2, gap=4)
    assert sheet.shape == (2, 24 * 2 + 4, 32 * 2 + 4, 3)
    assert (sheet[:, 28:, 36:] == 255).all()
    labelled = tile([clip(2), clip(2)], labels=["teacher", "graft"])
    strip = labelled[0, :-24]
    assert len(strip) > 0 and strip.min() < 128
    with pytest.raises(ValueError, match="2 clips and 1 labels"):
        tile([clip(2), clip(2)], labels=["teacher"])


def test_psnr_of_a_known_error():
    x = np.full((2, 8, 8, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(x, x + np.uint8(5)), 20 * np.log10(255 / 5))
    assert np.isinf(psnr(x, x)).all()


def test_ssim_is_the_windowed_definition():
    x, y = clip(1, 14, 13)[0], clip(1, 14, 13, seed=1)[0]
    y = (0.7 * x + 0.3 * y).astype(np.uint8)
    a, b = x.astype(float), y.astype(float)
    grid = np.arange(11) - 5
    weights = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(4):
        for j in range(3):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum((0, 1)), (weights * q).sum((0, 1))
            vp, vq = (weights * (p - mp) ** 2).sum((0, 1)), (weights * (q - mq) ** 2).sum((0, 1))
            cov = (weights * (p - mp) * (q - mq)).sum((0, 1))
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    np.testing.assert_allclose(ssim(x, y), np.mean(values), rtol=1e-10)
    np.testing.assert_allclose(ssim(x, x), 1.0)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(x[:8], y[:8])
