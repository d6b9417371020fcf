"""Train a Transformer language model on text, with the parameter server, and report how well it predicts.

    python tools/train.py                                the standard library of this Python, in minutes
    python tools/train.py --data book.txt --run runs/book
    python tools/train.py --resume                       go on after Ctrl-C or a crash, to the same bits

A run's folder holds checkpoints/, metrics.jsonl, loss.png, report.md and report.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from math import isfinite, log
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.training import checkpoint
from tools.training.cache import open_cache
from tools.training.checkpoint import run_lock
from tools.training.corpus import Corpus, open_corpus
from tools.training.errors import ProgramError, require, run_program
from tools.training.finish import finish, finished_report
from tools.training.interrupts import Interrupts
from tools.training.machine import measured_peak
from tools.training.metrics import Metrics
from tools.training.ngram import baselines
from tools.training.progress import Progress
from tools.training.report import comparison
from tools.training.session import Session, kernels
from tools.training.settings import Settings, add_flags, expect_effect, given, resumed
from tools.training.status import Status


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="a text file or a folder of them (default: this Python's "
                                                       "standard library)")
    parser.add_argument("--run", type=Path, default=Path("runs/default"), metavar="FOLDER",
                        help="where the results go (default: runs/default)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), metavar="FOLDER",
                        help="where tokens and baselines are kept between runs (default: runs/cache)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run, if any")
    parser.add_argument("--minutes", type=float, metavar="X",
                        help="stop the training after so many minutes, with a checkpoint, and report")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="record what workers and shards do, as a Chrome trace for https://ui.perfetto.dev")
    add_flags(parser)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    arguments = parse()
    for module in ("safetensors.numpy", "matplotlib", *(["tqdm"] if sys.stderr.isatty() else [])):
        require(module, "training")  # now, not when the training is done
    if arguments.trace is not None:
        arguments.trace.open("a").close()  # now, too
    with run_lock(arguments.run):
        settings, saved = choose_settings(arguments)
        expect_effect(settings, given(arguments))
        if settings.driver == "ray":
            require("ray", "--driver ray", extra="cluster")
        corpus = open_corpus(saved.facts["corpus"]["data"] if saved else arguments.data)
        session = prepare(settings, corpus, arguments, saved)
        if session.step == settings.steps and (report := finished_report(arguments.run, session.digest())):
            say(f"this run is finished; its report is {arguments.run / 'report.md'}")
            print(comparison(report["validation"]["bits_per_byte"], report["baselines"]))
            return 0
        table = baselines(corpus, arguments.cache)
        say("to beat, in bits per byte: " + ", ".join(f"{name} {bits:.2f}" for name, bits in table.items()))
        seconds, interrupted = train(session, arguments)
        if interrupted:
            say(f"stopped at step {session.step} of {settings.steps}; the checkpoint is written; go on with: "
                f"{command(arguments)} --resume")
            return 130
        finish(session, arguments.run, table, seconds, command(arguments))
        return 0


def command(arguments: argparse.Namespace) -> str:
    """The command line that this run was started with, without --resume."""
    return shlex.join(["python", *(word for word in sys.argv if word != "--resume")])


def choose_settings(arguments: argparse.Namespace) -> tuple[Settings, checkpoint.Checkpoint | None]:
    """The flags' settings, or those of the checkpoint to go on from."""
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ProgramError(f"--minutes is {arguments.minutes}, expected a positive number")
    folder = arguments.run / "checkpoints"
    found = checkpoint.steps(folder)
    if not arguments.resume:
        if found:
            raise ProgramError(f"{arguments.run} already holds a run, at step {found[-1]}; go on with --resume, remove "
                               "the folder to start over, or choose another with --run")
        return Settings(**given(arguments)), None
    if not found:
        say(f"no checkpoint in {arguments.run} yet: starting at step 0")
        return Settings(**given(arguments)), None
    saved = checkpoint.read(checkpoint.locate(folder), optimizer=True)
    data = saved.facts["corpus"]["data"]
    if arguments.data not in (None, data):
        raise ProgramError(f"--data is {arguments.data}, but the run to resume reads {data or 'the standard library'}")
    return resumed(saved.facts["settings"], given(arguments)), saved


