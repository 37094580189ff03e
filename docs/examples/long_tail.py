"""A long tail of classes: learned class centres in every batch, and anchors weighted by class."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from supcon_kernels import supcon_loss

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
# Class c keeps 160 / 1.6**c of its images: the largest class is 80 times the smallest.
kept = torch.cat([(labels == c).nonzero()[: int(160 / 1.6**c), 0] for c in range(10)])
images, labels = images[kept], labels[kept]

encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
centres = nn.Parameter(torch.randn(10, 64))
optimizer = torch.optim.AdamW([*encoder.parameters(), centres], lr=3e-3)

losses = []
for _epoch in range(20):
    for batch in torch.randperm(len(images)).split(128)[:-1]:
        features = encoder(images[batch])
        # The centres stand beside the rows, so that an anchor of a rare class has a positive.
        # Row i of the contrast is anchor i itself: self_offset=0 leaves it out.
        anchors = supcon_loss(
            features,
            labels[batch],
            contrast_features=torch.cat((features, centres)),
            contrast_labels=torch.cat((labels[batch], torch.arange(10))),
            self_offset=0,
            temperature=0.1,
            reduction="none",
        )
        # Every class of the batch counts the same, however many rows it has.
        weights = 1 / labels[batch].bincount(minlength=10)[labels[batch]]
        loss = (anchors * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

with torch.no_grad():
    predicted = (encoder(images) @ nn.functional.normalize(centres, dim=1).T).argmax(1)
