"""Run the benchmarks and keep the numbers: `python -m benchmarks [NAME ...]`; all of them by default."""

import argparse
import importlib
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

NAMES = (
    "train",
    "decode",
    "adapters",
    "loading",
    "memory",
    "compression",
    "autoencoders",
    "architectures",
    "length",
    "word_vectors",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, of {', '.join(NAMES)}; default all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    chosen = parser.parse_args()
    wrong = set(chosen.names) - set(NAMES)
    if wrong:
        parser.error(f"no such benchmark: {', '.join(sorted(wrong))}; there are {', '.join(NAMES)}")
    from benchmarks.measure import machine

    console = Console()
    kept = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    table = Table("what", "peer's time / ours", "spread", "bar", "met", "load")
    for name in chosen.names or NAMES:
        rows = []
        about = machine()
        with console.status(f"{name} ..."):
            for row in importlib.import_module(f"benchmarks.{name}").run():
                low, high = row.spread
                load = round(os.getloadavg()[0], 2)
                met = "yes" if row.ratio >= row.bar else "no"
                table.add_row(
                    row.name, f"{row.ratio:.2f}x", f"{low:.2f} .. {high:.2f}", f"{row.bar:g}x", met, str(load)
                )
                rows.append(row.to_dict() | {"load": load})
        kept[name] = {"machine": about, "rows": rows}
        chosen.out.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(table)
    console.print(f"numbers kept in {chosen.out}")


if __name__ == "__main__":
    main()
