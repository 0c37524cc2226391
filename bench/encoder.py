"""`python -m bench.encoder`: int8 in a whole model, held to its bars.

Runs examples/sentence_encoder.py in its long form (every way in a process of its own, one thread, by turns), compares
with *compiled* float32 and writes results/sentence_encoder-<isa>-<machine>.json and .md. Peers are held to our level as
in the bench itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.__main__ import RESULTS
from bench.bars import NOISE, Bar, Context, Part, Verdict, judge

EXAMPLE = machine.ROOT / "examples" / "sentence_encoder.py"
FLOAT32, OURS = "torch float32, compiled", "fastsparse int8, compiled"
PEERS = ("torchao int8, compiled", "ONNX Runtime int8")
GOALS = {"1 x 16": 3.0, "1 x 128": 2.3, "32 x 128": 2.0}

Ways = Mapping[str, Mapping[str, Any]]


def over(ways: Ways, other: str, shape: str) -> Part:
    """The other way's time over ours."""
    for name in (OURS, other):
        problem = ways[name]["problem"] if name in ways else "not among the ways"
        if problem:
            return Part(f"{shape} over {other}", None, f"{name}: {problem}")
    return Part(f"{shape} over {other}", ways[other]["seconds"][shape] / ways[OURS]["seconds"][shape])


def verdicts(ways: Ways) -> list[Verdict]:
    text = "MiniLM encoder, every nn.Linear in int8, compiled, one thread: "

    def bar(key: str, what: str, parts: Sequence[Part], goal: float, noise: float = NOISE) -> Verdict:
        found = Bar(f"encoder-{key}", "encoder", text + what, lambda _: list(parts), at_least=goal, noise=noise)
        return judge(found, Context([], "", ""))

    ours = ways[OURS]
    return [
        *(
            bar(shape.replace(" ", ""), f"{shape} tokens over compiled float32", [over(ways, FLOAT32, shape)], goal)
            for shape, goal in GOALS.items()
        ),
        *(
            bar(f"peer-{i}", f"times over {peer}", [over(ways, peer, shape) for shape in GOALS], 1.0)
            for i, peer in enumerate(PEERS)
        ),
        *(
            bar(
                key,
                f"{key} cosine to float32",
                [Part("all texts", ours[f"cosine_{key}"], ours["problem"] or "")],
                goal,
                0,
            )
            for key, goal in (("mean", 0.997), ("least", 0.995))
        ),
    ]


def markdown(result: Mapping[str, Any]) -> str:
    ways, described = result["ways"], result["machine"]
    shapes = list(GOALS)
    text = [
        f"# Sentence encoder in int8 on {described['cpu']}, {described['isa']}",
        "",
        f"all-MiniLM-L6-v2, texts x tokens, one thread, {described['date']}: ms, and times over compiled float32; "
        "cosine to float32 in eager mode.",
    ]
    if result["peers_held_by"]:
        held = ", ".join(f"{name}={value}" for name, value in result["peers_held_by"].items())
        text.append(f"All ran under {held}, since ours is capped.")
    text += ["", f"| | {' | '.join(shapes)} | cosine, mean | least |", "| --- " * (len(shapes) + 3) + "|"]
    base = next(way for way in ways if way["name"] == FLOAT32)
    for way in ways:
        if way["problem"]:
            text.append(f"| {way['name']} | {machine.scrub(way['problem'])} |")
            continue
        cells = [
            f"{way['seconds'][s] * 1e3:.1f}"
            + (f" ({base['seconds'][s] / way['seconds'][s]:.2f}x)" if not base["problem"] else "")
            for s in shapes
        ]
        text.append(f"| {way['name']} | {' | '.join(cells)} | {way['cosine_mean']:.4f} | {way['cosine_least']:.4f} |")
    text += ["", "| bar | target | measured | verdict | detail |", "| --- | --- | --- | --- | --- |"]
    for v in result["bars"]:
        measured = f"{v['measured']:.4g}" if v["measured"] is not None else "-"
        text.append(f"| {v['text']} | {v['target']} | {measured} | {v['status']} | {v['detail']} |")
    return "\n".join([*text, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """2 if the example did not run; 0 otherwise, whatever the verdicts are."""
    parser = argparse.ArgumentParser(prog="python -m bench.encoder", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the result goes; .md beside it")
    options = parser.parse_args(arguments)
    described = machine.describe()
    held = machine.hold(str(described["isa"]), str(described["cpu_level"]))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, str(EXAMPLE), "--output", folder], env={**os.environ, **held})
        facts = Path(folder) / "sentence_encoder.json"
        if not facts.exists():
            print(f"bench.encoder: the example ended with code {done.returncode} and no result", file=sys.stderr)
            return 2
        found = json.loads(facts.read_text())
    for way in found["ways"]:
        del way["convert"], way["layers"]
    judged = verdicts({way["name"]: way for way in found["ways"]})
    described["loadavg_end"] = machine.loadavg()
    result = {
        "machine": described,
        "peers_held_by": held,
        "seconds": found["seconds"],
        "bars": [asdict(verdict) for verdict in judged],
        "ways": found["ways"],
    }
    path = options.json or RESULTS / f"sentence_encoder-{described['isa']}-{described['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(machine.scrub(json.dumps(result, indent=1)) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
