import hashlib
import io
import json
import os
import re
import signal
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner

from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.sample import AudioRecord, Sample, VideoRecord
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate
from tests.processes import started, wait_until


def encode(
    frames=32, fps=16, gop=8, size=(64, 48), codec="libx264", pixel_format="yuv420p", b_frames=0, sound=False, skip=0
):
    """A small MP4 file; ``skip`` leaves a gap of so many frames after the tenth."""
    buffer = io.BytesIO()
    options = {"g": str(gop), "bf": str(b_frames), "sc_threshold": "0"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        if sound:  # Added before anything is muxed: the header is written then.
            voice = container.add_stream("aac", rate=24_000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            silence.rate = 24_000
            container.mux(voice.encode(silence))
            container.mux(voice.encode())
        for number in range(frames):
            levels = np.full((size[1], size[0], 3), 5 * number % 255, np.uint8)
            levels[:, : number % size[0]] = 200
            frame = av.VideoFrame.from_ndarray(levels, format="rgb24")
            frame.pts = number + (skip if number >= 10 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def array_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def problems_of(write_dataset, tmp_path):
    """Write a data set and return what validation says of it."""

    def problems(shards, *, deep=False, **fields):
        root = write_dataset(tmp_path / "root", shards, **fields)
        return validate(open_storage(root), deep=deep).problems

    return problems


def test_a_made_data_set_is_clean(problems_of, new_sample):
    assert problems_of([[new_sample("a"), new_sample("b")], [new_sample("c")]]) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_converted_data_set_is_clean_when_decoded(small_dataset, workers):
    seen, shards = [], []
    report = validate(
        open_storage(small_dataset),
        lambda shard: shards.append(shard.name),
        deep=True,
        workers=workers,
        on_sample=lambda: seen.append(1),
    )
    assert report.problems == []
    assert (report.samples, len(seen), len(shards)) == (10, 10, 3)


@pytest.mark.parametrize("deep", [False, True])
def test_a_data_set_in_an_object_store(small_dataset, bucket, deep):
    storage = bucket.open("data")
    for path in small_dataset.iterdir():
        if path.is_file():
            storage.write(path.name, path.read_bytes())
    report = validate(storage, deep=deep, workers=2)
    assert report.problems == []
    assert report.bytes == sum(path.stat().st_size for path in small_dataset.glob("*.tar"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (0, 3)}, "a: label 3: expected 0 to 2"),
        ({"duration": 2.5}, r"a: duration: expected 2.000 s.*found 2.500"),
        (
            {"video": VideoRecord(frames=32, fps=25, width=64, height=48, start=0)},
            "a: video: expected 16 frames/s, found 25",
        ),
        (
            {"video": VideoRecord(frames=32, fps=16, width=63, height=48, start=0)},
            "a: video: expected an even size.*found 63x48",
        ),
        (
            {"video": VideoRecord(frames=32, fps=16, width=600, height=400, start=0)},
            "a: video: .*at most 256, found 600x400",
        ),
        (
            {"audio": AudioRecord(frames=199, frames_per_second=100, start=0)},
            "a: spectrogram: expected 199 frames as in the record, found 200",
        ),
        (
            {"audio": AudioRecord(frames=200, frames_per_second=50, start=0), "duration": 4.0},
            "a: spectrogram: expected 100 frames/s, found 50",
        ),
        ({"video": None}, "a: the record and the members disagree about mp4"),
    ],
)
def test_a_record_that_does_not_fit(problems_of, new_sample, changes, message):
    problems = problems_of([[new_sample("a", **changes), new_sample("b")]])
    found = [problem for problem in problems if problem.startswith("shard-000000.tar: ")]
    assert len(found) == 1
    assert re.search(message, found[0])


def test_both_clocks_begin_at_zero(problems_of, new_sample):
    video = VideoRecord(frames=32, fps=16, width=64, height=48, start=0.5)
    audio = AudioRecord(frames=200, frames_per_second=100, start=0.7)
    (problem,) = problems_of([[new_sample("a", video=video, audio=audio, duration=2.7)]])
    assert "a: expected picture or sound to start at 0 s, found 0.5 s" in problem


def test_a_key_in_two_shards(problems_of, new_sample):
    (problem,) = problems_of([[new_sample("Key")], [new_sample("kEY")]])
    assert problem == "shard-000001.tar: key kEY was used in shard-000000.tar (case ignored)"


def test_the_quarantine_is_counted(write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path, [[new_sample("a")]], quarantined=2)
    entry = json.dumps({"source": "x", "reason": "unreadable", "detail": "y"})
    (root / "quarantine.jsonl").write_text(f"{entry}\n{entry}\n")
    assert validate(open_storage(root)).problems == []
    (root / "quarantine.jsonl").write_text(f"{entry}\nnonsense\n{{}}\n")
    problems = validate(open_storage(root)).problems
    assert any("line 2 is not JSON" in problem for problem in problems)
    assert any("line 3: expected an object" in problem for problem in problems)
    assert "quarantine.jsonl: expected 2 lines as in the manifest, found 3" in problems
    (root / "quarantine.jsonl").unlink()
    (problem,) = validate(open_storage(root)).problems
    assert "does not exist, expected 2 lines" in problem


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ({"with-audio": ((0, 1), (2, 3))}, None),
        ({}, "subsets.with-audio: is missing, though 2 samples have sound"),
        ({"with-audio": ((0, 2),)}, "first difference is instance 1, which is listed but has no sound"),
        ({"with-audio": ((0, 1),)}, "first difference is instance 2, which has sound but is not listed"),
    ],
)
def test_sound_that_only_some_samples_have(problems_of, new_sample, subsets, message):
    shards = [[new_sample("a"), new_sample("b", with_audio=False)], [new_sample("c")]]
    problems = problems_of(shards, modalities=("video",), subsets=subsets)
    assert len(problems) == (message is not None)
    assert all(message in problem for problem in problems)


