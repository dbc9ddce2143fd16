"""The `robot-action` pipeline: typed results, every form of input, one clear error for bad input."""

import base64
import io

import numpy as np
import pytest
import torch
from hub_folders import picture, save_policy, save_vision_tokenizer
from PIL import Image
from transformers import pipeline

from lapa import LapaForActionPrediction, LapaForLatentAction, LapaProcessor, LapaVisionTokenizer, RobotActionPipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_policy(root / "action", "action")
    save_policy(root / "latent", "latent")
    save_policy(root / "two", "action", statistics=("bridge", "fractal"))
    save_policy(root / "none", "action", statistics=())
    save_policy(root / "kept", "action", keep_latent_head=True)
    return root


@pytest.fixture(scope="module")
def policy(folders):
    return pipeline("robot-action", model=str(folders / "action"), device="cpu")


@pytest.fixture(scope="module")
def latent(folders):
    return pipeline("robot-action", model=str(folders / "latent"), device="cpu")


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        if key in ("scores", "log_probs", "action"):
            np.testing.assert_allclose(first[key], second[key], atol=1e-5)
        else:
            assert first[key] == second[key], key


def test_action_equals_processor_and_model(policy, folders):
    assert type(policy) is RobotActionPipeline
    result = policy({"image": picture(), "instruction": "push"})
    processor = LapaProcessor.from_pretrained(folders / "action")
    model = LapaForActionPrediction.from_pretrained(folders / "action")
    inputs = processor(images=picture(), instruction="push", target="action", unnorm_key="toy")
    expected = model.predict_action_tokens(**inputs, return_scores=True)
    assert list(result) == ["type", "action", "action_tokens", "scores", "unnorm_key"]
    assert result["type"] == "action" and result["unnorm_key"] == "toy"
    assert result["action_tokens"] == expected.action_tokens[0].tolist()
    assert result["action"].dtype == np.float32
    decoded = processor.decode_actions(expected.action_tokens, unnorm_key="toy")[0]
    np.testing.assert_array_equal(result["action"], decoded.numpy())
    # The bins of the key restrict the choice: 3, 2 and 2 of 16.
    assert all(token < bins for token, bins in zip(result["action_tokens"], (3, 2, 2)))
    probabilities = [expected.scores[0, i, token].exp().item() for i, token in enumerate(result["action_tokens"])]
    np.testing.assert_allclose(result["scores"], probabilities, atol=1e-6)


def test_latent_codes_are_never_an_action(latent, folders):
    result = latent({"image": picture(), "instruction": "push"})
    assert list(result) == ["type", "latent_action_codes", "scores"] and result["type"] == "latent_action"
    processor = LapaProcessor.from_pretrained(folders / "latent")
    model = LapaForLatentAction.from_pretrained(folders / "latent")
    codes = model.predict_latent_action(**processor(images=picture(), instruction="push"))
    assert result["latent_action_codes"] == codes[0].tolist()


def test_every_form_of_image_gives_the_same(policy, tmp_path):
    path = tmp_path / "camera.png"
    Image.fromarray(picture()).save(path)
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    expected = policy(picture(), instruction="push")
    images = [Image.fromarray(picture()), path, str(path), torch.from_numpy(picture()), encoded]
    for image in [*images, f"data:image/png;base64,{encoded}"]:
        same(policy(image, instruction="push"), expected)
        same(policy(image=image, instruction="push"), expected)


@pytest.mark.parametrize("name", ["policy", "latent"])
def test_lists_batches_and_iterables(name, request):
    pipe = request.getfixturevalue(name)
    texts = ["push", "take the broccoli out of the pot", "stop"]
    rows = [{"image": picture(seed), "instruction": text} for seed, text in enumerate(texts)]
    expected = [pipe(row) for row in rows]
    assert len({str(result) for result in expected}) == 3
    several = [
        pipe(rows),
        pipe(rows, batch_size=2),
        pipe(rows, batch_size=3, padding="longest"),
        list(pipe((row for row in rows), batch_size=2)),
        pipe(tuple(rows)),
        list(pipe(iter(rows))),
        pipe([row["image"] for row in rows], instruction=texts),
    ]
    for results in several:
        assert len(results) == 3
        for result, one in zip(results, expected):
            same(result, one)
    same(pipe([rows[0]["image"]] * 2, instruction="push")[1], expected[0])
    assert pipe([]) == []


