"""What a clip costs on the host besides reading, decoding and augmenting: microseconds, the best of five rounds.

python benchmarks/clip_overhead.py
"""

import io
import timeit
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tabulate import tabulate

from avid_pipeline.clips.augmentation import clip_generator, draw_augmentation
from avid_pipeline.clips.reading import TrainingChoice, read_clip
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.timing import draw_times
from avid_pipeline.shards_spec.sample import (
    AudioRecord,
    OriginalRecord,
    Sample,
    SampleRecord,
    VideoRecord,
    parse_record,
)

REPEATS, ROUNDS = 2000, 5
RECORD = SampleRecord(
    key="R6llTwEh07w",
    id="R6llTwEh07w",
    source="using segway/R6llTwEh07w.mp4",
    source_sha256="0" * 64,
    labels=(3,),
    duration=10,
    video=VideoRecord(frames=160, fps=16, width=340, height=256, start=0),
    audio=AudioRecord(frames=1000, frames_per_second=100, start=0),
    original=OriginalRecord(width=340, height=256, fps=30, video_codec="h264", audio_codec="aac"),
)


def main() -> None:
    """Print the table."""
    clip, augmentation = ClipSettings(), AugmentationSettings()
    choice, generator = TrainingChoice(0, 3, augmentation), clip_generator(0, 0, 0, 0)
    stored = io.BytesIO()
    np.save(stored, np.random.default_rng(0).integers(0, 256, (1000, 257), dtype=np.uint8))
    sample = Sample(RECORD, b"", stored.getvalue())
    text = RECORD.to_json()
    # A picture that is decoded later costs nothing here.
    silent = replace(sample, record=RECORD.model_copy(update={"audio": None}), spectrogram=None)
    steps: dict[str, Callable[[], object]] = {
        "parse the record": lambda: parse_record(text, "benchmark"),
        "make the generator": lambda: clip_generator(0, 3, 123_456, 1),
        "draw the times": lambda: draw_times(RECORD, clip, generator),
        "draw the augmentation": lambda: draw_augmentation(augmentation, 256, 340, generator),
        "all of a clip without sound": lambda: read_clip(silent, 123_456, 1, clip, choice, "later"),
        "all of a clip, its sound decoded": lambda: read_clip(sample, 123_456, 1, clip, choice, "later"),
    }
    rows = [(name, microseconds(step)) for name, step in steps.items()]
    print(tabulate(rows, headers=("step", "microseconds"), floatfmt=".1f"))


def microseconds(step: Callable[[], object]) -> float:
    """Time of one run."""
    return min(timeit.repeat(step, number=REPEATS, repeat=ROUNDS)) / REPEATS * 1e6


if __name__ == "__main__":
    main()