def test_sound_that_is_promised_and_missing(problems_of, new_sample):
    problems = problems_of([[new_sample("a"), new_sample("b", with_audio=False)]])
    assert problems == ["shard-000000.tar: b: member spectrogram.npy is missing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 399}, "spectrogram_statistics.frames: expected 400 as in the shards, found 399"),
        ({"mean": [90.0] * 257}, "spectrogram_statistics.mean: expected -100 to 60 dB, found 90.0 at frequency 0"),
        ({"std": [0.0] * 256 + [-1.0]}, "spectrogram_statistics.std: expected 0 to 80 dB, found -1.0 at frequency 256"),
        (None, "spectrogram_statistics: expected those of 400 spectrogram frames, found null"),
    ],
)
def test_statistics_that_cannot_be(write_dataset, new_sample, tmp_path, change, message):
    root = write_dataset(tmp_path, [[new_sample("a"), new_sample("b")]])
    content = json.loads((root / "manifest.json").read_text())
    if change is None:
        content["spectrogram_statistics"] = None
    else:
        content["spectrogram_statistics"].update(change)
    (root / "manifest.json").write_text(json.dumps(content))
    (problem,) = validate(open_storage(root)).problems
    assert message in problem


def test_statistics_are_computed_again_when_deep(problems_of, write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path, [[sample_with_video(new_sample, encode())]])
    assert validate(open_storage(root), deep=True).problems == []
    content = json.loads((root / "manifest.json").read_text())
    content["spectrogram_statistics"]["mean"][7] += 0.5
    (root / "manifest.json").write_text(json.dumps(content))
    assert validate(open_storage(root)).problems == []
    (problem,) = validate(open_storage(root), deep=True).problems
    assert "spectrogram_statistics.mean: expected -37.255 dB at frequency 7" in problem


def sample_with_video(new_sample, data, **record):
    fields = {"frames": 32, "fps": 16, "width": 64, "height": 48, "start": 0.0} | record
    made = new_sample("a", video=VideoRecord(**fields), duration=max(2.0, fields["frames"] / fields["fps"]))
    return Sample(made.record, data, made.spectrogram)


