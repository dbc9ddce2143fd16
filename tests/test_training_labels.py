"""Labelling: the codes of every step, whatever the batch size and the form of the pairs."""

import numpy as np
import pytest
import torch
from tiny_models import build

from lapa.data.frame_pairs import FramePairDataset
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
from lapa.training.label_latent_actions import (
    encode_images,
    hash_weights,
    label_episodes,
    label_latent_actions,
)


@pytest.fixture(scope="module")
def quantizer():
    model = build("nsvq")
    # Spread over the embeddings, so that different pairs get different codes.
    pixels = torch.rand(16, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = model.encode(pixels).latent_action_embeddings.detach().flatten(0, 1)
    model.vector_quantizer.codebook.data = embeddings[::8].clone()
    return model.train()


def episodes(lengths=(6, 3, 2, 5), size=32):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (length, size, size, 3), dtype=np.uint8) for length in lengths]


def test_codes_are_the_encoders(quantizer):
    pairs = FramePairDataset(episodes(), frame_gap=2)
    codes = label_latent_actions(quantizer, pairs, batch_size=3, show_progress=False)
    assert codes.shape == (4 + 1 + 0 + 3, 4) and codes.dtype == np.int64
    assert len(np.unique(codes)) > 2
    pixels = torch.stack([pairs[i]["frames"] for i in range(len(pairs))]).float() / 255
    assert np.array_equal(codes, quantizer.encode(pixels).latent_action_codes.numpy())
    assert quantizer.training, "labelling must leave the mode as it was"


def test_batch_size_and_form_do_not_matter(quantizer, tmp_path):
    pairs = FramePairDataset(episodes(), frame_gap=2)
    codes = label_latent_actions(quantizer, pairs, batch_size=64, show_progress=False)
    array = np.stack([pairs[i]["frames"].permute(0, 2, 3, 1).numpy() for i in range(len(pairs))])
    assert np.array_equal(label_latent_actions(quantizer, array, 1, show_progress=False), codes)
    assert np.array_equal(label_latent_actions(quantizer, iter(array), 5, show_progress=False), codes)
    quantizer.save_pretrained(tmp_path)
    encoder = LapaQuantizerEncoder.from_pretrained(tmp_path)
    assert np.array_equal(label_latent_actions(encoder, array, show_progress=False), codes)


def test_per_episode(quantizer):
    recordings = episodes()
    labelled = label_episodes(quantizer, recordings, 2, show_progress=False)
    assert [len(codes) for codes in labelled] == [4, 1, 0, 3]
    alone = label_episodes(quantizer, recordings[3:], 2, show_progress=False)
    assert np.array_equal(alone[0], labelled[3])
    gaps = label_episodes(quantizer, recordings, [5, 1, 2, 4], show_progress=False)
    assert [len(codes) for codes in gaps] == [1, 2, 0, 1]
    assert [codes.shape for codes in label_episodes(quantizer, recordings[2:3], 2, show_progress=False)] == [(0, 4)]


def test_bad_pairs(quantizer):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        label_latent_actions(quantizer, [], 0)
    with pytest.raises(ValueError, match="`frame_pairs`"):
        label_latent_actions(quantizer, np.zeros((2, 32, 32, 3), np.uint8), show_progress=False)
    with pytest.raises(ValueError, match="`pixel_values`"):
        label_latent_actions(quantizer, np.zeros((2, 2, 16, 16, 3), np.uint8), show_progress=False)
    assert label_latent_actions(quantizer, [], show_progress=False).shape == (0, 4)


def test_image_codes(quantizer):
    from lapa import LapaImageProcessor

    tokenizer = build("vision_tokenizer").eval()
    processor = LapaImageProcessor(size=8)
    images = episodes(size=8)[0]
    codes = encode_images(tokenizer, processor, images, 4, show_progress=False)
    pixels = torch.as_tensor(np.asarray(processor(list(images))["pixel_values"]))
    assert np.array_equal(codes, tokenizer.encode(pixels).codes.flatten(1).numpy())


def test_hash_names_the_weights(quantizer, tmp_path):
    quantizer.save_pretrained(tmp_path)
    first = hash_weights(tmp_path)
    assert len(first) == 64 and hash_weights(tmp_path) == first
    other = build("nsvq")
    other.save_pretrained(tmp_path)
    assert hash_weights(tmp_path) != first
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        hash_weights(tmp_path / "nowhere")
