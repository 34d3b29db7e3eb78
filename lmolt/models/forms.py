"""Tiles or FlexAttention: the two forms of a tree's attention, timed beside each other on a device."""

import subprocess
import time

import torch
from torch._inductor.runtime.triton_compat import OutOfResources, PTXASError

from lmolt.models.attention import layer_kinds, tree_attention
from lmolt.models.tree import attention_inputs

# what compilers say: torch's own errors are RuntimeErrors
UNCOMPILED = (RuntimeError, ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
UNCOMPILED += (subprocess.SubprocessError, OutOfResources, PTXASError)


def time_forms(
    tree, heads: int, shared: int, size: int, dtype: torch.dtype, forms=("tiles", "flex"), repeats: int = 5
) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """Seconds of one layer's attention on `tree.device`, forward and backward, in each form ("mask": one over the row).

    Medians of `repeats` after two passes that compile or plan; and each form's output and gradients for the same
    random numbers. On a CPU "flex" is a forward pass alone.
    """
    device = torch.device(tree.device)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = heads // shared, True, True
    T = len(tree.input_ids)
    draw = torch.Generator(device).manual_seed(0)
    make = lambda n: torch.randn(1, T, n, size, device=device, dtype=dtype, generator=draw).transpose(1, 2)
    inputs = [make(n) for n in (heads, shared, shared)]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timed, results = {}, {}
    for form in forms:
        differentiable = device.type != "cpu" or form != "flex"
        inputs = [x.detach().requires_grad_(differentiable) for x in inputs]
        if form == "mask":
            mask, blocks = torch.from_numpy(tree.attention_mask())[None, None].to(device), None
        else:
            with torch.no_grad():  # the shapes that training has are entered by training
                _, blocks = attention_inputs(tree, [(None, None)], form)
            mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
        took = []
        for _ in range(repeats + 2):
            wait()
            start = time.perf_counter()
            out = tree_attention(module, *inputs, mask, blocks, scaling=size**-0.5)[0]
            gradients = torch.autograd.grad(out.square().sum(), inputs) if differentiable else ()
            wait()
            took.append(time.perf_counter() - start)
        timed[form], results[form] = sorted(took[2:])[repeats // 2], [out.detach(), *gradients]
    return timed, results


def time_steps(score, trees: list, forms=("tiles", "flex")) -> dict[str, float]:
    """Seconds of `score(tree, form)` and its gradient in each form, as training runs them: the median over `trees`.

    The first two compile or plan, and aren't counted. Random numbers that are drawn here are drawn again afterwards.
    """
    on_gpu = trees[0].device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    timed = {}
    with torch.random.fork_rng([trees[0].device] if on_gpu else []):
        for form in forms:
            took = []
            for tree in trees:
                wait()
                start = time.perf_counter()
                score(tree, form).sum().backward()
                wait()
                took.append(time.perf_counter() - start)
            timed[form] = sorted(took[2:])[len(took[2:]) // 2]
    return timed


def why_not_flex(model) -> str | None:
    """What `model` has that FlexAttention wasn't seen to be right with on a GPU; None where there is nothing."""
    config = model.config.get_text_config()
    unfit = [name for name in ("attn_logit_softcapping", "attention_dropout") if getattr(config, name, None)]
    unfit += ["sinks"] * any("sinks" in name for name, _ in model.named_parameters())
    unfit += ["attention_chunk_size"] * any(chunk for _, chunk in layer_kinds(config).values())
    return f"not with the model's {', '.join(unfit)}" if unfit else None


def faster_form(model, tree) -> tuple[str, dict[str, float | str]]:
    """The faster of "tiles" and "flex" on `tree.device` for one layer of a model, and the ms of both.

    FlexAttention only where nothing speaks against it (`why_not_flex`), where it compiles, and where it gives the
    numbers of the tiles here and now.
    """
    if (why := why_not_flex(model)) is not None:
        return "tiles", {"flex": why}
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        timed, results = time_forms(tree, heads, getattr(config, "num_key_value_heads", None) or heads, size, dtype)
    except UNCOMPILED as error:  # the tiles do without it
        return "tiles", {"flex": f"{type(error).__name__}: {error}"[:200]}
    timed = {form: 1000 * seconds for form, seconds in timed.items()}
    for one, other in zip(*results.values(), strict=True):
        if not (one - other).norm() <= 0.02 * one.norm():
            return "tiles", timed | {"flex": "gives other numbers here"}
    return min(timed, key=timed.get), timed
