import pytest

from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings, resolve_modalities
from avid_pipeline.config import parse_config
from avid_pipeline.errors import ConfigError, ManifestError
from avid_pipeline.shards_spec.manifest import WITH_AUDIO
from avid_pipeline.shards_spec.reader import open_dataset

BOTH = ("video", "audio")


@pytest.fixture(scope="module")
def manifest(small_dataset):
    return open_dataset(small_dataset).manifest


def some_silent(manifest, **subsets):
    """A data set of ten samples, of which the third and the last have no sound."""
    ranges = {WITH_AUDIO: ((0, 2), (3, 9)), **subsets}
    return manifest.model_copy(update={"modalities": ("video",), "subsets": ranges})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "centre"}, "crop: Input should be 'multi_scale' or 'resize'"),
        ({"area": [0.5, 0.2]}, r"area: .*0 < lowest <= highest <= 1, found \[0.5, 0.2\]"),
        ({"area": [0.5, 1.2]}, "area: "),
        ({"ratio": [0, 1]}, "ratio: "),
        ({"crop": "resize", "area": [0.2, 1.0]}, "area and ratio have no meaning with crop: resize"),
        ({"crop": "resize", "ratio": [1.0, 1.0]}, "area and ratio have no meaning with crop: resize"),
        ({"volume": 1.0}, "volume: "),
        ({"hue": 0.6}, "hue: "),
        ({"flip": 1.1}, "flip: "),
    ],
)
def test_what_an_augmentation_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(settings, AugmentationSettings, "test.yaml")


@pytest.mark.parametrize("crop", ["multi_scale", "resize"])
def test_settings_survive_being_written_down(crop):
    settings = AugmentationSettings(crop=crop, brightness=0.2)
    assert parse_config(settings.model_dump(mode="json"), AugmentationSettings, "checkpoint") == settings


@pytest.mark.parametrize("modalities", [[], ["audio", "video"], ["video", "video"], ["text"]])
def test_modalities_that_are_none(modalities):
    with pytest.raises(ConfigError, match="modalities"):
        parse_config({"modalities": modalities}, ClipSettings, "test.yaml")


def test_a_clip_has_at_least_one_frame():
    assert ClipSettings().num_frames == 8
    assert ClipSettings(video_seconds=0.01).num_frames == 1


def test_what_every_sample_has_is_read(manifest):
    for found in (BOTH, ("video",), ("audio",)):
        there = manifest.model_copy(update={"modalities": found})
        resolved = resolve_modalities(ClipSettings(crop_size=32), there)
        assert resolved == ClipSettings(crop_size=32, modalities=found)
    backwards = manifest.model_copy(update={"modalities": ("audio", "video")})
    assert resolve_modalities(ClipSettings(), backwards).modalities == BOTH


@pytest.mark.parametrize("wanted", ["video", "audio"])
def test_less_can_be_asked_for(manifest, wanted):
    assert resolve_modalities(ClipSettings(modalities=(wanted,)), manifest).modalities == (wanted,)


def test_subsets_with_sound_have_both(manifest):
    kept = some_silent(manifest, fold1=((0, 2), (4, 6)), fold2=((0, 3),), nothing=())
    for subset, expected in (
        (None, ("video",)),
        (WITH_AUDIO, BOTH),
        ("fold1", BOTH),
        ("fold2", ("video",)),
        ("nothing", ("video",)),
    ):
        assert resolve_modalities(ClipSettings(), kept, subset).modalities == expected, subset


def test_what_samples_lack_cannot_be_asked_for(manifest):
    wanted = ClipSettings(modalities=BOTH)
    kept = some_silent(manifest, fold2=((0, 3),))
    with pytest.raises(ConfigError, match=r"kinetics.* has, which is video, found also audio; .*subset with-audio"):
        resolve_modalities(wanted, kept)
    with pytest.raises(ConfigError, match="the subset fold2 has, which is video, found also audio"):
        resolve_modalities(wanted, kept, "fold2")
    only_sound = manifest.model_copy(update={"modalities": ("audio",)})
    with pytest.raises(ConfigError, match=r"has, which is audio, found also video$"):
        resolve_modalities(wanted, only_sound)
    with pytest.raises(ManifestError, match="subset fold9: "):
        resolve_modalities(wanted, kept, "fold9")
