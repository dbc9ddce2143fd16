"""`lapa convert`: the command line of the conversions. Heavy imports wait until a conversion runs."""

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lapa.conversion.checksum import hash_file

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZER_FILE = "laq_openx.pt"

_EPILOG = """\
examples:
  lapa convert quantizer        --checkpoint laq_openx.pt --output quantizer
  lapa convert vision-tokenizer --checkpoint vqgan --output vision-tokenizer
  lapa convert policy --checkpoint params --vision-tokenizer vision-tokenizer --tokenizer tokenizer.model --output policy
  lapa convert policy --repo latent-action-pretraining/LAPA-7B-openx --output policy
"""


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of `lapa convert` and its three sub-commands."""
    parser = parser_class(
        prog="lapa convert",
        description="Converts the published checkpoints to folders that `from_pretrained` loads, and verifies them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="quantizer|vision-tokenizer|policy")
    for kind, file, config in (
        ("quantizer", QUANTIZER_FILE, "LapaQuantizerConfig"),
        ("vision-tokenizer", "vqgan", "LapaVisionTokenizerConfig"),
        ("policy", "params", "LapaConfig"),
    ):
        command = kinds.add_parser(kind, help=f"convert `{file}`")
        _add_common_arguments(command, file, config, required=kind != "policy")
        if kind == "policy":
            _add_policy_arguments(command)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser, file: str, config: str, required: bool) -> None:
    parser.add_argument("--checkpoint", type=Path, required=required, help=f"the published `{file}`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--config", type=Path, help=f"JSON file of {config} fields that differ from the released sizes"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="stored dtype; the source's by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at --output")


def _add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision-tokenizer", help="folder of a converted vision tokenizer, or `none`")
    parser.add_argument("--tokenizer", help="the published `tokenizer.model`, or `none`")
    parser.add_argument("--repo", help="Hub repository to fetch `params`, `vqgan` and `tokenizer.model` from")
    parser.add_argument("--push-to", metavar="NAME", help="Hub repository to upload the result to")


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Runs `lapa convert` and prints what was written and checked."""
    args = make_parser(parser_class).parse_args(arguments)
    import torch

    from lapa.conversion.convert_checkpoints import convert_quantizer, convert_vision_tokenizer
    from lapa.conversion.output_folder import check_output
    from lapa.conversion.sizes import read_sizes

    # Before anything is fetched or read.
    check_output(args.output, args.overwrite)
    common = {
        "output": args.output,
        "config": read_sizes(args.config),
        "dtype": getattr(torch, args.dtype) if args.dtype else None,
        "overwrite": args.overwrite,
    }
    if args.kind == "quantizer":
        print(convert_quantizer(args.checkpoint, **common))
    elif args.kind == "vision-tokenizer":
        print(convert_vision_tokenizer(args.checkpoint, **common))
    else:
        _run_policy(args, common)
    return 0


def _run_policy(args: argparse.Namespace, common: dict[str, Any]) -> None:
    from lapa.conversion.convert_checkpoints import convert_policy

    sources = {"checkpoint": args.checkpoint, "vision-tokenizer": args.vision_tokenizer, "tokenizer": args.tokenizer}
    if args.repo is not None:
        if given := [f"--{name}" for name, value in sources.items() if value is not None]:
            raise ValueError(f"--repo fetches every file itself; do not say {', '.join(given)} with it.")
        _convert_repository(args.repo, common)
    else:
        if absent := [f"--{name}" for name, value in sources.items() if value is None]:
            raise ValueError(f"{', '.join(absent)} must be given (a path, or `none`), or --repo instead of all.")
        paths = {name: None if str(value) == "none" else Path(value) for name, value in sources.items()}
        print(convert_policy(args.checkpoint, vision_tokenizer=paths["vision-tokenizer"],
                             tokenizer=paths["tokenizer"], **common))  # fmt: skip
    if args.push_to is not None:
        push(args.output, args.push_to)


def _convert_repository(repo: str, common: dict[str, Any]) -> None:
    """Fetches the published files, converts them, and puts the quantizer (if there) into a sub-folder."""
    from lapa.conversion.convert_checkpoints import convert_policy

    files = {name: fetch(repo, name) for name in ("params", "vqgan", "tokenizer.model")}
    print(convert_policy(files["params"], vision_tokenizer=files["vqgan"], tokenizer=files["tokenizer.model"],
                         quantizer=fetch(repo, QUANTIZER_FILE, optional=True), **common))  # fmt: skip


def fetch(repo: str, name: str, optional: bool = False) -> Path | None:
    """
    Fetches one file of a Hub repository, or finds it in the cache, and checks its checksum.

    Args:
        repo (`str`): Repository id.
        name (`str`): File name.
        optional (`bool`, *optional*): Whether a repository without the file gives None.

    Raises:
        FileNotFoundError: If the repository has no such file, or offline the cache has none.
        ValueError: If the file's content does not have its checksum.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        path = Path(hf_hub_download(repo, name))
    except HFValidationError as error:
        raise ValueError(f"`--repo` is no repository id: {repo!r}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"The Hub has no repository {repo}, or it needs a login.") from error
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        # A broken connection is no proof that an optional file does not exist; chosen offline mode has to do.
        if optional and (not offline or constants.HF_HUB_OFFLINE):
            return None
        where = "is neither in the cache nor reachable" if offline else "does not exist"
        raise FileNotFoundError(f"{name} of {repo} {where}.") from error
    check_sum(path)
    return path


def check_sum(path: Path) -> None:
    """Compares a file of the Hub cache with the checksum that names its blob: SHA-256, or git's for small files."""
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        found = hash_file(path)
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        head = f"blob {path.stat().st_size}\0".encode()
        found = hash_file(path, hashlib.sha1(head, usedforsecurity=False))
    else:
        return
    if found != expected:
        raise ValueError(f"{path.name} is damaged (its checksum differs): delete {path.resolve()} and run again.")


def push(folder: Path, repo: str) -> None:
    """Uploads a converted folder to a Hub repository, made if need be."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    print(api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Converted with lapa"))
