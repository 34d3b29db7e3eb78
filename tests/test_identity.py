"""A checkpoint is resumed by the run that saved it, and by no other: each difference is named, old value beside new."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script
from safetensors.torch import load_file, save_file

from lmolt.data.triples import write_triples
from lmolt.models.adapters import check_made_for
from lmolt.models.hashes import adapter_hash, model_hashes
from lmolt.training import checkpoints

script = load_script("train_pref")


def changed_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1e-3}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_policy, few_triples):
    """A folder with a run of 4 steps, its checkpoints, and the flags that it had."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_policy, folder / "model")
    write_triples(few_triples, folder / "triples.jsonl")
    flags = {"loss": "cpo", "model": folder / "model", "triples": folder / "triples.jsonl", "eval_strategy": "no"}
    flags |= {"load_in_4bit": "false", "bf16": "false", "lora_r": 4, "gradient_accumulation_steps": 12}
    flags |= {"eval_fraction": 0, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    flags |= {"save_total_limit": 9, "learning_rate": 1e-3}
    start(flags, folder / "whole")
    return folder, flags


def start(flags: dict, output_dir: Path, *more) -> None:
    argv = [f"--{name}={value}" for name, value in flags.items()]
    script.main([*argv, "--output_dir", str(output_dir), *map(str, more)])


def resume(run, output_dir: Path, step: int = 2, **other) -> None:
    folder, flags = run
    if not output_dir.exists():
        shutil.copytree(folder / "whole" / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    start({key: value for key, value in (flags | other).items() if value is not None}, output_dir,
          "--resume_from_checkpoint", "true")  # fmt: skip


def test_the_same_run_goes_on_to_the_same_bits_and_its_data_may_have_moved(run, tmp_path):
    shutil.copytree(run[0] / "model", tmp_path / "moved")
    shutil.copy(run[0] / "triples.jsonl", tmp_path / "renamed.jsonl")
    resume(run, tmp_path / "out", model=tmp_path / "moved", triples=tmp_path / "renamed.jsonl", logging_steps=2)
    one, two = (load_file(f / "adapter_model.safetensors") for f in (run[0] / "whole", tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    changes = {change["key"]: (change["step"], change["before"], change["after"]) for change in record["changes"]}
    assert changes.keys() == {"--output_dir", "--model", "--triples", "--logging_steps"}
    assert changes["--logging_steps"] == (2, 1, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from step 2 on, --logging_steps 2 (before: 1)" in card
    assert "| adapter | r 4, alpha 16, dropout 0.1 |" in card and "| mixed precision | none |" in card


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"learning_rate": 1e-5}, "--learning_rate was 0.001, is 1e-05"),
        ({"beta": 0.9}, "--beta was 0.1, is 0.9"),
        ({"loss": "sft"}, "--loss was cpo, is sft"),
        ({"seed": 7}, "--seed was 42, is 7"),
        ({"lora_r": 8}, "--lora_r was 4, is 8"),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules was all-linear, is q_proj"),
        ({"optim": "sgd"}, "--optim was adamw_torch_fused, is sgd"),
        ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type was cosine, is linear"),
        ({"max_grad_norm": 1}, "--max_grad_norm was 0.3, is 1"),
        ({"weight_decay": 0.1}, "--weight_decay was 0.0, is 0.1"),
        ({"bf16": "true"}, "--bf16 was false, is true"),
        ({"packing": "padded"}, "--packing was tree, is padded"),
        ({"max_length": 900}, "--max_length was 1024, is 900"),
        ({"eval_fraction": 0.2}, "--eval_fraction was 0.0, is 0.2"),
        ({"gradient_accumulation_steps": 6}, "12 triples a step, and this run has 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_flag_is_refused_by_name(other, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        resume(run, tmp_path / "out", **other)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["checkpoint-2"]


@pytest.mark.parametrize("what", ["base weights", "base config", "tokenizer", "--triples"])
def test_another_content_under_the_same_name_is_refused(what, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run[0] / "model", folder)
    other = {"model": folder}
    if what == "base weights":
        changed_weights(folder)
    elif what == "--triples":
        lines = (run[0] / "triples.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "triples.jsonl").write_text("".join(lines[:-1]))
        other = {"triples": tmp_path / "triples.jsonl"}
    else:
        file = folder / ("config.json" if what == "base config" else "tokenizer.json")
        file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=rf"is of another run: {what} was \S.*, is \S"):
        resume(run, tmp_path / "out", **other)


def test_a_checkpoint_that_can_not_go_on_is_refused(run, tmp_path):
    for name, message in {
        "optimizer.pt": "holds no optimizer or no schedule", "scheduler.pt": "holds no optimizer or no schedule",
        "identity.json": "doesn't say what the checkpoint was trained with",
    }.items():  # fmt: skip
        checkpoint = tmp_path / name / "checkpoint-2"
        shutil.copytree(run[0] / "whole" / "checkpoint-2", checkpoint)
        (checkpoint / name).unlink()
        checkpoints.write_manifest(checkpoint)
        with pytest.raises(ValueError, match=message):
            resume(run, tmp_path / name)


def test_no_step_beyond_max_steps(run, tmp_path):
    resume(run, tmp_path / "out", step=3, max_steps=3)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3
    one, two = (load_file(f / "adapter_model.safetensors") for f in
                (run[0] / "whole" / "checkpoint-3", tmp_path / "out"))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match=r"checkpoint-3 has 3 steps behind it, over the 2 asked for \(--max_steps"):
        resume(run, tmp_path / "fewer", step=3, max_steps=2)


@pytest.fixture(scope="module")
def with_best(run):
    """The run with held-out triples, whose best checkpoint, by the highest loss, is its first."""
    folder, flags = run
    flags = flags | {"eval_strategy": "steps", "eval_steps": 1, "eval_fraction": 0.3, "learning_rate": 2e-3}
    flags |= {"greater_is_better": "true", "warmup_steps": 0}
    start(flags, folder / "best")
    state = json.loads((folder / "best" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1 < state["global_step"]
    return folder, flags


def test_the_best_checkpoint_is_found_where_the_folder_is_now(with_best, tmp_path):
    folder, flags = with_best
    out = tmp_path / "moved"
    for name in ("checkpoint-1", "checkpoint-3"):
        shutil.copytree(folder / "best" / name, out / name)
    state = out / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text().replace(str(folder / "best"), "/gone"))
    checkpoints.write_manifest(out / "checkpoint-3")
    start(flags, out, "--resume_from_checkpoint", "true")
    one, two = (load_file(f / "adapter_model.safetensors") for f in (folder / "best", out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "| held-out, step 1 |" in (out / "README.md").read_text()


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_best_checkpoint_that_can_not_be_loaded_is_named(damage, with_best, tmp_path):
    folder, flags = with_best
    for name in ("checkpoint-1", "checkpoint-3"):
        shutil.copytree(folder / "best" / name, tmp_path / "out" / name)
    best = tmp_path / "out" / "checkpoint-1"
    if damage == "missing":
        shutil.rmtree(best)
    else:
        data = bytearray((best / "adapter_model.safetensors").read_bytes())
        data[-1000:] = bytes(1000)
        (best / "adapter_model.safetensors").write_bytes(data)
    message = "checkpoint-1 is the best checkpoint so far, and can't be used: " + (
        "it isn't there" if damage == "missing" else "adapter_model.safetensors has changed"
    )
    with pytest.raises(ValueError, match=message):
        start(flags, tmp_path / "out", "--resume_from_checkpoint", "true")


# --- hashes and adapters


def test_hashes_see_every_byte_of_weights_in_any_format(run, tmp_path):
    before = model_hashes(str(run[0] / "model"))
    assert before.keys() == {"base weights", "base config", "tokenizer"}
    folder = tmp_path / "bin"
    shutil.copytree(run[0] / "model", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    first = model_hashes(str(folder))
    state = torch.load(folder / "pytorch_model.bin")
    state["lm_head.weight"][3, 3] += 1e-3
    torch.save(state, folder / "pytorch_model.bin")
    second = model_hashes(str(folder))
    assert len({hashes["base weights"] for hashes in (before, first, second)}) == 3
    assert first["tokenizer"] == before["tokenizer"] == second["tokenizer"]


def test_an_adapter_goes_on_only_upon_its_own_base(run, tmp_path):
    adapter = str(run[0] / "whole")
    check_made_for(adapter, str(run[0] / "model"))
    other = tmp_path / "model"  # the same name
    shutil.copytree(run[0] / "model", other)
    check_made_for(adapter, str(other))
    changed_weights(other)
    with pytest.raises(ValueError, match="was trained on a base with weights"):
        check_made_for(adapter, str(other))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    with pytest.raises(ValueError, match="was made for 'org/other', and the base is"):
        check_made_for(str(foreign), str(other))


@pytest.mark.parametrize("damage", ["renamed", "missing", "larger"])
def test_an_adapter_that_does_not_fit_is_an_error(damage, run, tmp_path):
    folder, flags = run
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "whole", adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    if damage == "renamed":
        tensors = {name.replace(".layers.", ".language_model.layers."): t for name, t in tensors.items()}
    elif damage == "missing":
        tensors.pop(sorted(tensors)[0])
    else:
        tensors = {name: torch.cat([t, t]) for name, t in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert adapter_hash(str(adapter)) != adapter_hash(str(folder / "whole"))
    flags = {key: value for key, value in flags.items() if not key.startswith("lora")}
    with pytest.raises(ValueError, match="adapter .* (lacks|doesn't fit)"):
        start(flags, tmp_path / "out", "--adapter", adapter)
