"""How well a trained model predicts a text: bits per byte and perplexity.

    python tools/evaluate.py                                  the validation text of runs/default
    python tools/evaluate.py runs/book --data other.txt --stride 64
    python tools/evaluate.py --quantize q4_0                  what weights of 4 bits cost
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import numpy as np

from tools.training.corpus import open_corpus, read_file
from tools.training.errors import ProgramError, finite, run_program
from tools.training.evaluation import score
from tools.training.progress import show_percent
from tools.training.tokens import Tokenizer
from tools.training.trained import add_quantize, for_inference, load_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("runs/default"),
                        help="a run's folder or one of its checkpoints (default: runs/default)")
    parser.add_argument("--data", metavar="FILE", help="a text file (default: what the run held out for validation)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between two windows; fewer cost more and give "
                                                                "each prediction more to look back on (default: the "
                                                                "model's context)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows at once (default: %(default)s)")
    add_quantize(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args()


def text_tokens(arguments: argparse.Namespace, tokenizer: Tokenizer, facts: dict[str, object]) -> np.ndarray:
    """The tokens to score: of a file, or of the run's validation split, which must be as it was."""
    if arguments.data is not None:
        return tokenizer.encode(read_file(Path(arguments.data)))
    trained_on = facts["corpus"]
    assert isinstance(trained_on, dict)
    corpus = open_corpus(trained_on["data"])
    if corpus.sha256 != trained_on["sha256"]:
        raise ProgramError(f"{corpus.description} is not the corpus of this run (SHA-256 {corpus.sha256[:16]}, then "
                           f"{trained_on['sha256'][:16]}), so its held-out part may have been trained on; give a "
                           "file with --data")
    return np.concatenate([tokenizer.encode(document.read()) for document in corpus.validation])


def main() -> int:
    arguments = parse()
    if arguments.batch < 1:
        raise ProgramError(f"--batch is {arguments.batch}, expected at least 1")
    model, tokenizer, facts = load_model(arguments.checkpoint)
    if arguments.quantize:
        model = for_inference(model, arguments.quantize)
    tokens = text_tokens(arguments, tokenizer, facts)
    context = model.config.context_length
    result = score(model, tokens, tokenizer.byte_lengths(), context, arguments.stride, arguments.batch, show_percent)
    if arguments.json:
        print(json.dumps(finite({"bits_per_byte": result.bits_per_byte, "perplexity": result.perplexity,
                                 "tokens": result.tokens, "bytes": result.bytes,
                                 "stride": context if arguments.stride is None else arguments.stride})))
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.4f} per token, on "
              f"{result.tokens:,} tokens ({result.bytes:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("evaluate", main))
