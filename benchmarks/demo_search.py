"""The demo's search: the same grid of finetuning and playing settings for LAPA and for Scratch.

    lapa demo --seed 0 --output outputs/search          # the seed of the search; the reported ones are 1 to 5
    python benchmarks/demo_search.py --run outputs/search

Plays start states that no reported number uses, and prints one row per setting.
"""

import argparse
import itertools
from pathlib import Path
from unittest import mock

from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_settings import EVALUATION_SEEDS, DemoSettings, PlayingSettings
from lapa.evaluation.demo_tokenizer import build_tokenizer, simulator_phrases
from lapa.evaluation.rollout import outcomes_by_family
from lapa.evaluation.statistics import success_table
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor

SEARCH_EVALUATION_SEEDS = EVALUATION_SEEDS + 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a finished `lapa demo --seed 0`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--rollouts-per-family", type=int, default=40)
    args = parser.parse_args()
    settings = DemoSettings()
    labelled = stages.Recording.load(args.run / "labelled.npz")
    tokenizer = build_tokenizer(args.run / "search-tokenizer.model", simulator_phrases())
    config = stages.policy_config(settings, len(tokenizer))
    episodes = [
        (family, SEARCH_EVALUATION_SEEDS + index)
        for family in settings.families
        for index in range(args.rollouts_per_family)
    ]
    print("| method | learning rate | temperature | " + " | ".join(settings.families) + " | all |")
    print("|---|---|---|" + "---|" * (len(settings.families) + 1))
    for method, rate in itertools.product(("lapa", "scratch"), args.learning_rates):
        folder = args.run / f"search-{method}-{rate}"
        processor = LapaProcessor.from_config(config, LapaImageProcessor(size=settings.image_size), tokenizer)
        pretrained = args.run / "pretrained" if method == "lapa" else None
        playing = PlayingSettings(rate, 0.0)
        stages.finetune(settings, playing, args.seed, labelled, processor, folder, pretrained)
        for temperature in args.temperatures:
            with mock.patch.object(stages, "evaluation_episodes", lambda _: episodes):
                playing = PlayingSettings(rate, temperature)
                rollouts = stages.play_policy(settings, playing, args.seed, folder, [])
            table = success_table(outcomes_by_family(rollouts))
            cells = [*table["families"].values(), table["pooled"]]
            shares = " | ".join(f"{cell['successes']}/{cell['rollouts']}" for cell in cells)
            print(f"| {method} | {rate:g} | {temperature:g} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
