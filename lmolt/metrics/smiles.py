"""What is a molecule: one reader for pairs, predictions, negatives, decontamination and drawings.

RDKit reads more than SMILES: text after a blank (a name, CXSMILES), SELFIES as chains of carbenes. `parse` is RDKit's
verdict, which the reference scripts take; `oddity` says what else is in a string, for who wants a molecule and nothing
else.
"""

import re
import string

from rdkit import Chem

MAX_CHARACTERS = 5_000  # RDKit overflows the stack over 20,000 atoms in a chain, and takes a second over 10,000

# What a table writes where a value is missing: pandas' list, in lower case, and what people type.
MISSING_VALUES = {"nan", "-nan", "none", "null", "nil", "n/a", "na", "<na>", "#n/a", "#na", "#n/a n/a", "-", "--", "?"}
MISSING_VALUES |= {"-1.#ind", "1.#ind", "-1.#qnan", "1.#qnan"}

# cause: what a string is that is no plain SMILES, and what to do about it in one's own data
ODDITIES = {
    "missing_value": ("a missing value spelled out", "remove the row"),
    "number": ("a number", "name the column that holds the molecules"),
    "list": ("a list", "write one row for each molecule"),
    "special_token": ("text with a tokenizer's special token in it", "remove the token"),
    "inchi": ("an InChI", "convert it (rdkit.Chem.MolFromInchi, MolToSmiles)"),
    "selfies": ("SELFIES", "convert it (selfies.decoder)"),
    "reaction": ("a reaction", "give one molecule a row"),
    "cxsmiles": ("a SMILES with extensions (CXSMILES)", "cut it at the first blank"),
    "text_after": ("a SMILES with text after it", "cut it at the first blank, or move a name to a column of its own"),
    "non_ascii": ("a SMILES with a character outside ASCII", "remove the character; it may be invisible"),
    "overlong": (f"longer than {MAX_CHARACTERS:,} characters", "remove the row"),
}
# What decoding leaves where special tokens aren't skipped: T5's, BERT's, Llama's, Gemma's, GPT-2's and those of chat
# templates, bytes without a character; none is part of a SMILES.
SPECIAL_TOKEN = re.compile(
    r"</?s>|<(pad|unk|eos|bos|mask|sep|cls|extra_id_\d+|(start|end)_of_turn|0x[0-9a-f]{2})>|<[|｜][^<>\s]{1,40}[|｜]>"
    r"|\[(PAD|UNK|CLS|SEP|MASK|BOS|EOS|/?INST)\]",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"(\[[^\[\]]*\]){2,}")
_SELFIES = re.compile(r"\[[=#/\\-]*(?:C|N|O|S|P|F|B|Br|Cl|I|[A-Za-z]+expl|nop|epsilon)\]")
_ONLY_SELFIES = re.compile(r"\[(?:[=#/\\-]*(?:Branch|Ring)[1-3]|[=#/\\][A-Z]|Branch[1-3]_[1-3]|Expl[^\]]*)")


def parse(smiles: str) -> Chem.Mol | None:
    """A sanitised molecule, or None for what RDKit cannot read, for more than 5,000 characters and for no atoms (RDKit
    calls the empty string valid). Of strings that aren't known to be harmless, only within workers.in_processes."""
    molecule = Chem.MolFromSmiles(smiles) if len(smiles) <= MAX_CHARACTERS else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def oddity(text: str) -> str | None:
    """The key in `ODDITIES` of what `text`, less its outer blanks, is instead of one plain SMILES, judged by its
    characters; None where it may be one, and for an empty text."""
    text = text.strip(string.whitespace)  # a blank outside ASCII is a character of it
    if text.strip().lower() in MISSING_VALUES:
        return "missing_value"
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE):
        return "number"
    if text.startswith(("['", '["', "('", '("')):
        return "list"
    if SPECIAL_TOKEN.search(text):
        return "special_token"
    if re.match(r"inchi=", text, re.IGNORECASE):
        return "inchi"
    if len(text) > MAX_CHARACTERS:
        return "overlong"
    if _is_selfies(text):
        return "selfies"
    if re.search(r"\s+\|", text, re.ASCII):
        return "cxsmiles"
    if re.search(r"\s", text, re.ASCII):
        return "text_after"
    if re.search(r"[^\x21-\x7e]", text):
        return "non_ascii"
    return "reaction" if ">" in text.replace("->", "") else None  # a dative bond is written ->, or <-


def _is_selfies(text: str) -> bool:
    """Bracket atoms and nothing else, carbons without hydrogens among them, or brackets that are never atoms.

    `[O][O]`, `[2H][2H]` and `[Na+]` are SMILES too, and are taken for that.
    """
    if _ONLY_SELFIES.search(text):
        return True
    return bool(_BRACKETS.fullmatch(text)) and len(_SELFIES.findall(text)) > 1 and "C]" in text


def is_molecule(smiles: str) -> bool:
    return parse(smiles) is not None


def has_dummy(molecule: Chem.Mol) -> bool:
    """Whether an atom stands for any other (`*`, `[#0]`, `[1*]`, `[*:1]`): such a molecule has no InChI."""
    return any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms())


def dummy_of(smiles: str) -> bool | None:
    """Whether the molecule has a dummy atom; None where it is none."""
    molecule = parse(smiles)
    return molecule and has_dummy(molecule)


def canonical(smiles: str) -> str:
    """RDKit's canonical SMILES, empty where it cannot be read."""
    molecule = parse(smiles)
    return Chem.MolToSmiles(molecule) if molecule else ""
