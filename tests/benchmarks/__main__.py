"""Runs the races, each against its peers, and writes what they gave.

    python -m tests.benchmarks                     # all that this machine can
    python -m tests.benchmarks B7 B9 --json FILE   # some; rows in the file are replaced by new ones
    python -m tests.benchmarks --gpu --json FILE   # those of a GPU, the most wanted first, in half an hour
    python -m tests.benchmarks --table --json FILE # and put all rows of the file into docs/benchmarks.md and races.png

A race that needs a GPU says so where there is none. ``--quick`` runs toy sizes once, to see that all works.
With ``--keep-memory`` the C library keeps freed memory, as it does in the ``purecnn`` command.
"""

import argparse
import importlib
import traceback
from pathlib import Path

import torch

from converters.cli import keep_memory
from tests.benchmarks import picture, table
from tests.benchmarks.race import CLOCKS, Row, Setting

RACES = {
    "B1": "b1_cifar",
    "B2": "b2_ensembles",
    "B3": "b3_training",
    "B4": "b4_inference",
    "B5": "b5_per_sample",
    "B6": "b6_host",
    "B7": "b7_optimizers",
    "B8": "b8_compile",
    "B9": "b9_cpu",
}
"""Each is a module with ``NEEDS_GPU`` and ``run(setting)``, which yields rows."""

FIRST_ON_GPU = ("B3", "B4", "B2", "B5", "B1", "B6", "B7", "B8")
NO_GPU = "not measured: no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("races", nargs="*", metavar="RACE", help=f"of {', '.join(RACES)}; by default all")
    parser.add_argument("--gpu", action="store_true", help="those of a GPU, in the order of interest")
    parser.add_argument("--quick", action="store_true", help="toy sizes, once")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu (with one thread) bears other processes better"
    )
    parser.add_argument("--keep-memory", action="store_true", help="see above")
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10's pictures, for B1")
    parser.add_argument("--json", type=Path, help="rows are read from here, replaced, and written back")
    parser.add_argument(
        "--table", action="store_true", help="put the file's rows into docs/benchmarks.md and races.png"
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.races if name not in RACES]:
        parser.error(f"there is no race {', '.join(unknown)}; there are {', '.join(RACES)}")
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.gpu and device == "cpu":
        parser.error("torch sees no GPU here")
    seconds = 0.0 if arguments.quick else arguments.seconds
    setting = Setting(device, arguments.quick, seconds, arguments.clock, arguments.keep_memory, arguments.data)
    chosen = arguments.races or list(FIRST_ON_GPU if arguments.gpu else RACES)
    rows = [] if arguments.json is None else table.read(arguments.json)
    failed = []
    for name in chosen:
        module = importlib.import_module(f"tests.benchmarks.{RACES[name]}")
        found = []
        if device == "cpu" and name != "B9":
            found.append(Row(name, module.WHAT, "", note=NO_GPU, device="cuda"))
        if device == "cuda" or not module.NEEDS_GPU or arguments.quick:
            try:
                for row in module.run(setting._replace(device="cpu") if name == "B9" else setting):
                    print(
                        f"{row.race} {row.what:44} {row.peer:36} {row.ours:10.3f} {row.theirs:10.3f} ms "
                        f"{row.ratio:6.3f} ({row.rounds} rounds) {row.note}",
                        flush=True,
                    )
                    found.append(row)
            except Exception:  # the others are still worth their time
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
                failed.append(name)
        for row in found:
            if row.ratio is None:
                print(f"{row.race} {row.what}: {row.note}", flush=True)
        rows = table.merge(rows, found)
        if arguments.json is not None:  # after each race, so that an end before the last loses nothing
            table.write(arguments.json, rows)
    if arguments.table:
        table.update(rows)
        picture.draw(rows)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed")


if __name__ == "__main__":
    main()