def test_choosing_the_key(folders):
    pipe = pipeline("robot-action", model=str(folders / "two"), device="cpu")
    row = {"image": picture(), "instruction": "push"}
    with pytest.raises(ValueError, match="`unnorm_key` must be given.*'bridge', 'fractal'"):
        pipe(row)
    with pytest.raises(ValueError, match="`unnorm_key` 'widowx' is unknown; known keys: 'bridge', 'fractal'"):
        pipe(row, unnorm_key="widowx")
    assert pipe(row, unnorm_key="fractal")["unnorm_key"] == "fractal"
    fixed = pipeline("robot-action", model=str(folders / "two"), device="cpu", unnorm_key="bridge")
    assert fixed(row)["unnorm_key"] == "bridge"


def test_policy_without_statistics(folders):
    pipe = pipeline("robot-action", model=str(folders / "none"), device="cpu")
    row = {"image": picture(), "instruction": "push"}
    with pytest.raises(ValueError, match="no action statistics.*fit_actions.*decode=False"):
        pipe(row)
    result = pipe(row, decode=False)
    assert list(result) == ["type", "action_tokens", "scores"] and result["type"] == "action_tokens"


def test_scores_and_sampling(policy):
    row = {"image": picture(), "instruction": "push"}
    result = policy(row, return_log_probs=True)
    assert result["log_probs"].shape == (3, 16)
    np.testing.assert_allclose(np.exp(result["log_probs"]).sum(-1), 1, atol=1e-5)
    torch.manual_seed(0)
    sampled = {tuple(policy(row, do_sample=True, temperature=50.0, top_k=0)["action_tokens"]) for _ in range(20)}
    assert len(sampled) > 3
    # One choice left is greedy.
    same(policy(row, do_sample=True, top_k=1), policy(row))


def test_latent_codes_of_a_policy_that_kept_its_latent_head(folders, policy):
    pipe = pipeline("robot-action", model=str(folders / "kept"), device="cpu")
    row = {"image": picture(), "instruction": "push"}
    assert "action" in pipe(row)
    assert pipe(row, target="latent")["type"] == "latent_action"
    with pytest.raises(ValueError, match="retired"):
        policy(row, target="latent")


@pytest.mark.parametrize(
    "inputs, kwargs, message",
    [
        ({"instruction": "push"}, {}, "`image` is missing"),
        ({"image": picture()}, {}, "`instruction` is missing"),
        ({"image": picture(), "instruction": "push", "img": 1}, {}, "`img` is unknown.*accepted: image, instruction"),
        ({"img": picture(), "instruction": "push"}, {}, "`img` is unknown.*accepted: image, instruction"),
        ([{"image": picture(), "instruction": "push", 3: 1}], {}, "`3` is unknown in an input"),
        ({"image": picture(), "instruction": "push", "unnorm_key": "toy"}, {}, "`unnorm_key` is unknown in an input"),
        ({"image": picture(), "instruction": "  "}, {}, "`instruction` must say what to do"),
        ({"image": picture(), "instruction": 3}, {}, "`instruction` must be a string"),
        ({"image": "no_such_file.png", "instruction": "push"}, {}, "no path of a file"),
        ({"image": __file__, "instruction": "push"}, {}, "no readable image"),
        ({"image": np.zeros(5), "instruction": "push"}, {}, r"array of shape \(5,\)"),
        (picture(), {}, "an input must be"),
        ([picture(), picture()], {"instruction": ["push"]}, "equally many"),
        ({"image": picture(), "instruction": "push"}, {"instruction": "pull"}, "goes with an image"),
        ({"image": picture(), "instruction": "push"}, {"temprature": 2.0}, "`temprature` is unknown"),
        ({"image": picture(), "instruction": "push"}, {"max_new_tokens": 2}, "`max_new_tokens` cannot be set"),
        ({"image": picture(), "instruction": "push"}, {"target": "words"}, "`target` must be"),
    ],
)
def test_bad_input_is_one_clear_error(policy, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        policy(inputs, **kwargs)


def test_latent_model_refuses_what_belongs_to_actions(latent):
    row = {"image": picture(), "instruction": "push"}
    with pytest.raises(ValueError, match="`unnorm_key`.*latent codes"):
        latent(row, unnorm_key="toy")
    with pytest.raises(ValueError, match="no action head"):
        latent(row, target="action", decode=False)


def test_other_models_are_refused(tmp_path, policy):
    other = LapaVisionTokenizer.from_pretrained(save_vision_tokenizer(tmp_path / "other"))
    with pytest.raises(ValueError, match="`model` must be one of LapaForLatentAction.*got LapaVisionTokenizer"):
        RobotActionPipeline(model=other, processor=policy.processor, device="cpu")
    with pytest.raises(ValueError, match="`processor` must be given"):
        RobotActionPipeline(model=policy.model, device="cpu")
