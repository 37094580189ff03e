"""Supervised contrastive training of a small network in plain PyTorch."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from supcon_kernels import supcon_loss

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)

encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128))
head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))  # only the loss sees its output
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)


def random_view(images: torch.Tensor) -> torch.Tensor:
    """Brightness and noise; use the augmentations of your data instead."""
    brightness = 0.7 + 0.6 * torch.rand(len(images), 1, 1, 1)
    return images * brightness + 0.1 * torch.randn_like(images)


losses = []
for _epoch in range(3):
    for batch in torch.randperm(len(images)).split(256)[:-1]:  # without the last, smaller one
        views = torch.cat([random_view(images[batch]) for _ in range(2)])
        features = torch.stack(head(encoder(views)).chunk(2), dim=1)  # (B, V, D)
        loss = supcon_loss(features, labels[batch], temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

with torch.no_grad():
    embeddings = encoder(images)  # for k-NN, a linear classifier or search
