"""Fine-tune a timm encoder by cross-entropy and SupCon together, with an average of the weights."""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from supcon_kernels import supcon_loss


class Classifier(nn.Module):
    """A timm model with a projection head beside its classifier."""

    def __init__(self, encoder: nn.Module, *, dim: int = 64) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and what the contrastive loss sees."""
        embeddings = self.encoder.forward_head(
            self.encoder.forward_features(images), pre_logits=True
        )
        return self.encoder.get_classifier()(embeddings), self.head(embeddings)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
images = F.interpolate(images, 32)
labels = torch.tensor(digits.target)

# With the network: pretrained=True.
model = Classifier(timm.create_model("test_resnet", in_chans=1, num_classes=10))
average = ModelEmaV3(model, decay=0.9)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

losses = []
for _epoch in range(4):
    for batch in torch.randperm(len(images)).split(128)[:-1]:
        noisy = images[batch] + 0.05 * torch.randn(len(batch), 1, 32, 32)
        logits, features = model(noisy)
        loss = F.cross_entropy(logits, labels[batch])
        loss = loss + 0.5 * supcon_loss(features, labels[batch], temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

with torch.no_grad():
    logits, _ = average.module.eval()(images)  # the averaged weights are what is used
