"""Bad input: the exception, and that its message names the argument and what came."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from supcon_kernels import ClipLoss, LabelQueue, SupConLoss, supcon_loss

FEATURES = torch.randn(4, 3)
VIEWS = torch.randn(4, 2, 3)
LABELS = torch.tensor([0, 0, 1, 1])
SOFT = torch.rand(4, 5)
MEMORY = torch.randn(6, 3)
MEMORY_LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
MASK = torch.ones(4, 4)
SYMMETRIC = {
    "labels": LABELS,
    "contrast_features": MEMORY,
    "contrast_labels": MEMORY_LABELS,
    "symmetric": True,
}

CALLS = [
    # features
    ("features", "list", TypeError, {"features": [[1.0, 2.0]], "labels": LABELS}),
    ("features", "int64", TypeError, {"features": FEATURES.long(), "labels": LABELS}),
    ("features", r"\(4,\)", ValueError, {"features": FEATURES[:, 0], "labels": LABELS}),
    ("features", "at least one view", ValueError, {"features": torch.zeros(4, 0, 3)}),
    ("features", "sparse", ValueError, {"features": FEATURES.to_sparse(), "labels": LABELS}),
    ("features", r"\(2, 2, 2, 2\)", ValueError, {"features": torch.zeros(2, 2, 2, 2)}),
    # what is positive
    ("labels", "nothing is positive", ValueError, {"features": FEATURES}),
    ("labels", "nothing is positive", ValueError, {"features": FEATURES[:, None]}),
    ("labels", "list", ValueError, {"labels": [0, 0, 1, 1]}),
    ("labels", r"\(3,\)$", ValueError, {"labels": LABELS[:3]}),
    ("labels", r"\(4, 0\)", ValueError, {"labels": torch.zeros(4, 0)}),
    ("labels", r"float32.* pass labels\.long\(\)", ValueError, {"labels": LABELS.float()}),
    ("labels", r"bool.* pass labels\.long\(\)", ValueError, {"labels": LABELS.bool()}),
    ("labels", r"float32.* pass labels\.long\(\)", ValueError, {"labels": LABELS[:, None].float()}),
    ("labels", "sparse", ValueError, {"labels": SOFT.to_sparse()}),
    ("mask", "sparse", ValueError, {"mask": MASK.to_sparse()}),
    ("labels", r"pass labels\.float\(\)", ValueError, {"labels": F.one_hot(LABELS)}),
    ("labels", r"\(3,\)", ValueError, {"labels": LABELS[:3, None]}),
    ("labels", ">= 0", ValueError, {"labels": -SOFT}),
    ("labels", ">= 0 and finite", ValueError, {"labels": SOFT.log() * torch.nan}),
    ("labels", "require grad", ValueError, {"labels": SOFT.clone().requires_grad_()}),
    ("labels", "device", ValueError, {"labels": LABELS.to("meta")}),
    ("mask", "both", ValueError, {"labels": LABELS, "mask": MASK}),
    ("mask", "list", ValueError, {"mask": [[1]]}),
    ("mask", r"\(4, 5\)", ValueError, {"mask": torch.ones(4, 5)}),
    ("mask", "complex64", ValueError, {"mask": MASK.to(torch.complex64)}),
    ("mask", "require grad", ValueError, {"mask": MASK.clone().requires_grad_()}),
    ("mask", "finite", ValueError, {"mask": MASK * torch.nan}),
    ("mask", "finite", ValueError, {"mask": MASK / 0}),
    ("mask", "device", ValueError, {"mask": MASK.to("meta")}),
    # a memory
    ("contrast_features", "int64", TypeError, {"contrast_features": MEMORY.long()}),
    ("contrast_features", r"\(6, 2\)", ValueError, {"contrast_features": MEMORY[:, :2]}),
    ("contrast_features", r"\(6,\)", ValueError, {"contrast_features": MEMORY[:, 0]}),
    ("contrast_features", "device", ValueError, {"contrast_features": MEMORY.to("meta")}),
    ("contrast_features", "at least", ValueError, {"contrast_features": MEMORY[:3]}),
    ("contrast_labels", "without", ValueError, {"labels": LABELS, "contrast_labels": LABELS}),
    ("self_offset", "without", ValueError, {"labels": LABELS, "self_offset": 0}),
    (
        "contrast_labels",
        "come together",
        ValueError,
        {"labels": LABELS, "contrast_features": MEMORY},
    ),
    (
        "labels",
        "come together",
        ValueError,
        {"contrast_features": MEMORY, "contrast_labels": MEMORY_LABELS},
    ),
    (
        "contrast_labels",
        r"\(4,\)",
        ValueError,
        {"labels": LABELS, "contrast_features": MEMORY, "contrast_labels": LABELS},
    ),
    (
        "contrast_labels",
        r"\(6, 2\)",
        ValueError,
        {"labels": SOFT, "contrast_features": MEMORY, "contrast_labels": torch.ones(6, 2)},
    ),
    (
        "mask",
        "contrast_labels",
        ValueError,
        {
            "mask": torch.ones(4, 6),
            "contrast_features": MEMORY,
            "contrast_labels": MEMORY_LABELS,
        },
    ),
    ("mask", r"\(4, 4\)", ValueError, {"mask": MASK, "contrast_features": MEMORY}),
    ("self_offset", "labels", ValueError, {"contrast_features": MEMORY, "self_offset": 0}),
    *(
        (
            "self_offset",
            str(offset),
            ValueError,
            {
                "labels": LABELS,
                "contrast_features": MEMORY,
                "contrast_labels": MEMORY_LABELS,
                "self_offset": offset,
            },
        )
        for offset in (-1, 3, 0.5, True)
    ),
    # options
    ("temperature", "0", ValueError, {"labels": LABELS, "temperature": 0}),
    ("temperature", "-0.1", ValueError, {"labels": LABELS, "temperature": -0.1}),
    ("temperature", "nan", ValueError, {"labels": LABELS, "temperature": float("nan")}),
    ("temperature", "'hot'", ValueError, {"labels": LABELS, "temperature": "hot"}),
    ("temperature", "-1", ValueError, {"labels": LABELS, "temperature": torch.tensor(-1.0)}),
    ("temperature", r"\(1,\)", ValueError, {"labels": LABELS, "temperature": torch.ones(1)}),
    ("temperature", "int64", ValueError, {"labels": LABELS, "temperature": torch.tensor(1)}),
    ("base_temperature", "0", ValueError, {"labels": LABELS, "base_temperature": 0.0}),
    (
        "base_temperature",
        "None",
        ValueError,
        {
            "labels": LABELS,
            "temperature": torch.tensor(0.1, requires_grad=True),
            "base_temperature": 0.07,
        },
    ),
    ("contrast_mode", "'two'", ValueError, {"labels": LABELS, "contrast_mode": "two"}),
    ("summation", "'both'", ValueError, {"labels": LABELS, "summation": "both"}),
    ("denominator", "'none'", ValueError, {"labels": LABELS, "denominator": "none"}),
    ("reduction", "'max'", ValueError, {"labels": LABELS, "reduction": "max"}),
    ("symmetric", "1", ValueError, {"labels": LABELS, "symmetric": 1}),
    ("symmetric", "without contrast_features", ValueError, {"labels": LABELS, "symmetric": True}),
    ("self_offset", "symmetric=True, got 0", ValueError, {**SYMMETRIC, "self_offset": 0}),
    ("reduction", "symmetric=True, got 'none'", ValueError, {**SYMMETRIC, "reduction": "none"}),
    (
        "contrast_features",
        r"\(4\) with symmetric=True .* got 8",
        ValueError,
        {"contrast_features": torch.randn(8, 3), "symmetric": True},
    ),
    ("normalize", "'no'", ValueError, {"labels": LABELS, "normalize": "no"}),
    *(
        ("ignore_index", str(index), ValueError, {"labels": LABELS, "ignore_index": index})
        for index in (None, 1.0, 2**63, True)
    ),
    ("backend", "tiled", ValueError, {"labels": LABELS, "backend": ["tiled"]}),
    ("backend", "'cuda'", ValueError, {"labels": LABELS, "backend": "cuda"}),
]


@pytest.mark.parametrize(
    "name, said, error, arguments", CALLS, ids=[f"{c[0]}-{k}" for k, c in enumerate(CALLS)]
)
def test_message_names_the_argument_and_what_came(name, said, error, arguments):
    with pytest.raises(error, match=rf"^{name} (?s:.*){said}"):
        supcon_loss(**{"features": FEATURES, **arguments})


def test_learning_the_temperature_in_the_module_needs_no_base():
    criterion = SupConLoss(torch.nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"^base_temperature must be None"):
        criterion(VIEWS, LABELS)


@pytest.mark.parametrize(
    "name, said, scale, bias",
    [
        ("logit_bias", r"got torch\.float32 of shape \(\)", 10.0, torch.tensor(0.0)),
        ("logit_scale", "got 0", 0, None),
        ("logit_scale", "got -1.0", torch.tensor([-1.0]), None),
        ("logit_scale", "'ten'", "ten", None),
        ("logit_scale", r"\(2,\)", torch.ones(2), None),
        ("logit_scale", "int64", torch.tensor(1), None),
    ],
)
def test_clip_names_the_argument(name, said, scale, bias):
    with pytest.raises(ValueError, match=rf"^{name} must .*{said}"):
        ClipLoss()(FEATURES, FEATURES, scale, bias)


@pytest.mark.parametrize(
    "name, said, images, texts",
    [
        ("image_features", "list", [[1.0]], FEATURES),
        ("text_features", "int64", FEATURES, FEATURES.long()),
        ("text_features", r"\(4, 3\), got \(3, 3\)", FEATURES, FEATURES[:3]),
        ("text_features", r"\(4, 3\), got \(4, 2\)", FEATURES, FEATURES[:, :2]),
    ],
)
def test_clip_names_the_tower(name, said, images, texts):
    with pytest.raises(ValueError, match=rf"^{name} must .*{said}"):
        ClipLoss()(images, texts, 10.0)


@pytest.mark.parametrize(
    "name, call",
    [
        ("size", lambda: LabelQueue(0, 4)),
        ("size", lambda: LabelQueue(4.5, 4)),
        ("dim", lambda: LabelQueue(4, 0)),
        ("dim", lambda: LabelQueue(4, "3")),
        ("dtype", lambda: LabelQueue(4, 3, dtype=torch.int64)),
        ("features", lambda: LabelQueue(4, 3).enqueue(torch.zeros(2, 5), LABELS[:2])),
        ("labels", lambda: LabelQueue(4, 3).enqueue(torch.zeros(2, 3), LABELS)),
        *(
            (
                "labels",
                lambda t=t: LabelQueue(4, 3).enqueue(torch.zeros(2, 3), torch.zeros(2).to(t)),
            )
            for t in (torch.float32, torch.bool, torch.uint64)
        ),
        ("features", lambda: LabelQueue(4, 3).enqueue(torch.zeros(2, 3) * 1j, LABELS[:2])),
        ("features", lambda: LabelQueue(4, 3).enqueue(None, LABELS[:2])),
        ("labels", lambda: LabelQueue(4, 3).enqueue(torch.zeros(2, 3), [0, 1])),
    ],
)
def test_queue_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call()
