"""The verdict on quantizers that were really trained, for long enough or not, on the tabletop."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.mixture import FramePairSource
from lapa.data.schema import Episode
from lapa.evaluation.demo_settings import DemoSettings
from lapa.evaluation.quantizer_report import measure_quantizer
from lapa.evaluation.quantizer_report_measures import Runner
from lapa.evaluation.quantizer_report_verdict import LEVELS
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer

pytest.importorskip("gymnasium")


class TabletopSource(EpisodeSource):
    """Recorded episodes, with the end effector's motion as their action."""

    cameras = ("image",)
    name = embodiment = "tabletop"

    def __init__(self, recording) -> None:
        self.recording = recording

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return (SourceShard("all", len(self.recording.lengths)),)

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for number in self.wanted(shard, episodes):
            start, length = self.recording.starts[number], int(self.recording.lengths[number])
            rows = slice(start, start + length)
            action = np.zeros((length, 2), np.float32)
            action[:-1] = np.diff(self.recording.effector[rows], axis=0)
            yield (
                number,
                Episode(str(number), self.name, {"image": self.recording.frames[rows]}, length, action=action),
            )


@pytest.mark.slow
def test_training_makes_a_quantizer_better_by_the_verdict(tmp_path):
    from lapa.evaluation.demo_stages import record, train_quantizer

    settings = DemoSettings()
    train = record(settings, {"reach": 400}, 0, "arm", False)
    held_out = TabletopSource(record(settings, {"reach": 60}, 90_000_000, "arm", False))
    reports = []
    for steps in (20, 600):
        train_quantizer(replace(settings, quantizer_steps=steps), 1000, train, tmp_path / str(steps))
        runner = Runner(LapaQuantizer.from_pretrained(tmp_path / str(steps)).eval())
        source = FramePairSource(held_out, frame_gap=settings.frame_gap)
        reports.append(measure_quantizer(runner, [source], max_pairs=400).report)
    under_trained, trained = (report["verdict"] for report in reports)
    assert under_trained["level"] == "bad"
    assert LEVELS.index(trained["level"]) >= LEVELS.index("usable")
    assert trained["score"] > under_trained["score"]
    assert reports[1]["probe"]["linear"]["r2"]["value"] > 0.3
    assert reports[1]["reconstruction"]["gain_from_codes"]["ci95"][0] > 0
