"""What the training loop calls back: one line of progress a log, a stop at a loss that isn't finite."""

import torch
from transformers import ProgressCallback, TrainerCallback

from lmolt.prompts import DIRECTIONS
from lmolt.training.statistics import TRANSLATION_SCORES


class OneLineProgress(ProgressCallback):
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


class FiniteLossCallback(TrainerCallback):
    """Ends training, before the optimizer's step, at the first loss that isn't finite: the weights are still whole."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        if not torch.isfinite(torch.as_tensor(loss)).item():
            raise ValueError(
                f"step {state.global_step + 1}: the loss is {float(loss)}, and training stops; its checkpoints up to "
                f"step {state.global_step} are kept. Lower --learning_rate, or look for what is odd in the data"
            )
