"""python as_if_cuda.py SCRIPT ARGS: loading sees a GPU, and transformers its own checks; the weights stay on the CPU.

What transformers makes of the `device_map` that it is given, its refusals included, is appended to the file
DEVICE_MAPS, one line of JSON for each load.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import check_and_set_device_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lmolt.models import loading  # noqa: E402

RANK = os.environ.get("LOCAL_RANK", "0")  # none in one process without a launcher
plain_load, plain_from_pretrained = loading.load_base, AutoModelForCausalLM.from_pretrained
visible = {"is_available": lambda: True, "current_device": lambda: int(RANK)}
hidden = {name: getattr(torch.cuda, name) for name in visible}


def see(functions: dict) -> None:
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


def from_pretrained(*args, device_map=None, **kwargs):
    see(hidden)
    checked = check_and_set_device_map(device_map)
    with Path(os.environ["DEVICE_MAPS"]).open("a") as file:
        file.write(json.dumps([kwargs.get("quantization_config") is not None, RANK, checked]) + "\n")
    return plain_from_pretrained(*args, **kwargs)


def load_base(*args, **kwargs):
    see(visible)
    try:
        return plain_load(*args, **kwargs | {"use_cpu": False})
    finally:
        see(hidden)


loading.load_base, AutoModelForCausalLM.from_pretrained = load_base, from_pretrained
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
