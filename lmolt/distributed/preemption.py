"""A run that is asked to stop (SIGTERM, SIGUSR1: Slurm's preemption and time limit) saves a checkpoint first.

The signal is remembered until the optimizer step is done. There the processes agree, since not all of them get it at
the same step: if any was asked, all save and end with exit code 75, "try again". The same command with
`--resume_from_checkpoint true` then goes on as if nothing had happened. Before the first step and after the last, a
signal does what it always does.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from lmolt.distributed.strategy import exit_other_processes

SIGNALS = [signal.SIGTERM, *filter(None, [getattr(signal, "SIGUSR1", None)])]  # Windows has no SIGUSR1


class PreemptionCallback(TrainerCallback):
    def __init__(self):
        self.asked = self.agreed = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _ask(self, number, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self.asked), device=args.device)
        self.agreed = reduce(asked, "sum").item() > 0
        control.should_save |= self.agreed

    def on_save(self, args, state, control, **kwargs):
        if not self.agreed:
            return
        PartialState().wait_for_everyone()  # the first process has sealed the checkpoint
        if saved := os.environ.get("LMOLT_SAVED"):  # for the supervisor: a launcher has exit codes of its own
            Path(saved).touch()
        exit_other_processes(os.EX_TEMPFAIL)
        checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
        print(f"asked to stop: saved {checkpoint}; --resume_from_checkpoint true goes on from there", flush=True)
        self.on_train_end(args, state, control)
        sys.exit(os.EX_TEMPFAIL)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
