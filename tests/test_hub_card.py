"""The model card: what its reader and the Hub learn from config, recorded results and provenance."""

import json

import pytest
from hub_folders import policy_config, save_policy, save_quantizer, save_vision_tokenizer
from huggingface_hub import ModelCard

from lapa import LapaForActionPrediction
from lapa.hub_cards.card import CardOptions
from lapa.hub_cards.export import export

RESULTS = {
    "results": [
        {
            "dataset": "Tabletop (pooled)",
            "metric": "success",
            "value": 0.4125,
            "ci95": [0.345, 0.4831],
            "episodes": 200,
        },
        {"dataset": "Bridge held-out", "metric": "token accuracy", "value": 0.9},
    ]
}


@pytest.fixture
def policy(tmp_path):
    return save_policy(tmp_path / "model", "action", statistics=("bridge", "fractal"))


def card_of(folder, **options):
    output = folder.parent / "hub"
    export(folder, output, CardOptions(**options))
    return ModelCard.load(output / "README.md")


def test_policy_card(policy):
    (policy / "lapa_results.json").write_text(json.dumps(RESULTS))
    state = {"global_step": 500, "epoch": 2.5, "log_history": [{"loss": 3.0, "step": 10}, {"loss": 0.25, "step": 500}]}
    (policy / "trainer_state.json").write_text(json.dumps(state))
    card = card_of(policy, license="mit", datasets=("me/demos",), base_model="me/latent", repo_id="me/policy")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "robotics" and data["library_name"] == "transformers"
    assert data["license"] == "mit" and data["datasets"] == ["me/demos"] and data["base_model"] == "me/latent"
    assert {"robotics", "lapa", "arxiv:2410.11758"} <= set(data["tags"])
    entries = [(one.dataset_name, one.metric_name, one.metric_value) for one in card.data.eval_results]
    assert sorted(entries) == [("Bridge held-out", "token accuracy", 0.9), ("Tabletop (pooled)", "success", 0.4125)]
    for line in (
        "# policy",
        "| Tabletop (pooled) | success | 0.4125 | 0.345 to 0.4831 | 200 |",
        "| Bridge held-out | token accuracy | 0.9 |  |  |",
        "- 500 steps (2.5 epochs), last logged loss 0.25.",
        "- Data: me/demos.",
        "- The weights: mit.",
        "| action | 3 dimensions, up to 16 bins each |",
        "| image | 16 x 16 pixels, 16 codes |",
        'Action statistics in this folder (`unnorm_key`): "bridge", "fractal".',
        "hf download me/policy --local-dir policy",
    ):
        assert line in card.content.splitlines(), line
    parameters = sum(one.numel() for one in LapaForActionPrediction.from_pretrained(policy).parameters())
    assert f"| parameters | {parameters:,} (F32 (100%)" in card.content
    assert "arXiv:2410.11758" in card.content and "Learning Representations" in card.content


def test_card_without_records(tmp_path):
    card = card_of(save_policy(tmp_path / "model", "action", statistics=()))
    assert "license" not in card.data.to_dict() and card.data.eval_results is None
    for text in ("Nothing about its training was recorded.", "No results were recorded", "has not stated a licence",
                 "no action statistics", "decode=False"):  # fmt: skip
        assert text in card.content


def test_latent_card_says_that_codes_are_no_actions(tmp_path):
    folder = save_policy(tmp_path / "model", "latent", quantizer_hash="c0ffee", fresh_segments=["latent"])
    text = card_of(folder).content
    assert "**The codes are no robot actions.**" in text and "4 latent action codes out of 8" in text
    assert "SHA-256 `c0ffee`" in text and "Rows of latent were drawn at random" in text
    assert "predict_action_tokens" not in text and 'result["action"]' not in text


@pytest.mark.parametrize("own", [None, "apache-2.0"])
def test_weights_that_come_from_the_released_ones_keep_their_licences(tmp_path, own):
    folder = save_policy(tmp_path / "model", "action", rope_in_model_dtype=True)
    card = card_of(folder, license=own)
    assert card.data.license == "other" and card.data.license_name == "llama2-and-mit"
    assert "Llama 2 Community License" in card.content and "Copyright (c) Meta Platforms" in card.content
    assert "LWM-Chat-1M" in card.content and "LAPA's released weights: MIT" in card.content
    assert ("added to the weights: apache-2.0" in card.content) == (own is not None)


def test_converted_parts(tmp_path):
    record = {"source": "laq_openx.pt", "verified_tensors": 7, "notes": ["equal to /home/me/laq_openx.pt"]}
    folders = (save_quantizer(tmp_path / "q" / "model"), save_vision_tokenizer(tmp_path / "v" / "model"))
    for folder, licence in zip(folders, ("mit", "apache-2.0")):
        (folder / "conversion.json").write_text(json.dumps(record))
        card = card_of(folder)
        assert card.data.license == licence
        assert "Converted from the published file `laq_openx.pt`; every one of the 7 tensors" in card.content
        assert "/home/me" not in card.content
    assert "| codes | 4 out of 8, 4-dimensional |" in (tmp_path / "q" / "hub" / "README.md").read_text()
    assert "| codes | 4 x 4 out of 30, 4-dimensional |" in (tmp_path / "v" / "hub" / "README.md").read_text()


def test_card_without_processor_shows_what_runs(tmp_path):
    LapaForActionPrediction(policy_config(has_action_segment=True)).save_pretrained(tmp_path / "model")
    text = card_of(tmp_path / "model").content
    assert "input_ids=torch.tensor([[1, 320]])" in text and "pipeline(" not in text and "finetune.py" not in text


@pytest.mark.parametrize(
    "rows, message",
    [
        ({}, "a list under `results`"),
        ([{"dataset": "d", "metric": "m"}], r"results\[0\] must have dataset, metric, value"),
        ([{"dataset": "d", "metric": "m", "value": 1, "sucess": 2}], "got .*sucess"),
        ([{"dataset": "d", "metric": "m", "value": float("nan")}], "`value` must be a finite number"),
        ([{"dataset": "d", "metric": "m", "value": 1, "ci95": [0]}], "`ci95` two of them"),
        ([{"dataset": "d", "metric": "m", "value": 1, "episodes": 0}], "`episodes` must be a positive whole number"),
    ],
)
def test_bad_results(policy, rows, message):
    (policy / "lapa_results.json").write_text(json.dumps({"results": rows}))
    with pytest.raises(ValueError, match=message):
        card_of(policy)
