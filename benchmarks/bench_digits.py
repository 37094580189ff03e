"""What the driver reaches without an argument: k-NN accuracy and time on digits, by seed.

python benchmarks/bench_digits.py runs train/pretrain.py as a user would, for three seeds, and
writes digits.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring.machine import REPOSITORY, describe_machine
from reporting.rows import add_output_options, results_path, write_table

RESULTS = "digits.csv"


def run(seed: int, folder: Path) -> dict[str, object]:
    """One run from start to end, the imports and the pictures included."""
    command = [sys.executable, str(REPOSITORY / "train" / "pretrain.py")]
    command += ["--seed", str(seed), "--output_dir", str(folder), "--name", f"seed{seed}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - start
    results = json.loads((folder / f"seed{seed}" / "results.json").read_text())
    return {"seed": seed, **results, "time_s": f"{elapsed:.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--num-seeds", type=int, default=3)
    add_output_options(parser)
    options = parser.parse_args()
    machine = describe_machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        measured = [run(seed, Path(folder)) for seed in range(options.num_seeds)]
    write_table(
        results_path(RESULTS, options.output_dir, options.update),
        [row | machine for row in measured],
    )
    for row in measured:
        print(
            f"seed {row['seed']}: k-NN {float(str(row['knn_accuracy'])):.2%} in {row['time_s']} s"
        )
    median = statistics.median(float(str(row["knn_accuracy"])) for row in measured)
    print(f"median k-NN {median:.2%}, raw pixels {float(str(measured[0]['knn_raw_pixels'])):.2%}")


if __name__ == "__main__":
    main()
