"""--use_liger_kernel: Liger's kernels for norms, MLPs and rotary positions, in models that Liger knows.

The head and the loss stay ours (lmolt/models/tree.py), so Liger's for them would have no effect. transformers' Trainer
puts the kernels into the model, and says nothing of one that Liger doesn't know; so that is asked before, and the same
row goes through the model without and with them.
"""

import contextlib

import torch
from transformers.utils import is_liger_kernel_available

OF_THE_HEAD = ("cross_entropy", "fused_linear_cross_entropy")
ROW = 64  # tokens
# ||with - without|| / ||without||, of the last hidden states: kernels round elsewhere, a wrong norm is off by about 1
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


def check_arguments(args) -> None:
    """`ValueError` where `args` ask for Liger's kernels and they can't run; else what stays ours is switched off."""
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu":
        raise ValueError("--use_liger_kernel: Liger's kernels need a GPU, and this run is on a CPU; leave it out")
    if not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs the package liger-kernel; install it, or leave it out")
    given = args.liger_kernel_config or {}
    if wrong := [name for name in OF_THE_HEAD if given.get(name)]:
        raise ValueError(f"--liger_kernel_config {wrong[0]} has no effect: the head and the loss are LMolT's own")
    args.liger_kernel_config = given | dict.fromkeys(OF_THE_HEAD, False)


def check_model(model) -> None:
    """`ValueError` where Liger has no kernels for the model, or its weights are shared out (ZeRO-3, FSDP)."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.get_base_model().config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"--use_liger_kernel: Liger has no kernels for a {kind}; leave it out")
    if any(p.is_meta or not p.numel() for p in model.parameters()):
        raise ValueError("--use_liger_kernel was not tried under ZeRO-3 and FSDP; leave it out")


@torch.no_grad()
def hidden_states(model, dtype: torch.dtype) -> torch.Tensor:
    """The last hidden states (1, ROW, hidden) of a fixed row, dropout off, computed in `dtype`; fp32."""
    row = torch.arange(ROW, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    autocast = torch.autocast(row.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with autocast:
        found = model(row, attention_mask=torch.ones_like(row), output_hidden_states=True, use_cache=False)
    model.train(was_training)
    return found.hidden_states[-1].float()


def check_equal(without: torch.Tensor, with_kernels: torch.Tensor, dtype: torch.dtype) -> float:
    """How far apart they are, relative; `ValueError` where that is more than rounding."""
    difference = ((with_kernels - without).norm() / without.norm()).item()
    if not difference <= BOUNDS[dtype]:
        raise ValueError(
            f"--use_liger_kernel: Liger's kernels give other hidden states than the model's own, {difference:.2g} off "
            f"where rounding allows {BOUNDS[dtype]:g}; leave it out"
        )
    return difference
