"""What a run learns about itself: statistics per direction, a sample of translations, a plot of its log."""

import logging
from pathlib import Path

import torch

from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP, build_prompt
from lmolt.training.losses import LOSSES, Loss

logger = logging.getLogger(__name__)

TRANSLATION_SCORES = {MOL2CAP: ("bleu2",), CAP2MOL: ("validity", "exact_match", "morgan")}
COLUMNS = ("pairs", "chosen", "rejected", "accuracies", "logp_chosen", "tokens_chosen", "logp_rejected")
COLUMNS += ("tokens_rejected",)

GREATER = {  # whether more is better, of what is logged of each direction
    "logps/chosen": True,
    "logps/rejected": False,
    "nll": False,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
}


def best_is_greater(metric: str, loss: Loss, translations: bool, directions=DIRECTIONS) -> bool:
    """Whether more of a held-out `metric` is better; `ValueError` where a run of `loss` has none of that name."""
    known = {"loss": False}
    for direction in directions:
        names = GREATER if "rejected" in loss.reads else {name: GREATER[name] for name in ("logps/chosen", "nll")}
        names = names | dict.fromkeys(TRANSLATION_SCORES[direction] if translations else (), True)
        known |= {f"{direction}/{name}": greater for name, greater in names.items()}
    if metric not in known:
        raise ValueError(f"--metric_for_best_model {metric!r} is not evaluated; use one of {', '.join(known)}")
    return known[metric]


