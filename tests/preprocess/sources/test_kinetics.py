import csv
import io

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import RemoteFile, Segment
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.sample import assign_keys

HEADER = ("label", "youtube_id", "time_start", "time_end", "split")


def table(path, rows, header=HEADER):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([header, *rows])
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def by_name(listing):
    assert len({source.name for source in listing.sources}) == len(listing.sources)
    return {source.name: source for source in listing.sources}


@pytest.fixture
def official(tmp_path):
    """Odd identifiers, files in both namings, one missing, and rows of other splits."""
    files = ("using segway/-abc_DEF123.mp4", "x/__b-_2345678_000084_000094.mp4", "x/left over.mp4")
    root = tree(tmp_path / "videos", *files)
    rows = [
        ("using segway", "-abc_DEF123", "7", "17", "train"),
        ("riding, a «bike»", "__b-_2345678", "84", "94", "train"),
        ("using segway", "gone_000001", "0", "10", "train"),
        ("abseiling", "validation1", "0", "10", "validate"),
    ]
    return root, table(tmp_path / "all.csv", rows)


def test_the_csv_decides(official):
    root, annotations = official
    listing = list_kinetics(root, "train", annotations=annotations)
    assert (listing.dataset, listing.split) == ("kinetics", "train")
    assert listing.classes == ("abseiling", "riding, a «bike»", "using segway")
    sources = by_name(listing)
    whole, trimmed = sources["-abc_DEF123#t=7,17"], sources["__b-_2345678#t=84,94"]
    assert whole.path == "using segway/-abc_DEF123.mp4"
    assert whole.location == root / "using segway" / "-abc_DEF123.mp4"
    assert (whole.id, whole.labels, whole.segment) == ("-abc_DEF123", ("using segway",), None)
    assert whole.key_name == "-abc_DEF123_000007_000017"
    assert (trimmed.path, trimmed.labels) == ("x/__b-_2345678_000084_000094.mp4", ("riding, a «bike»",))
    gone = sources["gone_000001#t=0,10"]
    assert gone.location is None
    assert gone.rejection[0] == "source_not_found"
    assert "line 4" in gone.rejection[1]
    assert len(sources) == 3
    assert listing.notes == (
        "1 row of other splits left out: validate (1).",
        "1 file left out, for no row names them: x/left over.mp4.",
    )


def test_trim_cuts_only_whole_videos(official):
    root, annotations = official
    listing = list_kinetics(root, annotations=annotations, trim=True)
    sources = by_name(listing)
    assert sources["-abc_DEF123#t=7,17"].segment == Segment(7, 17)
    assert sources["__b-_2345678#t=84,94"].segment is None
    assert any("1 file not cut" in note for note in listing.notes)


@pytest.mark.parametrize("split", ["val", "validate", "Validation"])
def test_names_of_the_validation_split(official, split):
    root, annotations = official
    listing = list_kinetics(root, split, annotations=annotations)
    assert [source.id for source in listing.sources] == ["validation1"]
    assert listing.split == split
    assert listing.classes == list_kinetics(root, "train", annotations=annotations).classes


def test_a_split_that_is_not_there(official):
    with pytest.raises(PreprocessError, match=r"no row is of the split 'test'; found train \(3\), validate \(1\)"):
        list_kinetics(official[0], "test", annotations=official[1])


def test_other_columns_and_orders(tmp_path):
    root = tree(tmp_path / "videos", "a.mkv")
    annotations = table(
        tmp_path / "k.csv",
        [("0", "a", "10.0", "20", "one")],
        ("is_cc", "youtube_id", "time_start", "time_end", "label"),
    )
    (source,) = list_kinetics(root, annotations=annotations).sources
    assert (source.path, source.labels, source.key_name) == ("a.mkv", ("one",), "a_000010_000020")


@pytest.mark.parametrize("header", [HEADER[1:], HEADER])
def test_a_test_split_without_labels(tmp_path, header):
    root = tree(tmp_path / "videos", "a.mp4")
    annotations = table(tmp_path / "k.csv", [("", "a", "1", "2", "test")[-len(header) :]], header)
    listing = list_kinetics(root, "test", annotations=annotations)
    assert [source.labels for source in listing.sources] == [()]
    assert listing.classes == ()
    assert listing.notes == ("1 row without a label.",)


