"""What GradCache saves and costs: peak memory and time of a step against the batch size.

python benchmarks/bench_grad_cache.py --data-root DIR writes grad_cache_cpu.csv; DIR holds Fashion-MNIST
(Debian's package dataset-fashion-mnist, or torchvision's folders). A step is forward,
loss and backward of a small ResNet on two views of each image, all rows at once or in chunks by
grad_cache_backward. Peaks are above weights, inputs and gradients, each in a process of its own; times
are of both forms in turn, in one process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import torch

from measuring.machine import REPOSITORY, describe_machine
from measuring.peak_memory import HighWaterMark
from reporting.rows import add_output_options, results_path, write_table

sys.path.insert(0, str(REPOSITORY / "train"))

from data.sources import DataOptions, load_data
from data.views import ViewOptions, build_views
from network.embedder import NetworkOptions, build_model
from supcon_kernels import grad_cache_backward, supcon_loss

RESULTS = "grad_cache_cpu.csv"
IMAGE_SIZE, TEMPERATURE = 16, 0.1


class Step:
    """Forward, loss and backward of one batch: the same gradient from all rows at once or in chunks."""

    def __init__(self, data_root: str, batch_size: int) -> None:
        data = load_data(
            DataOptions(dataset="fashion_mnist", data_root=data_root, image_size=IMAGE_SIZE)
        )
        views = build_views(ViewOptions(augment="crop_flip"), data, seed=0)
        images, self.labels = data.train[list(range(batch_size))]
        self.rows = torch.cat([views.random(images, step=0, view=view) for view in (0, 1)])
        self.model = build_model(NetworkOptions(), channels=data.channels)

    def projected(self, rows: torch.Tensor) -> torch.Tensor:
        """What the loss sees of (n, C, s, s) views, (n, D)."""
        projected: torch.Tensor = self.model(rows)[1]
        return projected

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the embeddings of both views, (2·B, D)."""
        features = rows.unflatten(0, (2, -1)).transpose(0, 1)
        return supcon_loss(features, self.labels, temperature=TEMPERATURE)

    def run(self, chunk_rows: int) -> float:
        """Seconds of a step in chunks of so many rows; 0: all at once."""
        began = time.perf_counter()
        if chunk_rows:
            chunks = self.rows.split(chunk_rows)
            grad_cache_backward(self.projected, chunks, self.loss, model=self.model)
        else:
            self.loss(self.projected(self.rows)).backward()
        return time.perf_counter() - began


def measure_peak(data_root: str, batch_size: int, chunk_rows: int) -> float:
    """MiB of a step in chunks of so many rows (0: all at once), in a process of its own."""
    arguments = [data_root, str(batch_size), str(chunk_rows)]
    # As in peak_memory: what is freed goes back to the system, so that the mark shows what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    child = subprocess.run(
        [sys.executable, __file__, "--peak", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(child.stdout.splitlines()[-1])


def measure_own_peak(data_root: str, batch_size: int, chunk_rows: int) -> float:
    step = Step(data_root, batch_size)
    step.run(chunk_rows)
    mark = HighWaterMark("cpu")
    mark.reset()
    before = mark.read_mib()
    step.run(chunk_rows)
    return mark.read_mib() - before


def measure_seconds(options: argparse.Namespace, batch_size: int) -> dict[str, list[float]]:
    """Of a step in either form, in turn."""
    step = Step(options.data_root, batch_size)
    forms = {"whole": 0, "chunks": options.chunk_rows}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds + 1):
        for name, chunk_rows in forms.items():
            seconds[name].append(step.run(chunk_rows))
    return {name: each[1:] for name, each in seconds.items()}  # the first finds its memory


def rows_of(options: argparse.Namespace, batch_size: int) -> list[dict[str, object]]:
    """A row for the whole batch at once, and one for chunks."""
    seconds = measure_seconds(options, batch_size)
    overhead = [ours / whole for whole, ours in zip(seconds["whole"], seconds["chunks"])]
    rows = []
    for form, chunk_rows in (("whole", 0), ("chunks", options.chunk_rows)):
        row = {"batch_size": batch_size, "num_rows": 2 * batch_size, "form": form}
        row |= {"chunk_rows": chunk_rows or 2 * batch_size}
        row |= {"peak_mib": measure_peak(options.data_root, batch_size, chunk_rows)}
        row |= {"seconds": median(seconds[form]), "num_samples": len(overhead)}
        row |= {"over_whole": median(overhead) if chunk_rows else 1.0}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data-root", metavar="DIR", help="the folder of Fashion-MNIST")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 768, 1536, 3072, 6144])
    parser.add_argument("--chunk-rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    add_output_options(parser)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak:
        data_root, *numbers = options.peak
        print(measure_own_peak(data_root, *map(int, numbers)))
        return 0
    if options.data_root is None:
        parser.error("--data-root is needed")
    machine = describe_machine("cpu")
    measured = []
    for batch_size in options.batch_sizes:
        for row in rows_of(options, batch_size):
            print(
                f"batch {row['batch_size']:5}  {row['form']:6}  {row['chunk_rows']:6} rows at a time  "
                f"{row['peak_mib']:8.1f} MiB  {row['seconds']:7.3f} s  {row['over_whole']:.2f} of whole",
                flush=True,
            )
            measured.append(row | machine)
    write_table(results_path(RESULTS, options.output_dir, options.update), measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
