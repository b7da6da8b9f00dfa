"""python -m examples.streams [NAME [DATA]]: lists the streams, or describes one."""

import sys
from collections.abc import Sequence

from examples.streams import describe, load
from examples.streams.registry import STREAMS


def main(args: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    if not args:
        for name, entry in STREAMS.items():
            print(f"{name:24}{entry.about}")
        return 0
    try:
        print(describe(load(args[0], data=args[1] if len(args) > 1 else None)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
