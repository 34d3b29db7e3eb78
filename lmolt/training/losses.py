"""The losses, as pure functions of sequence log-probabilities.

Equation numbers are those of Gkoumas & Liakata, "Feedback-aligned Mixed LLMs for Machine Language-Molecule
Translation". Notation: `logp(y) = sum_t log pi(y_t | x, y_<t)` over the tokens of an output, its EOS counted, is a
tensor (B,); `chosen`, `rejected` name the preferred and the dis-preferred output of each triple; `ref_*` are the same
under the frozen reference. Losses that the paper has not name their own source; docs/losses.md writes all of them out.

Each function returns the sum of its examples' losses over a *global* count: `num_pairs` triples or `num_tokens`
preferred tokens of the whole optimizer step, all ranks and accumulation steps. So the losses of micro-batches add up
to the loss of the batch, however it is split. A count left out is the batch's own.

A new loss is its function and one entry of `LOSSES`, at the end of this file; a new parameter is one entry of
`PARAMETERS`, and is then a flag. What a function is given follows from the names of its arguments (`GIVEN`).
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid

# What the trainer gives to a loss that has an argument of that name: (B,) log-probabilities, numbers of tokens and
# log-probabilities under the reference; `z`, KTO's constant; the counts of the whole optimizer step.
GIVEN = ("chosen", "rejected", "chosen_tokens", "rejected_tokens", "ref_chosen", "ref_rejected", "z")
GIVEN += ("num_pairs", "num_tokens")


class Parameter(NamedTuple):
    """A parameter of one or more losses: its flag's type and help, and which values have sense, in words too."""

    kind: type
    help: str
    valid: Callable[[Any], bool]
    values: str


PARAMETERS = {
    "beta": Parameter(float, "temperature", lambda v: v > 0, "it is more than 0"),
    "alpha": Parameter(float, "weight of the NLL term (Eq. 8)", lambda v: v >= 0, "it is 0 or more"),
    "nll": Parameter(
        str, "NLL as mean over tokens, or over sequences", ("token", "sequence").__contains__, "use token or sequence"
    ),
    "gamma": Parameter(float, "margin that the rewards' difference should exceed", lambda v: v >= 0, "it is 0 or more"),
    "label_smoothing": Parameter(
        float, "assumed share of swapped preferences", lambda v: 0 <= v < 0.5, "it is 0 or more, and less than 0.5"
    ),
    "lambda_p": Parameter(float, "weight of desirable outputs", lambda v: v >= 0, "it is 0 or more"),
    "lambda_d": Parameter(float, "weight of undesirable outputs", lambda v: v >= 0, "it is 0 or more"),
}


class Loss:
    """A loss as all of LMolT knows it: `function`, what it reads, its own parameters, its definition for a card.

    `rewards_per_token`: the rewards that are logged are means over an output's tokens, as such a loss sees them.
    `depends_on_split`: the loss of a step isn't the same however it is cut into micro-batches.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        definition: str,
        *,
        rewards_per_token: bool = False,
        depends_on_split: bool = False,
    ):
        self.function, self.definition = function, definition
        self.rewards_per_token, self.depends_on_split = rewards_per_token, depends_on_split

    @cached_property
    def reads(self) -> set[str]:
        """Which of `GIVEN` the function asks for."""
        return set(GIVEN) & set(inspect.signature(self.function).parameters)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The loss's own parameters with their defaults, in the function's order."""
        names = inspect.signature(self.function).parameters
        return {name: parameter.default for name, parameter in names.items() if name not in GIVEN}

    @property
    def has_reference(self) -> bool:
        return "ref_chosen" in self.reads

    def __call__(self, given: dict[str, torch.Tensor], parameters: dict[str, Any]) -> torch.Tensor:
        """The loss (a scalar) of what the function asks for; `given` may hold more, `parameters` may not."""
        return self.function(**{name: given[name] for name in self.reads}, **parameters)


def sft(chosen, chosen_tokens, *, num_tokens=None):
    """Eq. 4: negative log-likelihood of the preferred outputs, mean over their tokens. `chosen_tokens` is (B,)."""
    return -chosen.sum() / (chosen_tokens.sum() if num_tokens is None else num_tokens)


def _mean(losses, num_pairs):
    return losses.sum() / (len(losses) if num_pairs is None else num_pairs)


