"""Who may be timed: a provider that has memory enough here and agrees with the float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from measuring.machine import available_memory_bytes
from measuring.providers import Provider, Unavailable, make_provider
from measuring.results import Result
from measuring.workloads import Problem, Truth, Workload, worst

MEMORY_SHARE = 0.8
"""Share of the available memory that a provider may be expected to need."""


@dataclass(frozen=True)
class Admission:
    """The result so far, and the provider itself if it may be timed."""

    verdict: Result
    provider: Provider | None = None


def admit(
    name: str,
    workload: Workload,
    checked: Problem,
    truth: Truth,
    maker: Callable[[str, Workload], Provider] = make_provider,
) -> Admission:
    """Hold one step of the provider against the truth."""
    blank = Result(**asdict(workload), provider=name, bound=workload.error_bound)
    try:
        provider = maker(name, workload)
        _refuse_if_too_big(provider, workload)
        if not provider.has_loss:
            return Admission(replace(blank, status="unchecked", note="no loss"), provider)
        loss = provider.forward(checked)
        loss_error, grad_error = truth.errors(loss.detach(), provider.backward(checked, loss))
    except Unavailable as why_not:
        return Admission(replace(blank, status="unavailable", note=str(why_not)))
    except (RuntimeError, ValueError, TypeError) as failure:
        note = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return Admission(replace(blank, status="failed", note=note))
    verdict = replace(blank, loss_error=loss_error, grad_error=grad_error)
    if not worst((loss_error, grad_error)) <= workload.error_bound:
        return Admission(replace(verdict, status="wrong"))
    return Admission(verdict, provider)


def _refuse_if_too_big(provider: Provider, workload: Workload) -> None:
    element_bytes = max(4, workload.torch_dtype.itemsize)
    needed_bytes = provider.num_pair_matrices * workload.num_pairs * element_bytes
    if needed_bytes > MEMORY_SHARE * available_memory_bytes(workload.device):
        raise Unavailable(f"needs about {needed_bytes / 2**30:.0f} GiB")
