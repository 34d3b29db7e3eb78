"""The embedded default: real molecules, captions made for them, and small stand-ins for the paper's models.

    python -m lmolt.demo.build

Nothing is downloaded. The molecules are 4,999 of the NCI's, which come with RDKit; lmolt/demo/captions.py says in words
what RDKit computes about them. The models are trained from scratch on the training split: a Llama that has read pages
about its molecules but no instructions, from it a Llama for each direction, in the place of the two unidirectional
Meditrons, and a T5 for each direction in MolT5's, whose outputs become the dis-preferred ones. All is written to
runs/demo of the working directory, each file and folder whole, and what is there is kept; remove it to start anew:

    pairs.parquet -> models/tokenizer -> models/{base, cap2mol, mol2cap, t5_mol2cap, t5_cap2mol}

The triples are scripts/make_triples.py's: --recipe recipes/demo_triples.yaml.
"""

import argparse
import multiprocessing
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from lmolt.data.pairs import DEMO, scaffold_split
from lmolt.files import end_with_parent, read_table, run_main, write_table
from lmolt.prompts import COLUMNS, DIRECTIONS, TEMPLATES, build_prompt, encode_output, encode_prompt
from lmolt.recipes import Parser

SPLITS = {"train": 0.88, "validation": 0.04, "test": 0.08}
SEED = 0


class Scale(NamedTuple):
    """How much of everything. "tiny" runs the same code in seconds, for tests, and learns next to nothing."""

    molecules: int | None  # the first so many, or all
    hidden: int  # a multiple of 64, which NF4's blocks need
    llama_layers: int
    base_epochs: int
    llama_epochs: int
    t5_layers: int
    t5_epochs: int
    seed: int = SEED  # of the models' weights and the order of their data; the pairs have always the same


SCALES = {"full": Scale(None, 128, 4, 6, 2, 2, 4), "tiny": Scale(200, 64, 1, 1, 1, 1, 1)}
VOCABULARY = 1280
TOKENS_PER_BATCH = 800
SOURCE_WEIGHT = 0.2  # of a source's tokens in the Llamas' loss, outputs having 1


# --- pairs


def pairs(root: Path = DEMO, scale: str = "full") -> list[dict]:
    """Rows `id, molecule, caption, split`, split by Bemis-Murcko scaffold; made on the first call."""
    path = root / "pairs.parquet"
    if not path.exists():
        write_table(_make_pairs(SCALES[scale].molecules), path)
        print(f"wrote {path}")
    return read_table(path)


def _make_pairs(most: int | None) -> list[dict]:
    from rdkit import Chem, RDConfig, rdBase
    from tqdm import tqdm

    from lmolt.demo.captions import caption

    source = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    lines = source.read_text().splitlines()[:most]
    unique: dict[str, dict] = {}
    invalid, duplicates = [], 0
    with rdBase.BlockLogs():
        for line in tqdm(lines, desc=f"captions for {source.name}", mininterval=1):
            smiles, name = line.split("\t")
            molecule = Chem.MolFromSmiles(smiles)
            if molecule is None:
                invalid.append(f"{name}: {smiles}")
                continue
            canonical = Chem.MolToSmiles(molecule)
            if canonical in unique:
                duplicates += 1
                continue
            text = caption(Chem.MolFromSmiles(canonical), SEED)  # of the SMILES that the pair has
            unique[canonical] = {"id": f"nci{name}", "molecule": canonical, "caption": text}
    parts = dict(zip(SPLITS, scaffold_split(list(unique.values()), list(SPLITS.values()), SEED), strict=True))
    print(f"{source.name}: {len(lines)} molecules, {duplicates} duplicates, {len(invalid)} that RDKit can't parse:")
    for row in invalid:
        print(f"  {row}")
    print(f"{len(unique)} pairs: " + ", ".join(f"{len(part)} {split}" for split, part in parts.items()))
    split_of = {pair["id"]: split for split, part in parts.items() for pair in part}
    return [pair | {"split": split_of[pair["id"]]} for pair in unique.values()]


# --- models


