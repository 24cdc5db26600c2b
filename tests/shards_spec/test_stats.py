import re

import numpy as np
import pytest
from click.testing import CliRunner

from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord
from avid_pipeline.shards_spec.statistics import choose, collect, tables
from avid_pipeline.shards_spec.storage import Storage, open_storage


def run(*arguments):
    result = CliRunner().invoke(main, ["stats", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def root(write_dataset, new_sample, tmp_path):
    """Thirty samples in three shards: 1 s to 30 s long, classes 0 (20 samples) and 2 (10), one without sound."""

    def sample(number):
        return new_sample(
            f"v{number}",
            video_bytes=1000 + number,
            with_audio=number != 29,
            duration=number + 1.0,
            labels=(0,) if number < 20 else (2,),
            original=OriginalRecord(width=320 if number % 3 else 640, height=240, fps=25.0, video_codec="h264"),
        )

    return write_dataset(tmp_path / "root", [[sample(10 * shard + place) for place in range(10)] for shard in range(3)])


def test_the_numbers_are_those_of_the_records(root):
    found = collect(open_dataset(root))
    assert sorted(found.durations) == list(range(1, 31))
    assert found.class_counts().tolist() == [20, 0, 10]
    assert sorted(found.sizes["mp4"]) == list(range(1000, 1030))
    assert found.sizes["spectrogram.npy"].count(0) == 1
    assert found.resolutions == {(320, 240): 20, (640, 240): 10}
    assert found.codecs == {"h264, no sound": 30}
    assert int(found.sample_bytes().sum()) == sum(sum(sizes) for sizes in found.sizes.values())


def test_the_table(root):
    output = run(root).output
    for pattern in (
        "samples +30\n",
        "duration in all +7.75 minutes",
        r"bytes of spectrograms +1.5 MB, 9\d\.\d%, in 29 samples",
        r"duration, s +1.00 +15.50 +15.50 +28.55 +30.00",
        r"bytes of video +1,000 +1,014 +1,014 +1,028 +1,029",
        r"sound after picture, s +0.000 +0.000",
        r"dog +20 +66.7%",
        r"bird +10 +33.3%",
        "1 of 3 classes without a sample",
        r"320x240 +20 +66.7%",
        r"h264, no sound +30 +100.0%",
    ):
        assert re.search(pattern, output), pattern


def test_many_classes_are_cut_to_the_ends(write_dataset, new_sample, tmp_path):
    shards = [[new_sample(f"v{label}-{copy}", labels=(label,)) for copy in range(label)] for label in range(1, 15)]
    root = write_dataset(tmp_path / "root", shards, classes=tuple(f"class {label}" for label in range(20)))
    ((_, _, rows),) = [table for table in tables(collect(open_dataset(root))) if table[0] == "class"]
    names = [row[0] for row in rows]
    assert names == [
        *(f"class {label}" for label in (14, 13, 12, 11, 10)),
        "… 4 more classes",
        *(f"class {label}" for label in (5, 4, 3, 2, 1)),
        "6 of 20 classes without a sample",
    ]


def test_several_labels_and_none(write_dataset, new_sample, tmp_path):
    samples = [new_sample("a", labels=(0, 1, 2)), new_sample("b", labels=()), new_sample("c", labels=(2,))]
    output = run(write_dataset(tmp_path / "root", [samples])).output
    assert re.search(r"samples without a class +1 +33.3%", output)
    assert re.search(r"labels a sample, mean +1.33", output)


def test_sound_that_starts_late(write_dataset, new_sample, tmp_path):
    late = AudioRecord(frames=200, frames_per_second=100, start=0.25)
    root = write_dataset(tmp_path / "root", [[new_sample("a", audio=late, duration=2.25)]])
    assert collect(open_dataset(root)).offsets == [0.25]


def test_drawn_samples_depend_on_the_seed_alone(root):
    reader = open_dataset(root)
    first, again, other = (choose(reader, 12, seed) for seed in (1, 1, 2))
    assert first == again != other
    indices = [shard.first_index + place for shard, places in first for place in places]
    assert indices == sorted(set(indices))
    assert indices == np.sort(np.random.default_rng(1).choice(30, size=12, replace=False)).tolist()
    drawn = collect(reader, sample=12, seed=1)
    assert sorted(drawn.durations) == sorted(index + 1.0 for index in indices)
    assert len(drawn.sizes["mp4"]) == 12
    assert re.match("samples +12 of 30\n", run(root, "--sample", "12").output)
    assert re.match("samples +30\n", run(root, "--sample", "1000").output)


def test_only_records_are_read(root):
    class CountingStorage(Storage):
        def read(self, name):
            counted.append((name, None))
            return super().read(name)

        def read_ranges(self, name, starts, lengths):
            counted.append((name, sum(lengths)))
            return super().read_ranges(name, starts, lengths)

    counted = []
    plain = open_storage(root)
    reader = ShardReader(CountingStorage(plain.url, plain.store, plain.local_root))
    found = collect(reader)
    shards = {name: size for name, size in counted if name.endswith(".tar")}
    assert len(shards) == 3
    assert sum(shards.values()) == sum(found.sizes["json"])
    assert [name for name, size in counted if size is None].count("manifest.json") == 1


def test_in_an_object_store(root, bucket):
    for path in root.iterdir():
        bucket.open("data").write(path.name, path.read_bytes())
    result = run(f"{bucket.url}/data", *bucket.arguments())
    assert result.exit_code == 0, result.output
    assert result.output == run(root).output


@pytest.mark.parametrize("kind", ["usual", "one", "no classes", "many classes", "odd names", "unknown originals"])
def test_the_picture(write_dataset, new_sample, tmp_path, kind):
    changes, classes, count = {}, ("dog", "cat"), 20
    if kind == "one":
        count = 1
    elif kind == "no classes":
        changes, classes = {"labels": ()}, ()
    elif kind == "many classes":
        classes = tuple(f"class {label}" for label in range(500))
    elif kind == "odd names":
        classes = ("$x_{$", "a very long name of a class that goes on and on", "Ünïcödé")
    elif kind == "unknown originals":
        changes = {"original": OriginalRecord()}
    samples = [new_sample(f"v{place}", duration=1.0 + place**3, **changes) for place in range(count)]
    root = write_dataset(tmp_path / "root", [samples], classes=classes, dataset="a $ b $_ c")
    out = tmp_path / "stats.png"
    result = run(root, "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {out}" in result.output
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["stats.png"]


def test_pictures_that_cannot_be_written(root, tmp_path):
    result = run(root, "--out", tmp_path / "stats.doc")
    assert result.exit_code == 1
    assert "expected an ending of png" in result.output
    result = run(root, "--out", tmp_path / "no" / "folder.png")
    assert result.exit_code == 1
    assert "cannot write the picture" in result.output
