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


def test_cpo_over_sequences_adds_up_over_a_split_batch():
    whole = losses.cpo(*tensors(W, L, TOKENS), nll="sequence")
    counts = {"num_pairs": 3, "num_tokens": sum(TOKENS), "nll": "sequence"}
    shares = [losses.cpo(*tensors(W[i], L[i], TOKENS[i]), **counts) for i in (slice(0, 1), slice(1, 3))]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-12)


def test_kto_pair_has_a_gradient_through_the_other_kinds_mean():
    """One triple at the reference, r_l = 0.5: d/dr_l of (1 - s(r_w - r_l) + 1 - s(0 - r_l)) / 2, beta 1."""
    chosen, rejected, reference = tensors([0.0], [0.5], [0.0])
    rejected.requires_grad_()
    losses.kto_pair(chosen, rejected, reference, reference, beta=1.0).backward()
    slope = sigmoid(-0.5) * (1 - sigmoid(-0.5))
    assert rejected.grad.item() == pytest.approx((slope + slope) / 2, rel=1e-12)


def test_at_the_reference_dpo_is_log_two():
    assert losses.dpo(*tensors(W, L, W, L)).item() == pytest.approx(math.log(2))


REJECTED_TOKENS = [9, 2, 15]
ROWS = [
    dict(zip(("w", "l", "rw", "rl", "nw", "nl"), row, strict=True))
    for row in zip(W, L, REF_W, REF_L, TOKENS, REJECTED_TOKENS, strict=True)
]


def log_s(x):
    return math.log(sigmoid(x))


def margin(r):
    return (r["w"] - r["rw"]) - (r["l"] - r["rl"])


def margin_a_token(r):
    return (r["w"] - r["rw"]) / r["nw"] - (r["l"] - r["rl"]) / r["nl"]


def log_odds(logp, tokens):
    p = math.exp(logp / tokens)
    return math.log(p / (1 - p))


def smoothed(h, share):
    return -(1 - share) * log_s(h) - share * log_s(-h)


NLL = 55.75 / 30  # of the preferred outputs, a token
FORMULAS = {  # of one triple r and the parameters p: beta, label_smoothing e, gamma, alpha
    "dpo": lambda r, beta, e: smoothed(beta * margin(r), e),
    "cpo": lambda r, beta, e, alpha: smoothed(beta * (r["w"] - r["l"]), e) + alpha * NLL,
    "robust_dpo": lambda r, beta, e: ((1 - e) * -log_s(beta * margin(r)) - e * -log_s(-beta * margin(r))) / (1 - 2 * e),
    "dpo_norm": lambda r, beta, e: smoothed(beta * margin_a_token(r), e),
    "ipo": lambda r, beta: (margin_a_token(r) - 1 / (2 * beta)) ** 2,
    "hinge": lambda r, beta: max(0, 1 - beta * margin(r)),
    "apo_zero": lambda r, beta: (1 - sigmoid(beta * (r["w"] - r["rw"]))) + sigmoid(beta * (r["l"] - r["rl"])),
    "apo_down": lambda r, beta: sigmoid(beta * (r["w"] - r["rw"])) + (1 - sigmoid(beta * margin(r))),
    "simpo": lambda r, beta, gamma: -log_s(beta / r["nw"] * r["w"] - beta / r["nl"] * r["l"] - gamma),
    "cpo_simpo": lambda r, beta, gamma, alpha: FORMULAS["simpo"](r, beta, gamma) + alpha * NLL,
    "orpo": lambda r, beta: NLL - beta * log_s(log_odds(r["w"], r["nw"]) - log_odds(r["l"], r["nl"])),
}
OTHER = {"beta": 0.7, "label_smoothing": 0.2, "gamma": 0.3, "alpha": 0.6}  # away from every default


def given(part=slice(None)):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
    columns = tensors(W, L, REF_W, REF_L, TOKENS, REJECTED_TOKENS)
    return {name: column[part] for name, column in zip(names, columns, strict=True)} | {
        "num_pairs": 3,
        "num_tokens": 30,
    }


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_its_formula_and_adds_up_over_a_split_batch(name):
    loss = losses.LOSSES[name]
    for parameters in (loss.parameters, loss.parameters | {k: v for k, v in OTHER.items() if k in loss.parameters}):
        of_formula = {"e" if k == "label_smoothing" else k: v for k, v in parameters.items() if k != "nll"}
        expected = sum(FORMULAS[name](row, **of_formula) for row in ROWS) / 3
        assert loss(given(), parameters).item() == pytest.approx(expected, rel=1e-12)
        parts = [loss(given(part), parameters).item() for part in (slice(0, 1), slice(1, 3))]
        assert sum(parts) == pytest.approx(expected, rel=1e-12)


def test_orpo_of_a_certain_output_is_finite():
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    value = losses.orpo(certain, -one, one, one)
    value.backward()
    assert value.isfinite() and certain.grad.isfinite().all()


def test_what_each_loss_reads_and_its_own_parameters():
    reads = {name: (loss.reads - {"num_pairs", "num_tokens"}, loss.parameters) for name, loss in losses.LOSSES.items()}
    both, references = {"chosen", "rejected"}, {"ref_chosen", "ref_rejected"}
    tokens = {"chosen_tokens", "rejected_tokens"}
    assert reads == {
        "sft": ({"chosen", "chosen_tokens"}, {}),
        "dpo": (both | references, {"beta": 0.1, "label_smoothing": 0.0}),
        "cpo": (both | {"chosen_tokens"}, {"beta": 0.1, "alpha": 1.0, "nll": "token", "label_smoothing": 0.0}),
        "kto": (both | references | {"z"}, {"beta": 0.1, "lambda_p": 1.0, "lambda_d": 1.0}),
        "kto_pair": (both | references, {"beta": 0.1}),
        "simpo": (both | tokens, {"beta": 2.0, "gamma": 1.0}),
        "cpo_simpo": (both | tokens, {"beta": 2.0, "gamma": 1.0, "alpha": 1.0}),
        "orpo": (both | tokens, {"beta": 0.1}),
        "ipo": (both | references | tokens, {"beta": 0.1}),
        "hinge": (both | references, {"beta": 0.1}),
        "robust_dpo": (both | references, {"beta": 0.1, "label_smoothing": 0.1}),
        "dpo_norm": (both | references | tokens, {"beta": 5.0, "label_smoothing": 0.0}),
        "apo_zero": (both | references, {"beta": 0.1}),
        "apo_down": (both | references, {"beta": 0.1}),
    }
    without = [name for name, loss in losses.LOSSES.items() if not loss.has_reference]
    assert without == ["sft", "cpo", "simpo", "cpo_simpo", "orpo"]
    for loss in losses.LOSSES.values():
        assert loss.parameters.keys() <= losses.PARAMETERS.keys()


def test_a_loss_takes_what_it_reads_from_all_that_is_given():
    w, l, rw, rl, tokens = tensors(W, L, REF_W, REF_L, TOKENS)
    given = {"chosen": w, "rejected": l, "ref_chosen": rw, "ref_rejected": rl, "chosen_tokens": tokens}
    given |= {"rejected_tokens": tokens, "z": torch.tensor(0.4), "num_pairs": 6, "num_tokens": 60}
    assert losses.LOSSES["dpo"](given, {"beta": 0.3}) == losses.dpo(w, l, rw, rl, beta=0.3) / 2
    assert losses.LOSSES["sft"](given, {}).item() == pytest.approx(55.75 / 60, rel=1e-12)
