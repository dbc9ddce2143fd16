"""A linear layer that takes the faster of torch's two CPU matrix libraries in inference."""

import torch
import torch.nn.functional as F
from torch import nn


class LapaLinear(nn.Linear):
    """`nn.Linear`, in fp32 inference on a CPU through oneDNN.

    torch sends fp32 linear layers to MKL, which on processors that are not Intel's runs at a fraction of what oneDNN
    reaches there (`benchmarks/quantizer_encode.py` measures both). The operator has no gradient, so training and
    everything else go the usual way. Results differ by summation order only.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight = self.weight
        if (
            states.device.type == "cpu"
            and states.dtype == weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        ):
            return torch.ops.mkldnn._linear_pointwise(states.contiguous(), weight, self.bias, "none", [], "")
        return F.linear(states, weight, self.bias)
