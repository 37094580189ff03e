"""What bench_loss.py finds: a row for each provider, size and phase, and the rows of one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from measuring.workloads import Workload, worst

UNTIMED = ("wrong", "failed", "unavailable")


@dataclass(frozen=True)
class Result(Workload):
    """One measured phase of one provider; what was not measured is None."""

    provider: str = ""
    phase: str = "both"
    status: str = "ok"  # ok | unchecked | wrong | failed | unavailable
    note: str = ""
    time_ms: float | None = None
    time_q25_ms: float | None = None
    time_q75_ms: float | None = None
    num_samples: int | None = None
    peak_mib: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None
    bound: float | None = None
    peak_gflops: float | None = None
    peak_source: str = ""

    @property
    def gflops(self) -> float | None:
        """Useful rate of a whole step: the least FLOP that it needs over its time."""
        if self.phase != "both" or self.time_ms is None:
            return None
        return 1e-6 * self.num_flops / self.time_ms

    @property
    def peak_share(self) -> float | None:
        if self.gflops is None or not self.peak_gflops:
            return None
        return self.gflops / self.peak_gflops

    @property
    def errors(self) -> list[float]:
        return [e for e in (self.loss_error, self.grad_error) if e is not None]

    @property
    def verdict(self) -> str:
        """What stands in place of a time."""
        return f"WRONG ({worst(self.errors):.1e})" if self.status == "wrong" else self.status


@dataclass(frozen=True)
class Report:
    """The rows of one run and the machine they were measured on."""

    results: list[Result]
    machine: dict[str, str]

    def find(self, num_rows: int, provider: str, phase: str) -> Result | None:
        wanted = (num_rows, provider, phase)
        return next((r for r in self.results if (r.num_rows, r.provider, r.phase) == wanted), None)

    @property
    def notes(self) -> list[str]:
        """Why there is no time, once per provider and reason."""
        untimed = (r for r in self.results if r.status in UNTIMED and r.note)
        return list(dict.fromkeys(f"{r.provider} {r.status}: {r.note}." for r in untimed))

    @property
    def sizes(self) -> list[int]:
        return sorted({r.num_rows for r in self.results})

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(r.provider for r in self.results))


def rate_against_peak(results: Iterable[Result], gflops: float, source: str) -> list[Result]:
    return [replace(result, peak_gflops=gflops, peak_source=source) for result in results]
