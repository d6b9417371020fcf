"""Measurements as JSON lines: one object a line, appended, so that a killed run leaves all but perhaps the last line.

A resumed run drops the lines that came after its checkpoint, so each step stands in the file once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.files import replace_file
from tools.training.errors import ProgramError, json_object


class Metrics:
    """The file metrics.jsonl of a run. Every record carries its "step"."""

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        try:
            replace_file(path, [json.dumps(record).encode() + b"\n" for record in kept])
            self.file = path.open("ab", buffering=0)  # a line is with the system as soon as it is written
        except OSError as error:
            raise self.failure(error) from error

    def write(self, step: int, **values: Any) -> None:
        """Append one record. Raises ProgramError when the disk does not take it."""
        try:
            self.file.write((json.dumps({"step": step, **values}) + "\n").encode())
        except OSError as error:
            raise self.failure(error) from error

    def failure(self, error: OSError) -> ProgramError:
        return ProgramError(f"cannot write {self.path}: {error.strerror}; checkpoints are as they were: when there is "
                            "room again, go on with --resume")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of the file; none where there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json_object(line)
        except ValueError:
            break  # a line cut off by a kill: what follows it cannot be trusted
        if not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records
