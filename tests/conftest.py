"""Tiny models and data, made here: nothing is downloaded."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# One thread a process: the tests' models are tiny, and several processes on few cores wait for each other else.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "")
)
ROOT = Path(__file__).resolve().parents[1]
# What DeepSpeed compiles. Not the user's: a start that a test ends meanwhile leaves a lock, for which others wait.
os.environ["TORCH_EXTENSIONS_DIR"] = str(ROOT / ".pytest_cache" / "torch_extensions")
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

QUICK = ["--use_cpu", "true", "--bf16", "false", "--load_in_4bit", "false", "--gradient_accumulation_steps", "4"]

from lmolt import ownership  # noqa: E402


@functools.cache
def load_script(name: str):
    """The module scripts/NAME.py, which puts the project's root first on `sys.path` when it is loaded."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    first = sys.path[0]
    spec.loader.exec_module(module)
    sys.path[0] = first
    return module


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: several processes or machines, or long: ./launch.sh test-distributed")


@pytest.fixture(autouse=True)
def _caches_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LMOLT_CACHE", str(tmp_path / "cache"))
    yield
    ownership.release()  # the scripts' locks, which last as long as their process


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A folder with a random Llama of 64 hidden units and a byte-pair tokenizer trained on a few lines."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lmolt.prompts import TEMPLATES

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEMPLATES.values(), "The molecule is an aromatic amine.", "CC(=O)Nc1ccccc1"], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def few_triples() -> list[dict]:
    """24 triples, both directions, outputs of uneven length."""
    molecules = ["CCO", "CCN", "c1ccccc1O", "CC(=O)O", "CCCCCC", "CC(C)N", "C1CCCCC1", "Oc1ccc(Cl)cc1", "CCOC(C)=O"]
    molecules += ["NCCN", "CC#N", "CCS"]
    triples = []
    for i, smiles in enumerate(molecules):
        caption = f"The molecule has {len(smiles)} characters" + " and it is small" * (i % 3) + "."
        wrong = molecules[(i + 5) % len(molecules)]
        triples += [
            {"id": f"m{i}", "direction": "mol2cap", "source": smiles, "chosen": caption, "rejected": f"A thing {i}."},
            {"id": f"c{i}", "direction": "cap2mol", "source": caption + str(i), "chosen": smiles, "rejected": wrong},
        ]
    return triples


@pytest.fixture
def triples_file(tmp_path, few_triples):
    path = tmp_path / "triples.parquet"
    from lmolt.data.triples import write_triples

    write_triples(few_triples, path)
    return path


@pytest.fixture(scope="session")
def evaluate():
    """scripts/evaluate.py in this process: `evaluate("--flag", ...)` is its command line."""
    import torch

    torch.set_num_threads(1)  # on a busy machine threads of tiny products wait for each other
    return lambda *argv: load_script("evaluate").main([str(argument) for argument in argv])


@pytest.fixture(scope="session")
def merge():
    """scripts/merge.py in this process."""
    return lambda *argv: load_script("merge").main([str(argument) for argument in argv])


@pytest.fixture(scope="session")
def compiled() -> None:
    """What DeepSpeed compiles at a machine's first start: minutes, of which a run's own limit knows nothing."""
    import fcntl  # here: Windows has none

    from lmolt.distributed.strategy import is_open

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    code = "from deepspeed.ops.op_builder import cpu; cpu.ShareMemCommBuilder().load(); cpu.CPUAdamBuilder().load()"
    command, environment = [sys.executable, "-c", code], os.environ | {"DS_ACCELERATOR": "cpu"}
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other processes wait here
        for left in folder.glob("*/lock"):  # by a session that was killed, for one that runs holds it
            if not is_open(left):
                left.unlink(missing_ok=True)
        if (done := folder / f"compiled-{version('deepspeed')}-{version('torch')}").exists():
            return
        subprocess.run(command, check=True, env=environment, timeout=900)
        done.touch()


@pytest.fixture
def two_nodes(tmp_path):
    from machines import TwoNodes

    if not shutil.which("ip") or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("needs iproute2, and root's right to make network namespaces")
    nodes = TwoNodes(tmp_path)
    yield nodes
    nodes.remove()


def make_t5(tiny_policy: Path, folder: Path) -> Path:
    """A random T5 of two layers with the tiny Llama's tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    torch.manual_seed(1)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids, tie_word_embeddings=False, initializer_factor=2.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_nli(folder: Path, labels: list[str]) -> Path:
    """A random DeBERTa of one layer over the words a, b, c, d, the."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast, DebertaConfig, DebertaForSequenceClassification

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    inner = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    BertTokenizerFast(tokenizer_object=inner._tokenizer, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = DebertaForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder
