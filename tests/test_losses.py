"""Each loss against its equation, written out in plain float64 Python."""

import math

import pytest
import torch

from lmolt.training import losses

W, L = [-12.5, -3.25, -40.0], [-15.0, -2.5, -38.0]
REF_W, REF_L = [-13.0, -3.5, -36.0], [-14.0, -3.0, -37.0]
TOKENS = [7, 3, 20]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tensors(*columns):
    return [torch.tensor(column, dtype=torch.float64) for column in columns]


def test_sft_is_the_token_mean():
    assert losses.sft(*tensors(W, TOKENS)).item() == pytest.approx((12.5 + 3.25 + 40.0) / 30, rel=1e-12)


def test_dpo():
    expected = sum(
        -math.log(sigmoid(0.3 * ((w - rw) - (l - rl)))) for w, l, rw, rl in zip(W, L, REF_W, REF_L, strict=True)
    )
    assert losses.dpo(*tensors(W, L, REF_W, REF_L), beta=0.3).item() == pytest.approx(expected / 3, rel=1e-12)


@pytest.mark.parametrize(("nll", "term"), [("token", 55.75 / 30), ("sequence", 55.75 / 3)])
def test_cpo(nll, term):
    preference = sum(-math.log(sigmoid(0.2 * (w - l))) for w, l in zip(W, L, strict=True)) / 3
    value = losses.cpo(*tensors(W, L, TOKENS), beta=0.2, alpha=0.7, nll=nll).item()
    assert value == pytest.approx(preference + 0.7 * term, rel=1e-12)


def test_cpo_refuses_another_nll():
    with pytest.raises(ValueError, match="'token' or 'sequence'"):
        losses.cpo(*tensors(W, L, TOKENS), nll="mean")


def test_kto():
    z = 0.4
    desirable = [1.5 * (1 - sigmoid(0.1 * ((w - r) - z))) for w, r in zip(W, REF_W, strict=True)]
    undesirable = [0.5 * (1 - sigmoid(0.1 * (z - (l - r)))) for l, r in zip(L, REF_L, strict=True)]
    value = losses.kto(*tensors(W, L, REF_W, REF_L), torch.tensor(z), beta=0.1, lambda_p=1.5, lambda_d=0.5).item()
    assert value == pytest.approx((sum(desirable) + sum(undesirable)) / 6, rel=1e-6)


def test_kto_z_is_never_negative_and_has_no_gradient():
    total = torch.tensor(-3.0, requires_grad=True)
    assert losses.kto_z(total, 4).item() == 0
    assert losses.kto_z(-total, 4).item() == 0.75
    assert not losses.kto_z(-total, 4).requires_grad


def test_kto_pair_measures_each_kind_against_the_others_mean():
    r_w = [w - r for w, r in zip(W, REF_W, strict=True)]
    r_l = [l - r for l, r in zip(L, REF_L, strict=True)]
    mean_w, mean_l = max(0, sum(r_w) / 3), max(0, sum(r_l) / 3)
    expected = [1 - sigmoid(0.1 * (r - mean_l)) for r in r_w] + [1 - sigmoid(0.1 * (mean_w - r)) for r in r_l]
    value = losses.kto_pair(*tensors(W, L, REF_W, REF_L)).item()
    assert value == pytest.approx(sum(expected) / 6, rel=1e-12)


def test_shares_of_a_split_batch_add_up():
    w, l, rw, rl, tokens = tensors(W, L, REF_W, REF_L, TOKENS)
    parts = (slice(0, 1), slice(1, 3))
    counts = {"num_pairs": 3, "num_tokens": 30}
    whole = losses.cpo(w, l, tokens)
    assert sum(losses.cpo(w[p], l[p], tokens[p], **counts) for p in parts).item() == pytest.approx(whole.item())
    whole = losses.kto(w, l, rw, rl, torch.tensor(0.2))
    shares = (losses.kto(w[p], l[p], rw[p], rl[p], torch.tensor(0.2), num_pairs=3) for p in parts)
    assert sum(shares).item() == pytest.approx(whole.item())


def test_at_the_reference_dpo_is_log_two():
    assert losses.dpo(*tensors(W, L, W, L)).item() == pytest.approx(math.log(2))


def test_what_each_loss_reads_and_its_own_parameters():
    reads = {name: (loss.reads - {"num_pairs", "num_tokens"}, loss.parameters) for name, loss in losses.LOSSES.items()}
    both, references = {"chosen", "rejected"}, {"ref_chosen", "ref_rejected"}
    assert reads == {
        "sft": ({"chosen", "chosen_tokens"}, {}),
        "dpo": (both | references, {"beta": 0.1}),
        "cpo": (both | {"chosen_tokens"}, {"beta": 0.1, "alpha": 1.0, "nll": "token"}),
        "kto": (both | references | {"z"}, {"beta": 0.1, "lambda_p": 1.0, "lambda_d": 1.0}),
        "kto_pair": (both | references, {"beta": 0.1}),
    }
    assert [name for name, loss in losses.LOSSES.items() if loss.has_reference] == ["dpo", "kto", "kto_pair"]
    for loss in losses.LOSSES.values():
        assert loss.parameters.keys() <= losses.PARAMETERS.keys()


def test_a_loss_takes_what_it_reads_from_all_that_is_given():
    w, l, rw, rl, tokens = tensors(W, L, REF_W, REF_L, TOKENS)
    given = {"chosen": w, "rejected": l, "ref_chosen": rw, "ref_rejected": rl, "chosen_tokens": tokens}
    given |= {"rejected_tokens": tokens, "z": torch.tensor(0.4), "num_pairs": 6, "num_tokens": 60}
    assert losses.LOSSES["dpo"](given, {"beta": 0.3}) == losses.dpo(w, l, rw, rl, beta=0.3) / 2
    assert losses.LOSSES["sft"](given, {}).item() == pytest.approx(55.75 / 60, rel=1e-12)
