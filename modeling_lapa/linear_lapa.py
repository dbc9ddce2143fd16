"""Linear layers through the faster of torch's two CPU matrix libraries."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer does nothing but its product: no adapter, no quantised weights, no hook."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not module._forward_hooks


def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right.T + bias` in oneDNN: (..., inner), (columns, inner) -> (..., columns)."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """A linear layer all three of whose products run in oneDNN; the operator itself has no gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states.contiguous(), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient.contiguous(), weight.t()) if needs_states else None,
            _product(rows.t(), states.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def linear(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`module(states)` for a linear layer, in fp32 on a CPU through oneDNN.

    torch sends fp32 linear layers to MKL, which on processors that are not Intel's runs at a fraction of what oneDNN
    reaches there (`benchmarks/quantizer_encode.py` and `benchmarks/quantizer_training.py` measure both). Whatever is no
    plain `nn.Linear` goes the usual way: adapters, quantised and hooked layers. Results differ by summation order only.

    Args:
        module: The layer; (..., in_features) -> (..., out_features).
        states: (..., in_features).
    """
    if (
        is_plain_linear(module)
        and states.device.type == "cpu"
        and states.ndim > 1
        and states.numel()
        and states.dtype == module.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    ):
        weight, bias = module.weight, module.bias
        if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
            return _OneDnnLinear.apply(states, weight, bias)
        return _product(states.contiguous(), weight, bias)
    return module(states)
