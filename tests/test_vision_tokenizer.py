"""The vision tokenizer gives the published VQGAN's codes and images, is frozen, and can be trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from shared_files import shared_path

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.conversion.convert_checkpoints import convert_vision_tokenizer
from lapa.modeling_lapa import modeling_lapa_vision_tokenizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer

TINY = {
    "image_size": 8,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "codebook_size": 16,
    "codebook_dim": 4,
    "num_norm_groups": 4,
}


def tiny_tokenizer(seed: int = 0) -> LapaVisionTokenizer:
    torch.manual_seed(seed)
    return LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY))


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def recorded_sizes(name: str) -> dict:
    config = json.loads(shared_path("fixtures/vqgan/meta.json").read_text())[name]["config"]
    return {"image_size": config["resolution"], "num_norm_groups": 32}


@pytest.fixture(scope="module", params=["base", "alt"])
def recorded(request, tmp_path_factory):
    """A converted recorded tokenizer, its recordings in NCHW, and its name."""
    checkpoint = shared_path(f"fixtures/vqgan/{request.param}.pkl")
    output = tmp_path_factory.mktemp("vqgan") / request.param
    convert_vision_tokenizer(checkpoint, output, config=recorded_sizes(request.param))
    recordings = load_file(shared_path(f"fixtures/vqgan/{request.param}.io.safetensors"))
    return LapaVisionTokenizer.from_pretrained(output), recordings, request.param


def channels_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(-1, 1)


def test_codes_and_quantized_states_equal_the_recordings(recorded):
    tokenizer, recordings, _ = recorded
    encoded = tokenizer.encode(channels_first(recordings["pixel_values"]))
    assert encoded.codes.dtype == torch.int64
    assert torch.equal(encoded.codes, recordings["encode.indices"].long())
    torch.testing.assert_close(
        encoded.latents, channels_first(recordings["quant_conv_out"]), atol=1e-4, rtol=0, check_stride=False
    )
    torch.testing.assert_close(
        encoded.quantized, channels_first(recordings["encode.quantized_states"]), atol=1e-5, rtol=0
    )


def test_frames_of_a_video_give_the_recorded_codes(recorded):
    tokenizer, recordings, _ = recorded
    frames = channels_first(recordings["video_pixel_values"].flatten(0, 1))
    assert torch.equal(tokenizer.encode(frames).codes, recordings["encode_video.indices"].long().flatten(0, 1))


def test_image_tokens_are_the_codes_a_few_images_at_a_time(recorded, monkeypatch):
    tokenizer, recordings, _ = recorded
    frames = channels_first(recordings["video_pixel_values"].flatten(0, 1))
    sizes, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda part: sizes.append(len(part)) or encode(part))
    monkeypatch.setattr(modeling_lapa_vision_tokenizer, "ENCODED_PIXELS", 2 * frames.shape[-2:].numel())
    tokens = tokenizer.image_tokens(frames)
    assert torch.equal(tokens, recordings["encode_video.indices"].long().flatten(0, 1).flatten(1))
    assert max(sizes) == 2 and sum(sizes) == len(frames)


@pytest.mark.parametrize("case", ["decode", "decode_random"])
def test_reconstructions_equal_the_recordings(recorded, case):
    tokenizer, recordings, _ = recorded
    codes = recordings["encode.indices" if case == "decode" else "decode_random.indices"]
    image = tokenizer.decode(codes)
    torch.testing.assert_close(image, channels_first(recordings[f"{case}.reconstruction"]), atol=1e-4, rtol=0)
    # The recordings reach both bounds, so this holds only with the clip.
    assert image.min() == -1 and image.max() == 1


def test_intermediate_activations_equal_the_recordings(recorded):
    tokenizer, recordings, name = recorded
    if name != "base":
        pytest.skip("activations are recorded for `base` only")
    seen = {}
    modules = {
        "enc_act.Conv_0": tokenizer.encoder.conv_in,
        "enc_act.MidBlock_0": tokenizer.encoder.mid_block,
        "enc_act.GroupNorm_0": tokenizer.encoder.norm_out,
        "enc_act.Conv_1": tokenizer.encoder.conv_out,
        "dec_act.Conv_0": tokenizer.decoder.conv_in,
        "dec_act.MidBlock_0": tokenizer.decoder.mid_block,
        "dec_act.GroupNorm_0": tokenizer.decoder.norm_out,
        "dec_act.Conv_1": tokenizer.decoder.conv_out,
        **{f"enc_act.DownsamplingBlock_{i}": block for i, block in enumerate(tokenizer.encoder.down_blocks)},
        **{f"dec_act.UpsamplingBlock_{i}": block for i, block in enumerate(tokenizer.decoder.up_blocks)},
    }
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, key=key: seen.__setitem__(key, output[:1]))
        for key, module in modules.items()
    ]
    tokenizer.decode(tokenizer.encode(channels_first(recordings["pixel_values"])).codes)
    for hook in hooks:
        hook.remove()
    recorded_names = {key for key in recordings if key.startswith(("enc_act.", "dec_act."))}
    assert set(seen) == recorded_names
    for key in recorded_names:
        torch.testing.assert_close(seen[key], channels_first(recordings[key]), atol=1e-4, rtol=1e-4)


def test_default_config_has_the_released_parameters():
    recorded = json.loads(shared_path("fixtures/vqgan/full_size_params.json").read_text())
    with torch.device("meta"):
        tokenizer = LapaVisionTokenizer(LapaVisionTokenizerConfig())
    assert tokenizer.num_parameters() == recorded["n_params"] == 146_244_675
    # Two parameters of one shape may be swapped by this, but none may be missing or mis-shaped.
    published = sorted(tuple(sorted(shape)) for shape, _ in recorded["params"].values())
    assert sorted(tuple(sorted(parameter.shape)) for parameter in tokenizer.parameters()) == published
    assert tokenizer.config.grid_size == 16


def test_save_and_load_give_equality(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = LapaVisionTokenizer.from_pretrained(tmp_path)
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(tokenizer(images()).reconstruction, loaded(images()).reconstruction)
    half = LapaVisionTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encode(images()).codes.shape == (2, 4, 4) and half.dtype == torch.bfloat16


def test_frozen_when_built_and_when_loaded(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for model in (tokenizer, LapaVisionTokenizer.from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(images()).loss.requires_grad


def test_training_moves_every_parameter_and_lowers_the_loss():
    tokenizer = tiny_tokenizer().requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in tokenizer.named_parameters()}
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = tokenizer(images())
        optimizer.zero_grad()
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in tokenizer.parameters())
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in tokenizer.named_parameters())


def test_loss_is_reconstruction_plus_codebook_plus_quarter_commitment():
    tokenizer = tiny_tokenizer()
    output, encoded = tokenizer(images()), tokenizer.encode(images())
    unclipped = tokenizer.decoder(tokenizer.post_quant_conv(encoded.quantized))
    distance = (encoded.latents - encoded.quantized).square().mean()
    torch.testing.assert_close(output.loss, (unclipped - images()).square().mean() + 1.25 * distance)
    assert torch.equal(output.codes, encoded.codes)
    torch.testing.assert_close(output.reconstruction, unclipped.clamp(-1, 1))


def test_codes_are_the_nearest_entries():
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        tokenizer.codebook.weight.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)))
    encoded = tokenizer.encode(images())
    distances = (encoded.latents[:, :, None] - tokenizer.codebook.weight.T[None, :, :, None, None]).square().sum(1)
    assert torch.equal(encoded.codes, distances.argmin(1))
    assert len(encoded.codes.unique()) > 2


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("pixel_values", torch.zeros(3, 8, 8), r"\(batch, 3, 8, 8\), got \(3, 8, 8\)"),
        ("pixel_values", torch.zeros(1, 3, 8, 9), r"got \(1, 3, 8, 9\)"),
        ("pixel_values", torch.zeros(1, 8, 8, 3), r"got \(1, 8, 8, 3\)"),
        ("pixel_values", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"floating.*torch.uint8"),
        ("codes", torch.full((1, 4, 4), 16), r"\[0, 16\).*\[16, 16\]"),
        ("codes", torch.full((1, 4, 4), -1), r"\[-1, -1\]"),
        ("codes", torch.zeros(1, 16, dtype=torch.int64), r"\(batch, 4, 4\), got \(1, 16\)"),
        ("codes", torch.zeros(1, 4, 4), r"torch.float32"),
    ],
)
def test_bad_input_names_the_argument(argument, value, message):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=f"`{argument}`.*{message}"):
        (tokenizer.encode if argument == "pixel_values" else tokenizer.decode)(value)
