"""The store of features: what is written comes back, and what is missing, cut or damaged is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.evaluate.feature_store import Block, create_store, open_store, pack_labels, remove_store
from avid_pipeline.shards_spec.storage import open_storage

COUNT, CLIPS = 600, 2
DIMS = {"video": 3, "audio.pool": 2}


def create(root, dtype="float32", **changes):
    arguments = {"index": np.arange(10, 10 + COUNT), "clips": CLIPS, "dims": DIMS, "num_classes": 11}
    return create_store(root, **arguments | changes, description={"model": "this"}, dtype=dtype)


def features_of(block, dtype=np.float32):
    rows = np.arange(block.start, block.stop, dtype=np.float32)[:, None] + 1000 * block.clip
    return {name: (rows + 0.1 * np.arange(dim)).astype(dtype) for name, dim in DIMS.items()}


def labels_of(block):
    return [(row % 11, 10) if row % 3 else () for row in range(block.start, block.stop)]


def fill(store):
    for block in store.missing():
        found = np.array([row != 7 or block.clip == 1 for row in range(block.start, block.stop)])
        store.write(block, features_of(block), labels_of(block), found)


def test_what_is_written_comes_back(tmp_path):
    root = open_storage(tmp_path)
    store = create(root)
    assert store.blocks() == [Block(c, s, min(s + 256, COUNT)) for c in range(2) for s in (0, 256, 512)]
    assert store.missing() == store.blocks()
    fill(store)
    assert store.missing() == []
    again = open_store(root)
    assert again.names == tuple(DIMS)
    assert again.index.tolist() == list(range(10, 10 + COUNT))
    for clip in range(CLIPS):
        expected = features_of(Block(clip, 0, COUNT))
        for name in DIMS:
            assert np.array_equal(again.features(name, clip), expected[name])
            assert np.array_equal(again.features(name, clip, slice(300, 303)), expected[name][300:303])
    assert again.found().sum() == 2 * COUNT - 1
    assert not again.found()[0, 7]
    labels = labels_of(Block(0, 0, COUNT))
    assert again.labels().tolist() == [row[0] if row else -1 for row in labels]
    bits = np.unpackbits(again.label_sets(), axis=1, count=11)
    assert [tuple(np.flatnonzero(row)) for row in bits] == [tuple(sorted(set(row))) for row in labels]


def test_half_precision_is_stored_as_such(tmp_path):
    store = create(open_storage(tmp_path), dtype="float16")
    fill(store)
    assert store.features("video", 0).dtype == np.float16
    assert np.allclose(store.features("video", 0), features_of(Block(0, 0, COUNT))["video"], rtol=1e-3)


def test_one_that_was_begun_is_taken_up(tmp_path):
    root = open_storage(tmp_path)
    store = create(root)
    first = store.blocks()[0]
    store.write(first, features_of(first), labels_of(first), np.ones(256, dtype=bool))
    assert create(root).missing() == store.blocks()[1:]
    with pytest.raises(StorageError, match="5 of 6 parts are not there yet"):
        open_store(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": 3}, "clips was 2 and is now 3"),
        ({"dims": {"video": 3}}, "features was"),
        ({"dtype": "float16"}, "dtype was 'float32' and is now 'float16'"),
        ({"index": np.arange(5)}, "instances was 600 and is now 5"),
    ],
)
def test_another_description_is_refused_with_the_difference(tmp_path, changes, message):
    root = open_storage(tmp_path)
    create(root)
    with pytest.raises(ConfigError, match=f"holds features of something else: {message}"):
        create(root, **changes)


def test_a_store_that_was_cut_short_while_it_was_made_is_made_again(tmp_path):
    root = open_storage(tmp_path)
    create(root)
    root.delete("index/c/0")
    assert len(create(root, clips=3).blocks()) == 9


def test_a_group_of_somebody_else_is_left_alone(tmp_path):
    import zarr

    zarr.create_group(str(tmp_path), attributes={"mine": 1})
    with pytest.raises(StorageError, match="something else is here already"):
        create(open_storage(tmp_path))
    assert dict(zarr.open_group(str(tmp_path), mode="r").attrs) == {"mine": 1}


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("features/video/c/1/1/0", "flip", "features/video: clip 1 is missing or damaged"),
        ("features/video/c/1/1/0", "cut", "features/video: clip 1 is missing or damaged"),
        ("features/video/c/1/1/0", "remove", "a part of clip 1 is missing"),
    ],
)
def test_damage_is_named(tmp_path, file, damage, message):
    root = open_storage(tmp_path)
    fill(create(root))
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flip" else b"")
    store = open_store(root)
    assert np.isfinite(store.features("video", 0)).all()
    with pytest.raises(StorageError, match=message):
        store.features("video", 1)


def test_no_store_and_no_such_feature_are_clear_errors(tmp_path):
    root = open_storage(tmp_path)
    with pytest.raises(StorageError, match="found none that can be read"):
        open_store(root)
    fill(create(root))
    with pytest.raises(ConfigError, match=r"has no features audio; it has video, audio\.pool"):
        open_store(root).features("audio", 0)


def test_removing_leaves_what_is_not_ours(tmp_path):
    root = open_storage(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "mine.csv").write_text("mine")
    fill(create(root))
    remove_store(root)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "labels" / "mine.csv"]
    fill(create(root))
    assert open_store(root).found().any()


def test_on_an_object_store(make_bucket):
    bucket = make_bucket()
    root = open_storage(f"{bucket.url}/features", options=bucket.options)
    fill(create(root))
    store = open_store(root)
    assert np.array_equal(store.features("video", 1), features_of(Block(1, 0, COUNT))["video"])


@given(
    st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.sets(st.integers(0, c - 1)), min_size=1)))
)
def test_sets_of_labels_survive_packing(case):
    classes, sets = case
    packed = pack_labels([tuple(sorted(each)) for each in sets], -(-classes // 8))
    bits = np.unpackbits(packed, axis=1, count=classes)
    assert [set(np.flatnonzero(row).tolist()) for row in bits] == sets
