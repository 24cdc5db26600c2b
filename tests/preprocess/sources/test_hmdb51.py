from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.sources.hmdb51 import add_line, list_hmdb51

FILES = ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair/b#2.avi", "wave/a&b.avi", "wave/x.avi")


@pytest.fixture
def data(tmp_path):
    for name in FILES:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for fold in (1, 2):
        (lists / f"brush_hair_test_split{fold}.txt").write_text(
            f"April_09_brush_hair_u_nm_np1_ba_goo_0.avi {fold} \nb#2.avi 0 \n"
        )
        (lists / f"wave_test_split{fold}.txt").write_text(f"a&b.avi 2 \nx.avi {fold - 1} \n")
    return tmp_path


def subsets(listing):
    assert len({source.name for source in listing.sources}) == len(listing.sources)
    return {source.name: source.subsets for source in listing.sources}


@pytest.mark.parametrize("root", ["videos", "."])
def test_folds(data, root):
    listing = list_hmdb51(data / root)
    assert (listing.dataset, listing.split, listing.modalities) == ("hmdb51", "all", ("video",))
    assert listing.classes == ("brush_hair", "wave")
    assert listing.subsets == ("fold1-train", "fold1-test", "fold2-train", "fold2-test")
    assert subsets(listing) == {
        FILES[0]: ("fold1-train", "fold2-test"),
        FILES[1]: (),
        FILES[2]: ("fold1-test", "fold2-test"),
        FILES[3]: ("fold2-train",),
    }
    assert listing.notes == ()
    assert {source.location for source in listing.sources} == {data / "videos" / name for name in FILES}
    assert {source.labels for source in listing.sources} == {("brush_hair",), ("wave",)}


def test_gaps(data):
    lists = data / "testTrainMulti_7030_splits"
    (lists / "wave_test_split2.txt").unlink()
    (lists / "wave_test_split1.txt").write_text("x.avi 3\nx.avi 1\nx.avi 2\ngone.avi 1\n\n")
    (data / "videos" / "wave.rar").touch()
    listing = list_hmdb51(data / "videos", lists)
    assert {source.name: source.rejection[0] for source in listing.sources if source.rejection} == {
        "line 1 of wave_test_split1.txt": "bad_annotation",
        "wave/x.avi": "bad_annotation",
        "wave/gone.avi": "source_not_found",
    }
    assert listing.notes == (
        "Fold 2 lacks the lists of 1 of 2 classes.",
        "1 file left out, for their names say they are no videos: wave.rar.",
        "1 video in no list, so in no subset: wave/a&b.avi.",
    )


def test_a_missing_video_keeps_its_place(data):
    def plan():
        return [(s.name, s.id, s.labels, s.subsets) for s in sorted(list_hmdb51(data).sources, key=lambda s: s.name)]

    before = plan()
    (data / "videos" / FILES[0]).unlink()
    assert plan() == before


NAME = st.text(st.characters(exclude_categories=["Cs", "Z", "C"], exclude_characters="/"), min_size=1, max_size=12)


@given(NAME, st.sampled_from([("0", "unused"), ("1", "train"), ("2", "test")]))
def test_lines_come_back(file, part):
    videos = {}
    assert add_line(videos, f"{file}.avi {part[0]}", "wave", 3, "list line 1") is None
    assert videos[("wave", file)].parts == {3: part[1]}


@given(st.text())
def test_any_line_is_taken_or_refused(line):
    videos = {}
    assert (add_line(videos, line, "wave", 1, "list line 1") is None) == (len(videos) == 1)


def test_real_clips(real_clips: Path):
    listing = list_hmdb51(real_clips / "hmdb51" / "videos")
    assert subsets(listing) == {"wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi": ("fold1-train",)}
    assert listing.subsets == ("fold1-train", "fold1-test")
