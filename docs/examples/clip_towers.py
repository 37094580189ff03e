"""CLIP: an image tower and a text tower, both directions, and a temperature that is learned."""

import torch
from torch import nn

from supcon_kernels import ClipLoss

torch.manual_seed(0)
# A caption is four words; its image shows a pattern for each of them, and noise.
captions = torch.randint(100, (2048, 4))
patterns = torch.rand(100, 1, 16, 16)
images = patterns[captions].mean(dim=1) + 0.02 * torch.randn(2048, 1, 16, 16)

image_tower = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
text_tower = nn.Sequential(nn.EmbeddingBag(100, 256), nn.ReLU(), nn.Linear(256, 64))
log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
clip_loss = ClipLoss()  # with DDP: ClipLoss(group="world")
optimizer = torch.optim.AdamW(
    [*image_tower.parameters(), *text_tower.parameters(), log_scale], lr=1e-3
)

losses = []
for _epoch in range(5):
    for batch in torch.randperm(len(images)).split(256):
        from_image, from_text = image_tower(images[batch]), text_tower(captions[batch])
        # Row i of one tower belongs to row i of the other.
        loss = clip_loss(from_image, from_text, log_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, scale {log_scale.exp():.1f}")
