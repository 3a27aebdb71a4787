"""AntiBERTy (pip install antiberty==0.1.3, MIT; Ruffolo et al. 2021): BERT of 26 million weights for antibodies.

    python tools/export/antiberty.py antiberty.onnx [--samples FOLDER [--fasta chains.fasta]] [--count 32]

Outputs are logits and last_hidden_state, which is what the package calls embeddings; the file takes any number of
chains of any length, with a mask. Weights are those of the package, which 1.0.0 no longer holds. Mask token 4, special
tokens 0,2,3.

Without --fasta samples are drawn from the network itself: human germline genes (IGHV1-69, 3-23, 4-34, 5-51, IGKV1-39,
3-20, IGLV1-44, 2-14) with a third of their residues and all of their CDRs masked, of random length in CDR 3, and filled
in at random by what the network says, a sixth at a time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import BadInput, Kind, Missing, Rng, Sample, library, main

VERSION = "0.1.3"
PAD, BEGIN, END, MASK = 0, 2, 3, 4
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # ids 5 to 24
ROUNDS = 6
MASKED = 0.33  # of the residues of a framework
HEAVY, KAPPA, LAMBDA = "WGQGTLVTVSS", "FGQGTKVEIK", "FGGGTKLTVL"
# Framework 1, CDR 1, framework 2, CDR 2, framework 3, shortest and longest CDR 3, framework 4.
GERMLINES: tuple[tuple[str, str, str, str, str, int, int, str], ...] = (
    ("QVQLVQSGAEVKKPGSSVKVSCKAS", "GGTFSSYA", "ISWVRQAPGQGLEWMGG", "IIPIFGTA",
     "NYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYC", 9, 20, HEAVY),
    ("EVQLLESGGGLVQPGGSLRLSCAAS", "GFTFSSYA", "MSWVRQAPGKGLEWVSA", "ISGSGGST",
     "YYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC", 9, 20, HEAVY),
    ("QVQLQQWGAGLLKPSETLSLTCAVY", "GGSFSGYY", "WSWIRQPPGKGLEWIGE", "INHSGST",
     "NYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYC", 9, 20, HEAVY),
    ("EVQLVQSGAEVKKPGESLKISCKGS", "GYSFTSYW", "IGWVRQMPGKGLEWMGI", "IYPGDSDT",
     "RYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYC", 9, 20, HEAVY),
    ("DIQMTQSPSSLSASVGDRVTITCRAS", "QSISSY", "LNWYQQKPGKAPKLLIY", "AAS",
     "SLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYC", 8, 11, KAPPA),
    ("EIVLTQSPGTLSLSPGERATLSCRAS", "QSVSSSY", "LAWYQQKPGQAPRLLIY", "GAS",
     "SRATGIPDRFSGSGSGTDFTLTISRLEPEDFAVYYC", 8, 11, KAPPA),
    ("QSVLTQPPSASGTPGQRVTISCSGS", "SSNIGSNT", "VNWYQQLPGTAPKLLIY", "SNN",
     "QRPSGVPDRFSGSKSGTSASLAISGLQSEDEADYYC", 9, 13, LAMBDA),
    ("QSALTQPASVSGSPGQSITISCTGT", "SSDVGGYNY", "VSWYQQHPGKAPKLMIY", "EVS",
     "NRPSGVSNRFSGSKSGNTASLTISGLQAEDEADYYC", 9, 13, LAMBDA),
)  # fmt: skip


@functools.cache
def build() -> Any:
    """The language model, with the weights of the package; its heads for species and chain are left out."""
    torch, hub = library("torch"), library("transformers")
    try:  # not importlib.util: this file has the package's name
        place = Path(str(importlib.metadata.distribution("antiberty").locate_file("antiberty")))
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"antiberty is not installed: pip install --no-deps antiberty=={VERSION}") from None
    folder = place / "trained_models" / "AntiBERTy_md_smooth"
    if not (folder / "pytorch_model.bin").is_file():
        raise Missing(f"antiberty holds no weights here: pip install --no-deps antiberty=={VERSION}")
    config = hub.BertConfig.from_dict(json.loads((folder / "config.json").read_text()))
    language = hub.BertForMaskedLM(config)
    stored = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    parts = ("bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.", "bert.embeddings.position_ids")
    left = language.load_state_dict(stored, strict=False)
    if left.missing_keys or (other := [name for name in left.unexpected_keys if not name.startswith(parts)]):
        raise BadInput(f"The weights do not fit BertForMaskedLM: {(left.missing_keys or other)[:3]}")

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = language

        def forward(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
            hidden = self.network.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return {"logits": self.network.cls(hidden), "last_hidden_state": hidden}

    return Network().eval()


def ids_of(chain: str) -> list[int]:
    """Ids of a chain between those of begin and end."""
    return [BEGIN, *(5 + RESIDUES.index(residue) for residue in chain), END]


def drawn(rng: Rng) -> list[int]:
    """Ids of a chain that the network itself makes of a germline."""
    torch = library("torch")
    *parts, least, most, last = GERMLINES[rng.integers(len(GERMLINES))]
    chain = [str(part) for part in parts]
    ids = np.asarray(ids_of("".join([*chain, "A" * int(rng.integers(least, most, endpoint=True)), str(last)])))
    starts = np.cumsum([1, *map(len, chain)])
    masked = rng.random(len(ids)) < MASKED
    for begin, end in ((starts[1], starts[2]), (starts[3], starts[4]), (starts[5], len(ids) - 1 - len(str(last)))):
        masked[begin:end] = True
    masked[[0, -1]] = False
    ids[masked] = MASK
    for places in np.array_split(rng.permutation(np.flatnonzero(masked)), ROUNDS):
        with torch.no_grad():
            logits = build()(torch.from_numpy(ids[None]), torch.ones(1, len(ids), dtype=torch.int64))["logits"][0]
        chosen = logits.numpy()[places, 5:].astype(np.float64)
        ids[places] = 5 + (chosen + rng.gumbel(size=chosen.shape)).argmax(-1)
    return [int(i) for i in ids]


def batch(rows: list[list[int]], given: argparse.Namespace) -> Sample:
    """Rows filled up to the longest, or to --length where lengths are fixed."""
    length = max(map(len, rows)) if given.open else given.length
    if max(map(len, rows)) > length:
        raise BadInput(f"A chain has {max(map(len, rows)) - 2} residues, and --length {length} takes {length - 2}")
    ids = np.full((len(rows), length), PAD, np.int64)
    for row, chosen in zip(ids, rows, strict=True):
        row[: len(chosen)] = chosen
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}


def chains(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """The chains of a FASTA file, in its order."""
    rows = []
    for text in ("\n" + path.read_text(encoding="utf-8")).split("\n>")[1:]:
        chain = "".join(text.split("\n")[1:]).replace(" ", "").replace("\r", "").upper()
        if unknown := sorted(set(chain) - set(RESIDUES)):
            raise BadInput(f"{path}: {text.split()[0]!r} holds {', '.join(unknown)}, which are no residues")
        rows.append(ids_of(chain))
    for at in range(0, len(rows) - given.batch + 1, given.batch):
        yield batch(rows[at : at + given.batch], given)


KIND = Kind(
    options={"batch": 1, "length": 160, "open": True},
    draw=lambda rng, given: batch([drawn(rng) for _ in range(given.batch)], given),
    drawn="sampled from the network itself, of germline genes",
    source=("fasta", "FASTA file of antibody chains, variable domains, one sample a --batch"),
    read=chains,
    axes=("batch", "length"),
)

if __name__ == "__main__":
    raise SystemExit(main(build, KIND, weights=f"antiberty {VERSION}"))
