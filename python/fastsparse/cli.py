"""The command `fastsparse`: info, check, demo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from fastsparse import _library


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 well, 1 something does not hold, 2 the call was wrong."""
    parser = argparse.ArgumentParser(
        prog="fastsparse", description="PyTorch networks that are smaller and measurably faster."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,check,demo}")
    info = commands.add_parser("info", help="version, torch, ISA level in use and why, CUDA, threads")
    info.add_argument("--json", action="store_true", help="as JSON")
    check = commands.add_parser("check", help="every kernel that this machine can run, against its oracle")
    check.add_argument("--device", choices=["cpu", "cuda"], help="one device only (default: all that are usable)")
    check.add_argument("--json", action="store_true", help="as JSON")
    demo = commands.add_parser("demo", help="the main job on real digits: train, convert, save, load, evaluate")
    demo.add_argument("--output", default="demo-output", help="folder for the table, the plot and the files")
    demo.add_argument("--seed", type=int, default=0, help="same seed, same accuracy")
    demo.add_argument("--quick", action="store_true", help="a small network and few steps, without torch.compile")
    options = parser.parse_args(arguments)
    if options.command == "info":
        return _info(options)
    try:
        _library.load()
    except _library.LibraryError as error:
        print(f"fastsparse {options.command}: {error}", file=sys.stderr)
        return 2
    return _check(options) if options.command == "check" else _demo(options)


def _info(options: argparse.Namespace) -> int:
    from fastsparse import _info

    facts = _info.info()
    print(json.dumps(facts, indent=2) if options.json else _info.info_text())
    return 1 if facts["problem"] else 0


def _check(options: argparse.Namespace) -> int:
    from fastsparse._check import check

    try:
        report = check(options.device)
    except ValueError as error:
        print(f"fastsparse check: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report.ok else 1


def _demo(options: argparse.Namespace) -> int:
    from fastsparse import demo

    return demo.run(output=options.output, seed=options.seed, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
