"""CPC: InfoNCE between what a context predicts and what comes next in the sequence."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from supcon_kernels import supcon_loss

STEPS_AHEAD = 2

torch.manual_seed(0)
# A sequence: the eight rows of an image, from the top.
sequences = torch.tensor(load_digits().images, dtype=torch.float32) / 16  # (1797, T, 8)

encoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))
context = nn.GRU(32, 64, batch_first=True)
predictors = nn.ModuleList(nn.Linear(64, 32) for _ in range(STEPS_AHEAD))
modules = nn.ModuleList([encoder, context, predictors])
optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)

losses = []
for _epoch in range(5):
    for batch in torch.randperm(len(sequences)).split(128)[:-1]:
        encoded = encoder(sequences[batch])  # (B, T, D)
        contexts, _ = context(encoded)
        loss = torch.zeros(())
        for ahead, predict in enumerate(predictors, start=1):
            predicted = predict(contexts[:, :-ahead]).flatten(0, 1)  # (B * (T - ahead), D)
            following = encoded[:, ahead:].flatten(0, 1)
            # The positive of row i is row i; all other rows of the batch are negatives.
            # CPC compares by the dot product: neither scaled to length 1 nor by a temperature.
            loss = loss + supcon_loss(
                predicted, contrast_features=following, temperature=1.0, normalize=False
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