@pytest.mark.parametrize("column", ["youtube_id", "time_start", "time_end"])
def test_a_missing_column_is_named(tmp_path, column):
    header = [name for name in HEADER if name != column]
    annotations = table(tmp_path / "k.csv", [("x",) * 4], header)
    with pytest.raises(PreprocessError, match=f"no column '{column}'"):
        list_kinetics(tree(tmp_path / "v", "a.mp4"), annotations=annotations)


def test_bad_rows(tmp_path):
    rows = [
        ("one", "good", "1", "11", "train"),
        ("one", "soon", "", "11", "train"),
        ("one", "late", "12", "11", "train"),
        ("one", "part", "1.5", "11.5", "train"),
        ("one", "", "1", "11", "train"),
        ("one", "short", "1"),
    ]
    listing = list_kinetics(
        tree(tmp_path / "v", "good.mp4"), annotations=table(tmp_path / "k.csv", rows), split="train"
    )
    rejected = {source.name: source.rejection for source in listing.sources if source.rejection}
    assert {name: reason for name, (reason, _) in rejected.items()} == {
        f"line {line} of k.csv": "bad_annotation" for line in range(3, 8)
    }
    assert "time_start: expected seconds" in rejected["line 3 of k.csv"][1]
    with pytest.raises(PreprocessError, match="not one of 5 rows can be used; line 6: expected 5 fields, found 3"):
        list_kinetics(tmp_path / "v", annotations=table(tmp_path / "bad.csv", rows[1:]))


def test_repeated_rows(tmp_path):
    rows = [("one", "a", "1", "2", "train"), ("one", "a", "1", "2", "train"), ("one", "b", "1", "2", "train")]
    rows += [("two", "b", "1", "2", "train"), ("one", "c", "1", "2", "train"), ("two", "c", "3", "4", "train")]
    root = tree(tmp_path / "v", "a.mp4", "b.mp4", "c.mp4")
    annotations = table(tmp_path / "k.csv", rows)
    listing = list_kinetics(root, annotations=annotations)
    sources = by_name(listing)
    assert sources["a#t=1,2"].rejection is None
    assert sources["b#t=1,2"].rejection[0] == "bad_annotation"
    assert "line 4: one; line 5: two" in sources["b#t=1,2"].rejection[1]
    assert sources["c#t=1,2"].rejection is None
    assert sources["c#t=3,4"].rejection[0] == "bad_annotation"
    assert "c.mp4 is taken whole for line 6" in sources["c#t=3,4"].rejection[1]
    assert "1 row left out, for equal rows stand before them." in listing.notes
    cut = by_name(list_kinetics(root, annotations=annotations, trim=True))
    assert [cut[name].segment for name in ("c#t=1,2", "c#t=3,4")] == [Segment(1, 2), Segment(3, 4)]
    assert {cut[name].path for name in ("c#t=1,2", "c#t=3,4")} == {"c.mp4"}


@pytest.mark.parametrize("trim", [False, True])
def test_files_that_come_later_change_no_name(official, trim):
    """A retry needs the same plan: all but the place and the rejection stays."""
    root, annotations = official

    def plan():
        listing = list_kinetics(root, annotations=annotations, trim=trim)
        return [(s.name, s.id, s.labels, s.segment, s.key_name) for s in listing.sources], listing

    before, listing = plan()
    assert any(source.rejection for source in listing.sources)
    tree(root, "y/gone_000001.mp4")
    after, listing = plan()
    assert not any(source.rejection for source in listing.sources)
    assert after == before


def test_several_files_of_one_clip(tmp_path):
    """A side file never stands for the video, the clip goes before the whole video, then the first by name."""
    names = ("a.info", "a.json", "a.m4a", "a.mp4", "a.webm", "b.mp4", "b_000001_000002.mp4")
    rows = [("one", "a", "1", "2", "train"), ("one", "b", "1", "2", "train")]
    root = tree(tmp_path / "v", *names[1:])
    listing = list_kinetics(root, annotations=table(tmp_path / "k.csv", rows))
    assert sorted(source.path for source in listing.sources) == ["a.mp4", "b_000001_000002.mp4"]
    assert listing.notes == (
        "4 files left out, for another file of the same clip is used: a.json, a.m4a, a.webm and 1 more.",
    )


