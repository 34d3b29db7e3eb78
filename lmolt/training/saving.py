"""A finished run: its adapter and all that belongs to it, in its folder whole or not at all."""

import json
import os
from pathlib import Path

from lmolt import ownership
from lmolt.card import write_card
from lmolt.distributed import strategy
from lmolt.models.loading import check_saved_adapter
from lmolt.training.statistics import plot_run


def save_finished(trainer, run: dict) -> list[str]:
    """Write the adapter and all that belongs to it, by name; `adapter_model.safetensors` appears last, by rename.

    All processes call it; the first returns, and the others end in it (`strategy.leave_group`).
    """
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / "unfinished"
    if trainer.args.should_save:
        ownership.claim(output_dir, "train_pref", [staging.name])
    trainer.save_model(str(staging), _internal_call=True)  # else Trainer uploads at once, with a card of its own
    efficiency = trainer.efficiency.summary(trainer.accelerator, trainer.state.total_flos)
    strategy.leave_group()  # the first process goes on alone
    check_saved_adapter(staging, trainer.model)
    (staging / "run.json").write_text(json.dumps(run, indent=1))
    trainer.state.save_to_json(str(staging / "trainer_state.json"))
    (staging / "efficiency.json").write_text(json.dumps(efficiency, indent=1))
    plot_run(trainer.state.log_history, staging / "training.png")
    write_card(staging, output_dir, run)
    files = sorted(staging.iterdir(), key=lambda file: file.name == "adapter_model.safetensors")
    names = [file.name for file in files]
    ownership.check_free(output_dir, "train_pref", names)
    ownership.claim(output_dir, "train_pref", names)
    for file in files:
        file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        file.replace(output_dir / file.name)
    staging.rmdir()
    return names


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask
