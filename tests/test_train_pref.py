"""scripts/train_pref.py as a user runs it: losses, recipes, bad input, SIGKILL and resume, the reference's cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, load_script
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmolt import ownership
from lmolt.data.triples import write_triples
from lmolt.files import write_table
from lmolt.training import checkpoints
from lmolt.training.checkpoints import full_disk_is_named, last_good_checkpoint, what_is_wrong, write_manifest

ROOT = Path(__file__).resolve().parents[1]
script = load_script("train_pref")


def start(*arguments, **kwargs) -> subprocess.Popen:
    command = [sys.executable, ROOT / "scripts" / "train_pref.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | kwargs))


def run(*arguments) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def test_qlora_run_leaves_everything_that_belongs_to_an_adapter(tmp_path, tiny_policy, triples_file):
    out = tmp_path / "out"
    code, shown, err = run(
        *("--loss", "dpo", "--model", tiny_policy, "--triples", triples_file, "--output_dir", out),
        *("--use_cpu", "true", "--gradient_accumulation_steps", 8, "--num_train_epochs", 1, "--eval_fraction", 0.3),
    )
    assert code == 0, err
    assert "adapter off (log-probabilities computed)" in shown
    files = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "README.md", "run.json", "efficiency.json", "trainer_state.json"} <= files
    assert "training.png" in files
    assert not [path for path in out.iterdir() if path.suffix == ".bin"]
    run_record = json.loads((out / "run.json").read_text())
    assert run_record["arguments"]["loss"] == "dpo"
    assert len(run_record["data"]["sha256"]) == 64
    assert json.loads((out / "efficiency.json").read_text())["scored_tokens"] > 0
    assert "Eq. 5" in (out / "README.md").read_text()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), out)
    assert loaded(torch.arange(3, 20)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "p.csv"], "--pairs and --triples were both given; choose one"),
        (["--loss", "ppo"], "--loss is 'ppo'; use one of sft, dpo"),
        (["--triples", "missing.parquet"], "missing.parquet: no such file"),
        (["--model", "./nowhere"], "'./nowhere' doesn't exist"),
        (["--model", "{empty}"], "holds no config.json"),
        (["--hub_strategy", "every_save"], "--hub_strategy is 'every_save'; use one of end"),
        (["--hub_token", "hf_secret"], "^--hub_token would show in the shell's history; use `hf auth login`"),
        (["--max_length", "60"], "22 of 22 triples take more than --max_length 60 tokens.*raise it, or drop"),
        (["--tokens_per_batch", "20"], "over --tokens_per_batch 20; raise it"),
        (["--recipe", "{recipe}"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0; it is at least 1"),
        (["--score_chunk", "0"], "--score_chunk is 0; it is at least 1"),
        (["--beta", "0"], "--beta is 0.0; it is more than 0"),
        (["--beta", "nan"], "--beta is nan; it is a finite number"),
        (["--loss", "dpo", "--alpha", "0.3"], "--alpha has no effect with --loss dpo, it is of cpo"),
        (["--nll", "mean"], "--nll is 'mean'; use token or sequence"),
        (["--eval_fraction", "1"], "--eval_fraction is 1; it is 0 or more, and less than 1"),
        (["--adapter", "{empty}"], "holds no adapter_config.json"),
        (["--adapter", "./nowhere"], "adapter folder './nowhere' doesn't exist"),
        (["--resume_from_checkpoint", "{empty}"], "can't resume from .*manifest"),
        (["--learning_rte", "1"], "unknown flag --learning_rte; did you mean '--learning_rate'"),
        (["--recip", "{recipe}"], "unknown flag --recip; did you mean '--recipe'"),
        (["--learning_rate", "fast"], "argument --learning_rate.*: invalid float value: 'fast'"),
        (["stray"], "unknown arguments: stray"),
        (["--bf16", "true", "--fp16", "true"], "--bf16 and --fp16 were both given"),
        (["--adapter", "{empty}", "--lora_r", "4"], "--lora_r has no effect: --adapter brings its own"),
        (["--eval_triples", "x.jsonl", "--eval_fraction", "0.1"], "--eval_fraction has no effect: --eval_triples"),
        (["--eval_steps", "5"], "--eval_steps has no effect: --eval_strategy isn't steps"),
        (["--report_to", "wandb,tensorboard"], "--report_to wandb: its package isn't installed"),
        (["--report_to", "wnadb"], "--report_to 'wnadb' is no tracker; they are .*wandb"),
        (["--optim", "lomo"], "--optim lomo is for all of a model's weights"),
        (["--optim", "schedule_free_adamw"], "--optim schedule_free_adamw can't run here"),
        (
            ["--metric_for_best_model", "bleu"],
            "--metric_for_best_model 'bleu' is not evaluated; use one of loss",
        ),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "--early_stopping_patience needs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_named(arguments, message, tmp_path, tiny_policy, triples_file):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1e-4\n")
    (tmp_path / "empty").mkdir()
    arguments = [a.format(recipe=tmp_path / "recipe.yaml", empty=tmp_path / "empty") for a in arguments]
    base = ["--model", tiny_policy, "--triples", triples_file, "--output_dir", tmp_path / "out", *QUICK]
    with pytest.raises((ValueError, OSError), match=message):
        script.main([str(argument) for argument in [*base, *arguments]])
    ownership.release()  # as at the end of a process
    assert not (tmp_path / "out").exists()


def test_finished_and_interrupted_folders_are_not_overwritten(tmp_path, tiny_policy, triples_file):
    base = [*map(str, ["--model", tiny_policy, "--triples", triples_file, "--output_dir", tmp_path / "out"]), *QUICK]
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="interrupted run; go on with --resume_from_checkpoint true"):
        script.main(base)
    (tmp_path / "out" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="finished adapter.*--overwrite_output_dir"):
        script.main(base)
    with pytest.raises(ValueError, match="adapter_model.safetensors is there, and train_pref.py didn't write it"):
        script.main([*base, "--overwrite_output_dir"])
    with pytest.raises(ValueError, match="--output_dir .* holds --triples"):
        script.main([*base, "--output_dir", str(tmp_path), "--overwrite_output_dir"])
    assert (tmp_path / "out" / "checkpoint-3").exists()


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(tmp_path, tiny_policy, triples_file):
    base = ["--model", tiny_policy, "--triples", triples_file, "--output_dir", tmp_path / "out", *QUICK]
    base = [*map(str, base), "--eval_strategy", "no", "--lora_r", "8"]
    script.main([*base, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"])
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "checkpoint-1" / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="missing"):
        script.main([*base, "--overwrite_output_dir", "--model", "./missing"])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    script.main([*base, "--overwrite_output_dir", "--max_steps", "1", "--save_strategy", "no"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.glob("out/checkpoint-*/*")) == ["notes.txt"]
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


def test_sft_of_pairs_is_sft_of_triples(tmp_path, tiny_policy, few_triples):
    pairs = [{"id": t["id"], "molecule": t["source"], "caption": t["chosen"]} for t in few_triples[::2]]
    both = {"mol2cap": ("molecule", "caption"), "cap2mol": ("caption", "molecule")}
    triples = [
        {"id": p["id"], "direction": d, "source": p[source], "chosen": p[target], "rejected": "C" * 3000}
        for p in pairs
        for d, (source, target) in both.items()
    ]
    write_table(pairs, tmp_path / "pairs.csv")
    write_table(triples, tmp_path / "triples.jsonl")
    base = ["--loss", "sft", "--model", str(tiny_policy), "--load_in_4bit", "false", "--bf16", "false"]
    base += ["--max_steps", "2", "--gradient_accumulation_steps", "4", "--eval_fraction", "0", "--save_strategy", "no"]
    for kind in ("pairs.csv", "triples.jsonl"):
        flag = f"--{kind.split('.')[0]}"
        script.main([*base, flag, str(tmp_path / kind), "--output_dir", str(tmp_path / flag)])
    adapters = [load_file(tmp_path / flag / "adapter_model.safetensors") for flag in ("--pairs", "--triples")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert "| pairs | `pairs.csv`, SHA-256" in (tmp_path / "--pairs" / "README.md").read_text()
    with pytest.raises(ValueError, match="--loss cpo reads dis-preferred outputs, which --pairs have not"):
        script.main([*base, "--loss", "cpo", "--pairs", str(tmp_path / "pairs.csv")])


def test_variants_of_lora_are_peft_s_and_stand_in_the_card(tmp_path, tiny_policy, triples_file):
    base = ["--model", str(tiny_policy), "--triples", str(triples_file), "--load_in_4bit", "false", "--bf16", "false"]
    base += ["--max_steps", "1", "--gradient_accumulation_steps", "4", "--save_strategy", "no", "--lora_r", "4"]
    script.main([*base, "--use_dora", "--use_rslora", "--output_dir", str(tmp_path / "dora")])
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"]
    assert any("magnitude" in name for name in load_file(tmp_path / "dora" / "adapter_model.safetensors"))
    assert "DoRA True, rsLoRA True" in (tmp_path / "dora" / "README.md").read_text()


def test_no_traceback_for_a_mistake(tmp_path):
    code, _, err = run("--model", "./nowhere", "--triples", "missing.parquet", "--output_dir", tmp_path / "out")
    assert code == 2
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("slow", [True, False])
def test_bf16_is_the_default_where_the_processor_has_it(slow, monkeypatch, capsys):
    script = load_script("train_pref")
    monkeypatch.setattr(script, "bf16_is_slow", lambda: slow)
    given = ["--model", "m", "--triples", "t.jsonl"]
    assert script.parse_arguments(given).bf16 is not slow
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("no" if slow else "bf16")
    assert capsys.readouterr().out.startswith("this processor has no fast bf16") is slow
    assert script.parse_arguments([*given, "--bf16", "true"]).bf16 and not capsys.readouterr().out
    assert not script.parse_arguments([*given, "--bf16", "false"]).bf16


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_policy, triples_file):
    """SIGKILL while checkpoints are written, three times; LMOLT_KILLS=10 in the environment for more."""
    wanted = int(os.environ.get("LMOLT_KILLS", "3"))
    arguments = ["--loss", "kto", "--model", tiny_policy, "--triples", triples_file, *QUICK]
    arguments += ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--eval_fraction", "0"]
    arguments += ["--num_train_epochs", str(2 + wanted // 2), "--lora_r", "8"]
    code, _, err = run(*arguments, "--output_dir", tmp_path / "whole")
    assert code == 0, err
    killed = tmp_path / "killed"
    kills = 0
    resume = []
    while not (killed / "adapter_model.safetensors").exists():
        process = start(
            *arguments, "--output_dir", killed, *resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        resume = ["--resume_from_checkpoint", "true"]
        seen = sorted(killed.glob("checkpoint-*"))
        while process.poll() is None and kills < wanted:
            if sorted(killed.glob("checkpoint-*")) != seen:  # wherever a save or a step happens to be
                time.sleep(0.003 * kills)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.wait()
    assert kills == wanted
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (killed, tmp_path / "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (killed, tmp_path / "whole")]
    steps = [[row["step"] for row in log if "loss" in row] for log in logs]
    assert steps[0] == steps[1] == list(range(1, len(steps[1]) + 1))
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("size", "kept"), [("200k", None), ("800k", "checkpoint-4"), ("1100k", "checkpoint-6")])
def test_a_full_disk_is_named_and_the_run_goes_on_with_room(size, kept, tmp_path, tiny_policy, triples_file):
    """In the first checkpoint, in a later one, and in the finished adapter."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "lmolt", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root's right to mount")
    arguments = ["--loss", "cpo", "--model", tiny_policy, "--triples", triples_file, *QUICK, "--lora_r", "8"]
    arguments += ["--eval_strategy", "no", "--eval_fraction", "0", "--save_strategy", "steps", "--save_steps", "2"]
    arguments += ["--max_steps", "6", "--save_total_limit", "9"]
    train = lambda folder, *more: script.main([*map(str, arguments), "--output_dir", str(folder), *more])
    try:
        with pytest.raises(OSError, match="No space left on device; make room there, and --resume_from_chec") as full:
            train(disk / "out")
        assert full.value.filename == str(disk / "out")
        good = last_good_checkpoint(disk / "out")
        assert (good and good.name) == kept
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        train(disk / "out", "--resume_from_checkpoint", "true")
        train(tmp_path / "whole")
        one, two = (load_file(f / "adapter_model.safetensors") for f in (disk / "out", tmp_path / "whole"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    finally:
        ownership.release()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_not_taken_for_a_users_mistake(tmp_path, monkeypatch):
    full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(checkpoints.os, "fsync", full)
    for error, shown in (
        (ValueError("bf16 is no number"), "bf16 is no number"),
        (Exception("os error 28"), "make room"),
    ):
        with pytest.raises(type(error) if shown != "make room" else OSError, match=shown), full_disk_is_named(tmp_path):
            raise error


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        if step != 6:
            write_manifest(folder)
    assert what_is_wrong(tmp_path / "checkpoint-6") == "its saving was interrupted (no manifest.json)"
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"x" * 50)
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "50 bytes instead of 100" in caplog.text
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    assert what_is_wrong(tmp_path / "checkpoint-9") == "it is of step 2, and was renamed"
    (tmp_path / "checkpoint-9").rename(tmp_path / "checkpoint-2")
    manifest = tmp_path / "checkpoint-2" / "manifest.json"
    sealed = manifest.read_text()
    for damaged in (sealed[:-1], "[1]", '{"a": 7}', '{"a": ["x", "y"]}', "\0" * 20):
        manifest.write_text(damaged)
        assert what_is_wrong(tmp_path / "checkpoint-2") == "its manifest.json is damaged"
    manifest.write_text(sealed)
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    assert last_good_checkpoint(tmp_path) is None
    assert caplog.messages[-1] == f"{tmp_path} holds no checkpoint that can be resumed from: training starts anew"


def test_training_needs_neither_rdkit_nor_matplotlib():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lmolt.training.trainer, lmolt.data.triples, lmolt.models.loading, scripts.train_pref\n"
        "assert not {'rdkit', 'matplotlib', 'nltk', 'lmolt.metrics'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True).returncode == 0


def test_the_hold_out_is_stratified_and_keeps_sources_apart(few_triples):
    train, held_out = script.split_by_source(few_triples + [{**few_triples[0], "id": "again"}], 0.05)
    assert sorted(t["direction"] for t in held_out if t["id"] != "again") == ["cap2mol", "mol2cap"]
    assert not {t["source"] for t in train} & {t["source"] for t in held_out} and len(train) + len(held_out) == 25
    assert [len(part) for part in script.split_by_source(few_triples, 0.5)] == [12, 12]
    assert script.split_by_source(few_triples, 0.0) == (few_triples, [])
    assert script.split_by_source(few_triples[:1], 0.5) == (few_triples[:1], [])


def test_training_goes_on_where_all_held_out_rows_are_dropped(tmp_path, tiny_policy, few_triples, triples_file,
                                                              capsys, caplog, monkeypatch):  # fmt: skip
    long = tmp_path / "long.jsonl"
    write_triples([{**few_triples[0], "source": "C" * 3000}], long)
    arguments = [
        "--model",
        tiny_policy,
        "--triples",
        triples_file,
        "--eval_triples",
        long,
        "--output_dir",
        "out",
        *QUICK,
    ]
    arguments += ["--max_length_policy", "drop", "--max_steps", 1, "--early_stopping_patience", 2]
    monkeypatch.chdir(tmp_path)
    script.main(list(map(str, arguments)))
    assert "none of the 1 held-out triples is left: {'over 1024 tokens (mol2cap)': 1}" in caplog.text
    assert "nothing is evaluated, and the last model is kept" in capsys.readouterr().out
    monkeypatch.chdir("/")  # the card's Python runs from any folder
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'Translator("{tiny_policy}", "{tmp_path / "out"}")' in card
    assert f'from_pretrained("{tmp_path / "out"}"' in card and "| held out | none |" in card
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_policy
    )


def test_what_the_model_has_no_embedding_or_position_for_is_found_before_it_is_loaded(tmp_path, tiny_policy,
                                                                                      triples_file):  # fmt: skip
    for key, value, message in (
        ("vocab_size", 200, r"gives token \d+, and the model has embeddings for 200"),
        ("max_position_embeddings", 64, r"has 64 positions .* and the longest row takes 146; .*--max_length 64"),
    ):
        folder = tmp_path / key
        shutil.copytree(tiny_policy, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=message):
            script.main(
                [*map(str, ["--model", folder, "--triples", triples_file, "--output_dir", tmp_path / "o"]), *QUICK]
            )