@pytest.mark.parametrize(
    ("encoded", "record", "message"),
    [
        ({}, {"frames": 33}, "expected 33 frames as in the record, found 32"),
        ({}, {"width": 66}, "expected frames of 66x48, found 64x48 at frame 0"),
        ({"gop": 12}, {}, "expected a key frame every 8 frames, found none up to 8"),
        ({"fps": 15}, {}, "expected frame 1 at 0.0625 s, found 0.0667 s"),
        ({"skip": 2}, {}, "expected frame 10 at 0.6250 s, found 0.7500 s"),
        ({"pixel_format": "yuv444p"}, {}, "expected pixel format yuv420p, found yuv444p at frame 0"),
        ({"b_frames": 2}, {}, "expected no B-frames"),
        ({"codec": "mpeg4"}, {}, "expected codec h264, found mpeg4"),
        ({"sound": True}, {}, "expected one video stream and nothing else, found video, audio"),
    ],
)
def test_a_video_that_is_not_as_agreed(problems_of, new_sample, encoded, record, message):
    shards = [[sample_with_video(new_sample, encode(**encoded), **record)]]
    problems = problems_of(shards, deep=True)
    assert any(problem.startswith("shard-000000.tar: a: video") and message in problem for problem in problems)
    assert all("shard-000000.tar: a: video" in problem for problem in problems)


def test_the_codec_copy_promises_less(problems_of, new_sample):
    parameters = Parameters(video=VideoParameters(codec="copy", quality=0))
    fields = {"parameters": parameters, "parameters_fingerprint": parameters.fingerprint()}
    shards = [[sample_with_video(new_sample, encode(gop=30, skip=2, b_frames=2, fps=25), fps=25)]]
    assert problems_of(shards, deep=True, **fields) == []
    (problem,) = problems_of([[sample_with_video(new_sample, encode(), frames=31)]], deep=True, **fields)
    assert "expected 31 frames as in the record, found 32" in problem


@pytest.mark.parametrize("kind", ["cut", "flipped", "noise", "playlist"])
def test_a_video_that_cannot_be_decoded(problems_of, new_sample, tmp_path, kind):
    data = encode(frames=32)
    secret = tmp_path / "other.mp4"
    secret.write_bytes(data)
    start = data.index(b"mdat") + 4
    flipped = bytearray(data)
    flipped[start + 900 : start + 1100] = os.urandom(200)
    damaged = {
        "cut": data[: len(data) - 900],
        "flipped": bytes(flipped),
        "noise": os.urandom(1000),
        "playlist": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
    }[kind]
    problems = problems_of([[sample_with_video(new_sample, damaged)]], deep=True)
    assert problems
    assert all(problem.startswith("shard-000000.tar: a: video") for problem in problems)
    # The index and the checksums agree with the damaged content, so only decoding finds it.
    assert problems_of([[sample_with_video(new_sample, damaged)]]) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -300.0, 500.0])
def test_spectrogram_values_that_cannot_be(problems_of, new_sample, value):
    codes = np.full((200, 257), -40, np.float16)
    codes[150, 33] = value
    made = sample_with_video(new_sample, encode())
    audio = {"sample_rate": 24_000, "frames_per_second": 100, "storage": "float16"}
    parameters = Parameters.model_validate({"audio": audio})
    fields = {"parameters": parameters, "parameters_fingerprint": parameters.fingerprint()}
    shards = [[Sample(made.record, made.video, array_bytes(codes))]]
    assert problems_of(shards, **fields) == []
    (problem,) = problems_of(shards, deep=True, **fields)
    assert f"a: spectrogram: expected -100.1 to 80 dB, found {float(value)} at frame 150, frequency 33" in problem


def test_a_spectrogram_of_another_type(problems_of, new_sample):
    made = new_sample("a")
    half = Sample(made.record, made.video, array_bytes(np.full((200, 257), -40, np.float16)))
    (problem,) = problems_of([[half]])
    assert "a: spectrogram: expected uint8, found float16" in problem


