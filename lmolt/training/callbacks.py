"""What the training loop calls back: one line of progress a log."""

from transformers import ProgressCallback

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
