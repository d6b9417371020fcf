"""python -m engine doctor [--levels]"""

from __future__ import annotations

import sys

USAGE = """usage: python -m engine doctor [--levels]
  doctor             what is active on this machine, its measured limits, and a numeric self-test
  doctor --levels    only the instruction-set levels that run here, best first"""


def main(arguments: list[str]) -> int:
    if arguments in (["doctor"], ["doctor", "--levels"]):
        from engine import doctor

        return doctor.main(levels_only="--levels" in arguments)
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    print(f"engine: got {' '.join(arguments) or 'no command'!r}, expected doctor or doctor --levels", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
