import base64
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from avid_pipeline.errors import StorageError
from avid_pipeline.evaluate.report import Confusion, Curves, Picture, Report, render_report, write_report
from avid_pipeline.evaluate.report_classes import class_accuracies, frequent_confusions
from avid_pipeline.evaluate.report_curves import curves_picture
from avid_pipeline.evaluate.report_pictures import confusion_picture, row_shares
from avid_pipeline.evaluate.results import (
    REPORT_NAME,
    RESULTS_NAME,
    CheckpointIdentity,
    DataIdentity,
    Results,
    Table,
    read_results,
    versions,
)
from avid_pipeline.shards_spec.storage import open_storage

VOID = {"br", "img", "link", "meta"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=http://example.com/x onerror='alert(1)'>",
    "rock & roll",
    "cost $x^2$ and $\\frac{",
    "手を叩く",
    "\u202eright to left",
    "",
    "it's 'quoted' \"twice\"",
    "a name that is far longer than any picture has room for, and goes on and on",
    "</title></style></svg>",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """A page's text, its tables' cells and every address in it; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text, self.addresses, self.attributes = [], [], [], [], []
        self.tables = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._element(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self._element(tag, attrs)

    def _element(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("src", "href", "action", "poster", "srcset", "data"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "th" in self.open or "td" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def pictures(self):
        prefix = "data:image/png;base64,"
        found = [address.removeprefix(prefix) for address in self.addresses if address.startswith(prefix)]
        return [imread(io.BytesIO(base64.b64decode(data, validate=True)), format="png") for data in found]


def results(**changes):
    fields = {
        "command": "linear",
        "checkpoint": CheckpointIdentity(path="s3://bucket/runs/a&b", sha256="ab" * 32, kind="ours", step=200_000),
        "data": tuple(
            DataIdentity(
                role=role,
                url="https://example.com/shards?a=<b>",
                dataset="ucf101",
                split="all",
                fingerprint="sha256:" + "0f" * 32,
                subset=f"fold1-{role}",
                instances=instances,
            )
            for role, instances in (("train", 9537), ("test", 3783))
        ),
        "settings": {"clips": 10, "layers": ["conv4x", "pool"], "clip": {"seconds": 0.5, "more": {"<flip>": True}}},
        "versions": versions(),
        "tables": (
            Table(
                title="Accuracy by layer",
                rows={"video.conv4x": {"top-1": 0.4749, "loss": 2.5}, "chance": {"top-1": 0.1}},
                note="Fold 1 & only it.",
            ),
        ),
    }
    return Results(**{**fields, **changes})


def counts_of(classes, seed=0, empty=()):
    generator = np.random.default_rng(seed)
    size = len(classes)
    counts = generator.integers(0, 3, (size, size)) + np.diag(generator.integers(5, 30, size))
    counts[list(empty)] = 0
    return counts.astype(np.int64)


def picture(seed=0):
    figure = Figure(figsize=(2, 1))
    figure.subplots().imshow(np.random.default_rng(seed).random((4, 8, 3)))
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def report(classes, **changes):
    fields = {
        "results": results(),
        "confusions": (Confusion("Fold 1", tuple(classes), counts_of(classes, empty=[1] if len(classes) > 2 else [])),),
        "curves": (Curves("Loss", "epoch", "loss", {"train": [(0, 2.0), (1, 1.0)], "test": [(0, 2.5), (1, 1.5)]}),),
        "pictures": (Picture("Neighbours", picture(), "The query is first."),),
    }
    return Report(**{**fields, **changes})


@pytest.mark.parametrize("size", [1, 2, 10, 31, 61, 101])
def test_the_page_is_whole_and_fetches_nothing(size):
    classes = [f"class {number}" for number in range(size)]
    text = render_report(report(classes))
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.seen)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert "http-equiv" in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert ("details" in page.seen) == (size > 30)
    order = ["Linear classification on ucf101", "Accuracy by layer", "Fold 1", "Most frequent confusions"]
    order += ["Confusion matrix", "Loss", "Neighbours", "Checkpoint", "Data", "Settings", "Versions"]
    places = [page.text.index(heading) for heading in order]
    assert places == sorted(places)


def test_the_page_tells_what_was_evaluated_on_what():
    page = Page(render_report(Report(results(undecodable=3))))
    text = " ".join("".join(page.text).split())
    for told in (
        "Checkpoint of avid-pipeline, step 200,000: s3://bucket/runs/a&b",
        "Train: ucf101 all, subset fold1-train, 9,537 instances",
        "Test: ucf101 all, subset fold1-test, 3,783 instances",
        "3 instances cannot be decoded and are left out.",
        "Fold 1 & only it.",
        "https://example.com/shards?a=<b>",
        "sha256" + "ab" * 32,
        "clips: 10",
        "layers: conv4x, pool",
        "<flip>: true",
        "torch" + versions()["torch"],
    ):
        assert told in text, told
    assert page.tables == [[["", "top-1", "loss"], ["video.conv4x", "47.5 %", "2.5"], ["chance", "10.0 %", "-"]]]
    assert page.pictures == []


def test_an_evaluation_without_data_settings_or_tables():
    text = render_report(Report(results(data=(), settings={}, tables=(), command="<new>")))
    page = Page(text)
    assert "<new>" in page.text
    assert "left out" not in text


def test_hostile_names_are_text():
    counts = counts_of(HOSTILE, empty=[1])
    lines = {name: [(0.0, 1.0), (1.0, 2.0)] for name in HOSTILE}
    text = render_report(
        Report(
            results(
                tables=(Table(title=HOSTILE[0], rows={name: {HOSTILE[1]: 0.5} for name in HOSTILE}, note=HOSTILE[9]),),
                settings={HOSTILE[0]: HOSTILE[1]},
                checkpoint=CheckpointIdentity(path=HOSTILE[1], sha256=None, kind="random", step=None),
                command=HOSTILE[9],
            ),
            (Confusion(HOSTILE[0], HOSTILE, counts),),
            (Curves(HOSTILE[9], HOSTILE[1], HOSTILE[0], lines),),
            (Picture(HOSTILE[1], picture(), HOSTILE[0]),),
        )
    )
    page = Page(text)
    assert not {"script", "onerror"} & {*page.seen, *page.attributes}
    assert all(address.startswith("data:") for address in page.addresses)
    shown = {row[0] for row in page.tables[1][1:]}
    assert shown == set(HOSTILE)


def test_accuracy_of_each_class_agrees_with_the_counts():
    classes = ("dog", "cat", "bird", "fish")
    counts = np.array([[8, 2, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 5]], dtype=np.int64)
    found = class_accuracies(classes, counts)
    assert [(entry.name, entry.correct, entry.samples) for entry in found] == [
        ("fish", 5, 5),
        ("dog", 8, 10),
        ("cat", 1, 4),
        ("bird", 0, 0),
    ]
    assert [entry.accuracy for entry in found] == [1.0, 0.8, 0.25, None]
    assert [(entry.taken_for, entry.times) for entry in found] == [(None, 0), ("cat", 2), ("bird", 2), (None, 0)]
    page = Page(render_report(Report(results(tables=()), (Confusion("All", classes, counts),))))
    assert page.tables == [
        [
            ["class", "", "accuracy", "correct", "most often taken for"],
            ["fish", "", "100.0 %", "5 of 5", ""],
            ["dog", "", "80.0 %", "8 of 10", "cat (2)"],
            ["cat", "", "25.0 %", "1 of 4", "bird (2)"],
            ["bird", "", "-", "-", ""],
        ]
    ]
    told = "".join(page.text).replace("\xa0", " ")
    assert "14 of 19 samples are recognised (73.7 %); the mean accuracy of the classes is 68.3 %." in told
    assert "1 class has no test sample." in told


def test_the_most_frequent_confusions():
    classes = ("dog", "cat", "bird")
    counts = np.array([[9, 4, 0], [1, 5, 6], [0, 4, 90]], dtype=np.int64)
    found = [
        (entry.true, entry.predicted, entry.times, entry.samples) for entry in frequent_confusions(classes, counts)
    ]
    assert found == [("cat", "bird", 6, 12), ("dog", "cat", 4, 13), ("bird", "cat", 4, 94), ("cat", "dog", 1, 12)]
    assert len(frequent_confusions(classes, counts, most=2)) == 2
    assert frequent_confusions(classes, np.diag([1, 2, 3])) == []
    assert counts[0, 0] == 9


@pytest.mark.parametrize("size", [3, 40, 80])
def test_classes_without_any_sample(size):
    classes = tuple(f"class {number}" for number in range(size))
    page = Page(render_report(Report(results(), (Confusion("Empty", classes, np.zeros((size, size), np.int64)),))))
    assert "No class has a test sample." in page.text
    assert {row[-2] for row in page.tables[1][1:]} == {"-"}


def test_every_class_is_in_the_table_of_many():
    classes = [f"class {number}" for number in range(101)]
    page = Page(render_report(report(classes)))
    whole = page.tables[3]
    assert whole[0][:2] == ["class", "number"]
    assert sorted(int(row[1]) for row in whole[1:]) == list(range(101))
    assert all(row[0] == f"class {row[1]}" for row in whole[1:])
    shares = [row[3] for row in whole[1:]]
    assert shares[-1] == "-"
    values = [float(share.removesuffix(" %")) for share in shares[:-1]]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("size", [2, 10, 60, 61, 101, 700])
def test_the_heat_map_shows_the_shares_of_the_rows(size):
    classes = [f"class {number}" for number in range(size)]
    counts = counts_of(classes, empty=[1])
    page = Page(confusion_picture(classes, counts))
    (pixels,) = page.pictures
    repeat = len(pixels) // size
    assert pixels.shape == (repeat * size, repeat * size, 4)
    opacity = pixels[repeat // 2 :: repeat, repeat // 2 :: repeat, 3]
    np.testing.assert_allclose(opacity**2, row_shares(counts), atol=0.01)
    assert pixels.var() > 0
    assert not opacity[1].any()
    text = "".join(page.text)
    assert ("class 1" in text) == (size <= 60)
    if size <= 20:
        assert f"{100 * counts[0, 0] / counts[0].sum():.0f}" in page.text


@pytest.mark.parametrize(
    ("size", "ticks"), [(61, range(0, 61, 10)), (101, range(0, 101, 10)), (700, range(0, 700, 100))]
)
def test_classes_without_names_have_numbers_at_the_sides(size, ticks):
    page = Page(confusion_picture([""] * size, np.eye(size, dtype=np.int64)))
    numbers = [text for text in page.text if text.isdigit()]
    assert numbers == [str(tick) for tick in ticks for _ in range(2)]


def test_pictures_are_whole():
    classes = [f"class {number}" for number in range(5)]
    page = Page(render_report(report(classes)))
    assert len(page.pictures) == 2
    assert all(pixels.var() > 0 for pixels in page.pictures)


@pytest.mark.parametrize(
    ("classes", "counts"),
    [
        ((), np.zeros((0, 0), np.int64)),
        (("a", "b"), np.zeros((2, 3), np.int64)),
        (("a", "b"), np.zeros((2, 2))),
        (("a", "b"), np.array([[1, 0], [0, -1]])),
    ],
)
def test_counts_that_do_not_match_the_classes_are_refused(classes, counts):
    with pytest.raises(ValueError, match="confusion 'Fold 1': expected"):
        Confusion("Fold 1", classes, counts)


def test_numbers_that_are_not_finite_do_not_break_the_page():
    row = {"top-1": math.nan, "loss": math.inf, "median rank": -math.inf}
    line = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (math.nan, 1.0), (4.0, 2.0)]
    found = results(tables=(Table(title="Odd", rows={"row": row}),), settings={"rate": math.nan})
    text = render_report(
        Report(found, curves=(Curves("Loss", "epoch", "loss", {"a": line, "b": [(0.0, math.nan)], "c": []}),))
    )
    page = Page(text)
    assert page.tables == [[["", "top-1", "loss", "median rank"], ["row", "nan", "inf", "-inf"]]]
    assert "Points left out because they are not finite: 4." in text
    drawing = text[text.index('<svg class="curves"') :]
    assert not re.search(r"\b(nan|inf)\b", drawing[: drawing.index("</svg>")])


def test_curves_without_a_point():
    assert "No points to draw." in curves_picture("epoch", "loss", {"train": []})
    assert "No points to draw." in curves_picture("epoch", "loss", {})


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=8))
def test_any_curve_can_be_drawn_inside_its_picture(points):
    text = curves_picture("x", "y", {"line": points})
    Page(text)
    for path in re.findall(r'<path class="line line-0" stroke-dasharray="none" d="(M\d[^"]*h0[^"]*)"', text):
        for x, y in re.findall(r"[ML](\S+?) ([^hML]+)", path):
            assert 0 <= float(x) <= 760
            assert 0 <= float(y) <= 360


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([-0.1, 0.1], ["-0.10", "-0.05", "0.00", "0.05", "0.10"]),
        ([0, 4000], ["0", "1,000", "2,000", "3,000", "4,000"]),
        ([3, 3], ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2", "3.3"]),
        ([1e9, 2e9], ["1e+09", "1.2e+09", "1.4e+09", "1.6e+09", "1.8e+09", "2e+09"]),
    ],
)
def test_ticks_are_round_numbers(values, ticks):
    page = Page(curves_picture("", "", {"line": [(0.5, value) for value in values]}))
    shown = [text for text in page.text if re.fullmatch(r"-?\d[\d,.e+]*", text)]
    assert shown[: len(ticks)] == ticks


def test_whole_numbers_below_a_picture_have_ticks_at_whole_numbers():
    page = Page(curves_picture("", "", {"line": [(epoch, 0.5 + epoch / 10) for epoch in (1, 2, 3)]}))
    shown = [text for text in page.text if re.fullmatch(r"[\d.]+", text)]
    assert shown[-3:] == ["1", "2", "3"]


def test_both_files_are_written_and_a_failed_page_leaves_no_results(tmp_path):
    root = open_storage(tmp_path)
    write_report(root, report(["dog", "cat"]))
    assert read_results(root) == results()
    assert (tmp_path / REPORT_NAME).read_text(encoding="utf-8") == render_report(report(["dog", "cat"]))
    blocked = tmp_path / "blocked"
    (blocked / REPORT_NAME / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match=REPORT_NAME):
        write_report(open_storage(blocked), report(["dog", "cat"]))
    assert not (blocked / RESULTS_NAME).exists()


def browse(address, profile, *options):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: looked for {', '.join(BROWSERS)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--window-size=1200,2400", *options, address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(tmp_path, scheme):
    classes = [*HOSTILE, *(f"class {number}" for number in range(91))]
    write_report(open_storage(tmp_path), report(classes))
    address = (tmp_path / REPORT_NAME).as_uri()
    picture = tmp_path / "page.png"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(address, tmp_path / "profile", preferred, f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1200)
    assert pixels.std() > 0.05
    background = np.median(pixels)
    assert background > 0.9 if scheme == "light" else background < 0.15
    if scheme == "light":
        page = Page(browse(address, tmp_path / "profile", "--dump-dom").replace("<!DOCTYPE html>", ""))
        assert page.tables[0] == [
            ["", "top-1", "loss"],
            ["video.conv4x", "47.5 %", "2.5"],
            ["chance", "10.0 %", "-"],
        ]
        assert {row[0] for row in page.tables[3][1:]} == set(classes)
        assert "script" not in page.seen
