"""docs/migration.md: the losses of other libraries, and the calls that replace them."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from supcon_kernels import ClipLoss, SupConLoss, supcon_loss

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def assert_same(ours, theirs, *inputs):
    """Values and gradients to all inputs are the same."""
    found = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, **TOLERANCE)


def rows(*shape: int) -> list[torch.Tensor]:
    """Some sides, float64."""
    return list(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double())


class Embeds(nn.Module):
    """Stands for a model: its inputs are the embeddings."""

    def forward(self, embeddings):
        return {"sentence_embedding": embeddings}


def test_clip_loss_of_open_clip():
    from open_clip import ClipLoss as Theirs

    scale = torch.tensor(14.3).double()

    def of(criterion):
        return lambda a, b, s: criterion(F.normalize(a), F.normalize(b), s, output_dict=True)[
            "contrastive_loss"
        ]

    assert_same(of(ClipLoss()), of(Theirs()), *rows(2, 40, 16), scale)


def test_ranking_losses_of_sentence_transformers():
    from sentence_transformers.sentence_transformer import losses

    ranking = losses.MultipleNegativesRankingLoss(Embeds(), scale=20.0)
    assert_same(
        lambda a, p, n: supcon_loss(a, contrast_features=torch.cat((p, n)), temperature=1 / 20),
        lambda *sides: ranking(list(sides), None),
        *rows(3, 30, 16),
    )
    symmetric = losses.MultipleNegativesRankingLoss(
        Embeds(),
        scale=20.0,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    assert_same(
        lambda a, p: supcon_loss(a, contrast_features=p, symmetric=True, temperature=1 / 20),
        lambda *sides: symmetric(list(sides), None),
        *rows(2, 30, 16),
    )


def test_supcon_loss_of_setfit():
    from setfit.losses import SupConLoss as Theirs

    labels = torch.arange(30) % 4
    theirs = Theirs(Embeds(), temperature=0.1)
    (features,) = rows(1, 30, 16)
    assert_same(
        lambda x: SupConLoss(temperature=0.1)(x, labels), lambda x: theirs([x], labels), features
    )


def test_nt_xent_loss_of_lightly():
    from lightly.loss import NTXentLoss

    assert_same(
        lambda a, b: supcon_loss(torch.stack((a, b), 1), temperature=0.5),
        NTXentLoss(temperature=0.5),
        *rows(2, 30, 16),
    )


def test_losses_of_two_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = Path(__file__).with_name("losses_of_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, program, tmp_path], env=environment, check=True)
    by_rank = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in ("ClipLoss", "NTXentLoss"):
        ours, theirs = ([of_rank[name][k] for of_rank in by_rank] for k in range(2))
        for loss, *_ in ours:  # theirs is of one rank's rows
            mean = torch.stack([of_rank[0] for of_rank in theirs]).mean()
            torch.testing.assert_close(loss, mean, **TOLERANCE)
        for of_ours, of_theirs in zip(ours, theirs):
            torch.testing.assert_close(of_ours[1:3], of_theirs[1:3], **TOLERANCE)
    # DistributedDataParallel averages what each has of the scale.
    scales = [torch.stack([r["ClipLoss"][k][3] for r in by_rank]).mean() for k in range(2)]
    torch.testing.assert_close(*scales, **TOLERANCE)
