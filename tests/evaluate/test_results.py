import json
import math
import sys

import pytest

from avid_pipeline import __version__
from avid_pipeline.errors import AvidPipelineError
from avid_pipeline.evaluate.results import (
    RESULTS_NAME,
    CheckpointIdentity,
    DataIdentity,
    Results,
    ResultsError,
    Table,
    format_value,
    read_results,
    terminal_table,
    versions,
)
from avid_pipeline.shards_spec.storage import open_storage


def results(**changes):
    fields = {
        "command": "linear",
        "checkpoint": CheckpointIdentity(path="runs/avid", sha256="ab" * 32, kind="ours", step=1200),
        "data": (
            DataIdentity(
                role="test",
                url="s3://bucket/ucf101",
                dataset="ucf101",
                split="all",
                fingerprint="sha256:" + "0f" * 32,
                subset="fold1-test",
                instances=3783,
            ),
        ),
        "settings": {"clips_per_instance": 10, "features": ["video.conv4x"], "clip": {"seconds": 0.5}},
        "versions": versions(),
        "undecodable": 2,
        "tables": (Table(title="Accuracy", rows={"ünïcode": {"top-1": 0.25, "top-5": None}}, note="fold 1"),),
    }
    return Results(**{**fields, **changes})


def write(root, found):
    root.write(RESULTS_NAME, found.to_json())


def test_results_come_back_as_they_were_written(tmp_path):
    root = open_storage(tmp_path)
    write(root, results())
    assert read_results(root) == results()
    assert "ünïcode" in (tmp_path / RESULTS_NAME).read_text(encoding="utf-8")


def test_numbers_that_are_not_finite_come_back_from_json_that_every_reader_reads(tmp_path):
    row = {"loss": math.nan, "top-1": math.inf, "median rank": -math.inf}
    root = open_storage(tmp_path)
    write(root, results(tables=(Table(title="Odd", rows={"row": row}),), settings={"learning_rate": math.inf}))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / RESULTS_NAME).read_bytes(), parse_constant=refuse)
    assert content["settings"] == {"learning_rate": "Infinity"}
    found = read_results(root).tables[0].rows["row"]
    assert math.isnan(found["loss"])
    assert found["top-1"] == math.inf
    assert found["median rank"] == -math.inf


def test_missing_results_say_that_the_evaluation_is_not_finished(tmp_path):
    with pytest.raises(ResultsError, match=rf"{tmp_path}/results\.json: does not exist.*run avid-evaluate"):
        read_results(open_storage(tmp_path))


def changed(**changes):
    return json.dumps({**json.loads(results().to_json()), **changes}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (results().to_json()[:-20], "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "format_version: expected 1, found None"),
        (changed(format_version=2), "format_version: expected 1, found 2"),
        (changed(extra=1), "extra: "),
        (changed(tables=[{"title": "a", "rows": {"b": {"c": "many"}}}]), r"tables\.0\.rows\.b\.c: "),
        (changed(undecodable="few"), "undecodable: "),
    ],
    ids=["cut", "bytes", "list", "empty", "version", "unknown field", "value", "count"],
)
def test_damaged_results_are_an_error_that_names_file_and_field(tmp_path, content, message):
    (tmp_path / RESULTS_NAME).write_bytes(content)
    with pytest.raises(ResultsError, match=rf"{tmp_path}/results\.json: .*{message}.*run avid-evaluate") as raised:
        read_results(open_storage(tmp_path))
    assert isinstance(raised.value, AvidPipelineError)


def test_results_that_cannot_be_read_are_an_error_of_ours(tmp_path):
    (tmp_path / RESULTS_NAME).mkdir()
    (tmp_path / RESULTS_NAME / "inside").write_bytes(b"")
    with pytest.raises(AvidPipelineError, match=r"results\.json"):
        read_results(open_storage(tmp_path))


def test_versions():
    assert versions() == {
        "avid-pipeline": __version__,
        "torch": versions()["torch"],
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    assert versions()["torch"][0].isdigit()


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("top-1", 0.29, "29.0 %"),
        ("R@5", 1, "100.0 %"),
        ("top-1", None, "-"),
        ("top-1", math.nan, "nan"),
        ("median rank", 12.5, "12.5"),
        ("Median Rank", 3.0, "3"),
        ("frank", 0.5, "50.0 %"),
        ("rank of all", 0.5, "50.0 %"),
        ("instances", 1_784_108, "1,784,108"),
        ("test loss", 0.6931471, "0.6931"),
        ("loss", 1e300, "1e+300"),
        ("loss", math.inf, "inf"),
        ("loss", -math.inf, "-inf"),
        ("seconds", 12345.67, "12,345.7"),
        ("seconds", 1e-9, "1e-09"),
    ],
)
def test_how_a_value_is_shown(column, value, text):
    assert format_value(column, value) == text


def test_the_terminal_table():
    table = Table(
        title="Retrieval",
        rows={"video to audio": {"R@1": 0.5, "median rank": 2.0}, "chance": {"R@1": 0.01, "class P@1": None}},
        note="Ten clips.",
    )
    title, heads, rule, first, second, note = terminal_table(table).splitlines()
    assert (title, note) == ("Retrieval", "Ten clips.")
    assert heads.split() == ["R@1", "median", "rank", "class", "P@1"]
    assert set(rule) <= {"-", " "}
    assert first.split() == ["video", "to", "audio", "50.0", "%", "2", "-"]
    assert second.split() == ["chance", "1.0", "%", "-", "-"]
    assert len({len(line) for line in (heads, rule, first, second)}) == 1


def test_the_terminal_table_keeps_row_names_and_leaves_out_an_empty_note():
    shown = terminal_table(Table(title="Empty", rows={}))
    assert shown.splitlines()[0] == "Empty"
    shown = terminal_table(Table(title="Rows", rows={"007": {"loss": 1.0}, "1e5": {"loss": 2.5}}))
    assert [line.split() for line in shown.splitlines()[3:]] == [["007", "1"], ["1e5", "2.5"]]
