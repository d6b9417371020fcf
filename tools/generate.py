"""Let a trained model write, a token at a time.

    python tools/generate.py                                   from the newest checkpoint of runs/default
    python tools/generate.py runs/book --prompt "Once" --temperature 0.7 --top-p 0.9 --num-samples 3
    python tools/generate.py --quantize q8_0                  with weights of 8 bits: faster, in a quarter of the memory
"""

from __future__ import annotations

import argparse
import sys
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from tools.training.errors import ProgramError, run_program
from tools.training.generation import generate_text, visible
from tools.training.trained import add_quantize, for_inference, load_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("runs/default"),
                        help="a run's folder or one of its checkpoints (default: runs/default)")
    parser.add_argument("--prompt", default="def ", help="what the text begins with (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=400, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X",
                        help="below 1 favours likely tokens, 0 always takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="X",
                        help="draw from the likeliest tokens that together have probability X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X",
                        help="above 1 makes tokens that were there already less likely (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many texts (default: %(default)s)")
    add_quantize(parser)
    parser.add_argument("--stop", metavar="TEXT", help="end a text before this")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (default: 0)")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Refuse flags that cannot work, each with one line."""
    rules = [("max-new-tokens", arguments.max_new_tokens >= 1, "at least 1"),
             ("num-samples", arguments.num_samples >= 1, "at least 1"),
             ("seed", 0 <= arguments.seed < 2**63, "a whole number in [0, 2**63)"),
             ("temperature", 0 <= arguments.temperature < inf, "a number of at least 0"),
             ("top-k", arguments.top_k is None or arguments.top_k >= 1, "at least 1"),
             ("top-p", arguments.top_p is None or 0 < arguments.top_p <= 1, "a number above 0 and at most 1"),
             ("repetition-penalty", 0 < arguments.repetition_penalty < inf, "a positive number"),
             ("stop", arguments.stop != "", "some text"),
             ("prompt", arguments.prompt != "", "some text: the model goes on from it")]
    for name, holds, expected in rules:
        if not holds:
            raise ProgramError(f"--{name} is {getattr(arguments, name.replace('-', '_'))!r}, expected {expected}")


def main() -> int:
    arguments = parse()
    check(arguments)
    model, tokenizer, _ = load_model(arguments.checkpoint)
    model = for_inference(model, arguments.quantize)
    for number in range(arguments.num_samples):
        if arguments.num_samples > 1:
            print(f"── sample {number + 1} of {arguments.num_samples} " + "─" * 50)
        sys.stdout.write(arguments.prompt)
        for piece in generate_text(model, tokenizer, arguments.prompt, arguments.max_new_tokens,
                                   temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                                   repetition_penalty=arguments.repetition_penalty, stop=arguments.stop,
                                   seed=arguments.seed + number):
            sys.stdout.write(visible(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        print()
    return 0


if __name__ == "__main__":
    sys.exit(run_program("generate", main))
