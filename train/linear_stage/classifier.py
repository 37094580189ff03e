"""What the linear stage ends with: a linear classifier of embeddings, and its file linear.pt."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from run.atomic_write import replace_file
from run.checkpoint import DamagedCheckpoint, check_finite, read_file, restored_from

FILE = "linear.pt"
K = 5


@dataclass
class LinearClassifier:
    """A linear classifier of embeddings; linear.pt holds these attributes as a dictionary.

    Attributes:
        weight: (C, F).
        bias: (C,).
        unit_length: whether embeddings are scaled to length 1 before it.
        protocol: how it was made, as --protocol has it.
        encoder: the weights of the encoder where --finetune has trained it, too; else it is the
            checkpoint's.
        step: that of the checkpoint on which it was made.
    """

    weight: Tensor
    bias: Tensor
    unit_length: bool
    protocol: str
    encoder: dict[str, Tensor] | None = None
    step: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether training has not run away."""
        return bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    def logits(self, embedded: Tensor) -> Tensor:
        """Of (N, F) embeddings as the encoder gives them: (N, C)."""
        seen = F.normalize(embedded, dim=1) if self.unit_length else embedded
        return F.linear(seen, self.weight.to(seen.device), self.bias.to(seen.device))


class Accuracy(NamedTuple):
    """Shares of images whose class is the first that a classifier names, or among the first five."""

    top1: float
    top5: float


@torch.no_grad()
def measure(
    classifiers: list[LinearClassifier], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[Accuracy]:
    """The accuracies of some classifiers on batches of (B, F) embeddings and their (B,) labels."""
    hits, num_images = torch.zeros(len(classifiers), 2, dtype=torch.long), 0
    for embedded, labels in batches:
        num_images += len(labels)
        named = [
            logits.topk(min(K, logits.shape[1]), dim=1).indices == labels[:, None]
            for logits in (classifier.logits(embedded) for classifier in classifiers)
        ]
        counts = [count for hit in named for count in (hit[:, 0].sum(), hit.sum())]
        hits += torch.stack(counts).view(-1, 2).cpu()
    # Divided in Python: a float32 share is written as 0.6200000047683716.
    return [Accuracy(*(count / num_images for count in pair)) for pair in hits.tolist()]


def save_classifier(folder: Path, classifier: LinearClassifier) -> Path:
    """Write linear.pt into the folder of a run; returns its path."""
    content = dict(vars(classifier))
    content |= {name: content[name].detach().cpu() for name in ("weight", "bias")}
    if classifier.encoder is not None:
        content["encoder"] = {key: value.cpu() for key, value in classifier.encoder.items()}
    path = folder / FILE
    replace_file(path, lambda file: torch.save(content, file))
    return path


def load_classifier(path: Path) -> LinearClassifier:
    """Read a linear.pt to the CPU.

    Raises:
        UserError: there is none, it is damaged, or linear.py did not write it.
    """
    saved = read_file(path)
    if not isinstance(saved, dict) or "weight" not in saved or "protocol" not in saved:
        raise DamagedCheckpoint(f"{path} was not written by linear.py")
    with restored_from(path):
        classifier = LinearClassifier(**saved)
        check_finite(saved, "classifier")
    return classifier