def build_models(root: Path = DEMO, scale: str = "full", seed: int = SEED) -> None:
    """Train what `root`/models lacks of the tokenizer, the base, and a Llama and a T5 for each direction."""
    size = SCALES[scale]._replace(seed=seed)
    models, finished = root / "models", root / "models" / "finished"
    if finished.exists():
        return
    train = [pair for pair in pairs(root, scale) if pair["split"] == "train"]
    if not (models / "tokenizer").exists():
        _save_whole(models / "tokenizer", _train_tokenizer(train))
    llamas, t5s = [models / d for d in DIRECTIONS], [models / f"t5_{d}" for d in DIRECTIONS]
    print(f"trains what {models} lacks of base, {', '.join(f.name for f in llamas + t5s)} on {len(train)} pairs")
    # Models so small gain little from a second thread, so each has a process of its own with one. A worker dies of
    # Ctrl-C by itself, silently; this process reports.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=_begin_worker) as pool:
        build = lambda folders: [pool.submit(_build_model, f, train, size) for f in folders if not f.exists()]
        base, others = build([models / "base"]), build(t5s)  # side by side
        for future in base:
            print(f"wrote {future.result()}")
        for future in as_completed(others + build(llamas)):
            print(f"wrote {future.result()}")
    finished.touch()


def _begin_worker() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _build_model(folder: Path, train: list[dict], size: Scale) -> Path:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder.with_name("tokenizer"))
    if folder.name == "base":
        model = _train_base(train, tokenizer, size)
    elif folder.name in DIRECTIONS:
        model = _train_llama(folder.with_name("base"), train, folder.name, tokenizer, size)
    else:
        model = _train_t5(train, folder.name.removeprefix("t5_"), tokenizer, size)
    _save_whole(folder, tokenizer, model)
    return folder


def _save_whole(folder: Path, *parts) -> None:
    """Save a tokenizer and a model to a sibling that becomes `folder`: a finished folder or none."""
    partial = folder.with_name(f".{folder.name}.partial")
    for part in parts:
        part.save_pretrained(partial)
    partial.rename(folder)


def _train_tokenizer(train: list[dict]):
    """Byte-level BPE over captions, SMILES and the prompts.

    A run of lower-case words may merge into one token, and so may all of a SMILES: texts have half of the usual
    tokens, and a model this small learns phrases and rings instead of spelling.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = r" ?[A-Z]?[a-z]+(?: [a-z'-]+)+|[.,]| ?[^\s.,]+|\s"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be encoded
        show_progress=False,
    )
    texts = [text for pair in train for text in (pair["caption"], pair["molecule"])]
    bpe.train_from_iterator(texts + 400 * list(TEMPLATES.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _train_base(train: list[dict], tokenizer, size: Scale):
    """The Llama that both directions start from, as both Meditrons do: it has read, and never been instructed.

    What it reads are lines of the training split as a page about a molecule has them: the SMILES before its caption,
    and after it, and SMILES in random atom order, which are as good to learn the syntax from. Without such pages it
    would meet mol2cap in the triples alone, too few for a model this small to find out that a caption tells of its
    molecule: it learns to write captions, and any molecule's would do as well.
    """
    import torch
    from rdkit import Chem
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(size.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.llama_layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=size.hidden // 32,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = []
    for pair in train:
        smiles, caption = pair["molecule"], pair["caption"]
        first, second = Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(smiles), 2, randomSeed=size.seed + 1)
        texts += [f"{smiles}\n{caption}", f"{first}\n{caption}", f"{caption}\n{smiles}", second]
    rows = [([], encode_output(tokenizer, text)) for text in texts]
    _optimise(model, rows, _causal_loss(model, encode_prompt(tokenizer, "")), size.base_epochs, "Llama base", size.seed)
    return model


def _train_llama(base: Path, train: list[dict], direction: str, tokenizer, size: Scale):
    """`base` trained with the paper's prompts of one direction.

    Embeddings and head stay as they are and sources are learned a little, so that the model goes on knowing the
    language it doesn't write: LoRA, which leaves the head alone, could teach it nothing otherwise.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    source, target = COLUMNS[direction]
    prompts = [encode_prompt(tokenizer, build_prompt(direction, pair[source])) for pair in train]
    instruction = os.path.commonprefix(prompts)
    closing = len(os.path.commonprefix([prompt[::-1] for prompt in prompts]))  # from the source's end to the output
    rows = [
        (prompt[len(instruction) :], encode_output(tokenizer, pair[target]))
        for prompt, pair in zip(prompts, train, strict=True)
    ]
    _optimise(
        model, rows, _causal_loss(model, instruction, closing), size.llama_epochs, f"Llama {direction}", size.seed
    )
    return model


