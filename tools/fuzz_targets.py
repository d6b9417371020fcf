"""What reads files from outside, each as a target of tools/fuzz.py: seeds that are right, and a reader of bytes.

A target's `read` puts the bytes in place of one file among others that are right, and reads them all. It returns if
they were taken, and raises one of `refusals` with one line if not; anything else is a finding.

What stands behind a SHA-256 is signed again after each change, so that the reader behind it is reached too.

Not here: DLPack capsules and pickles, which are memory and programs of a process that is trusted, not files; ledgers
of tools/, which the tools write for themselves; the corpus's texts, every byte of which is one token; the residuals of
compression (drivers/residual_files.py), whose names and bytes the workers of one run write for each other, each whole
before any message speaks of it, and which nobody brings from another run.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import engine as eg
from engine.models import Transformer, TransformerConfig, huggingface
from engine.sharder.drivers import tape
from engine.sharder.drivers.files import RECORD, read_whole, record_bytes, records_of
from tools.fuzz_wire import Fuzzer, draw_message, wire_target
from tools.planning import models
from tools.training import checkpoint
from tools.training.cache import open_entry
from tools.training.checkpoint import FACTS, Checkpoint
from tools.training.corpus import Document, file_corpus, split_documents
from tools.training.errors import ProgramError
from tools.training.finish import finished_report
from tools.training.metrics import Metrics
from tools.training.ngram import baselines
from tools.training.settings import Settings, resumed
from tools.training.tokens import TOKENIZER_FILE, BPETokenizer, ByteTokenizer
from tools.training.trained import load_model

SMALL: dict[str, Any] = {"vocab_size": 11, "context_length": 6, "layers": 1, "heads": 2, "width": 8, "hidden": 12}


@dataclass(frozen=True)
class Target:
    """name; what a file that is right may hold; read(bytes, a folder of its own); the errors it may refuse with."""

    name: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], Any]
    refusals: tuple[type[Exception], ...] = ()


TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    TARGETS[target.name] = target


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


# ── published models ──────────────────────────────────────────────────────────────────────────────────

PRESETS: dict[str, Callable[..., TransformerConfig]] = {
    "gpt2": TransformerConfig.gpt2, "llama": TransformerConfig.llama, "bert": TransformerConfig.bert}


def published(folder: Path, family: str) -> Path:
    """A folder of a family, made once."""
    path = folder / family
    if not path.exists():
        with eg.seed(0):
            huggingface.save(Transformer(PRESETS[family](**SMALL)), path)
    return path


def _published_file(family: str, name: str) -> Target:
    def read(data: bytes, folder: Path) -> None:
        path = published(folder, family)
        right = (path / name).read_bytes()
        try:
            (path / name).write_bytes(data)
            huggingface.load(path)
        finally:
            (path / name).write_bytes(right)

    return Target(f"{family}/{name}", lambda folder: [(published(folder, family) / name).read_bytes()], read,
                  (ValueError,))


PART = "model-00001-of-00001.safetensors"


def _read_index(data: bytes, folder: Path) -> None:
    path = published(folder, "gpt2")
    index = path / huggingface.INDEX
    (path / huggingface.SINGLE).rename(path / PART)  # an index is looked for where there is no single file
    try:
        index.write_bytes(data)
        huggingface.load(path)
    finally:
        index.unlink()
        (path / PART).rename(path / huggingface.SINGLE)


for _family in PRESETS:
    register(_published_file(_family, "config.json"))
    register(_published_file(_family, huggingface.SINGLE))
register(Target(f"gpt2/{huggingface.INDEX}", lambda folder: [_json({"weight_map": {"wte.weight": PART}})],
                _read_index, (ValueError, FileNotFoundError)))


def _read_described(data: bytes, folder: Path) -> None:
    """plan.py --config: a number of parameters, of a model that is not made."""
    path = folder / "described.json"
    path.write_bytes(data)
    assert models.from_file(path) > 0


register(Target("plan/config.json", lambda folder: [(published(folder, family) / "config.json").read_bytes()
                                                    for family in PRESETS], _read_described, (ProgramError,)))


# ── checkpoints of training ───────────────────────────────────────────────────────────────────────────

def stored(folder: Path) -> Path:
    """A checkpoint with a byte-pair tokenizer, made once."""
    path = folder / "checkpoint" / "step-000003"
    if not path.exists():
        config = TransformerConfig(**SMALL, positions="rotary", norm="rms_norm", activation="swiglu", bias=False)
        model = {name: value.numpy() for name, value in Transformer(config).state_dict().items()}
        facts = {"step": 3, "seconds": 1.5, "settings": vars(Settings()), "kernels": "v3",
                 "corpus": {"data": None, "sha256": "0" * 64}}
        made = Checkpoint(model, {"exp_avg/embedding.weight": np.ones((11, 8), np.float32)}, config.asdict(), facts)
        checkpoint.save(path.parent, made, small_tokenizer(), keep=1)
    return path


@lru_cache(maxsize=1)
def small_tokenizer() -> BPETokenizer:
    return BPETokenizer.train([b"a tokenizer of a few pairs, a few pairs of a tokenizer"], 270)


def resume(path: Path) -> None:
    """What a run that goes on takes from a checkpoint."""
    saved = checkpoint.read(path, optimizer=True)
    resumed(saved.facts["settings"], {"workers": 3})
    load_model(path)


def _stored_file(name: str) -> Target:
    def read(data: bytes, folder: Path) -> None:
        path = stored(folder)
        right = {file: (path / file).read_bytes() for file in (name, FACTS)}
        try:
            (path / name).write_bytes(data)
            if name != FACTS:
                facts = json.loads(right[FACTS])
                facts["sha256"][name] = hashlib.sha256(data).hexdigest()
                (path / FACTS).write_bytes(_json(facts))
            resume(path)
        finally:
            for file, content in right.items():
                (path / file).write_bytes(content)

    return Target(f"checkpoint/{name}", lambda folder: [(stored(folder) / name).read_bytes()], read, (ProgramError,))


for _name in (FACTS, "config.json", "model.safetensors", "optimizer.safetensors", TOKENIZER_FILE):
    register(_stored_file(_name))


# ── other files of a run: what is damaged there is made again, so nothing is refused ──────────────────────

def _read_metrics(data: bytes, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    Metrics(path, resume_step=5).close()


def _read_report(data: bytes, folder: Path) -> None:
    (folder / "report.json").write_bytes(data)
    finished_report(folder, "0" * 64)


def _read_cache(data: bytes, folder: Path) -> None:
    entry = folder / "tokens"
    entry.mkdir(exist_ok=True)
    for split in ("training", "validation"):
        (entry / f"{split}.tokens").write_bytes(bytes(8))
    (entry / "facts.json").write_bytes(data)
    open_entry(entry, None)


def _read_tokens(data: bytes, folder: Path) -> None:
    """As long as the cache's facts say, and so taken for tokens: what looks one up refuses it if there is none."""
    entry = folder / "byte pairs"
    entry.mkdir(exist_ok=True)
    small_tokenizer().save(entry)
    for split in ("training", "validation"):
        (entry / f"{split}.tokens").write_bytes(data)
    (entry / "facts.json").write_bytes(_json({split: {"tokens": len(data) // 2, "dtype": "uint16"}
                                              for split in ("training", "validation")}))
    opened = open_entry(entry, 270)
    if opened is not None:
        assert opened.training.nbytes == len(data)
        eg.embedding(eg.zeros(270, 1), eg.tensor(opened.training.astype(np.int64)))


def _read_baselines(data: bytes, folder: Path) -> None:
    corpus = split_documents("two", [Document("a", lambda: b"a text\n" * 9), Document("b", lambda: b"a text")])
    (folder / f"baselines-{corpus.sha256[:16]}.json").write_bytes(data)
    table = baselines(corpus, folder)
    assert all(isinstance(bits, float) for bits in table.values())


def _read_corpus(data: bytes, folder: Path) -> None:
    path = folder / "text"
    path.write_bytes(data)
    corpus = file_corpus(path)
    assert corpus.text("training") + corpus.text("validation") == data
    assert ByteTokenizer().decode(ByteTokenizer().encode(data)) == data


register(Target("metrics", lambda folder: [b'{"step": 1, "loss": 2.5}\n{"step": 7, "loss": 1.5}\n'], _read_metrics))
register(Target("report", lambda folder: [_json({"result_sha256": "0" * 64, "seconds": 1.5})], _read_report))
register(Target("cache", lambda folder: [_json({split: {"tokens": 8, "dtype": "uint8"}
                                                for split in ("training", "validation")})], _read_cache))
register(Target("cache tokens", lambda folder: [np.arange(0, 270, 7, dtype=np.uint16).tobytes()], _read_tokens,
                (IndexError,)))
register(Target("baselines", lambda folder: [_json({"4-gram": 1.95, "lzma": 1.29})], _read_baselines))
register(Target("corpus", lambda folder: [b"a line of text\n" * 80, "größer ∇\n".encode() * 100], _read_corpus,
                (ProgramError,)))


# ── messages between machines ─────────────────────────────────────────────────────────────────────────

def _messages(folder: Path) -> list[bytes]:
    fuzzer, seeds = Fuzzer(0), []
    for _ in range(40):
        fuzzer.run(1)
        seeds.append(fuzzer.input)
    return seeds


register(Target("wire", _messages, lambda data, folder: wire_target(data)))


# ── logs and snapshots of a shard: they end before what is damaged ────────────────────────────────────────

def _records(folder: Path) -> list[bytes]:
    random = Random(0)
    return [b"".join(part for number in range(3) for part in record_bytes(number, draw_message(random)))
            for _ in range(20)]


def _read_records(data: bytes, folder: Path) -> None:
    """As a log, as a snapshot, and as a record's body under checksums that are right."""
    path = folder / "snapshot"
    path.write_bytes(data)
    read_whole(path)
    head = RECORD.pack(1, len(data), zlib.crc32(data), 0)[:-4]
    for log in (data, head + zlib.crc32(head).to_bytes(4, "little") + data):
        ends = [0, *(end for _, _, end in records_of(log))]
        assert ends == sorted(set(ends)) and ends[-1] <= len(log)


register(Target("log", _records, _read_records))


# ── tapes of machines that were killed: they end before what is damaged ────────────────────────────────

def _tapes(folder: Path) -> list[bytes]:
    written = tape.Tape(("worker", 1), 0, folder / "tape")
    with written.span("Push", clock=3):
        written.birth(("shard", 0), "ready")
    written.count(4)
    return [(folder / "tape").read_bytes()]


def _read_tape(data: bytes, folder: Path) -> None:
    path = folder / "damaged tape"
    path.write_bytes(data)
    assert all(isinstance(entry, list) for entry in tape.read(path))


register(Target("tape", _tapes, _read_tape))
