"""Hugging Face's Trainer with a text encoder and the supervised contrastive loss."""

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from supcon_kernels import supcon_loss

# Small stand-ins: with the network, AutoTokenizer and AutoModel by from_pretrained.
TOPICS = {
    "sea": "ship wave sail tide",
    "garden": "rose soil seed lawn",
    "music": "note drum choir tune",
}
words = ["[PAD]", "[UNK]", "the", "a", "near", *" ".join(TOPICS.values()).split()]
vocabulary = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]"
)
bert = BertConfig(
    vocab_size=len(words),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)


class ContrastiveText(nn.Module):
    """A text encoder that returns the loss where it is given labels, as Trainer expects."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Average the token embeddings; add the loss of all ranks' rows."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        embeddings = (hidden * weight).sum(1) / weight.sum(1)
        if labels is None:
            return {"embeddings": embeddings}
        loss = supcon_loss(embeddings, labels, temperature=0.1, group="world")
        return {"loss": loss, "embeddings": embeddings}


sentences = [
    (f"the {first} near a {second}", label)
    for label, topic in enumerate(TOPICS.values())
    for first in topic.split()
    for second in topic.split()
]
dataset = [{**tokenizer(text), "label": label} for text, label in sentences]
model = ContrastiveText(BertModel(bert, add_pooling_layer=False))
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/text",
        num_train_epochs=10,
        per_device_train_batch_size=24,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    data_collator=DataCollatorWithPadding(tokenizer),
    train_dataset=dataset,
)
trainer.train()
