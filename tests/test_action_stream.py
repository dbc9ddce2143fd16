"""Steps with actions as a stream: windows, instructions, what is left out, and the examples made of them."""

from dataclasses import replace

import numpy as np
import pytest
from memory_source import MemorySource
from shared_files import shared_path
from tiny_models import TINY_VISION_TOKENIZER

from lapa import LapaConfig, LapaImageProcessor, LapaProcessor, LapaTokenizer
from lapa.data.action_stream import ActionStepEncoder, ActionStepSource, ActionStepStream, ActionWindow
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.data.open_source import open_source
from lapa.data.schema import ReadError
from lapa.data.stream_loader import StreamLoader
from lapa.processing.image_augmentation_lapa import LapaImageAugmentation


class TalkingSource(MemorySource):
    """Episodes with as many instructions as their number, states, and actions that tell shard, episode and step."""

    def _episode(self, shard, number, length):
        episode = super()._episode(shard, number, length)
        marks = [[shard, number, step] for step in range(length)]
        return replace(
            episode,
            instructions=tuple(f"way {way}" for way in range(number)),
            action=np.array(marks, dtype=np.float32),
            proprio=None if number == 2 else np.array(marks, dtype=np.float32) / 10,
        )


def source(lengths=((3, 5, 4, 6), (2, 7)), **options):
    return ActionStepSource(TalkingSource("robot", lengths, **options), unnorm_key="robot")


def steps_of(stream):
    return sorted(tuple(example["action"].reshape(-1, 3)[0].astype(int).tolist()) for example in stream)


def test_every_step_with_an_action_and_an_instruction_once():
    stream = ActionStepStream([source()], repeat=False, buffer_size=4)
    wanted = [(0, 1, s) for s in range(5)] + [(0, 2, s) for s in range(4)] + [(0, 3, s) for s in range(6)]
    assert steps_of(stream) == sorted(wanted + [(1, 1, s) for s in range(7)])
    counts = stream.counts()["robot"]
    # Nobody said what to do in the first episode of each shard.
    assert counts.metrics() == {
        "steps": 22, "episodes": 6, "dropped_steps/no_instruction": 5, "skipped_episodes/no_instruction": 2,
    }  # fmt: skip
    example = next(iter(stream))
    shard, number, step = example["action"].astype(int).tolist()
    assert example["image"][0, 0].tolist() == [shard, number, step] and example["step"] == step
    assert example["unnorm_key"] == "robot" and example["example_id"] == f"robot {shard}/{number} step {step}"
    assert "proprio" not in example and "num_valid_steps" not in example
    silent = ActionStepStream([ActionStepSource(MemorySource("video", [[4, 4]]))], repeat=False)
    assert list(silent) == [] and silent.counts()["video"].skipped_groups == {"no_action": 2}
    blank = ActionStepStream([source(blank=[(0, 1)])], repeat=False)
    assert len(list(blank)) == 17 and blank.counts()["robot"].dropped_items["blank_camera"] == 5


@pytest.mark.parametrize("rule", ["drop", "repeat", "mask"])
def test_windows_of_actions(rule):
    stream = ActionStepStream(
        [
            source(
                [(0, 5)],
            )
        ],
        action_horizon=3,
        past_end=rule,
        repeat=False,
        on_error="skip",
        max_skipped=1,
    )
    windows = {example["step"]: example for example in stream}
    assert windows[1]["action"][:, 2].tolist() == [1, 2, 3] and windows[1]["action"].dtype == np.float32
    if rule == "drop":
        assert sorted(windows) == [0, 1, 2] and stream.counts()["robot"].dropped_items == {"past_end": 2}
        return
    assert sorted(windows) == [0, 1, 2, 3, 4] and not stream.counts()["robot"].dropped_items
    assert windows[3]["action"][:, 2].tolist() == [3, 4, 4] and windows[4]["action"][:, 2].tolist() == [4, 4, 4]
    valid = [windows[step].get("num_valid_steps") for step in range(5)]
    assert valid == ([3, 3, 3, 2, 1] if rule == "mask" else [None] * 5)
    short = ActionStepStream([source([(0, 2)])], action_horizon=3, repeat=False, on_error="skip", max_skipped=1)
    assert not list(short) and short.counts()["robot"].skipped_groups == {"unreadable": 1, "too_short": 1}


def test_an_instruction_is_drawn_for_each_step_and_epoch():
    options = {"repeat": False, "seed": 5}
    streams = [ActionStepStream([source([(1, 1, 1, 40)])], **options) for _ in range(3)]
    drawn = [{e["step"]: e["instruction"] for e in stream if e["episode_id"] == "0/3"} for stream in streams]
    assert drawn[0] == drawn[1] == drawn[2] and set(drawn[0].values()) == {"way 0", "way 1", "way 2"}
    # The next epoch draws anew; another order of the same steps would not.
    again = {e["step"]: e["instruction"] for e in streams[0] if e["episode_id"] == "0/3"}
    assert again != drawn[0] and again.keys() == drawn[0].keys()
    other = ActionStepStream([source([(1, 1, 1, 40)])], buffer_size=3, **options)
    assert {e["step"]: e["instruction"] for e in other if e["episode_id"] == "0/3"} == drawn[0]


