"""Faster forms of the quantizer's layers compute what the plain ones do."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import quantizer_config

from lapa.modeling_lapa.linear_lapa import linear
from lapa.modeling_lapa.modeling_lapa_quantizer_layers import (
    LapaQuantizerFeedForward,
    LapaQuantizerPositionConvolution,
    eager_attention_forward,
    short_attention_forward,
)


@pytest.mark.parametrize("time", [1, 2, 4])
def test_the_position_convolution_is_a_causal_3d_convolution(time):
    torch.manual_seed(0)
    module = LapaQuantizerPositionConvolution(8)
    states = torch.randn(2 * time, 12, 8)
    volume = states.reshape(2, time, 3, 4, 8).permute(0, 4, 1, 2, 3)
    convolution = module.convolution
    expected = F.conv3d(F.pad(volume, (1, 1, 1, 1, 2, 0)), convolution.weight, convolution.bias, groups=8)
    expected = expected.permute(0, 2, 3, 4, 1).reshape(states.shape)
    torch.testing.assert_close(module(states, (2, time, 3, 4)), expected, atol=1e-6, rtol=1e-5)


def test_short_attention_is_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 4, 2, 8) for _ in range(3))
    expected, _ = eager_attention_forward(torch.nn.Identity(), query, key, value, None, scaling=8.0)
    output, _ = short_attention_forward(torch.nn.Identity(), query, key, value, None, scaling=8.0)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_a_padded_feed_forward_has_the_same_output_and_gradients():
    torch.manual_seed(0)
    module = LapaQuantizerFeedForward(quantizer_config(hidden_size=40))
    assert module.down_proj.in_features == 106
    states = torch.randn(5, 40)
    plain = module(states)
    padded = module._padded(module.norm(states), padding=22)
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), module.down_proj.weight)[0] for out in (plain, padded)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_have_the_output_and_gradients_of_torch(bias):
    torch.manual_seed(0)
    module = torch.nn.Linear(24, 40, bias=bias)
    results = []
    for function in (module, lambda states: linear(module, states)):
        states = torch.arange(2 * 3 * 24).reshape(2, 24, 3).sin().transpose(1, 2).requires_grad_()  # not contiguous
        output = function(states)
        results.append((output, *torch.autograd.grad(output.cos().sum(), [states, *module.parameters()])))
    for ours, theirs in zip(results[1], results[0]):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(module, states), results[0][0], atol=1e-6, rtol=1e-5)
    assert type(linear(module, states).grad_fn).__name__ == "_OneDnnLinearBackward"


def test_autocast_reaches_linear_layers():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.nn.Linear(24, 40), torch.ones(2, 24)).dtype == torch.bfloat16
