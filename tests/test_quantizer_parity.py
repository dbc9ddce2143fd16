"""The quantizer against recordings of the published code."""

import pytest
import torch
from recordings import meta, quantizer_folder, tensors

from lapa import LapaQuantizer
from lapa.conversion.checkpoint_mapping import QUANTIZER_TABLE, rename
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerDecoder, LapaQuantizerEncoder
from lapa.modeling_lapa.vector_quantization_lapa import replace_unused_codes_published

NAMES = ("n4", "n1", "n2", "n16")


@pytest.fixture(params=NAMES)
def recorded(request):
    """A converted quantizer, its recorded tensors, and frame pairs (batch, 2, 3, height, width)."""
    tensors_ = tensors(f"laq/{request.param}.io")
    pairs = tensors_["video"].transpose(1, 2).contiguous()
    return request.param, LapaQuantizer.from_pretrained(quantizer_folder(request.param)), tensors_, pairs


def test_codes_and_embeddings(recorded):
    _, model, io, pairs = recorded
    output = model.encode(pairs)
    assert torch.equal(output.latent_action_codes, io["inference_indices"].long())
    torch.testing.assert_close(output.latent_action_embeddings.flatten(0, 1), io["vq_diff"], atol=1e-5, rtol=0)


def test_position_bias(recorded):
    _, model, io, _ = recorded
    torch.testing.assert_close(model.position_bias(model.config.grid)[0], io["spatial_bias"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_decoding_inferred_and_chosen_codes(recorded):
    name, model, io, pairs = recorded
    first = pairs[:, 0]
    inferred = model.encode(pairs).latent_action_codes
    torch.testing.assert_close(model.decode(first, inferred), io["inference_recon"], atol=1e-5, rtol=0)
    chosen = torch.tensor(meta("laq")[name]["user_ids_flat"]).reshape(inferred.shape)
    torch.testing.assert_close(model.decode(first, chosen), io["inference_user_recon"], atol=1e-5, rtol=0)
    one = torch.tensor(meta("laq")[name]["user_ids_b1"]).reshape(1, -1)
    torch.testing.assert_close(model.decode(first[:1], one), io["inference_user_b1_recon"], atol=1e-5, rtol=0)
    # In evaluation the forward pass decodes the inferred codes.
    torch.testing.assert_close(model(pairs).reconstruction, io["inference_recon"], atol=1e-5, rtol=0)


def test_training_loss_and_gradients(recorded):
    name, model, io, pairs = recorded
    output = model.train()(pairs, noise=io["noise"])
    torch.testing.assert_close(output.loss, io["train_loss"].squeeze(), atol=0, rtol=1e-5)
    torch.testing.assert_close(output.reconstruction, io["train_recon"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.perplexity, io["train_perplexity"].squeeze(), atol=0, rtol=1e-5)
    output.loss.backward()
    gradients = tensors(f"laq/{name}.grads")
    parameters = dict(model.named_parameters())
    for theirs, ours in rename(gradients, QUANTIZER_TABLE, "quantizer").items():
        # 1e-8: the position bias's last bias shifts all scores alike, so its gradient is rounding noise around 0.
        assert (parameters[ours].grad - gradients[theirs]).norm() <= 1e-5 * gradients[theirs].norm() + 1e-8, theirs


def test_one_adam_step(recorded):
    name, model, io, pairs = recorded
    settings = meta("laq")[name]["adam1"]
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"], settings["betas"], settings["eps"])
    model(pairs, noise=io["noise"]).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
    assert norm.item() == pytest.approx(settings["grad_norm_before_clip"], rel=1e-5)
    optimizer.step()
    after = tensors(f"laq/{name}.adam1")
    parameters = dict(model.named_parameters())
    for theirs, ours in rename(after, QUANTIZER_TABLE, "quantizer").items():
        torch.testing.assert_close(parameters[ours].data, after[theirs], atol=1e-6, rtol=1e-5)
    assert model(pairs, noise=io["noise"]).loss.item() == pytest.approx(settings["loss_after"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["few", "many", "none", "border", "all"])
def test_published_replacement_of_unused_codes(name, case):
    arguments, io = meta("laq")[name]["replace_cases"][case], tensors(f"laq/{name}.replace")
    codebook = io[f"{case}.codebooks_before"].clone()
    torch.manual_seed(arguments["torch_manual_seed"])
    replace_unused_codes_published(codebook, io[f"{case}.used_before"], arguments["num_batches"])
    torch.testing.assert_close(codebook, io[f"{case}.codebooks_after"], atol=1e-7, rtol=0)


def test_halves_load_alone_and_agree(recorded):
    name, model, _, pairs = recorded
    encoder = LapaQuantizerEncoder.from_pretrained(quantizer_folder(name))
    decoder = LapaQuantizerDecoder.from_pretrained(quantizer_folder(name))
    assert not any(name.startswith("decoder") for name, _ in encoder.named_parameters())
    assert not any(name.startswith("spatial_encoder") for name, _ in decoder.named_parameters())
    codes = encoder(pairs).latent_action_codes
    assert torch.equal(codes, model.encode(pairs).latent_action_codes)
    assert torch.equal(decoder(pairs[:, 0], codes), model.decode(pairs[:, 0], codes))
