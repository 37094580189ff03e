"""How exact the loss is at full size: errors against float64, beside those of the dense formula.

python benchmarks/bench_accuracy.py prints them, writes accuracy_cpu_float32.csv and exits 1
where the error of ``native`` exceeds twice that of the dense formula in float32, plus one part in
2^23 of the quantity, or of the mean magnitude of the terms that cancel in the temperature's gradient.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from measuring.machine import describe_machine
from reporting.rows import add_output_options, results_path, write_table
from supcon_kernels import supcon_loss
from supcon_kernels.problem import DENOMINATORS, SUMMATIONS

RESULTS = "accuracy_cpu_float32.csv"
TEMPERATURES = (0.01, 0.022, 0.05, 0.1, 0.3, 1.0)
VARIANTS = list(itertools.product(SUMMATIONS, DENOMINATORS))
Arguments = dict[str, Any]


def cases(num_rows: int, dim: int) -> Iterator[tuple[str, Arguments]]:
    """Features in float32 and everything else, by name."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(num_rows, dim, generator=g)
    labels = torch.randint(10, (num_rows,), generator=g)
    for temperature in TEMPERATURES:
        yield (
            f"τ={temperature:g}",
            {
                "features": features,
                "labels": labels,
                "temperature": temperature,
            },
        )
    for summation, denominator in VARIANTS[1:]:
        for temperature in (0.01, 0.1, 1.0):
            yield (
                f"{summation}/{denominator}, τ={temperature:g}",
                {
                    "features": features,
                    "labels": labels,
                    "temperature": temperature,
                    "summation": summation,
                    "denominator": denominator,
                },
            )
    other_views = features + 0.7 * torch.randn(num_rows, dim, generator=g)
    pairs = torch.cat([features[::2], other_views[::2]])
    for temperature in (0.05, 0.1):
        yield (
            f"two views of each sample, τ={temperature:g}",
            {
                "features": pairs,
                "labels": torch.arange(len(pairs) // 2).repeat(2),
                "temperature": temperature,
            },
        )
    outlier = torch.nn.functional.normalize(features)
    outlier[7] *= 1e4
    yield (
        "norm 1e4, not normalised",
        {
            "features": outlier,
            "labels": labels,
            "normalize": False,
            "temperature": 1.0,
        },
    )
    logits = torch.nn.functional.one_hot(labels, 10).double() * 28
    logits += torch.randn(num_rows, 10, generator=g, dtype=torch.float64)
    yield (
        "saturated soft labels",
        {"features": features, "labels": logits.softmax(dim=1), "temperature": 0.1},
    )


def evaluate(
    loss_function: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The loss and its gradients, in float64."""
    features = arguments["features"].to(dtype).requires_grad_()
    temperature = torch.tensor(arguments["temperature"], dtype=torch.float64, requires_grad=True)
    loss = loss_function(**{**arguments, "features": features, "temperature": temperature})
    grads = torch.autograd.grad(loss, (features, temperature))
    return {
        "loss": loss.detach().double(),
        "features": grads[0].double(),
        "temperature": grads[1].double(),
    }


def mean_term(arguments: Arguments) -> float:
    """The mean magnitude over all pairs of s / τ, s being the similarity divided by τ."""
    z = arguments["features"]
    if arguments.get("normalize", True):
        z = torch.nn.functional.normalize(z)
    mean: float = (z @ z.T).abs().mean().item()
    return mean / float(arguments["temperature"]) ** 2


def rows(num_rows: int, dim: int) -> Iterator[dict[str, Any]]:
    """One row for each case and quantity."""
    dense = functools.partial(supcon_loss, backend="reference")
    for name, arguments in cases(num_rows, dim):
        truth = evaluate(dense, arguments, torch.float64)
        plain = evaluate(dense, arguments, torch.float32)
        ours = evaluate(functools.partial(supcon_loss, backend="native"), arguments, torch.float32)
        for quantity, exact in truth.items():
            size = exact.abs().max().item()
            error = (ours[quantity] - exact).abs().max().item() / size
            dense_error = (plain[quantity] - exact).abs().max().item() / size
            terms = mean_term(arguments) if quantity == "temperature" else 0.0
            floor = torch.finfo(torch.float32).eps * max(size, terms) / size
            passed = error <= 2 * dense_error + floor
            yield {
                "case": name,
                "num_rows": num_rows,
                "dim": dim,
                "quantity": quantity,
                "native_error": f"{error:.3g}",
                "dense_error": f"{dense_error:.3g}",
                "bound": f"{2 * dense_error + floor:.3g}",
                "passed": passed,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--num-rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    add_output_options(parser)
    options = parser.parse_args()
    machine = describe_machine("cpu")
    measured = []
    for row in rows(options.num_rows, options.dim):
        print(
            f"{row['case']:<28} {row['quantity']:<12} native {row['native_error']:>9} "
            f"dense {row['dense_error']:>9} {'ok' if row['passed'] else 'TOO LARGE'}",
            flush=True,
        )
        measured.append({**row, **machine})
    write_table(results_path(RESULTS, options.output_dir, options.update), measured)
    return 0 if all(row["passed"] for row in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
