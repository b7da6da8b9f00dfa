"""Measures methods and writes their pages: see the package's docstring."""

import argparse
import sys

from benchmarks._pages import methods as package
from benchmarks._pages.methods import verified
from benchmarks._pages.methods.families import METHODS
from benchmarks._pages.methods.measure import measure, measured, write
from benchmarks._pages.methods.writing import FOLDER, pages


def main() -> int:
    parser = argparse.ArgumentParser(
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("methods", nargs="*", help="those to measure; default all")
    named = parser.parse_args().methods
    unknown = set(named) - set(METHODS) - {"none"}
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}"
        )

    chosen = {k: m for k, m in METHODS.items() if not named or k in named}
    if chosen:
        passed = verified.passing(chosen.values())
        rows = {}
        for name, method in chosen.items():
            tests = {t for ts in verified.tests_of(method).values() for t in ts}
            rows[name] = measure(method, tests & passed)
            print(f"{name}: {rows[name].routes}", flush=True)
        write(rows)
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages(measured()).items():
        (FOLDER / name).write_text(text)
    print(f"written: {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