def rewrite(root: Path, change) -> None:
    """Change the bytes of the first shard, and make size and checksum of the manifest fit."""
    shard = root / "shard-000000.tar"
    data = change(bytearray(shard.read_bytes()))
    shard.write_bytes(data)
    content = json.loads((root / "manifest.json").read_text())
    content["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (root / "manifest.json").write_text(json.dumps(content))


def with_header(data, offset, **fields):
    info = tarfile.TarInfo.frombuf(bytes(data[offset : offset + 512]), "utf-8", "strict")
    for name, value in fields.items():
        setattr(info, name, value)
    data[offset : offset + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: with_header(data, 0, type=b"2", linkname="/etc/passwd"), "a.mp4: expected a regular file"),
        (lambda data: with_header(data, 0, size=1 << 32), "a.mp4: its header says 4294967296 bytes, more than"),
        (lambda data: with_header(data, 0, mtime=5), "a.mp4: its header must have mtime 0"),
        (lambda data: with_header(data, 0, name="../b.mp4"), "the key has invalid characters"),
        (lambda data: with_header(data, 0, name="a.exe"), "a: unknown member exe"),
        (lambda data: with_header(data, 0, name="a.json"), "expected members once each and in the order"),
        (lambda data: data.rstrip(b"\0") + bytes(100), "the tar is damaged after 1 samples: "),
        (lambda data: data[:1500], "the tar is damaged after 0 samples: the header before byte 1500: truncated"),
        (lambda data: data[:20_000], "damaged after 0 samples: a.spectrogram.npy: its header says 51528 bytes, more"),
    ],
)
def test_a_tar_that_breaks_the_rules(write_dataset, new_sample, tmp_path, change, message):
    root = write_dataset(tmp_path, [[new_sample("a"), new_sample("b")]])
    rewrite(root, change)
    problems = validate(open_storage(root)).problems
    assert any(message in problem for problem in problems)
    assert not any("sha256" in problem for problem in problems)


def test_an_index_that_does_not_fit(write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path, [[new_sample("a"), new_sample("b")]])
    index = load_index(open_storage(root), "shard-000000.index.npz")
    offsets, crc32 = index.offsets.copy(), index.crc32.copy()
    offsets[0, 1] += 512
    crc32[1, 2] ^= 1
    (root / "shard-000000.index.npz").write_bytes(ShardIndex(index.keys, offsets, index.sizes, crc32).to_bytes())
    first, second = validate(open_storage(root)).problems
    assert "a.spectrogram.npy: the index says offset and size" in first
    assert "b.json: bytes" in second
    (root / "shard-000000.index.npz").write_bytes(b"nonsense")
    (problem,) = validate(open_storage(root)).problems
    assert "shard-000000.index.npz: is no shard index" in problem


def test_a_missing_shard_is_named_and_the_others_are_checked(write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path, [[new_sample("a")], [new_sample("b", labels=(9,))]])
    (root / "shard-000000.tar").unlink()
    problems = validate(open_storage(root)).problems
    assert any("shard-000000.tar: does not exist" in problem for problem in problems)
    assert any("b: label 9" in problem for problem in problems)


def test_the_command_names_every_problem(write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path, [[sample_with_video(new_sample, encode(gop=16))], [new_sample("b", labels=(9,))]])
    result = CliRunner().invoke(main, ["validate", "--deep", "--workers", "2", str(root)])
    assert result.exit_code == 1
    assert "shard-000000.tar: a: video: expected a key frame every 8 frames, found none up to 8" in result.output
    assert "shard-000001.tar: b: label 9: expected 0 to 2" in result.output
    assert "shard-000001.tar: b: video cannot be decoded" in result.output
    assert "3 problems in 2 samples" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing(write_dataset, new_sample, tmp_path, number):
    long = sample_with_video(new_sample, encode(frames=4000, size=(128, 96)), frames=4000, width=128, height=96)
    shards = [
        [
            Sample(long.record.model_copy(update={"key": f"{part}-{place}"}), long.video, long.spectrogram)
            for place in range(40)
        ]
        for part in "ab"
    ]
    root = write_dataset(tmp_path / "root", shards)
    command = [sys.executable, "-m", "avid_pipeline.shards_spec.cli", "validate", "--deep", "--workers", "2", str(root)]
    with started(*command, merge=True) as process:
        # The command, multiprocessing's tracker and two workers; then all are at work.
        process.wait_until(lambda: len(process.family()) >= 4)
        process.signal(number, group=number == signal.SIGINT)
        assert process.wait() == (1 if number == signal.SIGINT else -signal.SIGKILL)
        assert "Traceback" not in process.stdout
        wait_until(lambda: not process.family())
