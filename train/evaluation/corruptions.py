"""How a classifier bears the corruptions of ImageNet-C: accuracies, and mCE against another run's.

A corruption at one severity is a test of its own: those that were finished before are kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import cv2
import imagecorruptions  # noqa: F401  once, and not by each process that corrupts images
from torch import Tensor

from data.corrupted import CORRUPTIONS, SEVERITIES, Corrupted
from data.images import ImageData, Split
from data.sources import evenly_drawn
from evaluation.classification import rounded, top1
from evaluation.options import EvaluateOptions

# Fewer than of plain images: each takes longer, and they are shared out by batches.
BATCH_SIZE = 64
LIBRARY = "imagecorruptions-imaug"
# Top-1 accuracies by corruption and severity, such as ["fog"]["5"].
Accuracies = dict[str, dict[str, float]]


@dataclass
class Corruptions:
    """The corrupted images that runs are tested on.

    Attributes:
        split: the images, `places` among the test images.
        size: the side of what the network sees.
        side: an image smaller than this is enlarged to it, corrupted and reduced again.
    """

    split: Split
    places: list[int]
    size: int
    side: int

    @property
    def about(self) -> dict[str, Any]:
        """What tells these images from others."""
        return {
            "images": len(self.split),
            "order": self.split.order,
            "side": max(self.side, self.size),
            "library": f"{LIBRARY} {version(LIBRARY)}",
        }

    def test(
        self,
        scores_of: Callable[..., Tensor],
        found: Accuracies,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        """Test every corruption at every severity that is not `found`.

        Args:
            scores_of: takes `Corrupted` images, and `batch_size`, and gives (N, C) scores.
            keep: called with all that is found, again after each test.
        """
        # A fork of a process in which OpenCV has threads may hang.
        cv2.setNumThreads(0)
        found = {name: dict(found.get(name, {})) for name in CORRUPTIONS}
        print("  top-1 under corruptions, severity 1 to 5", flush=True)
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                if str(severity) in found[name]:
                    continue
                corrupted = Corrupted(self.split, name, severity, self.size, self.side)
                scores = scores_of(corrupted, batch_size=BATCH_SIZE)
                found[name][str(severity)] = top1(scores.cpu(), self.split.labels)
                keep({"top1": found})
            shares = " ".join(f"{found[name][str(severity)]:7.2%}" for severity in SEVERITIES)
            print(f"  {name:<18}{shares}", flush=True)
        keep({"top1": found, **_means(found)})


def draw_corruptions(data: ImageData, options: EvaluateOptions) -> Corruptions:
    """The images of a data set that the options have corrupted."""
    places = list(range(len(data.test)))
    if 0 < options.corruption_images < len(places):
        places = evenly_drawn(len(places), options.corruption_images)
    split = data.test.take(places)
    return Corruptions(split, places, data.image_size, options.corruption_side)


def compare(tested: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """mCE and relative mCE of what `Corruptions.test` found, and what they are the means of.

    Of each corruption, over all severities (arXiv 1903.12261): CE = Σ errors / Σ errors of the baseline;
    in the relative one, errors are those beyond the errors on clean images. None where the baseline
    makes none; the mean is of the others.
    """
    ce = _shares(tested["top1"], baseline["top1"], 1.0, 1.0)
    clean = tested["clean_top1"], baseline["clean_top1"]
    relative_ce = _shares(tested["top1"], baseline["top1"], *clean)
    return {
        "mce": _mean(ce.values()),
        "relative_mce": _mean(relative_ce.values()),
        "ce": ce,
        "relative_ce": relative_ce,
    }


def _shares(
    accuracies: Accuracies, baseline: Accuracies, best: float, best_of_baseline: float
) -> dict[str, float | None]:
    """What accuracies lack of the best, as a share of what the baseline's do."""
    shares: dict[str, float | None] = {}
    for name in CORRUPTIONS:
        lacking = sum(best - share for share in accuracies[name].values())
        of_baseline = sum(best_of_baseline - share for share in baseline[name].values())
        shares[name] = rounded(lacking / of_baseline) if of_baseline > 0 else None
    return shares


def _mean(shares: Iterable[float | None]) -> float | None:
    numbers = [share for share in shares if share is not None]
    return rounded(sum(numbers) / len(numbers)) if numbers else None


def _means(accuracies: Accuracies) -> dict[str, Any]:
    """The mean accuracy at each severity, and of all tests."""
    by_severity = {
        str(severity): rounded(
            sum(accuracies[name][str(severity)] for name in CORRUPTIONS) / len(CORRUPTIONS)
        )
        for severity in SEVERITIES
    }
    mean = rounded(sum(by_severity.values()) / len(SEVERITIES))
    return {"mean_top1": mean, "mean_top1_by_severity": by_severity}
