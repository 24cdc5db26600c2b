"""Converting single files without a job."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from avid_pipeline.preprocess.convert import Converted, PlannedSource, convert
from avid_pipeline.preprocess.fetch import Fetcher
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Segment, Source
from avid_pipeline.shards_spec.manifest import Parameters


class ConvertFile(Protocol):
    """Converts one file; see the fixture ``convert_file``."""

    def __call__(
        self,
        path: Path,
        settings: Settings | None = None,
        parameters: Parameters | None = None,
        segment: Segment | None = None,
    ) -> Converted:
        """What :func:`avid_pipeline.preprocess.convert.convert` gives for the file."""


@pytest.fixture
def convert_file(tmp_path_factory: pytest.TempPathFactory) -> ConvertFile:
    """Convert one local file into a fresh folder, with default settings and parameters where none are given."""

    def converted(
        path: Path,
        settings: Settings | None = None,
        parameters: Parameters | None = None,
        segment: Segment | None = None,
    ) -> Converted:
        settings = settings or Settings()
        planned = PlannedSource(Source(name=path.name, location=path, id="id", segment=segment), "key", ())
        folder = tmp_path_factory.mktemp("converted")
        fetcher = Fetcher({}, settings.limits)
        return convert(planned, parameters or Parameters(), settings, fetcher, folder)

    return converted


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., None]:
    """Run ffmpeg with the given arguments; it must succeed."""

    def run(*arguments: object) -> None:
        command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *map(str, arguments)]
        subprocess.run(command, check=True, timeout=120)

    return run
