"""What the quantizer's switches do, and what it refuses."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import QUANTIZER_VARIANTS, quantizer_config, training_batch
from tiny_models import build as build_variant

from lapa import LapaQuantizer
from lapa.modeling_lapa.vector_quantization_lapa import CodebookQuantizer, FiniteScalarQuantizer, code_perplexity


def build(**changes) -> LapaQuantizer:
    torch.manual_seed(0)
    return LapaQuantizer(quantizer_config(**changes)).eval()


@pytest.mark.parametrize("num_latent_tokens", [1, 3, 5, 7])
def test_query_bottleneck_makes_any_number_of_tokens(num_latent_tokens):
    model = build(bottleneck="query", num_latent_tokens=num_latent_tokens)
    codes = model.encode(training_batch(model)["pixel_values"]).latent_action_codes
    assert codes.shape == (3, num_latent_tokens)


@pytest.mark.parametrize("variant", QUANTIZER_VARIANTS)
def test_codes_decode_to_what_the_forward_pass_shows(variant):
    model = build_variant(variant).eval()
    torch.nn.init.normal_(model.to_pixels.weight)  # a residual decoder starts at "nothing changes"
    batch = training_batch(model)
    pairs = batch["pixel_values"]
    told = {"instruction_ids": batch["instruction_ids"]} if "instruction_ids" in batch else {}
    with torch.no_grad():
        output, encoded = model(**batch), model.encode(pairs)
        if model.config.task_centric:
            told["irrelevant_codes"] = encoded.irrelevant_codes
        assert torch.equal(output.latent_action_embeddings, encoded.latent_action_embeddings)
        if model.config.has_codes:
            codes = encoded.latent_action_codes
            assert torch.equal(output.latent_action_codes, codes)
            again = model.decode(pairs[:, 0], codes, **told)
            other = model.decode(pairs[:, 0], (codes + 1) % model.config.codebook_size, **told)
        else:
            assert output.latent_action_codes is None and encoded.latent_action_codes is None
            again = model.decode(pairs[:, 0], embeddings=encoded.latent_action_embeddings)
            other = model.decode(pairs[:, 0], embeddings=encoded.latent_action_embeddings + 1)
        torch.testing.assert_close(again, output.reconstruction, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(again, other)  # the decoder listens to the codes


def test_a_forward_never_edits_the_codebook():
    model = build().train()
    before = model.vector_quantizer.codebook.detach().clone()
    model(training_batch(model)["pixel_values"]).loss.backward()
    model.eval()(training_batch(model)["pixel_values"])
    assert torch.equal(model.vector_quantizer.codebook, before)


def test_residual_decoding_starts_from_the_first_frame():
    model = build(residual_decoding=True)
    pairs = training_batch(model)["pixel_values"]
    assert torch.equal(model(pairs).reconstruction, pairs[:, 0])


def test_stop_gradient_of_the_first_frame():
    """With it, the patch embedding learns through the encoder only."""
    gradients = []
    for stop in (True, False):
        model = build(stop_gradient_first_frame=stop).train()
        model.vector_quantizer.codebook.requires_grad_(False)
        pairs = training_batch(model)["pixel_values"]
        noise = torch.zeros(12, 8) + 1e-3
        model(pairs, noise=noise).loss.backward()
        gradients.append(model.patch_embedding.projection.weight.grad)
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("variant", QUANTIZER_VARIANTS)
def test_a_code_that_equals_its_embedding_leaves_gradients_finite(variant):
    """As with two equal frames, whose embedding is the same every time, once a code was re-seeded from it."""
    model = build_variant(variant).train()
    batch = training_batch(model)
    embeddings = model.encode(batch["pixel_values"]).latent_action_embeddings
    if not isinstance(model.vector_quantizer, CodebookQuantizer):
        pytest.skip("has no codebook")
    with torch.no_grad():
        model.vector_quantizer.codebook[0] = embeddings[0, 0]
    output = model(**batch)
    assert output.latent_action_codes[0, 0] == 0
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_nsvq_noise_has_the_length_of_the_error():
    model = build().train()
    embeddings = torch.randn(6, 8)
    noise = torch.randn(6, 8)
    output = model.vector_quantizer(embeddings, noise)
    error = (embeddings - model.vector_quantizer.codebook[output.codes]).norm(dim=1)
    torch.testing.assert_close((output.quantized - embeddings).norm(dim=1), error)


def test_fsq_reaches_every_code_and_no_other():
    quantizer = FiniteScalarQuantizer(quantizer_config(**QUANTIZER_VARIANTS["fsq-additive"]))
    with torch.no_grad():
        quantizer.projection_in.weight.copy_(torch.eye(2, 8))
        quantizer.projection_in.bias.zero_()
    grid = torch.zeros(400, 8)
    grid[:, :2] = torch.cartesian_prod(torch.linspace(-4, 4, 20), torch.linspace(-4, 4, 20))
    output = quantizer(grid)
    assert set(output.codes.tolist()) == set(range(15))
    torch.testing.assert_close(quantizer.lookup(output.codes), output.quantized)


def test_perplexity_counts_codes():
    assert code_perplexity(torch.zeros(8, dtype=torch.long), 4).item() == pytest.approx(1.0)
    assert code_perplexity(torch.arange(8) % 4, 4).item() == pytest.approx(4.0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((2, 3, 3, 32, 32), torch.float32), ((2, 2, 3, 32, 16), torch.float32), ((2, 3, 32, 32), torch.float32),
         ((2, 2, 3, 32, 32), torch.uint8)],
    )  # fmt: skip
    def test_frames(self, shape, dtype):
        with pytest.raises(
            ValueError, match=r"`pixel_values` must be a float tensor of shape \(batch, 2, 3, 32, 32\)"
        ):
            build()(torch.zeros(shape, dtype=dtype))

    @pytest.mark.parametrize("codes", [[[0, 1, 2, 8]], [[0, -1, 2, 3]], [[0, 1, 2]], [[0.0, 1.0, 2.0, 3.0]]])
    def test_codes(self, codes):
        with pytest.raises(ValueError, match="`codes` must"):
            build().decode(torch.rand(1, 3, 32, 32), torch.tensor(codes))

    def test_noise(self):
        with pytest.raises(ValueError, match=r"`noise` must have shape.*\(12, 8\)"):
            build()(torch.rand(3, 2, 3, 32, 32), noise=torch.randn(3, 8))
        with pytest.raises(ValueError, match="nsvq"):
            build(quantizer="vq")(torch.rand(3, 2, 3, 32, 32), noise=torch.randn(12, 8))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_size": 30}, r"`image_size` \(30\) is not a multiple of `patch_size` \(4\)"),
            ({"num_latent_tokens": 5}, r"`num_latent_tokens` \(5\).*\[1, 2, 4\].*query"),
            ({"quantizer": "lfq"}, "nsvq, vq, fsq"),
            ({"quantizer": "fsq"}, "fsq_levels"),
            ({"quantizer": "fsq", "fsq_levels": [3, 3]}, r"multiply to 9.*`codebook_size` \(8\)"),
            ({"action_injection": "film"}, "cross_attention, additive"),
            ({"hidden_size": 0}, "`hidden_size` must be at least 1"),
        ],
    )
    def test_config(self, changes, message):
        with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
            quantizer_config(**changes)
