"""Mixtures as a whole: Open X-Embodiment by its published weights, and the recipes as they stand."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from shared_files import shared_path
from test_open_x import write_data_set
from video_files import encode_video, moving_frames

from lapa.data.mixture import FramePairStream
from lapa.data.open_source import open_mixture
from lapa.data.open_x import open_x_dataset, open_x_mixture
from lapa.data.pair_filters import BlankFrames, ShotCuts, StaticPairs
from lapa.training import scripts

RECIPES = Path(scripts.__file__).parent / "recipes"
PRESENT = ("fractal20220817_data", "taco_play", "bc_z")


@pytest.fixture(scope="module")
def open_x(tmp_path_factory):
    """Three of the data sets, one in the folder of its version, one without, one under a version that is not the table's."""
    root = tmp_path_factory.mktemp("mixtures")
    write_data_set(root / "open_x" / "fractal20220817_data" / "0.1.0", "fractal20220817_data")
    write_data_set(root / "open_x" / "taco_play", "taco_play")
    write_data_set(root / "open_x" / "bc_z" / "0.1.0", "bc_z")
    # The newest is not the one to take.
    write_data_set(root / "open_x" / "bc_z" / "1.0.0", "bc_z")
    return root


def test_open_x_by_its_published_weights(open_x):
    shutil.copy(RECIPES / "mixture_open_x.yaml", open_x)
    sources = open_mixture(open_x / "mixture_open_x.yaml", frame_gap=1)
    assert [pair.source.dataset.name for pair in sources] == list(PRESENT)
    assert [pair.weight for pair in sources] == [open_x_dataset(name).weight for name in PRESENT]
    assert [pair.source.folder.version for pair in sources] == ["0.1.0"] * 3
    assert sources[1].chosen_camera == "rgb_static"
    warning = sources[0].source.warnings[-1]
    assert warning.startswith("24 data sets of magic_soup_plus are left out, which ")
    assert all((row.name in warning) != (row.name in PRESENT) for row in open_x_mixture("magic_soup_plus"))
    seen = {example["source"] for example in FramePairStream(sources).first(60)}
    assert seen == {f"{name}/train" for name in PRESENT}


def test_what_open_x_lacks_is_one_error(open_x):
    root = str(open_x / "open_x")
    with pytest.raises(ValueError) as error:
        open_mixture([{"open_x": "magic_soup_plus", "path": root}])
    assert "lacks 24 of the 27 data sets of magic_soup_plus (`allow_missing: true` leaves them out): kuka, " in str(
        error.value
    )
    assert "droid" in str(error.value) and "taco_play" not in str(error.value)
    for entry, message in (
        ({"path": str(open_x), "allow_missing": True}, "lacks 27 of the 27 data sets of magic_soup_plus: fractal"),
        ({"path": root, "open_x": "rtx"}, "`open_x` must be one of magic_soup_plus, got 'rtx'"),
        ({"path": root, "allow_missing": "yes"}, "`allow_missing` must be true or false, got 'yes'"),
        ({"path": root, "allow_missing": True, "weight": 0}, "`weight` must be a number above 0, got 0"),
        ({}, "`open_x` needs the `path`"),
        ({"path": root, "allow_missing": True, "camera": "wrist"}, "fractal20220817_data: `cameras` has 'wrist'"),
        ({"path": root, "allow_missing": True, "colour": 1}, "`colour` is no option"),
    ):
        with pytest.raises(ValueError, match=message):
            open_mixture([{"open_x": "magic_soup_plus", **entry}])


def test_options_are_for_all_of_it(open_x):
    entry = {"open_x": "magic_soup_plus", "path": str(open_x / "open_x"), "allow_missing": True, "weight": 3}
    sources = open_mixture([{**entry, "camera": "primary", "filters": ["static"], "frame_gap_seconds": 1.0}])
    assert [pair.weight for pair in sources] == [3 * open_x_dataset(name).weight for name in PRESENT]
    assert [pair.camera for pair in sources] == ["image", "rgb_static", "image"]
    assert all(pair.filters == (StaticPairs(),) and pair.gap.seconds == 1 for pair in sources)


def test_the_recipe_of_bridge(tmp_path):
    shutil.copytree(shared_path("data/bridge_rlds/1.0.0"), tmp_path / "bridge_dataset" / "1.0.0")
    shutil.copy(RECIPES / "mixture_bridge.yaml", tmp_path)
    main, other = open_mixture(tmp_path / "mixture_bridge.yaml")
    assert (main.chosen_camera, main.weight, other.chosen_camera, other.weight) == ("image_0", 2, "image_1", 1)
    assert main.gap.seconds == 0.6 and main.filters == (StaticPairs(),)
    assert len(FramePairStream([main, other], 32).first(5)) == 5


def test_the_recipe_of_something_something(tmp_path):
    clips = tmp_path / "something_something" / "20bn-something-something-v2"
    clips.mkdir(parents=True)
    (clips / "7.webm").write_bytes(encode_video(moving_frames(30), "libvpx-vp9", "webm"))
    labels = [{"id": "7", "label": "pushing a block", "template": "Pushing [something]", "placeholders": ["a block"]}]
    (clips.parent / "something-something-v2-train.json").write_text(json.dumps(labels))
    shutil.copy(RECIPES / "mixture_something_something.yaml", tmp_path)
    (source,) = open_mixture(tmp_path / "mixture_something_something.yaml")
    assert source.gap.seconds == 2.4 and source.filters == (StaticPairs(), ShotCuts(), BlankFrames())
    assert source.source.num_episodes == 1


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("mixture_*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_where_the_data_go(recipe):
    text = recipe.read_text()
    for entry in yaml.safe_load(text):
        assert f"`{entry['path'].split('/')[0]}`" in text
