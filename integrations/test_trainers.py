"""docs/examples: the programs for the trainers of other libraries."""

import pytest
import torch

from supcon_kernels import supcon_loss

# What the libraries do of their own accord.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def logged_losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_lightning(run_example):
    found = run_example("lightning_module")
    model, fresh = found["model"].cpu(), found["SupCon"]()
    assert found["trainer"].global_step == 21

    def loss(module):
        rows = slice(256)
        features = module.head(module(found["images"][rows]))
        return supcon_loss(features, found["dataset"].tensors[1][rows], temperature=0.1)

    assert loss(model) < loss(fresh) - 0.5


def test_transformers(run_example):
    found = run_example("transformers_trainer")
    losses = logged_losses(found["trainer"])
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.4

    # Without labels the model returns embeddings alone, which padding does not change.
    model, tokenizer = found["model"].eval().cpu(), found["tokenizer"]
    texts = ["the ship", "the rose near a lawn"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    short = tokenizer(texts[:1], return_tensors="pt")
    inputs = [(x["input_ids"], x["attention_mask"]) for x in (batch, short)]
    with torch.no_grad():
        both, alone = (model(*pair)["embeddings"] for pair in inputs)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def test_sentence_transformers(run_example):
    found = run_example("sentence_transformers_loss")
    losses = logged_losses(found["trainer"])
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.4

    model, texts = found["model"].cpu(), list(found["texts"])
    labels = torch.tensor(found["labels"])
    loss = found["SupervisedContrastiveLoss"](model)([model.preprocess(texts)], labels)
    embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    assert loss.item() == pytest.approx(
        supcon_loss(embeddings, labels, temperature=0.1).item(), rel=1e-5
    )
