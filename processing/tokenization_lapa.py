"""The text tokenizer of the published models: sentencepiece, split at `<s>`, `</s>` and `<unk>`."""

from typing import Any

from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


def _special(content: str) -> AddedToken:
    # White space on both sides of a special token vanishes in the published prompts.
    return AddedToken(content, lstrip=True, rstrip=True, normalized=False, special=True)


class LapaTokenizer(SentencePieceBackend):
    r"""
    Sentencepiece tokenizer that gives the ids the published models were trained on. Today's `LlamaTokenizer` differs
    around white space and special tokens.

    Special tokens written in the text (`<s>`, `</s>`, `<unk>`) become their ids, and the white space around them
    vanishes. Nothing is added at the ends. Padding and truncation are on the left, as in the published prompt.

    Args:
        vocab_file (`str`): Path of a sentencepiece `tokenizer.model`.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<unk>",
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ValueError("`vocab_file` must be the path of a sentencepiece model (tokenizer.model), got None.")
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("truncation_side", "left")
        kwargs.setdefault("special_tokens_pattern", "none")
        super().__init__(  # type: ignore[no-untyped-call]
            vocab_file=vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            **kwargs,
        )
        # The base class keeps the contents of special tokens only, not how they treat the white space around them.
        for token in (bos_token, eos_token, unk_token, pad_token):
            index = self.sp_model.piece_to_id(str(token))
            self._added_tokens_decoder[index] = _special(str(token))
            self._added_tokens_encoder[str(token)] = index
        self._update_trie()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; byte pieces become characters, special tokens stand as they are."""
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in self.all_special_tokens:
                text += self.sp_model.decode(run) + token
                run = []
            else:
                run.append(token)
        return f"{text}{self.sp_model.decode(run)}"


__all__ = ["LapaTokenizer"]