def _cross_entropy(logits, label_smoothing=0.0):
    """-log s(h) where the preference is right, -log s(-h) where it is swapped, as is assumed of a share."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0, num_pairs=None):
    """Eq. 5: -log s(beta [(logp(w) - ref(w)) - (logp(l) - ref(l))]).

    With `label_smoothing` it is conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return _mean(_cross_entropy(beta * margins, label_smoothing), num_pairs)


def cpo(
    chosen, rejected, chosen_tokens,
    *, beta=0.1, alpha=1.0, nll="token", label_smoothing=0.0, num_pairs=None, num_tokens=None,
):  # fmt: skip
    """Eqs. 6 and 8: -log s(beta [logp(w) - logp(l)]) + alpha NLL(w), without a reference.

    `nll="token"` takes the mean over the tokens of all preferred outputs, as the paper's authors ran it (TRL's CPO);
    `nll="sequence"` the mean over sequences, which is Eq. 8 to the letter.
    """
    preference = _mean(_cross_entropy(beta * (chosen - rejected), label_smoothing), num_pairs)
    if nll == "token":
        return preference + alpha * sft(chosen, chosen_tokens, num_tokens=num_tokens)
    if nll == "sequence":
        return preference + alpha * _mean(-chosen, num_pairs)
    raise ValueError(f"nll is {nll!r}; use 'token' or 'sequence'")


def kto_z(log_ratio_sum, num_pairs):
    """Eq. 11: z = max(0, mean(logp(y_j|x_i) - ref(y_j|x_i))) over mismatched pairs, a constant without gradient.

    `log_ratio_sum` is that difference's sum over the `num_pairs` mismatched pairs of the whole optimizer step.
    """
    return (log_ratio_sum.detach() / num_pairs).clamp(min=0)


def kto(chosen, rejected, ref_chosen, ref_rejected, z, *, beta=0.1, lambda_p=1.0, lambda_d=1.0, num_pairs=None):
    """Eqs. 9 to 13, each triple one desirable and one undesirable example; mean over both kinds of examples.

    Desirable: lambda_P (1 - s(beta (r_w - z))); undesirable: lambda_D (1 - s(beta (z - r_l))), r = logp - ref.
    """
    desirable = lambda_p * (1 - torch.sigmoid(beta * ((chosen - ref_chosen) - z)))
    undesirable = lambda_d * (1 - torch.sigmoid(beta * (z - (rejected - ref_rejected))))
    return (desirable + undesirable).sum() / (2 * (len(chosen) if num_pairs is None else num_pairs))


def kto_pair(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, num_pairs=None):
    """The loss behind the paper's "DPO" figures: TRL 0.8's `loss_type="kto_pair"`.

    Each kind's reward is measured against the other's mean over the micro-batch, with gradient. It therefore depends
    on how a batch is split, unlike the other losses; the authors ran it at one triple a micro-batch.
    """
    r_chosen, r_rejected = chosen - ref_chosen, rejected - ref_rejected
    losses = torch.cat(
        [
            1 - torch.sigmoid(beta * (r_chosen - r_rejected.mean().clamp(min=0))),
            1 - torch.sigmoid(beta * (r_chosen.mean().clamp(min=0) - r_rejected)),
        ]
    )
    return losses.sum() / (2 * (len(chosen) if num_pairs is None else num_pairs))


def robust_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.1, num_pairs=None):
    """Chowdhury et al. 2024 (arXiv 2403.00409): DPO's loss, unbiased where a share of preferences is swapped."""
    logits = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    unbiased = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return _mean(unbiased / (1 - 2 * label_smoothing), num_pairs)


def dpo_norm(
    chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected,
    *, beta=5.0, label_smoothing=0.0, num_pairs=None,
):  # fmt: skip
    """Lambert et al. 2024 (Tulu 3, arXiv 2411.15124): DPO of log-ratios divided by the outputs' tokens."""
    margins = (chosen - ref_chosen) / chosen_tokens - (rejected - ref_rejected) / rejected_tokens
    return _mean(_cross_entropy(beta * margins, label_smoothing), num_pairs)


def ipo(
    chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected, *, beta=0.1, num_pairs=None
):  # fmt: skip
    """Azar et al. 2023 (arXiv 2310.12036), Eq. 17: (h - 1 / (2 beta))^2, `beta` being their tau.

    h is a difference of log-ratios a token, as TRL has it on its authors' word; the equation itself has sums.
    """
    margins = (chosen - ref_chosen) / chosen_tokens - (rejected - ref_rejected) / rejected_tokens
    return _mean((margins - 1 / (2 * beta)) ** 2, num_pairs)


