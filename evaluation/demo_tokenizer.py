"""The demo's text tokenizers: recurring phrases are single pieces, so that a tiny trunk reads short prompts."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from lapa.evaluation.environments.tabletop_tasks import COLOURS, FAMILIES, SHAPES
from lapa.processing.processing_lapa import TRAINING_TEXT
from lapa.processing.tokenization_lapa import LapaTokenizer

# What stands around the codes in prompts and training examples. The closing bracket is a piece of its own, as in the
# published tokenizer: prompts for latent actions and for actions then end in the same, well-trained token.
MARKERS = ("<vision", "</vision", "<delta", "</delta", "<action", "</action")
SPACE = "▁"  # sentencepiece's own sign for a space
# Letters, digits and byte pieces for any other text.
BASE_PIECES = 400


def prompt_phrases() -> list[str]:
    """What stands before and after the instruction in every prompt."""
    before, after = TRAINING_TEXT.replace("<s>", "").split("{instruction}")
    return [before.strip(), after.strip()]


def simulator_phrases() -> list[str]:
    """What the simulator's instructions are made of: objects, places and directions, and the words between them."""
    phrases = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for family in FAMILIES.values():
        phrases += [argument for argument in family.arguments if argument]
        for template in family.templates:
            phrases += [part.strip() for part in re.split(r"\{\w+\}", template) if part.strip()]
    return phrases


def simulator_words() -> list[str]:
    """`simulator_phrases` with colours and shapes as pieces of their own: a pair that was never seen is read from them."""
    pairs = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    return [*COLOURS, *SHAPES, *(phrase for phrase in simulator_phrases() if phrase not in pairs)]


def phrase_pieces(phrases: Sequence[str]) -> list[str]:
    """Every phrase and marker as a piece, with and without the space before it, longest first."""
    pieces = {phrase.replace(" ", SPACE) for phrase in (*phrases, *MARKERS)}
    return sorted(pieces | {SPACE + piece for piece in pieces}, key=lambda piece: (-len(piece), piece))


def build_tokenizer(path: Path, phrases: Sequence[str], corpus: Sequence[str] = ()) -> LapaTokenizer:
    """Train a tokenizer, write its sentencepiece model to `path`, and load it.

    Args:
        path: File to write.
        phrases: Become single pieces.
        corpus: Sentences whose frequent parts become pieces; bytes stand for what occurs in neither.
    """
    import sentencepiece

    pieces, model = phrase_pieces([*prompt_phrases(), *phrases]), io.BytesIO()
    sentences = [*(text.replace(SPACE, " ") for text in pieces), *corpus] * 4
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
