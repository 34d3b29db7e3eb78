"""LoRA layers with fewer passes against PEFT's own: the same numbers; dropout is what it says, one mask an input."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lmolt.models.lora import _dropout, _dropped, lean_adapters

CONFIG = LlamaConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def policy(dropout: float):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_config(CONFIG), lora).train()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_numbers_and_gradients_as_pefts_own(autocast):
    ids, results = torch.arange(40).view(2, 20), []
    for lean in (False, True):
        model = policy(0.0)
        assert not lean or lean_adapters(model) == 14
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits.float()
        logits.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with model.disable_adapter(), torch.no_grad():
            results.append((logits, gradient, model(input_ids=ids).logits))
    (logits, gradient, base), (lean_logits, lean_gradient, lean_base) = results
    tolerance = 2e-2 if autocast else 1e-6
    assert (lean_logits - logits).norm() <= tolerance * logits.norm()
    assert (lean_gradient - gradient).norm() <= tolerance * gradient.norm()
    assert torch.equal(lean_base, base)
    assert (lean_logits - lean_base).norm() > 0.1 * base.norm()  # the adapter does something here


def test_an_adapter_that_comes_later_is_pefts_own():
    ids, results = torch.arange(40).view(2, 20), []
    for lean in (False, True):
        model = policy(0.0)
        if lean:
            lean_adapters(model)
        torch.manual_seed(1)
        model.add_adapter("later", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.set_adapter("later")
        results.append(model(input_ids=ids).logits)
    assert (results[1] - results[0]).norm() <= 1e-6 * results[0].norm()


def test_dropout_drops_with_its_probability_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1003)  # no multiple of four
    for p in (0.1, 0.5, 0.9):
        dropped = _dropout(x, p)
        assert (dropped == 0).float().mean().sub(p).abs() < 0.002
        kept = dropped[dropped != 0]
        assert (kept - 1 / (1 - p)).abs().max() < 1e-3 / (1 - p)
        assert abs(dropped.mean() - 1) < 0.01
    lanes = (_dropout(torch.ones(4_000_000), 0.1) == 0).view(-1, 4).float().mean(0)
    assert (lanes - 0.1).abs().max() < 0.001  # each quarter of a draw drops as often
    assert not torch.equal(_dropout(x, 0.5), _dropout(x, 0.5))


def test_layers_of_one_input_share_its_mask_and_no_two_passes_do():
    x = torch.randn(50, 60, requires_grad=True)
    assert _dropped(x, 0.5) is _dropped(x, 0.5)
    assert _dropped(x, 0.5) is not _dropped(x, 0.25)
    assert not torch.equal(_dropped(x, 0.5) == 0, _dropped(x * 1.0, 0.5) == 0)
    model = policy(0.5)
    lean_adapters(model)
    ids = torch.arange(20).view(1, 20)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_mask_is_not_kept_for_other_numbers_or_without_gradient():
    x = torch.ones(64, requires_grad=True)
    with torch.no_grad():
        _dropped(x, 0.5)
    _dropped(x, 0.5).sum().backward()  # what was kept without a gradient would give none
    assert x.grad.norm() > 0
    y = torch.ones(64)
    _dropped(y, 0.5)
    assert _dropped(y.mul_(0), 0.5).abs().sum() == 0


def test_checkpointing_computes_again_with_the_same_masks():
    ids, gradients = torch.arange(40).view(2, 20), []
    for checkpointing in (False, True):
        model = policy(0.3)
        lean_adapters(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        model(input_ids=ids).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
