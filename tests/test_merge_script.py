"""scripts/merge.py as a user runs it: good calls, the table of bad inputs, kills, checks afterwards."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmolt import ownership

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "merge.py"


@pytest.fixture
def abc(tiny_policy, tmp_path) -> list[Path]:
    """Folders A, B and base; B in two shards."""
    folders = []
    for seed, name in enumerate(("A", "B", "base")):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if name != "base" else []:
                parameter.add_(torch.randn_like(parameter) * 0.01)
        folders.append(tmp_path / name)
        shutil.copytree(tiny_policy, folders[-1])
        (folders[-1] / "model.safetensors").unlink()
        model.save_pretrained(folders[-1], max_shard_size="150KB" if name == "B" else "5GB")
    return folders


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a folder of one shard."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


SLERP = ("--method", "slerp", "--weights", 0.95, 0.05)
TIES = ("--method", "ties", "--weights", 0.95, 0.05)


# --- good calls


def test_slerp_as_a_user_runs_it(abc, tmp_path):
    a, b, _ = abc
    command = [sys.executable, SCRIPT, "--method", "slerp", "--models", a, b, "--weights", "0.95", "0.05"]
    run = subprocess.run([*command, "--output", tmp_path / "O", "--verify"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| weights asked for | 0.950 : 0.050 = 19.0 : 1 |" in run.stdout and "verified" in run.stdout
    lineage = json.loads((tmp_path / "O" / "merge.json").read_text())
    assert lineage["total"]["effective_weights"] == pytest.approx(
        [0.95, 0.05], abs=0.01
    )  # SLERP at an angle: a little over 1 together
    for file, digest in lineage["outputs"].items():
        content = (tmp_path / "O" / file).read_bytes()
        assert digest == f"{len(content)}-{xxhash.xxh3_128_hexdigest(content)}"
    assert len(lineage["inputs"]) == 1 + len(list(b.glob("*.safetensors")))
    assert "A merge by slerp" in (tmp_path / "O" / "README.md").read_text()


def test_the_output_loads_and_goes_on(merge, abc, tmp_path):
    a, b, base = abc
    merge(*TIES, "--models", a, b, "--base", base, "--output", tmp_path / "O", "--plot", tmp_path / "layers.png")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "O", dtype="auto")
    assert model.dtype == torch.bfloat16 and (tmp_path / "layers.png").stat().st_size > 10_000
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "O" / name).read_bytes() == (a / name).read_bytes()
    ids = AutoTokenizer.from_pretrained(tmp_path / "O")("CCO", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_tied_weights_stay_tied(merge, abc, tmp_path):
    for folder in abc[:2]:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, tie_word_embeddings=True))
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder)
    merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "O")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_t_is_the_second_weights_share(merge, abc, tmp_path):
    merge("--method", "slerp", "--t", 0.05, "--models", *abc[:2], "--output", tmp_path / "one")
    merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_for_a_pattern_and_three_models(merge, abc, tmp_path):
    options = ("--weights_for", "embed_tokens=0,1,0", "--output", tmp_path / "O")
    merge("--method", "linear", "--models", *abc, "--weights", 1, 1, 2, *options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "O").state_dict()
    a, b, base = (AutoModelForCausalLM.from_pretrained(folder).double().state_dict() for folder in abc)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[name], ((a[name] + b[name] + 2 * base[name]) / 4).bfloat16())
    assert torch.equal(merged["model.embed_tokens.weight"].double(), b["model.embed_tokens.weight"])


def test_dtype_and_config_agree(merge, abc, tmp_path):
    merge(*SLERP, "--models", *abc[:2], "--dtype", "float32", "--output", tmp_path / "O")
    assert json.loads((tmp_path / "O" / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "O" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "merge").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes(merge, abc, tmp_path, recipe):
    a, b, base = abc
    ties = ("--base", base) if "ties" in recipe.stem else ()
    merge("--recipe", recipe, "--models", a, b, *ties, "--output", tmp_path / "O", "--verify")
    effective = json.loads((tmp_path / "O" / "merge.json").read_text())["total"]["effective_weights"]
    expected = {"linear_average": (0.5, 0.5), "slerp_19_1": (0.95, 0.05)}
    expected |= {"ties_19_1": (0.93, 0.47), "ties_19_1_unnormalised": (0.89, 0.035)}  # merging.md
    assert effective == pytest.approx(expected[recipe.stem], abs=0.03)


def test_an_unknown_recipe_key_is_an_error(merge, abc, tmp_path):
    (tmp_path / "r.yaml").write_text("method: slerp\nweight: [1, 2]\n")
    with pytest.raises(ValueError, match="unknown key 'weight'; did you mean 'weights'"):
        merge("--recipe", tmp_path / "r.yaml", "--models", *abc[:2], "--output", tmp_path / "O")


def test_a_hub_id_is_taken_from_the_cache(abc, tmp_path):
    a, b, _ = abc
    repository = tmp_path / "hub" / "models--someone--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("0" * 40)
    shutil.copytree(b, repository / "snapshots" / ("0" * 40))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, *map(str, SLERP), "--models", a, "someone/b", "--output", tmp_path / "O"]
    run = subprocess.run([*command, "--revision", "v1"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    run = subprocess.run([*command, "--overwrite"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "error: someone/b: no such folder here" in run.stderr
    assert "Traceback" not in run.stderr


def test_files_obey_the_umask(merge, abc, tmp_path):
    (abc[0] / "tokenizer.json").chmod(0o600)
    old = os.umask(0o022)
    try:
        merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "O").iterdir()} == {0o644}


# --- bad input: found before a byte is written


def poison(value):
    def change(tensors):
        tensors["model.norm.weight"][3] = value

    return change


def cut(folder):
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(stream.seek(-10, os.SEEK_END))


def longer_vocabulary(tensors):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])


BAD = {
    "nan": (lambda a: rewrite(a, poison(float("nan"))), r"A/model.safetensors: model.norm.weight holds NaN or inf"),
    "inf": (lambda a: rewrite(a, poison(float("-inf"))), r"A/model.safetensors: model.norm.weight holds NaN or inf"),
    "missing": (lambda a: rewrite(a, lambda t: t.pop("model.norm.weight")), "1 tensors in one only, model.norm.weight"),
    "types": (
        lambda a: rewrite(a, lambda t: t.update({name: x.half() for name, x in t.items()})),
        r"several types \(BF16, F16\); say --dtype",
    ),
    "tied": (lambda a: rewrite(a, lambda t: t.pop("lm_head.weight")), "one ties its head .* the other does not. Untie"),
    "tied_config": (
        lambda a: configure(a, tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight, though config.json ties them",
    ),
    "vocabulary": (lambda a: rewrite(a, longer_vocabulary), r"a vocabulary of \d+, .* one of \d+ .*resize_token_embed"),
    "shape": (
        lambda a: rewrite(a, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()})),
        r"model.norm.weight: \[5\] in .*A, \[64\] in .*B",
    ),
    "cut": (cut, "A/model.safetensors: .* bytes where its header says .*: cut off"),
    "empty": (lambda a: (a / "model.safetensors").write_bytes(b""), "not a safetensors file, or cut off"),
    "header": (lambda a: (a / "model.safetensors").write_bytes(b"\4" + b"\0" * 7 + b"oops" * 9), "header is not JSON"),
    "pickle": (
        lambda a: (a / "model.safetensors").rename(a / "pytorch_model.bin"),
        "no such file; pytorch_model.bin is a pickle, and isn't read: load the model with transformers and save_pre",
    ),
    "config": (lambda a: (a / "config.json").unlink(), "A/config.json: there is no such file"),
    "kind": (lambda a: configure(a, model_type="mistral"), "A is a mistral, .*B a llama"),
    "quantised": (
        lambda a: rewrite(a, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.uint8)})),
        "model.norm.weight is of type U8; merging takes bf16, fp16 and fp32",
    ),
    "gone": (lambda a: shutil.rmtree(a), "A: there is no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models(merge, abc, tmp_path, case):
    spoil, message = BAD[case]
    spoil(abc[0])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_a_shard_that_the_index_names_is_missing(merge, abc, tmp_path):
    sorted(abc[1].glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match="there is no such file; its index names it"):
        merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (TIES, "ties needs --base"),
        (("--method", "slerp"), "--weights: give one weight a model"),
        (("--method", "slerp", "--weights", 1), "1 weights for 2 models"),
        (("--method", "linear", "--weights", 1, -1), "add up to 0"),
        (("--method", "linear", "--weights", 1, -1.0000000000000002), "add up to 0"),
        (("--method", "slerp", "--weights", 1.5, -0.5), "none below 0"),
        (("--method", "slerp", "--t", 1.5), "--t .here 1.5 for .* is the way from the first model"),
        (("--weights", 1, 1), "--method is one of"),
        ((*TIES, "--base", "{base}", "--density", 0), r"--density must lie in \(0, 1\]"),
        ((*TIES, "--base", "{base}", "--density", 0.1, 0.2, 0.3), "3 values for 2 models"),
        ((*SLERP, "--base", "{base}"), "slerp has no base"),
        ((*SLERP, "--weights_for", "embed"), "write PATTERN=W,W"),
        ((*SLERP, "--weights_for", "embde=1,0"), "no tensor has such a name"),
        (("--method", "linear", "--weights", 0.1, 1e-320), "numbers of a size between 1e-12 and 1e12, not 1e-320"),
        (("--method", "slerp", "--weights", 1e308, 1e308), "numbers of a size between 1e-12 and 1e12"),  # the sum: inf
        ((*TIES, "--base", "{base}", "--lambda", 1e-40), "--lambda takes 0 and numbers of a size"),
        (("--method", "ties", "--base", "{base}", "--weights", 0, 0), "ties would write the base"),
        (("--method", "task_arithmetic", "--base", "{base}", "--weights", 1, 1, "--lambda", 0), "would write the base"),
        (("--method", "linear", "--no_normalize", "--weights", 0, 0), "linear would write zeros"),
        ((*SLERP, "--weights_for", "self_attn=1,0", ".=0,1"), "'self_attn': another one goes before it"),
        ((*TIES, "--base", "{base}", "--density_for", "embde=1,1"), "--density_for 'embde': no tensor has such a name"),
        ((*SLERP, "--density", 0.5), "--density .* has no meaning for slerp"),
        ((*SLERP, "--density_for", "mlp=.1,.1"), "--density_for .* has no meaning for slerp"),
        ((*SLERP, "--no_normalize"), "--normalize .here False. has no meaning for slerp"),
        (("--method", "linear", "--weights", 1, 1, "--lambda", 2), "--lambda .here 2.0. has no meaning for linear"),
        (("--method", "nuslerp", "--weights", 1, 1, "--lambda", 2), "--lambda .here 2. is of deltas from --base"),
        ((*SLERP, "--fold_base", "dequantised"), "--fold_base .* has no meaning for slerp"),
        ((*SLERP, "--revision", "main"), "--revision main is of Hub ids"),
        (("--weights", 1, 1, "--adapter", "{base}"), "--weights .* has no meaning for a fold"),
        ((*SLERP, "--adapter", "{base}"), "--adapter is folded into one model"),
    ],
)
def test_bad_arguments(merge, abc, tmp_path, argv, message):
    argv = [str(argument).format(base=abc[2]) for argument in argv]
    with pytest.raises(ValueError, match=message):
        merge(*argv, "--models", *abc[:2], "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_slerp_of_three_is_an_error(merge, abc, tmp_path):
    with pytest.raises(ValueError, match="exactly two models, not 3"):
        merge("--method", "slerp", "--weights", 1, 1, 1, "--models", *abc, "--output", tmp_path / "O")


@pytest.mark.parametrize(
    ("holds", "remedy"),
    {
        "adapter_config.json": "an adapter, so fold it into its base first: merge.py --models BASE --adapter",
        "config.json": "takes safetensors: load the model with transformers and save_pretrained it",
    }.items(),
)
def test_a_folder_without_safetensors_says_what_to_do(merge, abc, tmp_path, holds, remedy):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / holds).touch()
    with pytest.raises(FileNotFoundError, match=remedy):
        merge(*SLERP, "--models", abc[0], tmp_path / "model", "--output", tmp_path / "O")


def test_what_exists_is_kept_unless_told(merge, abc, tmp_path):
    call = (*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    merge(*call)
    with pytest.raises(ValueError, match="O exists; --overwrite replaces it"):
        merge(*call)
    (tmp_path / "O" / "cpo").mkdir()
    with pytest.raises(ValueError, match="O/cpo is there, and merge.py didn't write it"):
        merge(*call, "--overwrite")
    (tmp_path / "O" / "cpo").rename(tmp_path / "O.partial")
    with pytest.raises(ValueError, match="O is model 1"):
        merge(*SLERP, "--models", tmp_path / "O", abc[1], "--output", tmp_path / "O", "--overwrite")
    (tmp_path / "O.partial" / "mine").touch()
    with pytest.raises(ValueError, match="O.partial/mine is there, and merge.py didn't write it"):
        merge(*call, "--overwrite")
    (tmp_path / "O.partial").rename(tmp_path / "elsewhere")
    ownership.claim(tmp_path / "O", "merge", ["model-00009-of-00009.safetensors"])
    (tmp_path / "O" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    merge(*call, "--overwrite")
    assert not (tmp_path / "O" / "model-00009-of-00009.safetensors").exists()
    assert not (tmp_path / "O.replaced").exists()
    with pytest.raises(ValueError, match=f"--output {abc[0]} is model 1"):
        merge(*SLERP, "--models", *abc[:2], "--output", abc[0], "--overwrite")
    with pytest.raises(ValueError, match="holds no merge.json"):
        merge(*SLERP, "--models", *abc[:2], "--output", abc[2], "--overwrite")


def test_a_full_disk_is_seen_before_the_inputs_are_read(merge, abc, tmp_path, monkeypatch):
    rewrite(abc[0], poison(float("nan")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="needs .* MiB, 0 MiB are free"):
        merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    assert not list(tmp_path.glob("O*"))


def test_values_beyond_float16_are_an_error(merge, abc, tmp_path):
    rewrite(abc[0], poison(1e6))
    with pytest.raises(ValueError, match="model.norm.weight: the merged values leave the range of F16"):
        merge(*SLERP, "--models", *abc[:2], "--dtype", "float16", "--output", tmp_path / "O")
    assert not (tmp_path / "O").exists()


# --- afterwards


def test_verify_sees_a_flipped_byte(merge, abc, tmp_path, capsys):
    a, b, base = abc
    merge(*TIES, "--models", a, b, "--base", base, "--output", tmp_path / "O")
    merge("--verify", tmp_path / "O")
    assert "verified" in capsys.readouterr().out
    file = tmp_path / "O" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was written"):
        merge("--verify", tmp_path / "O")


def test_verify_looks_at_all_that_was_read_and_written(merge, abc, tmp_path):
    folder = tmp_path / "O"
    merge(*SLERP, "--models", *abc[:2], "--output", folder, "--verify")
    for file, message in {
        folder / "tokenizer.json": "O/tokenizer.json is not what was written",
        folder / "config.json": "O/config.json: hidden_act is not what was written or read from",
        min(abc[1].glob("*.safetensors")): "safetensors is not what was merged into .*O",
    }.items():
        before = file.read_bytes()
        if file.name == "config.json":
            configure(folder, hidden_act="gelu")
        else:
            file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=message):
            merge("--verify", folder)
        file.write_bytes(before)
    merge("--verify", folder)


def test_verify_where_large_terms_cancel(merge, abc, tmp_path, capsys):
    """b + 0.05 (0 - b) / 0.05 is 0 but for the last bits of b, which are no units of 0."""
    a, zeros = abc[0], tmp_path / "Z"
    shutil.copytree(a, zeros)
    rewrite(zeros, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    merge(*TIES, "--density", 1, "--models", a, zeros, "--base", a, "--output", tmp_path / "O", "--verify")
    assert "at most 0.0000% of a tensor's values off the formula" in capsys.readouterr().out


def test_verify_works_tensors_out_again(merge, abc, tmp_path):
    merge(*SLERP, "--models", *abc[:2], "--output", tmp_path / "O")
    rewrite(abc[0], lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    file = tmp_path / "O" / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": {}}))  # whose hashes would tell
    with pytest.raises(ValueError, match=r"weight: .* of its values are not the formula's"):
        merge("--verify", tmp_path / "O")


def test_another_merges_journal_is_refused(merge, abc, tmp_path):
    rewrite(abc[0], poison(1e6))
    call = ("--models", *abc[:2], "--output", tmp_path / "O", "--dtype", "float16")
    with pytest.raises(ValueError, match="leave the range"):  # stops in the middle
        merge(*SLERP, *call)
    with pytest.raises(ValueError, match="begun with other models or arguments"):
        merge("--method", "linear", "--weights", 1, 1, *call, "--resume")


def test_a_damaged_partial_merge_is_refused(merge, abc, tmp_path):
    rewrite(abc[0], poison(1e6))
    call = (*SLERP, "--models", *abc[:2], "--output", tmp_path / "O", "--dtype", "float16")
    with pytest.raises(ValueError, match="leave the range"):  # stops in the middle
        merge(*call)
    shard = tmp_path / "O.partial" / "model.safetensors"
    stored = bytearray(shard.read_bytes())
    stored[8 + int.from_bytes(stored[:8], "little")] ^= 1  # the first tensor's first byte
    shard.write_bytes(stored)
    with pytest.raises(ValueError, match="damaged"):
        merge(*call, "--resume")
    (tmp_path / "O.partial" / "journal.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="journal.jsonl is damaged; leave --resume out"):
        merge(*call, "--resume")


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """One tensor of 64 MiB: the merge holds pieces of it only."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": torch.randn(4096, 8192).bfloat16()}, tmp_path / name / "model.safetensors")
    command = [sys.executable, str(SCRIPT), "--method", "ties", "--models", "a", "--base", "b", "--weights", "1"]
    # a process of its own in between: a forked child starts with its parent's peak, and pytest's is large
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, "-c", code, *command, "--output", "O"]
    run = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    assert int(run.stdout) < 150_000  # KiB


def test_help_needs_no_torch():
    code = "import sys, runpy; sys.argv = ['merge.py', '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    code = code.replace("'merge.py'", repr(str(SCRIPT))) + "\nexcept SystemExit: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "False"
    assert "python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O" in run.stdout