def prepare(settings: Settings, corpus: Corpus, arguments: argparse.Namespace,
            saved: checkpoint.Checkpoint | None) -> Session:
    """Tokenise the corpus if need be, build the model, and take over the checkpoint."""
    say(f"corpus: {corpus.description}, {len(corpus.training)} files for training, {len(corpus.validation)} held out, "
        f"SHA-256 {corpus.sha256[:16]}")
    if saved and saved.facts["corpus"]["sha256"] != corpus.sha256:
        raise ProgramError(f"the corpus has changed since the checkpoint (SHA-256 {corpus.sha256[:16]}, then "
                           f"{saved.facts['corpus']['sha256'][:16]}); restore it, or start a new run with --run")
    cache = open_cache(corpus, arguments.cache, settings.vocab)
    facts: dict[str, Any] = {"data": saved.facts["corpus"]["data"] if saved else arguments.data,
                             "description": corpus.description, "sha256": corpus.sha256,
                             "training_files": len(corpus.training), "validation_files": len(corpus.validation)}
    session = Session(settings, cache, facts, arguments.run)
    parameters = session.model.num_parameters()
    say(f"model: {parameters:,} parameters; {settings.workers} workers, {settings.shards} shards, "
        f"{settings.tokens_per_step:,} tokens a step, {len(cache.training):,} tokens to train on")
    if saved:
        session.restore(saved)
        say(f"resumed at step {session.step} of {settings.steps}")
        here = kernels(settings.precision)
        if saved.facts["kernels"] != here:
            say(f"note: the checkpoint was made with kernels of level {saved.facts['kernels']}, here they are "
                f"{here}: the result will not have the same bits")
    return session


def train(session: Session, arguments: argparse.Namespace) -> tuple[float, bool]:
    """Run the remaining steps. Returns the seconds of training, earlier sessions included, and whether it was
    interrupted. A run that ends so, or at its last step, leaves a checkpoint of its last finished step."""
    settings, start = session.settings, time.monotonic()
    metrics = Metrics(arguments.run / "metrics.jsonl", resume_step=session.step)
    peak = measured_peak()
    progress = Progress(session.step, settings.steps, settings.tokens_per_step, session.model.flops_per_token(), peak)
    status = Status(session.server)
    bytes_per_token = float(session.byte_lengths[session.cache.training].mean())
    folder, saved_step = arguments.run / "checkpoints", session.step
    seconds = session.seconds
    with Interrupts() as interrupts:
        for done in session.steps(arguments.trace):
            step, seconds = done.clock + 1, session.seconds + time.monotonic() - start
            if not isfinite(done.mean_loss):
                raise diverged(f"the loss of step {step} is {done.mean_loss}", saved_step, settings)
            bits_per_byte = done.mean_loss / log(2) / bytes_per_token
            record = {"bits_per_byte": bits_per_byte, "gradient_norm": done.norm,
                      "lr": session.hyper(session.server.setup.updates(step), "")["lr"], "seconds": round(seconds, 2)}
            progress.update(step, bits_per_byte, status(done))
            last = step == settings.steps or interrupts.requested or (
                arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes)
            saved = last or step % settings.checkpoint_interval == 0
            validated = step % settings.validation_interval == 0
            if (saved or validated) and (name := session.not_finite()):  # the loss is of the parameters before
                raise diverged(f"{name} is not finite after step {step}", saved_step, settings)
            if validated:
                record["validation_bits_per_byte"] = session.validate().bits_per_byte
                progress.measured(measured_peak())
                progress.say(f"step {step}: {record['validation_bits_per_byte']:.3f} bits per byte on validation text")
            metrics.write(step, **record)
            if saved:
                checkpoint.save(folder, session.checkpoint(seconds), session.cache.tokenizer, settings.keep)
                saved_step = step
            progress.pause()
            if last:
                break
    progress.close()
    metrics.close()
    return seconds, interrupts.requested and saved_step < settings.steps


def diverged(what: str, saved_step: int, settings: Settings) -> ProgramError:
    kept = f"the last checkpoint is of step {saved_step}" if saved_step else "there is no checkpoint yet"
    return ProgramError(f"{what}: training has diverged; {kept}; start a new run with a smaller --lr, now "
                        f"{settings.lr}")


if __name__ == "__main__":
    sys.exit(run_program("train", main))
