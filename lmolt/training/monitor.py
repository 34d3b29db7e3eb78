"""What a run shows of itself: statistics per direction, efficiency, and a sample of translations."""

import json
import logging
import math
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import ProgressCallback

from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP, build_prompt
from lmolt.training.losses import LOSSES

logger = logging.getLogger(__name__)

TRANSLATION_SCORES = {MOL2CAP: ("bleu2",), CAP2MOL: ("validity", "exact_match", "morgan")}
COLUMNS = ("pairs", "chosen", "rejected", "accuracies", "logp_chosen", "tokens_chosen", "logp_rejected")
COLUMNS += ("tokens_rejected",)


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

        That is how DPO and KTO collapse in the paper: both outputs become unlikely, the dis-preferred one faster.
        """
        for direction in DIRECTIONS:
            logp, margin = (means.get(f"{direction}/{key}") for key in ("logps/chosen", "rewards/margins"))
            if logp is None or margin is None or direction in self.warned:
                continue
            first_logp = self.first.setdefault(f"{direction}/logp", logp)
            first_margin = self.first.setdefault(f"{direction}/margin", margin)
            if logp < first_logp - fall and margin > first_margin:
                self.warned.add(direction)
                logger.warning(
                    "%s: preferred outputs fell from %.2f to %.2f nats a token while margins grew from %.2f to %.2f; "
                    "the policy may be collapsing (lower --learning_rate or raise --beta; CPO's NLL term prevents it)",
                    *(direction, first_logp, logp, first_margin, margin),
                )


class OneLine(ProgressCallback):
    """Transformers' progress bar, with one short line a log instead of every number; all of them are in the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or "train_runtime" in logs:
            return
        held_out = "eval_loss" in logs
        prefix = "eval_" if held_out else ""
        line = f"step {state.global_step} {'held out' if held_out else 'train':8} loss {logs[prefix + 'loss']:.4f}"
        for direction in DIRECTIONS:
            shown = {"nll": "nll", "margin": "rewards/margins", "accuracy": "rewards/accuracies"} | {
                key: key for key in TRANSLATION_SCORES[direction]
            }
            values = {short: logs.get(f"{prefix}{direction}/{key}") for short, key in shown.items()}
            line += f" | {direction}" + "".join(f" {k} {v:.3f}" for k, v in values.items() if v is not None)
        if not held_out:
            line += f" | {logs['tokens_per_second']:.0f} scored tokens/s, padding {logs['padding']:.1%}"
        self.training_bar.write(line)


class Efficiency:
    """Wall time, tokens, floating-point operations, peak memory and energy of a run, across its resumptions.

    Operations are counted as 2 P a token forward, 2 P backward through activations and 2 P_trainable for the
    gradients of weights; attention's own products, a few per cent at these lengths, are left out.
    """

    def __init__(self, model):
        self.n_parameters = sum(_true_size(p) for p in model.parameters())
        self.n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.wall_seconds = 0.0
        self.packed_tokens = self.scored_tokens = self.padding_tokens = 0
        self._flops = 0.0
        self._energy_at_start = _gpu_energy_joules()
        self._energy_before = 0.0
        self._started = self._last = time.perf_counter()
        self._tokens_last = 0

    def count(self, packed: int, scored: int, padding: int = 0) -> None:
        self.packed_tokens += packed
        self.scored_tokens += scored
        self.padding_tokens += padding
        forward = 2 * self.n_parameters * (packed + padding)
        self._flops += forward
        if torch.is_grad_enabled():
            self._flops += forward + 2 * self.n_trainable * (packed + padding)

    def count_padded(self, sequences) -> None:
        lengths = [len(prompt) + len(output) for prompt, output in sequences]
        padding = max(lengths) * len(lengths) - sum(lengths)
        self.count(sum(lengths), sum(len(output) for _, output in sequences), padding)

    def drain_flops(self) -> float:
        flops, self._flops = self._flops, 0.0
        return flops

    def rates(self) -> dict[str, float]:
        """Scored tokens a second since the last call (this rank), share of padding, peak memory in GiB."""
        now, tokens = time.perf_counter(), self.scored_tokens
        rate = (tokens - self._tokens_last) / max(now - self._last, 1e-9)
        self._last, self._tokens_last = now, tokens
        padded = self.padding_tokens / max(self.packed_tokens + self.padding_tokens, 1)
        return {"tokens_per_second": rate, "padding": padded, "peak_memory_gib": peak_memory_bytes() / 2**30}

    def summary(self, accelerator, flops: float) -> dict:
        """Of all processes together (each has to call it); memory is that of the one which took most."""
        energy = _gpu_energy_joules()
        energy = math.nan if energy is None else energy + self._energy_before - self._energy_at_start
        counts = [self.packed_tokens, self.scored_tokens, self.padding_tokens, energy]
        of_all = lambda values, how: accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=accelerator.device), how
        ).tolist()
        *counts, energy = of_all(counts, "sum")
        packed, scored, padding = map(int, counts)
        wall = self.wall_seconds + time.perf_counter() - self._started
        return {
            "processes": accelerator.num_processes,
            "wall_seconds": wall,
            "tokens": packed,
            "scored_tokens": scored,
            "padding_tokens": padding,
            "scored_tokens_per_second": scored / max(wall, 1e-9),
            "flops": flops,
            "peak_memory_bytes": int(of_all([peak_memory_bytes()], "max")[0]),
            "gpu_energy_joules": None if math.isnan(energy) else energy,
            "n_parameters": self.n_parameters,
            "n_trainable": self.n_trainable,
        }

    def resume_from(self, path: Path) -> None:
        """Go on counting where an interrupted run stood at its checkpoint; for one process, which counts for all."""
        before = json.loads(path.read_text())
        self.wall_seconds = before["wall_seconds"]
        self.packed_tokens, self.scored_tokens = before["tokens"], before["scored_tokens"]
        self.padding_tokens, self._tokens_last = before["padding_tokens"], before["scored_tokens"]
        self._energy_before = before["gpu_energy_joules"] or 0.0


def peak_memory_bytes() -> int:
    """Of this process: the GPU's allocator where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _true_size(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter, also where 4-bit storage packs them or ZeRO-3 keeps them elsewhere."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def _gpu_energy_joules() -> float | None:
    """Energy that this process's GPU has drawn since its driver loaded; None where NVML can't tell."""
    if not torch.cuda.is_available():
        return None
    import pynvml  # the package nvidia-ml-py

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")  # NVML's indices know no CUDA_VISIBLE_DEVICES
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


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
            [build_prompt(direction, e.source) for e in sample],
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
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        names = [panel] if panel == "loss" else [f"{direction}/{panel}" for direction in DIRECTIONS]
        for name in names:
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = [(row["step"], row[prefix + name]) for row in log_history if prefix + name in row]
                if points:
                    label = f"{'held out ' if prefix else ''}{name.split('/')[0]}"
                    axis.plot(*zip(*points, strict=True), style, ms=4, label=label)
        unit = " (nats a token)" if panel.startswith("logps") else ""
        axis.set(title=panel + unit, xlabel="optimizer step")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