def test_states_of_the_robot():
    stream = ActionStepStream([source()], use_proprio=True, repeat=False)
    examples = list(stream)
    assert all(np.allclose(example["proprio"], example["action"] / 10) for example in examples)
    assert len(examples) == 18 and stream.counts()["robot"].dropped_items["no_proprio"] == 4


def test_bad_arguments_and_actions():
    for options, message in (
        ({"action_horizon": 0}, "`action_horizon` must be at least 1, got 0"),
        ({"past_end": "clamp"}, "`past_end` must be one of drop, repeat, mask, got 'clamp'"),
        ({"steps_per_episode": 0}, "`steps_per_episode` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ActionStepStream([source()], **options)
    with pytest.raises(ValueError, match="`camera` 'left' is unknown; robot has front, wrist"):
        replace(source(), camera="left")
    assert ActionWindow(3).num_steps(2) == 0

    class Broken(TalkingSource):
        def _episode(self, shard, number, length):
            episode = super()._episode(shard, number, length)
            if number == 1:
                episode.action[2, 1] = np.inf
            return episode

    broken = [ActionStepSource(Broken("robot", [(3, 5, 4)]))]
    with pytest.raises(ReadError, match=r"episode '0/1' of robot: .*actions\[2, 1\] is inf"):
        list(ActionStepStream(broken, repeat=False))
    stream = ActionStepStream(broken, repeat=False, on_error="skip", max_skipped=0.5)
    assert steps_of(stream) == [(0, 2, step) for step in range(4)]
    assert stream.skipped()["robot"].num_skipped == 1 and stream.skipped()["robot"].num_seen == 3


def test_it_resumes_with_the_same_draws():
    def batches(stream):
        return iter(StreamLoader(stream, batch_size=3, num_workers=0))

    def key(batch):
        return [(e["example_id"], e["instruction"]) for e in batch]

    whole = batches(ActionStepStream([source()], seed=1, buffer_size=6))
    expected = [key(next(whole)) for _ in range(30)]
    begun = ActionStepStream([source()], seed=1, buffer_size=6)
    loader = batches(begun)
    assert [key(next(loader)) for _ in range(11)] == expected[:11]
    resumed = ActionStepStream([source()], seed=1, buffer_size=6)
    resumed.load_state_dict(begun.state_dict())
    loader = batches(resumed)
    assert [key(next(loader)) for _ in range(19)] == expected[11:]
    changed = ActionStepStream([source()], seed=1, buffer_size=6, action_horizon=2)
    with pytest.raises(ValueError, match="`action_horizon` of source 'robot' is 2, the state was made with 1"):
        changed.load_state_dict(begun.state_dict())


def tiny_processor():
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 2}
    config = LapaConfig(
        text_config=text, vision_vocab_size=34, action_vocab_size=8, vision_tokenizer_config=TINY_VISION_TOKENIZER
    )
    return LapaProcessor.from_config(config, LapaImageProcessor(size=8), tokenizer)


def bridge_stream(processor, augmentation=None, **options):
    bridge = open_source(shared_path("data/bridge_rlds/1.0.0"), cameras=["image_0"])
    actions = np.concatenate([episode.action for episode in bridge if episode.instructions])
    processor.fit_actions(actions, "bridge_dataset", num_bins=8)
    encoder = ActionStepEncoder(processor, augmentation)
    return bridge, ActionStepStream([ActionStepSource(bridge)], encoder, encoder.prepare, **options)


def test_examples_are_those_of_the_columns_in_memory():
    processor = tiny_processor()
    bridge, stream = bridge_stream(processor, repeat=False, steps_per_episode=1)
    episodes = {episode.episode_id: episode for episode in bridge}
    for example in stream.first(6):
        _, episode_id, _, step = example["example_id"].split()
        episode, step = episodes[episode_id], int(step)
        (expected,) = LabelledStepDataset(
            processor,
            [episode.instruction],
            images=[episode.frame("image_0", step)],
            actions=episode.action[step : step + 1],
            unnorm_key="bridge_dataset",
            example_ids=[example["example_id"]],
        )
        assert example.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(example[name], value), name


def test_augmentation_depends_on_the_step_and_the_epoch_alone():
    def pixels(buffer_size):
        _, stream = bridge_stream(
            tiny_processor(),
            LapaImageAugmentation(),
            repeat=False,
            steps_per_episode=1,
            seed=2,
            buffer_size=buffer_size,
        )
        epochs = [{e["example_id"]: e["pixel_values"] for e in stream} for _ in range(2)]
        return epochs

    first, second = pixels(4), pixels(20)
    for ours, theirs in zip(first, second):
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    both = first[0].keys() & first[1].keys()
    assert both and not any(np.array_equal(first[0][name], first[1][name]) for name in both)
