"""MoCo: contrast a small batch with a queue of earlier keys, made by a momentum encoder."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from supcon_kernels import LabelQueue, supcon_loss

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)

encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
queue = LabelQueue(1024, 64)  # empty slots take no part
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)


@torch.no_grad()
def update_momentum_encoder(momentum: float = 0.99) -> None:
    """Move the momentum encoder a little towards the encoder."""
    for average, parameter in zip(momentum_encoder.parameters(), encoder.parameters()):
        average.lerp_(parameter, 1 - momentum)


losses = []
for _epoch in range(3):
    for batch in torch.randperm(len(images)).split(32)[:-1]:
        first, second = (images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8) for _ in range(2))
        update_momentum_encoder()
        with torch.no_grad():
            keys = momentum_encoder(second)
        # The keys of this batch are in the queue that it is contrasted with.
        queue.enqueue(keys, labels[batch])
        loss = supcon_loss(
            encoder(first),
            labels[batch],  # without labels: one new number for each image
            contrast_features=queue.features,
            contrast_labels=queue.labels,
            temperature=0.1,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[len(losses) // 3]:.2f} -> {losses[-1]:.2f}")