def _causal_loss(model, instruction: list[int], closing: int = 0):
    """Cross-entropy of a batch's outputs and, weighted down, its sources, whose last `closing` tokens the prompt sets.

    All rows follow `instruction`, which is computed once for the batch, with its gradient.
    """
    import torch
    from transformers import DynamicCache

    def loss(batch):
        ids = _pad([s + t for s, t in batch])
        weights = _pad([[SOURCE_WEIGHT] * (len(s) - closing) + [0.0] * closing + [1.0] * len(t) for s, t in batch])
        cache = DynamicCache()
        first = model.model(torch.tensor([instruction]), past_key_values=cache).last_hidden_state[:, -1:]
        cache.batch_repeat_interleave(len(batch))
        hidden = model.model(ids, past_key_values=cache).last_hidden_state  # (B, T, H)
        hidden = torch.cat([first.expand(len(batch), -1, -1), hidden[:, :-1]], 1)  # at t what predicts ids[:, t]
        scored = weights > 0
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), ids[scored], reduction="none")
        return (losses * weights[scored]).sum() / weights.sum()

    return loss


def _train_t5(train: list[dict], direction: str, tokenizer, size: Scale):
    """An encoder-decoder from the bare source to the target; as a baseline, trained less than it could be."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(size.seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=size.hidden,
            d_kv=32,
            d_ff=2 * size.hidden,
            num_layers=size.t5_layers,
            num_heads=size.hidden // 32,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    source, target = COLUMNS[direction]
    rows = [(tokenizer(pair[source])["input_ids"], encode_output(tokenizer, pair[target])) for pair in train]

    def loss(batch):
        ids, mask = _pad([s for s, _ in batch]), _pad([[1] * len(s) for s, _ in batch])
        return model(input_ids=ids, attention_mask=mask, labels=_pad([t for _, t in batch], -100)).loss

    _optimise(model, rows, loss, size.t5_epochs, f"T5 {direction}", size.seed)
    return model


def _pad(rows: list[list[int]], fill: int = 0):
    """Right-padded (B, T)."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def _orthogonalise(gradient, coefficients: tuple[float, float, float], steps: int, eps: float):
    """Muon's quintic Newton-Schulz iteration towards U V^T of a gradient (R, C) = U S V^T, in its own precision."""
    a, b, c = coefficients
    x = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.size(0) > gradient.size(1) else x


def _optimise(model, rows: list[tuple[list[int], list[int]]], loss, epochs: int, description: str, seed: int) -> None:
    """Minimise `loss(batch)` over (source ids, target ids): Muon for the linear layers, AdamW for the rest.

    Muon (Jordan et al. 2024) learns to read the source in half of the steps that AdamW needs here.
    """
    import torch
    from torch.optim import _muon
    from tqdm import tqdm

    from lmolt.models.precision import bf16_is_slow

    if bf16_is_slow():  # torch's does this in bf16: on a processor without it, a minute of training took ten
        _muon._zeropower_via_newtonschulz = _orthogonalise

    draw = random.Random(seed)
    steps = [batch for _ in range(epochs) for batch in _batches(rows, draw)]
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    matrices = {id(layer.weight) for layer in layers}
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    optimizers = [
        torch.optim.Muon([layer.weight for layer in layers], lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    # up over the first 5 % of the steps, down over the last 60 %
    rate = lambda step: min(1.0, (step + 1) / (0.05 * len(steps)), (len(steps) - step) / (0.6 * len(steps)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    with tqdm(steps, desc=description, mininterval=1) as progress:
        for batch in progress:
            value = loss(batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.set_postfix(loss=f"{value.item():.2f}", refresh=False)
    model.eval()


def _batches(rows: list[tuple[list[int], list[int]]], draw: random.Random) -> list[list]:
    """One epoch in batches of rows of like length, `TOKENS_PER_BATCH` with the padding, in random order."""
    length = lambda row: len(row[0]) + len(row[1])
    order = draw.sample(rows, len(rows))
    batches = []
    for start in range(0, len(order), 1024):
        batch: list = []
        for row in sorted(order[start : start + 1024], key=length):
            if batch and length(row) * (len(batch) + 1) > TOKENS_PER_BATCH:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="tiny: for tests")
    parser.add_argument("--folder", type=Path, default=DEMO, help=f"default: {DEMO}")
    parser.add_argument("--seed", type=int, default=SEED, help="of the models; the pairs are always the same")
    args = parser.parse_args(argv)
    build_models(args.folder, args.scale, args.seed)


if __name__ == "__main__":
    run_main(main, kept="finished models are kept, and the same command goes on")
