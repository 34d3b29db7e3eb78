"""PEFT's LoRA layers with fewer passes over memory: the same numbers, and one dropout mask for each module's input.

PEFT computes `base(x) + B(A(dropout(x))) * scale` with a mask for each of q, k and v, though their input is one, a copy
of a 4-bit layer's output, a product by the scale and a sum, each a pass over (T, out) and a launch, in the backward
pass too. Here the scale is taken on the (T, r) between A and B, and B's product adds itself to the base's; and layers
that share an input share its mask: each adapter still sees each of its inputs dropped with the same probability, but
those of one input together.
"""

from types import MethodType

import torch
from torch.nn import functional as F

PLAIN = ("Linear", "Linear4bit")  # of PEFT's layers; others (embeddings, experts, 8 bit) stay as they are


def lean_adapters(model: torch.nn.Module) -> int:
    """Exchange the `forward` of each plain LoRA layer of `model`; the number of layers."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and type(m).__name__ in PLAIN]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
        for up in layer.lora_B.values():
            up.forward = MethodType(_onto, up)
    return len(layers)


def _forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    names = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(names) != 1 or args or kwargs or names[0] in self.lora_variant:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = names
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype != self.lora_A[name].weight.dtype:
        return type(self).forward(self, x)
    base = self.base_layer(x)
    dropout = self.lora_dropout[name]
    if isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and self.training:
        if autocast:
            x = _in(x, torch.get_autocast_dtype(x.device.type))
        x = _dropped(x, dropout.p)
    inner = self.lora_A[name](x)  # (..., r); by its module, as B below, whose hooks ZeRO-3 and FSDP need
    if self.scaling[name] != 1:
        inner = inner * self.scaling[name]
    precision = torch.get_autocast_dtype(x.device.type) if autocast else inner.dtype
    up = self.lora_B[name]
    if base.dtype == precision and up.bias is None and "forward" in vars(up):  # not of an adapter that came later
        return up(inner, base)
    return base + up(inner)


def _onto(self, x: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """B's product, added to `base` (..., out) by the same kernel where it is given."""
    if base is None:
        return F.linear(x, self.weight, self.bias)
    return torch.addmm(base.flatten(0, -2), x.flatten(0, -2), self.weight.t()).view(base.shape)


def _in(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`, once for all layers that read it."""
    if x.dtype == dtype or not x.is_floating_point():
        return x
    if (kept := getattr(x, "_lmolt_cast", None)) is None or kept.dtype != dtype:
        kept = x._lmolt_cast = x.to(dtype)
    return kept


def _dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """`x` with each number 0 with probability `p`, else scaled; the same for all layers that read this tensor."""
    known = getattr(x, "_lmolt_dropped", None)
    key = (p, x._version, torch.is_grad_enabled())
    if known is None or known[0] != key:
        x._lmolt_dropped = known = (key, _dropout(x, p))
    return known[1]


def _dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    if x.device.type != "cpu":
        return F.dropout(x, p)
    # a CPU draws 64 bits in about the time of one number: four decide of four, each in 1/65536ths
    keep = 65536 - round(p * 65536)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    mask = (bits[: x.numel()] < keep - 32768).view(x.shape)
    return x * mask.to(x.dtype).mul_(65536 / keep)