def test_the_csv_below_the_root_is_not_left_over(tmp_path):
    root = tree(tmp_path, "a.mp4")
    assert list_kinetics(root, annotations=table(root / "k.csv", [("x", "a", "1", "2", "train")])).notes == ()


def test_trim_needs_annotations(kinetics_tree):
    with pytest.raises(PreprocessError, match="give the official CSV"):
        list_kinetics(kinetics_tree, trim=True)


def test_class_folders(kinetics_tree):
    listing = list_kinetics(kinetics_tree, "val")
    assert listing.classes == ("class 0", "class 1", "class 2")
    assert len(listing.sources) == 10
    assert by_name(listing)["class 1/video000004.mp4"].labels == ("class 1",)


def test_real_clips(real_clips, tmp_path):
    rows = [("using segway", "R6llTwEh07w", "4", "14", "validate"), ("using segway", "WUzgd7C1pWA", "1", "11", "val")]
    listing = list_kinetics(real_clips / "kinetics400", "val", annotations=table(tmp_path / "k.csv", rows))
    assert sorted(by_name(listing)) == ["R6llTwEh07w#t=4,14", "WUzgd7C1pWA#t=1,11"]
    assert all(source.location.stat().st_size > 10_000 for source in listing.sources)


IDENTIFIER = st.text("ab-_0Y", min_size=1, max_size=11)
TIME = st.integers(0, 3).map(lambda number: str(number * 10))


@given(st.lists(st.tuples(st.sampled_from(["x", "y", ""]), IDENTIFIER, TIME, TIME), min_size=1), st.booleans())
def test_every_row_is_one_source_or_noted(tmp_path_factory, rows, trim):
    """Whatever the rows, names and keys are unique and every clip is accounted for."""
    folder = tmp_path_factory.mktemp("rows")
    names = [f"{row[1]}{ending}" for row in rows[::2] for ending in (".mp4", "_000010_000020.mp4")]
    root = tree(folder / "v", "other.mp4", *names)
    annotations = table(folder / "k.csv", rows, HEADER[:4])
    try:
        listing = list_kinetics(root, annotations=annotations, trim=trim)
    except PreprocessError as error:
        assert "not one of" in str(error)  # noqa: PT017
        return
    by_name(listing)
    assign_keys([source.key_name for source in listing.sources])
    clips = {(row[1], row[2], row[3]) for row in rows if int(row[2]) < int(row[3])}
    assert {source.id for source in listing.sources if source.key_name[:5] != "line-"} == {clip[0] for clip in clips}


def test_object_store(tmp_path):
    """Files and annotations in a bucket behind HTTP."""
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="videos")
        for name in ("k/train/c d/a b.mp4", "k/train/e/-id_000001_000011.mp4", "k/train/e/ü.mp4"):
            client.put_object(Bucket="videos", Key=name, Body=b"video")
        annotations = table(tmp_path / "k.csv", [("one", "-id", "1", "11", "train")])
        client.put_object(Bucket="videos", Key="k/k.csv", Body=annotations.read_bytes())
        options = {
            "aws_endpoint": endpoint,
            "aws_access_key_id": "a",
            "aws_secret_access_key": "b",
            "aws_region": "us-east-1",
        }
        root = "s3://videos/k/train"
        folders = list_kinetics(root, options=options)
        assert folders.classes == ("c d", "e")
        assert by_name(folders)["c d/a b.mp4"].location == RemoteFile(root, "c d/a b.mp4")
        assert str(by_name(folders)["e/ü.mp4"].location) == "s3://videos/k/train/e/ü.mp4"
        listing = list_kinetics(root, options=options, annotations="s3://videos/k/k.csv")
        (source,) = listing.sources
        assert source.location == RemoteFile(root, "e/-id_000001_000011.mp4")
    finally:
        server.stop()
