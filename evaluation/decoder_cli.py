"""`lapa train-decoder`: make a latent-pretrained model act by decoding its codes, without finetuning it.

    lapa label         --model out/quantizer --data RLDS_DIR --output out/labels
    lapa train-decoder --labels out/labels --model out/pretrained --output out/policy

For few labelled episodes. The labels must be of the quantizer whose codes the model learned; their rows with an action train a small
decoder from codes to actions. The folder that is written holds the model as it is, and the decoder in `action_decoder/`;
`lapa evaluate --policy` plays it.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lapa.data.label_table import LabelFolder

COLUMNS = ("episode_id", "unnorm_key", "latent_action_codes", "action")


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa train-decoder`."""
    parser = parser_class(
        prog="lapa train-decoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, required=True, help="folder that `lapa label` wrote, with actions")
    parser.add_argument("--model", type=Path, required=True, help="folder of a latent-pretrained model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--unnorm-key", help="take only the rows of this key; needed where labels have several")
    parser.add_argument("--steps", type=int, default=500, help="of the optimizer (default 500)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per step (default 64)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest rate (default 0.003)")
    parser.add_argument(
        "--held-out-share", type=float, default=0.1, help="share of the episodes that is measured on (default 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and order")
    return parser


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run with command-line arguments."""
    args = make_parser(parser_class).parse_args(arguments)
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.data.label_table import LabelFolder
    from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
    from lapa.evaluation.baselines.folders import refuse_foreign
    from lapa.evaluation.baselines.latent_decoder_policy import POLICY, write_latent_decoder_policy
    from lapa.evaluation.baselines.latent_decoder_training import LatentDecoderSettings, train_latent_decoder
    from lapa.evaluation.baselines.training import Schedule
    from lapa.evaluation.policies import DECODER_FOLDER
    from lapa.hub_cards.card import RESULTS_NAME

    if not (args.model / "config.json").is_file():
        raise ValueError(f"`model` ({args.model}) is no model folder: it has no config.json.")
    model = LapaConfig.from_pretrained(args.model)
    if model.has_action_segment and not model.keep_latent_head:
        raise ValueError(f"`model` ({args.model}) is finetuned to predict actions: name the latent-pretrained model.")
    refuse_foreign(args.output, DECODER_FOLDER, POLICY)
    labels = LabelFolder(args.labels)
    settings = labels.manifest.settings
    if model.quantizer_hash not in (None, settings.quantizer_hash):
        raise ValueError(
            f"`labels` ({args.labels}) are of the quantizer {settings.quantizer_hash[:12]}, `model` learned the codes of "
            f"{model.quantizer_name or 'another one'}, {model.quantizer_hash[:12]}: the same code means something else."
        )
    codes, actions, episode = read_steps(labels, args.unnorm_key)
    config = LatentActionDecoderConfig(
        codebook_size=settings.codebook_size,
        num_latent_tokens=settings.num_latent_tokens,
        action_dim=actions.shape[1],
        quantizer_hash=settings.quantizer_hash,
        quantizer_name=model.quantizer_name,
    )
    training = LatentDecoderSettings(
        Schedule(args.steps, args.batch_size, args.learning_rate, weight_decay=0.01),
        args.held_out_share,
        keep_best=args.held_out_share > 0,
    )
    decoder = args.output.with_name(f".{args.output.name}.decoder")
    train_latent_decoder(codes, actions, config, training, args.seed, decoder, episode)
    write_latent_decoder_policy(args.model, decoder, args.output)
    print(f"{len(codes)} steps of {len(np.unique(episode))} episodes, {actions.shape[1]}-dimensional actions")
    results = args.output / DECODER_FOLDER / RESULTS_NAME
    shutil.rmtree(decoder)
    for row in json.loads(results.read_text(encoding="utf-8"))["results"] if results.is_file() else ():
        print(f"R2 on {row['episodes']} held-out episodes: {row['value']:.3f} (from true codes)")
    print(args.output)
    return 0


def read_steps(
    labels: "LabelFolder", unnorm_key: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[Any]]:
    """
    The rows that have an action.

    Args:
        labels: The folder.
        unnorm_key: Take only rows of this key.

    Returns:
        Codes (num_steps, num_latent_tokens) int64, actions (num_steps, action_dim) float32, and episodes (num_steps,).

    Raises:
        ValueError: Labels without actions, rows of several keys without `unnorm_key`, actions of several lengths.
        ReadError: A damaged file.
    """
    if not labels.manifest.settings.action:
        raise ValueError(f"`labels` ({labels.path}) have no column `action`: label without `--action false`.")
    rows: list[dict[str, Any]] = []
    for file in range(len(labels.files)):
        for table in labels.read_groups(file, range(labels.group_count(file)), COLUMNS):
            # Episodes of two sources may have one name.
            rows += [row | {"file": file} for row in table.to_pylist() if row["action"] is not None]
    keys = sorted({str(row["unnorm_key"]) for row in rows})
    if unnorm_key is not None:
        rows = [row for row in rows if row["unnorm_key"] == unnorm_key]
    elif len(keys) > 1:
        raise ValueError(f"`unnorm_key` must be given: `labels` ({labels.path}) have {', '.join(keys)}.")
    if not rows:
        of_key = (
            "" if unnorm_key is None else f" of `unnorm_key` {unnorm_key!r} (there is {', '.join(keys) or 'none'})"
        )
        raise ValueError(f"`labels` ({labels.path}) have no row with an action{of_key}.")
    lengths = sorted({len(row["action"]) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"`labels` ({labels.path}) have actions of {' and '.join(map(str, lengths))} numbers: name one robot's rows by "
            "`unnorm_key`."
        )
    episodes = {name: number for number, name in enumerate(dict.fromkeys(_episode(row) for row in rows))}
    return (
        np.array([row["latent_action_codes"] for row in rows], dtype=np.int64),
        np.array([row["action"] for row in rows], dtype=np.float32),
        np.array([episodes[_episode(row)] for row in rows]),
    )


def _episode(row: dict[str, Any]) -> tuple[int, str]:
    return row["file"], row["episode_id"]


__all__ = ["main", "make_parser", "read_steps"]
