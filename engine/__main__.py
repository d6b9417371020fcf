"""python -m engine doctor"""

from __future__ import annotations

import sys

USAGE = "usage: python -m engine doctor [--levels]"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["doctor"]:
        from engine import doctor

        return doctor.main(arguments[1:])
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    got = f"unknown command {arguments[0]!r}" if arguments else "no command"
    print(f"engine: {got}; {USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
