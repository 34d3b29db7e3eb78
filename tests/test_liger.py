"""--use_liger_kernel: refused where it would have no effect, and with it the numbers are those without."""

from importlib.util import find_spec

import pytest
import torch
from test_trainer import make_trainer, step_gradient

from lmolt.training import liger
from lmolt.training.arguments import PreferenceArguments


def test_on_a_cpu_it_is_refused():
    with pytest.raises(ValueError, match="--use_liger_kernel: Liger's kernels need a GPU, and this run is on a CPU"):
        PreferenceArguments(use_liger_kernel=True, use_cpu=True)


def test_its_configuration_alone_has_no_effect():
    with pytest.raises(ValueError, match="--liger_kernel_config has no effect: there is no --use_liger_kernel"):
        PreferenceArguments(liger_kernel_config={"rope": True})


@pytest.mark.parametrize(("off", "right"), [(0.05, True), (0.3, False), (float("nan"), False)])
def test_other_hidden_states_are_refused(off, right):
    hidden = torch.ones(1, 64, 8)
    if right:
        assert liger.check_equal(hidden, hidden * (1 + off), torch.bfloat16) == pytest.approx(off, rel=1e-3)
    else:
        with pytest.raises(ValueError, match="give other hidden states than the model's own"):
            liger.check_equal(hidden, hidden * (1 + off), torch.bfloat16)


def test_on_a_gpu_the_gradient_is_the_same(tiny_policy, few_triples, tmp_path):
    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        pytest.skip("needs a GPU and the package liger-kernel")
    settings = {"use_cpu": False, "per_device_train_batch_size": 8}
    plain = step_gradient(make_trainer(tiny_policy, few_triples, tmp_path, **settings))
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, use_liger_kernel=True, **settings)
    assert (
        type(trainer.model.get_base_model().model.norm).forward is not trainer.model.get_base_model().model.norm.forward
    )
    assert (step_gradient(trainer) - plain).norm() <= 1e-3 * plain.norm()


def test_on_a_gpu_a_model_that_liger_does_not_know_is_refused(tmp_path, few_triples, tiny_policy, monkeypatch):
    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        pytest.skip("needs a GPU and the package liger-kernel")
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, use_cpu=False)
    monkeypatch.setattr(trainer.model.get_base_model().config, "model_type", "bloom", raising=False)
    with pytest.raises(ValueError, match="Liger has no kernels for a bloom"):
        liger.check_model(trainer.model)
