"""A Lightning module whose loss contrasts the rows of all ranks."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from supcon_kernels import supcon_loss


class SupCon(lightning.LightningModule):
    """An encoder and the projection head that only the loss sees."""

    def __init__(self, *, temperature: float = 0.1, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU())
        self.head = nn.Linear(128, 64)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images, without the head."""
        return self.encoder(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of two noisy views of each image."""
        images, labels = batch
        views = torch.cat([images + 0.1 * torch.randn_like(images) for _ in range(2)])
        features = torch.stack(self.head(self(views)).chunk(2), dim=1)  # (B, V, D)
        # Under DDP the loss is that of all ranks' rows, with one process it is its own.
        loss = supcon_loss(features, labels, temperature=self.hparams.temperature, group="world")
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


if __name__ == "__main__":
    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    model = SupCon()
    trainer = lightning.Trainer(max_epochs=3, accelerator="auto", log_every_n_steps=5)
    trainer.fit(model, DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True))
    print(f"loss {trainer.callback_metrics['loss']:.2f}")