def hinge(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, num_pairs=None):
    """max(0, 1 - beta h): SLiC-HF's hinge (Zhao et al. 2023, arXiv 2305.10425) of DPO's margin, as Liu et al. 2023
    (RSO, arXiv 2309.06657) have it."""
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return _mean((1 - beta * margins).clamp(min=0), num_pairs)


def apo_zero(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, num_pairs=None):
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), Eq. 7: preferred outputs up, dis-preferred ones down."""
    return _mean(
        1 - torch.sigmoid(beta * (chosen - ref_chosen)) + torch.sigmoid(beta * (rejected - ref_rejected)), num_pairs
    )


def apo_down(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, num_pairs=None):
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), Eq. 8: both down, the dis-preferred ones further."""
    r_chosen, r_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return _mean(torch.sigmoid(r_chosen) + 1 - torch.sigmoid(r_chosen - r_rejected), num_pairs)


def simpo(chosen, rejected, chosen_tokens, rejected_tokens, *, beta=2.0, gamma=1.0, num_pairs=None):
    """Meng et al. 2024 (arXiv 2405.14734), Eq. 6: -log s(beta logp(w) / |w| - beta logp(l) / |l| - gamma)."""
    return _mean(-logsigmoid(beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma), num_pairs)


def cpo_simpo(
    chosen, rejected, chosen_tokens, rejected_tokens,
    *, beta=2.0, gamma=1.0, alpha=1.0, num_pairs=None, num_tokens=None,
):  # fmt: skip
    """SimPO's preference term with CPO's NLL term (a joint proposal of both papers' authors): simpo + alpha NLL(w)."""
    preference = simpo(chosen, rejected, chosen_tokens, rejected_tokens, beta=beta, gamma=gamma, num_pairs=num_pairs)
    return preference + alpha * sft(chosen, chosen_tokens, num_tokens=num_tokens)


def orpo(
    chosen, rejected, chosen_tokens, rejected_tokens, *, beta=0.1, num_pairs=None, num_tokens=None
):  # fmt: skip
    """Hong et al. 2024 (arXiv 2403.07691), Eqs. 6 and 7: NLL(w) - beta log s(log odds(w) - log odds(l)).

    `beta` is their lambda, odds(y) = P(y) / (1 - P(y)) with P(y) = exp(logp(y) / |y|). The NLL is the mean over the
    tokens of the preferred outputs, as in the other losses here; TRL's also scores the prompt.
    """
    means = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = [mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7))) for mean in means]  # P = 1 has no odds
    return sft(chosen, chosen_tokens, num_tokens=num_tokens) + beta * _mean(
        -logsigmoid(log_odds[0] - log_odds[1]), num_pairs
    )


LOSSES = {
    "sft": Loss(sft, "negative log-likelihood of the preferred outputs (Eq. 4)"),
    "dpo": Loss(dpo, "direct preference optimisation (Eq. 5)"),
    "cpo": Loss(cpo, "contrastive preference optimisation with its NLL term (Eqs. 6 and 8)"),
    "kto": Loss(kto, "Kahneman-Tversky optimisation (Eqs. 9 to 13)"),
    "kto_pair": Loss(
        kto_pair, "TRL 0.8's kto_pair, the loss that the paper's authors ran as DPO", depends_on_split=True
    ),
    "simpo": Loss(simpo, "simple preference optimisation (Meng et al. 2024)", rewards_per_token=True),
    "cpo_simpo": Loss(cpo_simpo, "SimPO with CPO's NLL term", rewards_per_token=True),
    "orpo": Loss(orpo, "odds ratio preference optimisation (Hong et al. 2024)", rewards_per_token=True),
    "ipo": Loss(ipo, "identity preference optimisation, a token (Azar et al. 2023)", rewards_per_token=True),
    "hinge": Loss(hinge, "hinge of DPO's margin (SLiC-HF, Zhao et al. 2023; RSO, Liu et al. 2023)"),
    "robust_dpo": Loss(robust_dpo, "DPO, unbiased under swapped preferences (Chowdhury et al. 2024)"),
    "dpo_norm": Loss(dpo_norm, "length-normalised DPO (Tulu 3, Lambert et al. 2024)", rewards_per_token=True),
    "apo_zero": Loss(apo_zero, "anchored preference optimisation, zero (D'Oosterlinck et al. 2024)"),
    "apo_down": Loss(apo_down, "anchored preference optimisation, down (D'Oosterlinck et al. 2024)"),
}
