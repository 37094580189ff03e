"""A loss for sentence-transformers' trainer, for a data set of one sentence and a label a row."""

from collections.abc import Iterable

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from supcon_kernels import supcon_loss


class SupervisedContrastiveLoss(nn.Module):
    """In the place of BatchAllTripletLoss; SetFit's bodies are trained in the same way."""

    def __init__(self, model: SentenceTransformer, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the loss of a batch, of all ranks together."""
        (sentences,) = sentence_features
        embeddings = self.model(sentences)["sentence_embedding"]
        return supcon_loss(embeddings, labels, temperature=self.temperature, group="world")


# A small stand-in: with the network, SentenceTransformer("all-MiniLM-L6-v2").
topics = ["ship wave sail tide", "rose soil seed lawn", "note drum choir tune"]
words = ["[UNK]", "the", "a", "near", *" ".join(topics).split()]
tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)])

sentences = [
    (f"the {first} near a {second}", label)
    for label, topic in enumerate(topics)
    for first in topic.split()
    for second in topic.split()
]
texts, labels = zip(*sentences)
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        "runs/sentences",
        num_train_epochs=10,
        per_device_train_batch_size=24,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    train_dataset=Dataset.from_dict({"text": texts, "label": labels}),
    loss=SupervisedContrastiveLoss(model),
)
trainer.train()
