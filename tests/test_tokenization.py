"""The tokenizer gives the published ids for every recorded text."""

import json
import pickle

import pytest
from shared_files import shared_path

from lapa.processing.tokenization_lapa import LapaTokenizer

MODELS = ["tiny", "llama32k"]


def golden(name):
    return json.loads(shared_path("fixtures/tokenizer/tokenizer_golden.json").read_text())[name]


def load(name):
    return LapaTokenizer(str(shared_path(f"fixtures/tokenizer/{name}.tokenizer.model")))


def check_rows(tokenizer, recorded):
    assert len(recorded["rows"]) >= 16
    for row in recorded["rows"]:
        assert tokenizer(row["prompt"])["input_ids"] == row["raw_ids"]
        assert tokenizer(row["train_text"])["input_ids"] == row["train_ids"]
        assert tokenizer(row["instruction"])["input_ids"] == row["instruction_ids"]
        assert tokenizer.convert_ids_to_tokens(row["raw_ids"]) == row["pieces"]
        padded = tokenizer(row["prompt"], padding="max_length", truncation=True, max_length=128)
        assert padded["input_ids"] == row["input_ids_128"]
        assert padded["attention_mask"] == row["attention_mask_128"]
    for text, ids in recorded["encode"].items():
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_recordings(name, tmp_path):
    recorded = golden(name)
    tokenizer = load(name)
    check_rows(tokenizer, recorded)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == shared_path(
        f"fixtures/tokenizer/{name}.tokenizer.model"
    ).read_bytes()
    check_rows(LapaTokenizer.from_pretrained(tmp_path), recorded)
    check_rows(pickle.loads(pickle.dumps(tokenizer)), recorded)


@pytest.mark.parametrize("name", MODELS)
def test_special_ids(name):
    recorded, tokenizer = golden(name), load(name)
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, key) == recorded[key], key
    assert len(tokenizer) == recorded["len"]
    assert tokenizer.padding_side == tokenizer.truncation_side == "left"


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_prefixes(name):
    recorded, tokenizer = golden(name), load(name)
    prompts = [row["prompt"] for row in recorded["rows"][:3]]
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=128)
    assert batch["input_ids"] == [row["input_ids_128"] for row in recorded["rows"][:3]]
    for text, encoded in recorded["prefix_for_gen"].items():
        assert [tokenizer(text)["input_ids"]] == encoded["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_decode(name):
    tokenizer = load(name)
    for row in golden(name)["rows"]:
        if "nested special" not in row["instruction"] and not row["instruction"].startswith("first push"):
            assert tokenizer.decode(row["raw_ids"]) == row["decode_raw"]
    assert tokenizer.decode(tokenizer.encode("<s> 放 </s>"), skip_special_tokens=True) == "放"


def test_missing_model():
    with pytest.raises(ValueError, match="vocab_file"):
        LapaTokenizer()
