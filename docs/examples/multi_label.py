"""Images with several labels each: pairs weigh as much as the labels that they share."""

import torch
from torch import nn

from supcon_kernels import supcon_loss

torch.manual_seed(0)
# An image shows a pattern for each of its labels, and noise.
labels = torch.rand(2048, 12) < 0.2  # (N, C), one column for each label
patterns = torch.rand(12, 256)
images = labels.float() @ patterns + 0.3 * torch.randn(2048, 256)

encoder = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

losses = []
for _epoch in range(5):
    for batch in torch.randperm(len(images)).split(256):
        # Of length 1: the weight of a pair is the cosine of its labels (Jaccard's: use mask=).
        weights = nn.functional.normalize(labels[batch].float(), dim=1)
        # Images without a label have no positive: they are negatives, and not averaged over.
        loss = supcon_loss(
            encoder(images[batch]), weights, temperature=0.1, reduction="positive_mean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

with torch.no_grad():
    embeddings = nn.functional.normalize(encoder(images), dim=1)
