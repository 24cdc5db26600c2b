import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.audioset import class_names, file_name_readings, list_audioset, parse_segments
from avid_pipeline.preprocess.sources.base import Segment

HEADER = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=4, num_unique_labels=3, num_positive_labels=5, "odd quote
# YTID, start_seconds, end_seconds, positive_labels
"""


def segments(path, *rows):
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
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


def test_class_list():
    names = class_names()
    assert len(names) == len(set(names.values())) == 527
    assert list(names.items())[:2] == [("/m/09x0r", "Speech"), ("/m/05zppz", "Male speech, man speaking")]
    assert list(names)[-1] == "/m/07hvw1"


def test_labels_names_and_keys(tmp_path):
    annotations = segments(
        tmp_path / "eval_segments.csv",
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/068hy"',
        '_x-1_Y, 12.500, 22.500, "/m/09x0r"',
        'gone, 30.000, 40.000, "/m/09x0r"',
    )
    root = tree(tmp_path / "videos", "a/--4gqARaEJE.mp4", "_x-1_Y.webm", "other.mp4")
    listing = list_audioset(root, annotations, "eval")
    assert (listing.dataset, listing.split, listing.modalities) == ("audioset", "eval", ("video", "audio"))
    assert listing.classes == tuple(class_names().values())
    sources = by_name(listing)
    first = sources["--4gqARaEJE#t=0,10"]
    assert first.labels == (class_names()["/m/068hy"], class_names()["/m/07q6cd_"])
    assert (first.id, first.path, first.key_name) == ("--4gqARaEJE", "a/--4gqARaEJE.mp4", "--4gqARaEJE_0_10000")
    assert first.location == root / "a" / "--4gqARaEJE.mp4"
    assert first.segment is None
    assert sources["_x-1_Y#t=12.5,22.5"].key_name == "_x-1_Y_12500_22500"
    assert sources["gone#t=30,40"].rejection[0] == "source_not_found"
    assert listing.notes == ("1 file left out, for no row names them: other.mp4.",)
    cut = by_name(list_audioset(root, annotations, trim=True))
    assert cut["_x-1_Y#t=12.5,22.5"].segment == Segment(12.5, 22.5)


@pytest.mark.parametrize(
    "stem",
    ["{}", "Y{}", "{}_30", "{}_30_40", "{}_30.000", "{}_30.000_40.000", "{}_000030_000040", "{}_30000",
     "{}_30000_40000", "Y{}_30.000_40.000", "{}_30.0_40"],
)  # fmt: skip
@pytest.mark.parametrize("identifier", ["-abcdefghi_", "_5_10_abcde", "Yabc_123456", "a_1_2_3_4_5"])
def test_file_names(tmp_path, stem, identifier):
    annotations = segments(tmp_path / "s.csv", f'{identifier}, 30.000, 40.000, "/m/09x0r"')
    name = f"{stem.format(identifier)}.wav"
    listing = list_audioset(tree(tmp_path / "v", name), annotations, trim=True)
    (source,) = listing.sources
    assert source.path == name
    assert (source.segment is not None) == (stem == "{}")
    assert listing.notes == (
        ("1 file not cut, for their names say that they hold the clip alone.",) if stem != "{}" else ()
    )


@pytest.mark.parametrize("name", ["abc_31.wav", "abc_30_41.wav", "abc_30_.wav", "Zabc.wav", "abc_30.000_40000.wav"])
def test_files_of_other_clips(tmp_path, name):
    annotations = segments(tmp_path / "s.csv", 'abc, 30.000, 40.000, "/m/09x0r"')
    (source,) = list_audioset(tree(tmp_path / "v", name), annotations).sources
    assert source.rejection[0] == "source_not_found"


def test_a_video_with_several_clips(tmp_path):
    annotations = segments(
        tmp_path / "s.csv", 'a, 0.000, 10.000, "/m/09x0r"', 'a, 30.000, 40.000, "/m/068hy"', 'a, 0, 10, "/m/09x0r"'
    )
    trimmed = list_audioset(tree(tmp_path / "trimmed", "a_0_10.mp4", "a_30_40.mp4"), annotations)
    assert {source.name: source.path for source in trimmed.sources} == {
        "a#t=0,10": "a_0_10.mp4",
        "a#t=30,40": "a_30_40.mp4",
    }
    assert trimmed.notes == ("1 row left out, for equal rows stand before them.",)
    full = tree(tmp_path / "full", "a.mp4")
    cut = by_name(list_audioset(full, annotations, trim=True))
    assert [source.segment for source in cut.values()] == [Segment(0, 10), Segment(30, 40)]
    whole = by_name(list_audioset(full, annotations))
    assert whole["a#t=0,10"].rejection is None
    assert whole["a#t=30,40"].rejection[0] == "bad_annotation"


def test_bad_rows(tmp_path):
    rows = [
        'good, 0.000, 10.000, "/m/09x0r"',
        'mid, 0.000, 10.000, "/m/09x0r,/m/none"',
        "bare, 0.000, 10.000, /m/09x0r,/m/068hy",
        'soon, 10.000, 10.000, "/m/09x0r"',
        'nan, nan, 10.000, "/m/09x0r"',
        'tiny, 0.0001, 0.0002, "/m/09x0r"',
        'twice, 0, 10, "/m/09x0r"',
        'twice, 0.000, 10.000, "/m/068hy"',
    ]
    root = tree(tmp_path / "v", "good.mp4", "twice.mp4")
    listing = list_audioset(root, segments(tmp_path / "s.csv", *rows))
    rejected = {source.name: source.rejection for source in listing.sources if source.rejection}
    assert {reason for reason, _ in rejected.values()} == {"bad_annotation"}
    assert rejected.keys() == {f"line {line} of s.csv" for line in range(5, 10)} | {"twice#t=0,10"}
    assert "'/m/none' is none of the 527 classes" in rejected["line 5 of s.csv"][1]
    assert "found 5 fields" in rejected["line 6 of s.csv"][1]
    with pytest.raises(PreprocessError, match="not one of 5 rows can be used; line 4"):
        list_audioset(root, segments(tmp_path / "bad.csv", *rows[1:6]))
    with pytest.raises(PreprocessError, match="there is no row"):
        list_audioset(root, segments(tmp_path / "none.csv"))


IDENTIFIER = st.text("abY_-012", min_size=1, max_size=11)


ROW = st.tuples(IDENTIFIER, st.integers(0, 10**8), st.integers(1, 10**6), st.sets(st.integers(0, 526), max_size=5))


@given(st.lists(ROW, min_size=1))
def test_clips_come_back(rows):
    names = class_names()
    mids = list(names)
    text = ""
    for identifier, start, length, labels in rows:
        listed = ",".join(mids[number] for number in sorted(labels))
        text += f'{identifier}, {start / 1000:.3f}, {(start + length) / 1000:.3f}, "{listed}"\n'
    clips, bad = parse_segments(HEADER + text, "s.csv", names)
    assert bad == []
    assert [(clip.id, clip.start, clip.end - clip.start) for clip in clips] == [row[:3] for row in rows]
    assert [clip.labels for clip in clips] == [tuple(names[mids[n]] for n in sorted(row[3])) for row in rows]


@given(st.text())
def test_garbage_is_at_most_a_preprocess_error(text):
    try:
        clips, _ = parse_segments(text, "s.csv", {"/m/1": "one"})
    except PreprocessError:
        return
    assert clips
    assert all(clip.start < clip.end for clip in clips)


@given(st.text())
def test_any_file_name_can_be_read(stem):
    readings = list(file_name_readings(stem))
    assert readings[0].id == stem
    assert all(stem.removeprefix("Y").startswith(r.id) or stem.startswith(r.id) for r in readings)
