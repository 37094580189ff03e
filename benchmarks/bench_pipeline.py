"""The whole pipeline as a user runs it: cross-entropy and SupCon, the linear stage, the evaluation.

python benchmarks/bench_pipeline.py trains each on 10,000 images of Fashion-MNIST at 16 pixels, for
three seeds, and writes pipeline_cpu.csv: what evaluate.py finds, and the minutes that training took.
Nothing is tuned: it checks the pipeline, and decides nothing between the methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring.machine import REPOSITORY, describe_machine
from reporting.rows import add_output_options, results_path, write_table

RESULTS = "pipeline_cpu.csv"
METHODS = ("cross_entropy", "supcon")
NUMBERS = ("top1", "nll", "ece", "recall@1", "map@r")


def script(name: str, *arguments: object) -> None:
    """Run a script of train/ to its end."""
    command = [sys.executable, str(REPOSITORY / "train" / f"{name}.py"), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(method: str, seed: int, options: argparse.Namespace, folder: Path) -> float:
    """Train one run, with its linear stage if it has no classifier; returns the minutes."""
    run = folder / f"{method}{seed}"
    start = time.perf_counter()
    script(
        *("pretrain", "--config", REPOSITORY / "train" / "recipes" / "fashion_mnist.yaml"),
        *("--data_root", options.data_root, "--image_size", 16),
        *("--train_images", options.images, "--method", method),
        *("--epochs", options.epochs, "--warmup_epochs", options.epochs // 10),
        *("--seed", seed, "--output_dir", folder, "--name", run.name, "--resume", "auto"),
    )
    if method == "supcon":
        script("linear", "--checkpoint", run)
    return (time.perf_counter() - start) / 60


def row_of(run: Path, minutes: float) -> dict[str, object]:
    """What evaluate.py found of a run."""
    found = json.loads((run / "evaluation.json").read_text())
    print(found.keys(), found.get("corruptions", {}).keys())
    numbers = {name: f"{found[name]:.4f}" for name in NUMBERS}
    corrupted = found["corruptions"]
    return {
        **numbers,
        "corrupted_top1": f"{corrupted['mean_top1']:.4f}",
        "mce": f"{corrupted['mce']:.4f}",
        "relative_mce": f"{corrupted['relative_mce']:.4f}",
        "train_minutes": f"{minutes:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--corruption-images", type=int, default=500)
    parser.add_argument("--data-root", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and resume them")
    add_output_options(parser)
    options = parser.parse_args()
    machine = describe_machine("cpu")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        for seed in range(options.num_seeds):
            minutes = {method: train(method, seed, options, folder) for method in METHODS}
            runs = {method: folder / f"{method}{seed}" for method in METHODS}
            script(
                *("evaluate", "--checkpoint", *runs.values(), "--baseline", runs[METHODS[0]]),
                *("--corruption_images", options.corruption_images),
            )
            for method in METHODS:
                found = row_of(runs[method], minutes[method])
                rows.append({"method": method, "seed": seed, **found, **machine})
                print(method, seed, found, flush=True)
    write_table(results_path(RESULTS, options.output_dir, options.update), rows)


if __name__ == "__main__":
    main()
