"""Linear layers through the faster of torch's two CPU matrix libraries in inference."""

import torch
from torch import nn


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer does nothing but its product: no adapter, no quantised weights, no hook."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not module._forward_hooks


def linear(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`module(states)` for a linear layer, in fp32 inference on a CPU through oneDNN.

    torch sends fp32 linear layers to MKL, which on processors that are not Intel's runs at a fraction of what oneDNN
    reaches there (`benchmarks/quantizer_encode.py` measures both). The operator has no gradient, so training goes the
    usual way, and so does whatever is no plain `nn.Linear`: adapters, quantised and hooked layers. Results differ by
    summation order only.

    Args:
        module: The layer; (..., in_features) -> (..., out_features).
        states: (..., in_features).
    """
    if (
        is_plain_linear(module)
        and states.device.type == "cpu"
        and states.dtype == module.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    ):
        weight, bias = module.weight, module.bias
        return torch.ops.mkldnn._linear_pointwise(states.contiguous(), weight, bias, "none", [], "")
    return module(states)
