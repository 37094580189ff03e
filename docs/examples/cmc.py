"""CMC: an encoder for each kind of view of a sample, contrasted across the kinds only."""

from itertools import combinations

import torch
from sklearn.datasets import load_digits
from torch import nn

from supcon_kernels import supcon_loss

torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32) / 16  # (1797, 8, 8)
# Two kinds of view: the upper and the lower half. In the paper: luminance and colour, or depth.
kinds = [images[:, :4], images[:, 4:]]

encoders = nn.ModuleList(
    nn.Sequential(nn.Flatten(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in kinds
)
optimizer = torch.optim.AdamW(encoders.parameters(), lr=3e-3)

losses = []
for _epoch in range(5):
    for batch in torch.randperm(len(images)).split(256)[:-1]:
        features = [encoder(kind[batch]) for encoder, kind in zip(encoders, kinds)]
        # Every pair of kinds, in both directions: with three kinds three pairs.
        loss = torch.stack(
            [
                supcon_loss(one, contrast_features=other, symmetric=True, temperature=0.1)
                for one, other in combinations(features, 2)
            ]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

with torch.no_grad():  # a sample's embedding: that of all its views, side by side
    embeddings = torch.cat([encoder(kind) for encoder, kind in zip(encoders, kinds)], dim=1)
