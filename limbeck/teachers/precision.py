"""Copies of a module that compute in another precision; the module itself is not changed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LEVELS = 127
"""Of each sign; the 128th negative one is left out, so that the levels lie evenly around 0."""

SMALLEST = 1e-30
"""The least that the largest value of a row counts as; a row of zeros has no scale."""

ROTARY = "inv_freq"
"""What transformers calls the frequencies of rotary positions. In half precision far positions come out wrong."""


def converted(module: nn.Module, dtype: str) -> nn.Module:
    """A copy of a module with its floating parameters and buffers in another dtype.

    The frequencies of rotary positions stay as they are.

    Args:
        module: Any module.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Example:
        >>> module = nn.Linear(2, 3)
        >>> converted(module, "bf16").weight.dtype, module.weight.dtype
        (torch.bfloat16, torch.float32)
    """
    wanted = DTYPES[dtype]
    memo: dict[
        int, object
    ] = {}  # deepcopy takes what is here as copied: the weights are never there twice in fp32
    for parameter in module.parameters():
        if parameter.is_floating_point():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(wanted, copy=True), requires_grad=False)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and ROTARY not in name:
            memo[id(buffer)] = buffer.detach().to(wanted, copy=True)
    return copy.deepcopy(module, memo)


def quantized(module: nn.Module) -> nn.Module:
    """A copy of a module with every `nn.Linear` in int8; see `Int8Linear`.

    Raises:
        ValueError: it has none.

    Example:
        >>> quantized(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
        Sequential(
          (0): Int8Linear(in_features=2, out_features=3)
          (1): Tanh()
        )
    """
    # Subclasses stay: torch's own attention reads the weight of one past its forward.
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    if not layers:
        raise ValueError(f"int8 is for nn.Linear, and {type(module).__name__} has none; leave int8 out")
    return copy.deepcopy(module, {id(layer): Int8Linear(layer) for layer in layers})


class Int8Linear(nn.Module):
    """A linear layer that multiplies in int8, for inference on a CPU.

    Weights have one scale for each output, inputs one for each row, found when they come. So what comes out for
    an example does not depend on the others of its batch, as it does where a whole batch shares one scale
    (PyTorch's `quantize_dynamic`): such signals could not be kept by example.

    Args:
        linear: The layer to convert.

    Example:
        >>> linear = nn.Linear(4, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.5, 1.0, 0.0, -1.0], [0.0, 0.0, 2.0, 0.0]]))
        >>> Int8Linear(linear)(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
        tensor([[1.5039, 2.0000]])
    """

    quantized: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weights, scale = _to_int8(linear.weight.detach())
        self.register_buffer("quantized", weights)
        self.register_buffer("scale", scale.squeeze(-1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """(out, in), as floating numbers, for models that read the weight of a layer past its forward."""
        return self.quantized * self.scale.unsqueeze(-1)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the input's dtype."""
        rows, scale = _to_int8(input.reshape(-1, self.in_features))
        product = torch._int_mm(rows, self.quantized.t()) * scale
        result = product * self.scale if self.bias is None else torch.addcmul(self.bias, product, self.scale)
        return result.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sizes, as PyTorch's own layers print them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) in int8, and the scale (N, 1) of each."""
    rows = rows.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LEVELS
    return (rows / scale).round().to(torch.int8), scale
