"""Command line of the export: `lapa export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = "Writes weights, remote code, model card and finetuning script to a folder that loads without lapa."
_EPILOG = """\
examples:
  lapa export --model outputs/policy --output outputs/hub
  lapa export --model outputs/policy --output outputs/hub --push-to NAME/my-policy --license mit --dataset NAME/my-data
"""


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of `lapa export`."""
    parser = parser_class(
        "lapa export", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a policy, quantizer or vision tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--push-to", metavar="NAME", help="Hub repository to upload the folder to")
    parser.add_argument("--private", action="store_true", help="make a new Hub repository private")
    parser.add_argument("--license", help="licence you give the weights, such as apache-2.0 or mit")
    parser.add_argument("--dataset", action="append", default=[], help="data set it was trained on; may be repeated")
    parser.add_argument("--base-model", help="Hub repository of the model it was finetuned from")
    return parser


def run(args: argparse.Namespace) -> int:
    """Exports, uploads on request, and prints what was written."""
    from lapa.hub_cards.card import CardOptions
    from lapa.hub_cards.export import check_upload, export, upload

    if args.push_to is not None:
        check_upload(args.push_to)
    elif args.private:
        raise ValueError("`--private` is about an upload; say --push-to with it.")
    options = CardOptions(
        license=args.license, datasets=tuple(args.dataset), base_model=args.base_model, repo_id=args.push_to
    )
    folder = export(args.model, args.output, options)
    files = list(folder.iterdir())
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")
    if args.push_to is not None:
        print(upload(folder, args.push_to, private=args.private or None))
    return 0


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Runs `lapa export`."""
    return run(make_parser(parser_class).parse_args(arguments))
