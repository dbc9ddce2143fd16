"""`lapa train-decoder`: make a latent-pretrained model act by decoding its codes, without finetuning it.

    lapa label         --model out/quantizer --data RLDS_DIR --output out/labels
    lapa train-decoder --labels out/labels --model out/pretrained --output out/policy

For few labelled episodes. The labels must be of the quantizer whose codes the model learned; their rows with an action train a small
decoder from codes to actions. The folder that is written holds the model as it is, and the decoder in `action_decoder/`;
`lapa evaluate --policy` plays it.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.data.label_manifest import LabelSettings
    from lapa.data.label_table import LabelFolder

COLUMNS = ("episode_id", "source", "unnorm_key", "latent_action_codes", "action")


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa train-decoder`."""
    parser = parser_class(
        prog="lapa train-decoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, required=True, help="folder that `lapa label` wrote, with actions")
    parser.add_argument("--model", type=Path, required=True, help="folder of a latent-pretrained model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--unnorm-key",
        help="take only the rows of this key; of rows without one the source; needed where labels have several",
    )
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
    from lapa.data.label_table import LabelFolder
    from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
    from lapa.evaluation.baselines.folders import refuse_foreign
    from lapa.evaluation.baselines.latent_decoder_policy import POLICY, write_latent_decoder_policy
    from lapa.evaluation.baselines.latent_decoder_training import LatentDecoderSettings, train_latent_decoder
    from lapa.evaluation.baselines.training import Schedule
    from lapa.hub_cards.card import RESULTS_NAME
    from lapa.hub_cards.checkpoint import DECODER_FOLDER

    training = LatentDecoderSettings(
        Schedule(args.steps, args.batch_size, args.learning_rate, weight_decay=0.01),
        args.held_out_share,
        keep_best=args.held_out_share > 0,
    )
    labels = LabelFolder(args.labels)
    settings, model = labels.manifest.settings, _read_model(args.model, labels.manifest.settings)
    refuse_foreign(args.output, DECODER_FOLDER, POLICY)
    if args.model.resolve() in (args.output.resolve(), *args.output.resolve().parents):
        raise ValueError(f"`output` ({args.output}) lies in `model` ({args.model}): name a folder beside it.")
    codes, actions, episode = read_steps(labels, args.unnorm_key)
    config = LatentActionDecoderConfig(
        codebook_size=settings.codebook_size,
        num_latent_tokens=settings.num_latent_tokens,
        action_dim=actions.shape[1],
        quantizer_hash=settings.quantizer_hash,
        quantizer_name=model.quantizer_name,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Seconds of work: begun anew by every run, and gone when it ends.
    with tempfile.TemporaryDirectory(prefix=f".{args.output.name}.", dir=args.output.parent) as folder:
        decoder = Path(folder) / DECODER_FOLDER
        train_latent_decoder(codes, actions, config, training, args.seed, decoder, episode)
        write_latent_decoder_policy(args.model, decoder, args.output)
    results = args.output / DECODER_FOLDER / RESULTS_NAME
    rows = json.loads(results.read_text(encoding="utf-8"))["results"] if results.is_file() else []
    print(f"{len(codes)} steps of {len(np.unique(episode))} episodes, {actions.shape[1]}-dimensional actions")
    for row in rows:
        print(
            f"R2 on {row['episodes']} held-out episodes: {row['value']:.3f} (from true codes, mean of the dimensions that vary)"
        )
    if any(row["value"] <= 0 for row in rows):
        print(
            "below 0: always playing the mean action would be as good. The codes do not tell the actions, or the steps are too few."
        )
    print(args.output)
    return 0


def _read_model(folder: Path, labels: "LabelSettings") -> "LapaConfig":
    """The config of a latent-pretrained model whose codes are those of the labels; anything else is refused."""
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.processing.processing_lapa import LapaProcessor

    if not (folder / "config.json").is_file():
        raise ValueError(f"`model` ({folder}) is no model folder: it has no config.json.")
    model = LapaConfig.from_pretrained(folder)
    if model.has_action_segment and not model.keep_latent_head:
        raise ValueError(f"`model` ({folder}) is finetuned to predict actions: name the latent-pretrained model.")
    for ours, theirs in (("latent_vocab_size", "codebook_size"), ("num_latent_tokens", "num_latent_tokens")):
        if getattr(model, ours) != getattr(labels, theirs):
            raise ValueError(
                f"`model` ({folder}) has `{ours}` {getattr(model, ours)}, the labels have `{theirs}` "
                f"{getattr(labels, theirs)}."
            )
    if model.quantizer_hash not in (None, labels.quantizer_hash):
        raise ValueError(
            f"the labels are of the quantizer {labels.quantizer_hash[:12]}, `model` ({folder}) learned the codes of "
            f"{model.quantizer_name or 'another one'}, {model.quantizer_hash[:12]}: the same code means something else."
        )
    LapaProcessor.from_pretrained(folder)
    return model


def read_steps(
    labels: "LabelFolder", unnorm_key: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[Any]]:
    """
    The rows that have an action.

    Args:
        labels: The folder.
        unnorm_key: Take only rows of this key; rows without one go by their source.

    Returns:
        Codes (num_steps, num_latent_tokens) int64, actions (num_steps, action_dim) float32, and episodes (num_steps,).

    Raises:
        ValueError: Labels without actions, rows of several keys without `unnorm_key`, actions of several lengths.
        ReadError: A damaged file.
    """
    if not labels.manifest.settings.action:
        raise ValueError(f"`labels` ({labels.path}) have no column `action`: label without `--action false`.")
    import pyarrow.compute as pc

    kept: list[tuple[NDArray[Any], NDArray[Any], list[tuple[int, str, str]]]] = []
    keys: set[tuple[str, str]] = set()
    for file in range(len(labels.files)):
        for table in labels.read_groups(file, range(labels.group_count(file)), COLUMNS):
            table = table.filter(pc.is_valid(table["action"]))
            # Rows without a key belong to their source.
            names = pc.if_else(pc.is_valid(table["unnorm_key"]), table["unnorm_key"], table["source"])
            keys |= set(names.unique().to_pylist())
            if unnorm_key is not None:
                table = table.filter(pc.equal(names, unnorm_key))
            if not len(table):
                continue
            episodes = [(file, source, name) for source, name in
                        zip(table["source"].to_pylist(), table["episode_id"].to_pylist())]  # fmt: skip
            kept.append((_matrix(table, "latent_action_codes"), _matrix(table, "action"), episodes))
    known = ", ".join(sorted(keys)) or "none"
    if unnorm_key is None and len(keys) > 1:
        raise ValueError(f"`unnorm_key` must be given: `labels` ({labels.path}) have {known}.")
    if not kept:
        of_key = "" if unnorm_key is None else f" of `unnorm_key` {unnorm_key!r} (there is {known})"
        raise ValueError(f"`labels` ({labels.path}) have no row with an action{of_key}.")
    lengths = sorted({actions.shape[1] for _, actions, _ in kept})
    if len(lengths) > 1:
        raise ValueError(
            f"`labels` ({labels.path}) have actions of {' and '.join(map(str, lengths))} numbers: name one robot's rows by "
            "`unnorm_key`."
        )
    numbers: dict[tuple[int, str, str], int] = {}
    episode = [numbers.setdefault(name, len(numbers)) for _, _, names in kept for name in names]
    return (
        np.concatenate([codes for codes, _, _ in kept]).astype(np.int64),
        np.concatenate([actions for _, actions, _ in kept]).astype(np.float32),
        np.array(episode),
    )


def _matrix(table: Any, column: str) -> NDArray[Any]:
    """A column of lists of one length, (num_rows, length)."""
    lists = table[column].combine_chunks()
    lengths = set(lists.value_lengths().to_pylist())
    if len(lengths) != 1:
        raise ValueError(f"`labels` have `{column}` of {' and '.join(map(str, sorted(lengths)))} numbers: name one robot's rows "
                         "by `unnorm_key`.")  # fmt: skip
    values: NDArray[Any] = lists.flatten().to_numpy()
    return values.reshape(len(lists), -1)


__all__ = ["main", "make_parser", "read_steps"]
