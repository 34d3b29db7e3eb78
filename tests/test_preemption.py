"""A run that gets a signal saves, ends with exit code 75, and goes on later as if nothing had happened."""

import os
import signal
import threading
import time

import pytest
import torch
from conftest import QUICK, load_script
from safetensors.torch import load_file

script = load_script("train_pref")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(number, triples_file, tiny_policy, tmp_path, capsys):
    arguments = ["--loss", "cpo", "--model", tiny_policy, "--triples", triples_file, *QUICK, "--lora_r", "8"]
    arguments += ["--eval_strategy", "no", "--eval_fraction", "0", "--save_strategy", "steps", "--save_steps", "4"]
    run = lambda name, *more: script.main([*map(str, arguments), "--output_dir", str(tmp_path / name), *more])
    stopped = tmp_path / "stopped"

    def ask():
        while not (stopped / "checkpoint-4").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(SystemExit) as ended:
        run("stopped")
    asking.join()
    assert ended.value.code == 75 and signal.getsignal(number) == before
    assert f"asked to stop: saved {stopped}/checkpoint-" in capsys.readouterr().out
    assert not (stopped / "adapter_model.safetensors").exists()
    run("stopped", "--resume_from_checkpoint", "true")
    assert f"resumes from {stopped}/checkpoint-" in capsys.readouterr().out
    run("whole")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