class Statistics:
    """Sums per direction, (directions, COLUMNS) in float64, and their means as they are logged.

    Rewards are beta (logp - ref), or beta logp for the losses without a reference (CPO), as is usual for them.
    """

    def __init__(self, args):
        loss = LOSSES[args.loss]
        self.beta = args.loss_parameters.get("beta", 1.0)
        self.with_rejected, self.per_token = "rejected" in loss.reads, loss.rewards_per_token
        self.device = args.device
        self.sums = self.zeros()
        self.first: dict[str, float] = {}
        self.warned: set[str] = set()
        self.falling = dict.fromkeys(DIRECTIONS, 0)
        self.remedy = "lower --learning_rate or raise --beta"
        if "alpha" not in loss.parameters:
            self.remedy += "; CPO's NLL term prevents it"

    def zeros(self) -> torch.Tensor:
        return torch.zeros(len(DIRECTIONS), len(COLUMNS), dtype=torch.float64, device=self.device)

    def of(self, examples, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums of one micro-batch; `given` is what the loss got: (B,) log-probabilities, tokens, references."""
        sums = self.zeros()
        direction = torch.tensor([DIRECTIONS.index(e.direction) for e in examples], device=self.device)
        values = torch.zeros(len(examples), len(COLUMNS), dtype=torch.float64, device=self.device)
        values[:, 0] = 1
        values[:, 4] = given["chosen"].detach()
        values[:, 5] = given["chosen_tokens"]
        if self.with_rejected:
            reward_chosen, reward_rejected = (self._reward(given, side) for side in ("chosen", "rejected"))
            values[:, 1], values[:, 2] = reward_chosen, reward_rejected
            values[:, 3] = reward_chosen > reward_rejected
            values[:, 6] = given["rejected"].detach()
            values[:, 7] = given["rejected_tokens"]
        return sums.index_add(0, direction, values)

    def _reward(self, given, side: str) -> torch.Tensor:
        reward = self.beta * (given[side].detach() - given.get(f"ref_{side}", 0))
        return reward / given[f"{side}_tokens"] if self.per_token else reward

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums

    def drain(self, accelerator) -> dict[str, float]:
        """Means over all ranks since the last call."""
        sums, self.sums = accelerator.reduce(self.sums, "sum"), self.zeros()
        means = self.means(sums)
        self._watch_for_collapse(means)
        return means

    def means(self, sums: torch.Tensor) -> dict[str, float]:
        means = {}
        for direction, row in zip(DIRECTIONS, sums.tolist(), strict=True):
            total = dict(zip(COLUMNS, row, strict=True))
            if not total["pairs"]:
                continue
            means[f"{direction}/logps/chosen"] = total["logp_chosen"] / total["tokens_chosen"]
            means[f"{direction}/nll"] = -total["logp_chosen"] / total["tokens_chosen"]
            if self.with_rejected:
                for name in ("chosen", "rejected", "accuracies"):
                    means[f"{direction}/rewards/{name}"] = total[name] / total["pairs"]
                means[f"{direction}/rewards/margins"] = (total["chosen"] - total["rejected"]) / total["pairs"]
                means[f"{direction}/logps/rejected"] = total["logp_rejected"] / total["tokens_rejected"]
        return means

    def _watch_for_collapse(self, means: dict[str, float], fall: float = 0.5) -> None:
        """Warn once a direction whose preferred outputs lose `fall` nats a token while the margins still grow.

        Three logs in a row, since those of single steps are noisy.

        That is how DPO and KTO collapse in the paper: both outputs become unlikely, the dis-preferred one faster.
        """
        for direction in DIRECTIONS:
            logp, margin = (means.get(f"{direction}/{key}") for key in ("logps/chosen", "rewards/margins"))
            if logp is None or margin is None or direction in self.warned:
                continue
            first_logp = self.first.setdefault(f"{direction}/logp", logp)
            first_margin = self.first.setdefault(f"{direction}/margin", margin)
            fell = logp < first_logp - fall and margin > first_margin
            self.falling[direction] = self.falling[direction] + 1 if fell else 0
            if self.falling[direction] == 3:
                self.warned.add(direction)
                logger.warning(
                    "%s: preferred outputs fell from %.2f to %.2f nats a token while margins grew from %.2f to %.2f; "
                    "the policy may be collapsing (%s)",
                    *(direction, first_logp, logp, first_margin, margin, self.remedy),
                )


def translation_scores(trainer, examples) -> dict[str, float]:
    """BLEU-2 of captions, validity, exact match and Morgan similarity of molecules, on a small held-out sample.

    The same sources at every evaluation. Without the packages that score (rdkit, nltk) nothing is scored, aloud.
    """
    try:
        from lmolt.generation.translate import translate
        from lmolt.metrics import score
    except ImportError as error:
        logger.warning("--eval_translations is not scored: %s", error)
        return {}
    scores = {}
    for direction, keys in TRANSLATION_SCORES.items():
        sample = [e for e in examples if e.direction == direction][: trainer.args.eval_translations]
        if not sample:
            continue
        outputs = translate(
            trainer.accelerator.unwrap_model(trainer.model_wrapped),
            trainer.processing_class,
            [build_prompt(direction, e.source, trainer.args.prompt_style) for e in sample],
            max_new_tokens=trainer.args.eval_max_new_tokens,
            progress=f"translating {direction}",
        )
        sources, references = [e.source for e in sample], [e.target for e in sample]
        metrics = score(direction, sources, references, outputs, fcd=False, n_bootstrap=1)[0]["metrics"]
        scores |= {f"{direction}/{key}": metrics[key]["value"] for key in keys if "value" in metrics[key]}
    return scores


def plot_run(log_history: list[dict], path: Path) -> None:
    """Loss, rewards, margins and log-probabilities against steps; left out, aloud, where matplotlib is absent."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        logger.warning("no plot of the run: %s", error)
        return
    panels = ["loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]
    colours = dict(zip(("loss", *DIRECTIONS), ("#000000", "#0072B2", "#D55E00"), strict=True))
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6), layout="constrained")
    handles = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        names = [panel] if panel == "loss" else [f"{direction}/{panel}" for direction in DIRECTIONS]
        for name in names:
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = [(row["step"], row[prefix + name]) for row in log_history if prefix + name in row]
                if points:
                    what = name.split("/")[0]
                    label = f"{'held out ' if prefix else ''}{what}"
                    (handles[label],) = axis.plot(*zip(*points, strict=True), style, ms=4, color=colours[what])
        unit = " (nats a token)" if panel.startswith("logps") else ""
        axis.set(title=panel + unit, xlabel="optimizer step")
        axis.grid(color="#E4E4E4", linewidth=0.6)
    axes.flat[-1].axis("off")  # one legend for all, where it hides no curve
    axes.flat[-1].legend(handles.values(), handles.keys(), loc="center left", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
