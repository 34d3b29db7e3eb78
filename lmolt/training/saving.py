"""A finished run: its adapter and all that belongs to it, in its folder whole or not at all."""

import json
import os
from pathlib import Path

from lmolt import ownership
from lmolt.card import write_card
from lmolt.distributed import strategy
from lmolt.models.loading import check_saved_adapter
from lmolt.training.losses import PARAMETERS
from lmolt.training.statistics import plot_run


def save_finished(trainer, run: dict) -> list[str]:
    """Write the adapter and all that belongs to it, by name; `adapter_model.safetensors` appears last, by rename.

    `run` is what the trainer doesn't know: its data and reference, versions, licence.
    All processes call it; the first returns, and the others end in it (`strategy.exit_other_processes`).
    """
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / "unfinished"
    if trainer.args.should_save:
        ownership.claim(output_dir, "train_pref", [staging.name])
    trainer.save_model(str(staging), _internal_call=True)  # else Trainer uploads at once, with a card of its own
    efficiency = trainer.efficiency.summary(trainer.accelerator, trainer.state.total_flos)
    run = record(trainer) | run
    strategy.exit_other_processes()  # the first process goes on alone
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


def record(trainer) -> dict:
    """What run.json says of a trainer's run: arguments, loss, identity, and which step's weights are kept."""
    args = trainer.args
    kept = lambda name: not name.endswith("_token") and name not in PARAMETERS  # which stand with the loss
    arguments = {name: value for name, value in args.to_dict().items() if kept(name)}
    return {
        "arguments": arguments,
        "loss": {"name": args.loss, "definition": trainer.loss.definition, "parameters": args.loss_parameters},
        "identity": trainer.fixed,
        "chosen": trainer.chosen,
        "attention_ms": trainer.attention_ms,
        "changes": trainer.changes,
        "step": trainer.kept_step or trainer.state.global_step,
        "strategy": trainer.strategy,
        "world_size": args.world_size,
    }


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask
