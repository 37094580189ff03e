"""Whether a claim holds: a paired bootstrap over test images and seeds, and the rule of the verdict."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reproduction.claims import CORRUPTED, METRICS, SPREAD, Claim
from reproduction.methods import REFERENCE, SUPCON, settings_of
from reproduction.runs import Job, Study

RESAMPLES = 2000
LEAST_SEEDS = 3
SHOWN, OPEN, CONTRADICTED, NOT_RUN = "shown", "not resolved", "contradicted", "not run"
RULE = f"""\
Both methods are compared on the same seeds and the same test images. A paired bootstrap draws seeds and images
with replacement, {RESAMPLES:,} times. The interval holds the middle 95% of the differences. A claim is

- **{SHOWN}** if the whole interval is on the claimed side of 0,
- **{CONTRADICTED}** if it is on the other side,
- **{OPEN}** otherwise, and with fewer than {LEAST_SEEDS} seeds.

For a claim that is not resolved, the column *would resolve it* estimates how many test images and seeds are needed.
It takes the difference that was found, and assumes that the interval narrows with the square root of their
number. What is measured on corrupted images is one number for each seed, so only seeds are drawn. The spread is
the standard deviation of top-1 over the settings of Figure 4 that both losses have. A setting that diverges
counts as 0.
"""
# As evaluate.py has it.
BINS = 15
# Of (R, N) weights of the N test images the (R,) values of a metric.
Statistic = Callable[[Tensor], Tensor]


def judge(study: Study, claim: Claim, seeds: int) -> dict[str, Any]:
    """The difference of two methods, positive in the direction claimed, its interval and the verdict."""
    metric = claim.metric
    sign = 1 if METRICS[metric][1] else -1
    found, resampled, images = [], [], 0
    for seed in range(seeds):
        better = statistic(study, Job(claim.better, seed), metric)
        worse = statistic(study, Job(claim.worse, seed), metric)
        if better is None or worse is None:
            continue
        images = study.num_tested(Job(claim.better, seed))
        as_they_are, drawn = torch.ones(1, images), _drawn_images(images)
        found.append(sign * (better(as_they_are) - worse(as_they_are)).item())
        resampled.append(sign * (better(drawn) - worse(drawn)))
    row: dict[str, Any] = {"metric": metric, "seeds": len(found), "images": images}
    if not found:
        return row | {"verdict": NOT_RUN}
    low, high = _interval(torch.stack(resampled))
    difference, verdict = sum(found) / len(found), OPEN
    if len(found) >= LEAST_SEEDS and (low > 0 or high < 0):
        verdict = SHOWN if low > 0 else CONTRADICTED
    row |= {"difference": round(difference, 6), "low": round(low, 6), "high": round(high, 6)}
    if verdict == OPEN and difference:
        times = max(((high - low) / 2 / difference) ** 2, 1.0)
        row["needed_images"] = math.ceil(images * times)
        row["needed_seeds"] = max(math.ceil(len(found) * times), LEAST_SEEDS)
    return row | {"verdict": verdict}


def value(study: Study, job: Job, metric: str) -> float | None:
    """A metric of a run on the test images, if it was measured."""
    found = statistic(study, job, metric)
    return found and round(found(torch.ones(1, study.num_tested(job))).item(), 6)


def statistic(study: Study, job: Job, metric: str) -> Statistic | None:
    """A metric of a run as a function of the weights of the test images, if it was measured."""
    if metric == SPREAD:
        return _spread(study, job)
    scored = study.scores(job)
    if scored is None:
        return None
    if metric in CORRUPTED:
        measured = study.corruptions(job).get(metric)
        return None if measured is None else _always(measured)
    scores, labels = scored
    confidence, classes = scores.double().softmax(1).max(1)
    correct = (classes == labels).double()
    if metric == "top1":
        return lambda weights: weights @ correct.float() / len(labels)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(len(labels), BINS)
    gaps[torch.arange(len(labels)), bins] = (correct - confidence).float()
    return lambda weights: (weights @ gaps).abs().sum(1) / len(labels)


def _spread(study: Study, job: Job) -> Statistic | None:
    """Over the settings of a loss; None: it has none, or not all of them were run."""
    if job.method not in (SUPCON, REFERENCE):
        return None
    statistics = []
    for setting in (Job(name, job.seed) for name in settings_of(job.method)):
        found = _always(0.0) if study.failed(setting) else statistic(study, setting, "top1")
        if found is None:
            return None
        statistics.append(found)
    return lambda weights: torch.stack([found(weights) for found in statistics]).std(0)


def _always(number: float) -> Statistic:
    """What does not depend on which of the images are drawn."""
    return lambda weights: number * torch.ones(len(weights))


@cache
def _drawn_images(count: int) -> Tensor:
    """How often each resample draws each image, (R, N): the same for all methods and seeds."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(RESAMPLES, count)
    for row in weights:
        row.copy_(torch.randint(count, (count,), generator=generator).bincount(minlength=count))
    return weights


def _interval(differences: Tensor) -> tuple[float, float]:
    """The middle 95% of the means of seeds, which are drawn in each resample of (S, R) differences."""
    seeds, resamples = differences.shape
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(seeds, (seeds, resamples), generator=generator)
    means = differences.double().gather(0, drawn).mean(0)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high
