"""The specification against loops over pairs, values worked out by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from cases import VARIANTS, by_id
from supcon_kernels import supcon_loss


def loss_by_loops(features, w, temperature, summation, denominator):
    """The table of the mathematics, pair by pair: w_ij > 0 positive, 0 negative, < 0 ignored."""
    z = F.normalize(features, dim=1).tolist()
    losses = []
    for i, row in enumerate(w):
        e = [math.exp(sum(a * b for a, b in zip(z[i], z[j])) / temperature) for j in range(len(z))]
        positives = [j for j, weight in enumerate(row) if weight > 0]
        total = sum(row[j] for j in positives)
        negatives = sum(e[j] for j, weight in enumerate(row) if weight == 0)
        if not positives or (denominator == "only_negatives" and negatives == 0):
            losses.append(0.0)
            continue
        everything = negatives + sum(e[j] for j in positives)
        below = {
            "all": lambda j, everything=everything: everything,
            "one_positive": lambda j, e=e, negatives=negatives: negatives + e[j],
            "only_negatives": lambda j, negatives=negatives: negatives,
        }[denominator]
        p = {j: e[j] / below(j) for j in positives}
        if summation == "out":
            losses.append(-sum(row[j] * math.log(p[j]) for j in positives) / total)
        else:
            losses.append(-math.log(sum(row[j] * p[j] for j in positives) / total))
    return losses


def labelled_weights(labels):
    w = (labels[:, None] == labels[None, :]).double()
    return w.fill_diagonal_(-1.0).tolist()


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@pytest.mark.parametrize("name", ["singleton", "one_class", "duplicated_rows"])
def test_labelled_loss_by_loops(name, variant):
    arguments = by_id(name).arguments()
    features, labels = arguments["features"], arguments["labels"]
    expected = loss_by_loops(features, labelled_weights(labels), 0.1, *variant)
    summation, denominator = variant
    loss = supcon_loss(
        **arguments,
        summation=summation,
        denominator=denominator,
        reduction="none",
        backend="reference",
    )
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_weighted_loss_by_loops(variant):
    arguments = by_id("weighted_mask").arguments()
    features = arguments["features"].transpose(0, 1).flatten(0, 1)
    w = arguments["mask"].clone().fill_diagonal_(-1.0).tolist()
    expected = loss_by_loops(features, w, 0.1, *variant)
    summation, denominator = variant
    loss = supcon_loss(
        **arguments,
        summation=summation,
        denominator=denominator,
        reduction="none",
        backend="reference",
    )
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-12, atol=1e-12)


def supcontrast_by_loops(features, labels, temperature, base_temperature):
    """The loss of the SupContrast repository: mean over all anchors, scaled by τ / τ_base."""
    views = features.shape[1]
    z = [F.normalize(features[:, v], dim=1) for v in range(views)]
    rows = torch.cat(z)
    names = labels.repeat(views).tolist()
    total = 0.0
    for i in range(len(rows)):
        logits = [float(rows[i] @ rows[j]) / temperature for j in range(len(rows))]
        others = [j for j in range(len(rows)) if j != i]
        log_sum = math.log(sum(math.exp(logits[j]) for j in others))
        positives = [j for j in others if names[j] == names[i]]
        mean = sum(logits[j] - log_sum for j in positives) / len(positives)
        total -= (temperature / base_temperature) * mean
    return total / len(rows)


def test_it_is_the_loss_of_supcontrast():
    arguments = by_id("two_views").arguments()
    expected = supcontrast_by_loops(arguments["features"], arguments["labels"], 0.1, 0.07)
    loss = supcon_loss(**arguments, base_temperature=0.07, backend="reference")
    assert math.isclose(float(loss), expected, rel_tol=1e-12)


# Unit vectors e1, e1, e2 at τ = 1: the two alike see similarities 1 and 0.
BY_HAND = {
    ("out", "all"): math.log(1 + math.exp(-1)),
    ("in", "all"): math.log(1 + math.exp(-1)),
    ("out", "one_positive"): math.log(1 + math.exp(-1)),
    ("in", "one_positive"): math.log(1 + math.exp(-1)),
    ("out", "only_negatives"): -1.0,
    ("in", "only_negatives"): -1.0,
}


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_three_rows_by_hand(variant):
    features = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    loss = supcon_loss(
        features,
        torch.tensor([0, 0, 1]),
        temperature=1.0,
        summation=variant[0],
        denominator=variant[1],
        reduction="none",
        backend="reference",
    )
    assert loss.tolist() == pytest.approx([BY_HAND[variant], BY_HAND[variant], 0.0], abs=1e-15)


def test_out_and_in_by_hand():
    # Similarities of the first row: 1 to a positive, 0 to a positive and to a negative.
    features = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1])

    def first(summation):
        return supcon_loss(
            features, labels, temperature=1.0, summation=summation, reduction="none"
        )[0]

    total = math.e + 2
    assert float(first("out")) == pytest.approx(math.log(total) - 0.5, abs=1e-14)
    assert float(first("in")) == pytest.approx(math.log(total) - math.log((math.e + 1) / 2))


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@pytest.mark.parametrize("name", ["soft_memory", "self_in_memory", "singleton"])
def test_first_and_second_derivatives(name, variant):
    arguments = by_id(name).arguments()
    features = arguments.pop("features")[:7, :4].clone().requires_grad_()
    if "contrast_features" in arguments:
        arguments["contrast_features"] = arguments["contrast_features"][:17, :4]
        arguments["contrast_labels"] = arguments["contrast_labels"][:17]
    arguments["labels"] = arguments["labels"][:7]
    del arguments["temperature"]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(features, temperature):
        return supcon_loss(
            features,
            temperature=temperature,
            summation=variant[0],
            denominator=variant[1],
            reduction="none",
            backend="reference",
            **arguments,
        )

    assert gradcheck(loss, (features, temperature))
    assert gradgradcheck(loss, (features, temperature))
