"""Decoding: segments, bins, batches, caches, sampling, prompts that are refused, and growing the id space."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from recordings import end_to_end_folder, policy_folder
from tiny_models import build, policy_config, prompt

from lapa import LapaConfig, LapaForActionPrediction, LapaForLatentAction, LapaProcessor


@pytest.fixture(scope="module")
def latent():
    return build("latent").eval()


@pytest.fixture(scope="module")
def policy():
    return build("action").eval()


@pytest.fixture(scope="module")
def kept():
    return build("action", keep_latent_head=True).eval()


def test_left_padded_batch_equals_single_rows(policy):
    inputs = prompt(policy.config, batch=3)
    assert inputs["attention_mask"].sum(1).tolist() != [inputs["input_ids"].shape[1]] * 3
    together = policy.predict_action_tokens(**inputs, return_scores=True)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = policy.predict_action_tokens(
            input_ids=inputs["input_ids"][row, real][None],
            attention_mask=torch.ones(1, int(real.sum()), dtype=torch.long),
            pixel_values=inputs["pixel_values"][row : row + 1],
            return_scores=True,
        )
        assert torch.equal(alone.action_tokens[0], together.action_tokens[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_caches_agree(policy, options):
    inputs = prompt(policy.config)
    expected = policy.predict_action_tokens(**inputs, return_scores=True)
    actual = policy.predict_action_tokens(**inputs, **options, return_scores=True)
    assert torch.equal(actual.action_tokens, expected.action_tokens)
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_precomputed_codes_equal_the_image(policy):
    inputs = prompt(policy.config)
    codes = policy.model.encode_images(inputs.pop("pixel_values"))
    from_codes = policy.predict_action_tokens(**inputs, vision_codes=codes, return_scores=True)
    from_image = policy.predict_action_tokens(**prompt(policy.config), return_scores=True)
    assert torch.equal(from_codes.scores, from_image.scores)
    other = policy.predict_action_tokens(**inputs, vision_codes=(codes + 1) % 32, return_scores=True)
    assert not torch.equal(other.scores, from_image.scores)  # the image is looked at


def test_vision_positions_tell_equal_codes_apart():
    model = build("latent-positions").eval()
    inputs = prompt(model.config)
    inputs.pop("pixel_values")
    filled = model.model.fill_vision_codes(inputs["input_ids"], torch.zeros(2, 16, dtype=torch.long))
    places = model.model._embed_vision_positions(filled)
    inside = filled == model.config.vision_offset
    assert torch.equal(places[~inside], torch.zeros_like(places[~inside]))
    for row in range(2):
        assert torch.equal(places[row][inside[row]], model.model.vision_positions.weight)


def test_scores_are_probabilities_inside_the_segment(policy, latent):
    action = policy.predict_action_tokens(**prompt(policy.config), return_scores=True)
    assert action.scores.shape == (2, 7, 16)
    torch.testing.assert_close(action.scores.exp().sum(-1), torch.ones(2, 7))
    assert torch.equal(action.scores.argmax(-1), action.action_tokens)
    assert action.latent_action_codes is None
    codes = latent.predict_latent_action(**prompt(latent.config), return_scores=True)
    assert codes.scores.shape == (2, 4, 8)
    assert codes.action_tokens is None


def test_missing_bins_are_never_decoded(policy):
    num_bins = torch.tensor([[1, 2, 3, 4, 5, 16, 2], [16, 16, 1, 1, 2, 2, 3]])
    inputs = prompt(policy.config)
    for options in ({}, {"do_sample": True, "temperature": 5.0}, {"num_beams": 3}):
        prediction = policy.predict_action_tokens(**inputs, action_num_bins=num_bins, **options, return_scores=True)
        assert (prediction.action_tokens < num_bins).all(), options
        torch.testing.assert_close(prediction.scores.exp().sum(-1), torch.ones(2, 7))
        chosen = prediction.scores.gather(-1, prediction.action_tokens.unsqueeze(-1))
        assert chosen.isfinite().all(), options
    config = policy_config(action_num_bins=[1, 2, 3, 4, 5, 16, 2])
    torch.manual_seed(0)
    assert (LapaForActionPrediction(config).predict_action_tokens(**inputs) < num_bins[0]).all()


def test_sampling_on_request_only(policy):
    inputs = prompt(policy.config)
    greedy = [policy.predict_action_tokens(**inputs) for _ in range(2)]
    assert torch.equal(*greedy)
    torch.manual_seed(0)
    samples = torch.stack([policy.predict_action_tokens(**inputs, do_sample=True) for _ in range(8)])
    assert len(samples.unique(dim=0)) > 1
    assert ((samples >= 0) & (samples < policy.config.action_vocab_size)).all()


def test_plain_generate_works(latent):
    inputs = prompt(latent.config)
    output = latent.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)


@pytest.mark.slow
def test_compiled_forward_equals_eager(policy):
    inputs = prompt(policy.config)
    compiled = torch.compile(policy, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, policy(**inputs).logits, atol=1e-4, rtol=1e-4)


class TestActionRows:
    """Starting an action model from a latent-pretrained folder."""

    @pytest.fixture
    def folder(self, latent, tmp_path):
        latent.save_pretrained(tmp_path)
        return tmp_path

    def test_old_rows_are_copied_and_new_ones_drawn(self, latent, folder):
        torch.manual_seed(5)
        policy = LapaForActionPrediction.from_pretrained(folder)
        old = latent.config.vocab_size
        assert policy.config.vocab_size == old + 16
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            before, after = latent.state_dict()[name], policy.state_dict()[name]
            assert torch.equal(after[:old], before)
            assert after.shape[0] == old + 16
        # Lecun-normal: fan-in is the number of rows for the embedding and the width for the head.
        assert policy.model.embed_tokens.weight[old:].std().item() == pytest.approx(16**-0.5, rel=0.15)
        assert policy.lm_head.weight[old:].std().item() == pytest.approx(32**-0.5, rel=0.15)
        torch.manual_seed(5)
        assert torch.equal(LapaForActionPrediction.from_pretrained(folder).lm_head.weight, policy.lm_head.weight)

    def test_sizes_of_the_new_segment_can_be_chosen(self, folder):
        policy = LapaForActionPrediction.from_pretrained(folder, action_vocab_size=5, action_dim=3).eval()
        tokens = policy.predict_action_tokens(**prompt(policy.config))
        assert tokens.shape == (2, 3)
        assert tokens.max() < 5

    def test_a_given_config_may_have_action_rows_already(self, latent, folder):
        config = policy_config(has_action_segment=True, action_vocab_size=5)
        policy = LapaForActionPrediction.from_pretrained(folder, config=config)
        assert policy.lm_head.out_features == latent.config.vocab_size + 5
        assert config.has_action_segment

    def test_bins_of_an_action_checkpoint_are_fixed(self, folder, tmp_path):
        LapaForActionPrediction.from_pretrained(folder).save_pretrained(tmp_path / "policy")
        with pytest.raises(ValueError, match=r"`action_vocab_size` is 16 .* cannot become 5"):
            LapaForActionPrediction.from_pretrained(tmp_path / "policy", action_vocab_size=5)

    def test_the_grown_model_round_trips(self, folder, tmp_path):
        policy = LapaForActionPrediction.from_pretrained(folder).eval()
        policy.save_pretrained(tmp_path / "policy")
        loaded = LapaForActionPrediction.from_pretrained(tmp_path / "policy")
        inputs = prompt(policy.config)
        assert torch.equal(loaded.predict_action_tokens(**inputs), policy.predict_action_tokens(**inputs))
        assert loaded.config.architectures == ["LapaForActionPrediction"]

    def test_latent_head_is_retired_unless_kept(self, latent, folder):
        inputs = prompt(latent.config)
        retired = LapaForActionPrediction.from_pretrained(folder)
        with pytest.raises(ValueError, match="keep_latent_head"):
            retired.predict_latent_action(**inputs)
        kept = LapaForActionPrediction.from_pretrained(folder, keep_latent_head=True)
        assert torch.equal(kept.predict_latent_action(**inputs), latent.predict_latent_action(**inputs))

    def test_quantised_trunk_still_gains_rows(self, folder):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True)
        policy = LapaForActionPrediction.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
        assert policy.lm_head.out_features == policy.config.vocab_size
        assert policy.predict_action_tokens(**prompt(policy.config)).shape == (2, 7)


class TestPromptOfTheOtherTarget:
    """`prompt` ends in ids 9 and 10."""

    TAILS = {"latent": [9, 11], "action": [9, 10]}  # noqa: RUF012

    def test_is_refused_by_both_models(self):
        inputs = prompt(policy_config())
        asks_for_codes = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 10, 11)}
        policy, latent = (build(kind, prompt_tails=self.TAILS).eval() for kind in ("action", "latent"))
        assert policy.predict_action_tokens(**inputs).shape == (2, 7)
        assert latent.predict_latent_action(**asks_for_codes).shape == (2, 4)
        with pytest.raises(ValueError, match=r'row 0 .* is a prompt for `target="latent"`.*with `target="action"`'):
            policy.predict_action_tokens(**asks_for_codes)
        with pytest.raises(ValueError, match=r'row 0 .* is a prompt for `target="action"`.*with `target="latent"`'):
            latent.predict_latent_action(**inputs)
        inputs["input_ids"][1, -1] = 11
        with pytest.raises(ValueError, match="row 1 of `input_ids`"):
            policy.predict_action_tokens(**inputs)

    def test_a_kept_latent_head_asks_for_codes(self):
        policy = build("action", prompt_tails=self.TAILS, keep_latent_head=True).eval()
        with pytest.raises(ValueError, match=r'is a prompt for `target="action"`'):
            policy.predict_latent_action(**prompt(policy.config))

    def test_converted_policies_know_their_prompts(self):
        folder = end_to_end_folder("action")
        policy, processor = LapaForActionPrediction.from_pretrained(folder), LapaProcessor.from_pretrained(folder)
        assert policy.config.prompt_tails == processor.prompt_tails
        codes = {"vision_codes": [0] * processor.num_image_tokens, "instruction": "push"}
        assert policy.predict_action_tokens(**processor(**codes)).shape == (1, 7)
        with pytest.raises(ValueError, match='with `target="action"`'):
            policy.predict_action_tokens(**processor(**codes, target="latent"))
        # Without a tokenizer there are no prompts to know.
        assert LapaConfig.from_pretrained(policy_folder("delta", "bf16")).prompt_tails is None

    @pytest.mark.parametrize(
        "tails",
        [
            None,  # a folder from before the field
            {"latent": [9, 12], "action": [9, 13]},  # a prompt of one's own
            {"latent": [9, 10], "action": [9, 10]},  # a tokenizer that cannot tell the markers apart
            {"latent": [7] * 30 + [9, 10], "action": [9, 11]},  # longer than the prompt
        ],
    )
    def test_what_is_not_certain_passes(self, tails):
        policy = build("action", prompt_tails=tails).eval()
        assert torch.equal(
            policy.predict_action_tokens(**prompt(policy.config)),
            build("action").eval().predict_action_tokens(**prompt(policy.config)),
        )

    def test_the_config_keeps_the_tails(self, tmp_path):
        policy_config(prompt_tails=self.TAILS).save_pretrained(tmp_path)
        assert LapaConfig.from_pretrained(tmp_path).prompt_tails == self.TAILS
        saved = json.loads((tmp_path / "config.json").read_text())
        del saved["prompt_tails"]
        (tmp_path / "config.json").write_text(json.dumps(saved))
        assert LapaConfig.from_pretrained(tmp_path).prompt_tails is None
        for wrong in ({"latent": [1]}, {"latent": [1], "action": []}, {"latent": [1], "action": [-1]}):
            with pytest.raises(StrictDataclassError, match="prompt_tails"):
                policy_config(prompt_tails=wrong)


class TestBadInput:
    def test_number_of_placeholders(self, policy):
        inputs = prompt(policy.config)
        inputs["input_ids"][0, inputs["input_ids"][0] == policy.config.vision_offset] = 3
        with pytest.raises(ValueError, match="placeholders"):
            policy(**inputs)

    def test_vision_codes_outside_the_segment(self, policy):
        inputs = prompt(policy.config)
        inputs.pop("pixel_values")
        with pytest.raises(ValueError, match=r"`vision_codes` must lie in \[0, 33\].*99"):
            policy(**inputs, vision_codes=torch.full((2, 16), 99))

    @pytest.mark.parametrize("method", ["predict_action_tokens", "predict_latent_action", "generate"])
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda ids: ids[0], r"`input_ids` must be .* \(batch, length\), got torch.int64 of shape \(25,\)"),
            (lambda ids: ids[None], r"got torch.int64 of shape \(1, 2, 25\)"),
            (lambda ids: ids[:, :0], r"got torch.int64 of shape \(2, 0\)"),
            (lambda ids: ids.float(), r"got torch.float32 of shape \(2, 25\)"),
            (lambda ids: ids.tolist(), "got list"),
            (lambda ids: ids.masked_fill(ids == 9, 98), r"`input_ids` must lie in \[0, 97\].*got 98"),
            (lambda ids: ids.masked_fill(ids == 9, -1), r"`input_ids` must lie in \[0, 97\].*got -1"),
        ],
    )
    def test_ids(self, kept, method, spoil, message):
        inputs = prompt(kept.config)
        with pytest.raises(ValueError, match=message):
            getattr(kept, method)(**inputs | {"input_ids": spoil(inputs["input_ids"])})

    def test_the_last_row_of_the_id_space_is_an_id(self, latent, policy):
        ids = torch.tensor([[1, latent.config.vocab_size - 1]])
        assert latent.predict_latent_action(input_ids=ids).shape == (1, 4)
        assert policy.predict_action_tokens(input_ids=ids + 1).shape == (1, 7)
        with pytest.raises(ValueError, match="input_ids"):
            latent.generate(ids + 1, max_new_tokens=1)

    @pytest.mark.parametrize("method", ["predict_action_tokens", "predict_latent_action", "generate"])
    @pytest.mark.parametrize(
        ("codes", "message"),
        [
            (torch.zeros(16, dtype=torch.long), r"must be .* \(batch, num_image_tokens\), got .* \(16,\)"),
            (torch.zeros(2, 16), "must be .* got torch.float32"),
            ([[0] * 16] * 2, "must be .* got list"),
            (torch.full((2, 16), 34), r"must lie in \[0, 33\].*34"),
            (torch.full((2, 16), -1), r"must lie in \[0, 33\].*-1"),
        ],
    )
    def test_vision_codes(self, kept, method, codes, message):
        inputs = prompt(kept.config)
        inputs.pop("pixel_values")
        with pytest.raises(ValueError, match=f"`vision_codes` {message}"):
            getattr(kept, method)(**inputs, vision_codes=codes)

    def test_values_are_looked_at_once_per_prompt(self, policy, monkeypatch):
        looks = []
        aminmax = torch.aminmax
        monkeypatch.setattr(torch, "aminmax", lambda ids: (looks.append(ids.shape), aminmax(ids))[1])
        policy.predict_action_tokens(**prompt(policy.config))
        assert looks == [(2, 25)]

    def test_image_without_a_vision_tokenizer(self):
        model = LapaForLatentAction(policy_config(with_images=False))
        with pytest.raises(ValueError, match="vision_tokenizer_config"):
            model(input_ids=torch.tensor([[1, 2]]), pixel_values=torch.zeros(1, 3, 8, 8))

    def test_wrong_bins(self, policy):
        with pytest.raises(ValueError, match="action_num_bins"):
            policy.predict_action_tokens(**prompt(policy.config), action_num_bins=torch.tensor([[1, 2]]))

    def test_rope_theta_has_its_place(self):
        with pytest.raises(ValueError, match="rope_parameters"):
            policy_config(text_config={"hidden_size": 32, "rope_theta": 1e4})
        partial = policy_config(text_config={"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4})
        assert partial.text_config.rope_parameters["rope_theta"] == 5e7

    def test_resizing_is_refused(self, policy):
        with pytest.raises(ValueError, match="new_num_tokens"):
            policy.resize_token_embeddings(7)
