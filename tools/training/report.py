"""The report of a finished run, as Markdown for people and as JSON for programs, from one record of facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.files import replace_file
from tools.training.errors import finite
from tools.training.progress import duration

MODEL_ROW = "this Transformer"


def comparison(bits_per_byte: float, baselines: dict[str, float]) -> str:
    """A Markdown table of bits per byte, the best first."""
    rows = sorted([(MODEL_ROW, bits_per_byte), *baselines.items()], key=lambda row: row[1])
    lines = ["| model | bits per byte |", "|---|---:|"]
    for name, bits in rows:
        mark = "**" if name == MODEL_ROW else ""
        lines.append(f"| {mark}{name}{mark} | {mark}{bits:.3f}{mark} |")
    return "\n".join(lines)


def fenced(text: str) -> str:
    """Text as a Markdown code block, whatever backticks it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def markdown(facts: dict[str, Any]) -> str:
    """The report. `facts` is what report.json holds; see tools/train.py, which collects it."""
    validation, machine, settings = facts["validation"], facts["machine"], facts["settings"]
    sections = [
        "# Training report",
        f"A Transformer of {facts['parameters']:,} parameters, trained for {facts['steps_done']:,} of "
        f"{settings['steps']:,} steps ({facts['tokens_seen']:,} tokens, {facts['epochs']:.2f} epochs) on "
        f"{facts['corpus']['description']} with {settings['workers']} workers and {settings['shards']} shards, in "
        f"{duration(facts['seconds'])}.",
        "## Validation",
        f"{validation['bits_per_byte']:.4f} bits per byte, perplexity {validation['perplexity']:.3f} per token, on "
        f"{validation['tokens']:,} tokens held out by file, windows {validation['stride']} tokens apart.",
        comparison(validation["bits_per_byte"], facts["baselines"]),
        "n-gram: interpolated Witten-Bell byte models. lzma: what the validation text adds to the size of the "
        "compressed training text. Both are counted on the same split.",
        "![loss](loss.png)",
        "## Samples",
        *(fenced(sample) for sample in facts["samples"]),
        "## To reproduce",
        fenced(facts["command"]),
        f"- corpus: SHA-256 `{facts['corpus']['sha256']}`, {facts['corpus']['training_files']} files for training, "
        f"{facts['corpus']['validation_files']} for validation\n"
        f"- result: SHA-256 `{facts['result_sha256']}` of parameters and optimizer state\n"
        f"- machine: {machine['description']}; the bits above are promised for kernels of level {machine['level']}\n"
        f"- speed: {facts['tokens_per_second']:,.0f} tokens/s, {facts['gflops']:.1f} GFLOP/s"
        + (f" of {machine['peak_gflops']:.0f} measured" if machine["peak_gflops"] else ""),
        "## Settings",
        "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in settings.items())]),
    ]
    return "\n\n".join(sections) + "\n"


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    """report.json and report.md in the run's folder, each replaced whole."""
    for name, text in (("report.json", json.dumps(finite(facts), indent=1)), ("report.md", markdown(facts))):
        replace_file(folder / name, text.encode())
