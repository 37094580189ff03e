"""The quick linear stage: multinomial logistic regression, a convex problem, by L-BFGS.

Each image is encoded once, without augmentation. There is no learning rate or schedule to choose.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_stage.classifier import Accuracy, LinearClassifier, measure
from linear_stage.features import Features
from run.rules import out_of_range

# The largest derivative of the loss by a weight with which the fit counts as converged.
TOLERANCE = 1e-4
# Evaluations of the loss that a line search may take, as torch limits it.
EVALUATIONS = 25
CONVEX = "convex"
WEIGHT_DECAY = 1e-4


@dataclass
class ConvexOptions:
    """The convex fit.

    Args:
        max_iterations: Most L-BFGS iterations.
        features_gib: Features that take more memory than this, in GiB, are read from a file
            (memory-mapped), which lies in the folder of the run until the script ends.
    """

    max_iterations: int = 200
    features_gib: float = 8.0

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(self, at_least={"max_iterations": 1, "features_gib": 0})


@dataclass
class Fit:
    """How a fit ended.

    Attributes:
        gradient: the largest derivative of its loss by a weight, of absolute value.
        accuracy: on the images that it was fitted to.
    """

    iterations: int
    gradient: float
    accuracy: Accuracy

    @property
    def converged(self) -> bool:
        """Whether more iterations would change nothing that matters."""
        return self.gradient <= TOLERANCE

    def __str__(self) -> str:
        state = "converged" if self.converged else "warning: not converged"
        remedy = "" if self.converged else ": raise --max_iterations, or --weight_decay"
        return (
            f"{state} after {self.iterations} iterations of L-BFGS (largest derivative "
            f"{self.gradient:.1e}, accepted {TOLERANCE:.0e}){remedy}"
        )


def fit_convex(
    features: Features,
    num_classes: int,
    *,
    weight_decay: float = WEIGHT_DECAY,
    max_iterations: int = ConvexOptions.max_iterations,
) -> tuple[LinearClassifier, Fit]:
    """Fit a classifier to the features of the training images, which are standardised in place."""
    mean, std = features.standardize()
    layer = nn.Linear(len(mean), num_classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=max_iterations,
        max_eval=EVALUATIONS * max_iterations,
        tolerance_grad=TOLERANCE / 10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        penalty = layer.weight.square().sum() * (weight_decay / 2)
        penalty.backward()
        total = penalty.item()
        for rows, labels in features.chunks():
            loss = F.cross_entropy(layer(rows), labels, reduction="sum") / len(features.rows)
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(objective)
    with torch.enable_grad():
        objective()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    fit = Fit(
        iterations=optimizer.state[layer.weight]["n_iter"],
        gradient=max(_largest(part) for part in layer.parameters()),
        accuracy=measure([LinearClassifier(weight, bias, False, CONVEX)], features.chunks())[0],
    )
    # Of embeddings as they come: what was subtracted and divided by goes into the weights.
    weight = weight / std
    return LinearClassifier(weight, bias - weight @ mean, False, CONVEX), fit


def _largest(weight: Tensor) -> float:
    assert weight.grad is not None
    return weight.grad.abs().max().item()
