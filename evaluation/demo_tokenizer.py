"""The demo's text tokenizer: the simulator's phrases are single pieces, so that a tiny trunk reads short prompts."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from lapa.evaluation.environments.tabletop_tasks import COLOURS, FAMILIES, SHAPES
from lapa.processing.processing_lapa import PROMPT
from lapa.processing.tokenization_lapa import LapaTokenizer

# What stands around the instruction and the codes in prompts and training examples.
MARKERS = ("<vision>", "</vision>", "<delta>", "</delta>", "<action>", "</action>")
SPACE = "▁"  # sentencepiece's own sign for a space
# Letters, digits and byte pieces for any other text.
BASE_PIECES = 400


def _phrases() -> Iterator[str]:
    before, after = PROMPT.replace("<s>", "").replace("<vision>", "").split("{instruction}")
    yield from (before.strip(), after.strip())
    for colour in COLOURS:
        yield from (f"{colour} {shape}" for shape in SHAPES)
    for family in FAMILIES.values():
        yield from (argument for argument in family.arguments if argument)
        for template in family.templates:
            yield from (part.strip() for part in re.split(r"\{\w+\}", template) if part.strip())


def phrase_pieces() -> list[str]:
    """Every phrase as a piece, with the space before it, longest first."""
    phrases = set(_phrases())
    pieces = {SPACE + phrase.replace(" ", SPACE) for phrase in phrases} | {p.replace(" ", SPACE) for p in phrases}
    markers = {SPACE + marker for marker in MARKERS} | set(MARKERS)
    return sorted(pieces | markers, key=lambda piece: (-len(piece), piece))


def build_tokenizer(path: Path) -> LapaTokenizer:
    """Train the tokenizer, write its sentencepiece model to `path`, and load it."""
    import sentencepiece

    pieces, model = phrase_pieces(), io.BytesIO()
    sentences = [text.replace(SPACE, " ") for text in pieces] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=len(pieces) + BASE_PIECES,
        user_defined_symbols=pieces,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return LapaTokenizer(str(path))
