"""The end of a run: the whole validation text scored, samples written, the picture drawn, the report filed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.training import machine
from tools.training.errors import json_object
from tools.training.evaluation import Score, score
from tools.training.generation import generate_text, visible
from tools.training.metrics import read_metrics
from tools.training.plot import plot_losses
from tools.training.progress import duration, show_percent
from tools.training.report import comparison, write_report
from tools.training.session import Session, kernels

PYTHON_PROMPTS = ("def ", "class ", "import ")


def finish(session: Session, run: Path, baselines: dict[str, float], seconds: float, command: str) -> None:
    """Score, sample, plot and report; the end of the report goes to standard output."""
    settings = session.settings
    print(f"training took {duration(seconds)}; scoring the validation text", file=sys.stderr, flush=True)
    stride = max(1, settings.context // 2)  # every prediction but the first few looks back on half a context
    result = score(session.current_model(), session.cache.validation, session.byte_lengths, settings.context, stride,
                   progress=show_percent)
    samples = [sample(session, number) for number in range(settings.samples)]
    facts = collect(session, baselines, result, samples, seconds, command, stride)
    records = read_metrics(run / "metrics.jsonl")
    title = f"{facts['parameters'] / 1e6:.2f} M parameters, {settings.workers} workers × {settings.shards} shards"
    plot_losses(records, baselines, title, run / "loss.png")
    write_report(run, facts)
    for number, text in enumerate(samples):
        print(f"── sample {number + 1} " + "─" * 60 + f"\n{text}")
    print("─" * 71)
    print(comparison(result.bits_per_byte, baselines))
    print(f"\nresult SHA-256 {facts['result_sha256'][:16]}, {settings.workers} workers × {settings.shards} shards")
    for name in ("checkpoints", "loss.png", "report.md", "report.json", "metrics.jsonl"):
        print(f"wrote {run / name}")


def prompt_for(session: Session, number: int) -> str:
    """How sample `number` begins: a keyword of Python, or for other data the start of a held-out line."""
    if session.corpus_facts["data"] is None:
        return PYTHON_PROMPTS[number % len(PYTHON_PROMPTS)]
    tokens, count = session.cache.validation, session.settings.samples
    text = session.cache.tokenizer.decode(tokens[len(tokens) * number // count:][:200]).decode(errors="ignore")
    lines = [line for line in text.split("\n")[1:] if line.strip()] or [text]
    return lines[0][:20] or "\n"


def sample(session: Session, number: int) -> str:
    """One text by the model, the same each time."""
    prompt = prompt_for(session, number)
    pieces = generate_text(session.current_model(), session.cache.tokenizer, prompt, session.settings.sample_length,
                           temperature=0.8, top_p=0.95, seed=session.settings.seed + number)
    return visible(prompt + "".join(pieces))


def collect(session: Session, baselines: dict[str, float], result: Score, samples: list[str], seconds: float,
            command: str, stride: int) -> dict[str, Any]:
    """Everything the report says, as plain data."""
    settings, peak = session.settings, machine.measured_peak()
    seen = session.step * settings.tokens_per_step
    rate = seen / seconds if seconds else 0.0
    return {
        "command": command,
        "settings": asdict(settings),
        "parameters": session.model.num_parameters(),
        "steps_done": session.step, "tokens_seen": seen, "epochs": session.loader.epoch(session.step),
        "seconds": round(seconds, 1), "tokens_per_second": rate, "gflops": rate * session.model.flops_per_token() / 1e9,
        "corpus": session.corpus_facts, "baselines": baselines,
        "validation": {"bits_per_byte": result.bits_per_byte, "perplexity": result.perplexity,
                       "tokens": result.tokens, "bytes": result.bytes, "stride": stride},
        "samples": samples, "result_sha256": session.digest(),
        "machine": {"description": machine.description(), "level": kernels(settings.precision),
                    "peak_gflops": peak / 1e9 if peak else None},
    }


def finished_report(run: Path, digest: str) -> dict[str, Any] | None:
    """The report of this very result, if it was written before."""
    try:
        facts = json_object((run / "report.json").read_bytes())
    except (OSError, ValueError):
        return None
    return facts if facts.get("result_sha256") == digest else None
