"""What a run says of numbers that are not finite, and of a collapse."""

import math

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from methods.options import MethodOptions
from run.errors import UserError
from supcon_kernels import supcon_loss
from training.divergence import COLLAPSE_STEPS, MAX_SKIPPED_IN_A_ROW, DivergenceCheck


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_not_finite_is_named_with_step_rate_and_remedy(name, value):
    measured = {"loss": 1.0, "gradient": 1.0} | {name: value}
    message = rf"the .*{name} is {value} at step 7, learning rate 0\.25: try .*--warmup_epochs"
    with pytest.raises(UserError, match=message):
        DivergenceCheck(math.log(255)).check(7, 0.25, **measured)


@pytest.mark.parametrize(
    ("temperature", "base"), [(0.05, None), (0.5, None), (0.1, 1), (0.1, 0.07)]
)
@pytest.mark.parametrize("labels", [torch.arange(128) % 10, None], ids=["supcon", "simclr"])
def test_collapse_is_named_once(labels, temperature, base):
    generator = torch.Generator().manual_seed(0)
    features = torch.ones(128, 2, 16) + 1e-4 * torch.randn(128, 2, 16, generator=generator)
    loss = supcon_loss(features, labels, temperature=temperature, base_temperature=base).item()
    scale = MethodOptions(temperature=temperature, base_temperature=base).scale
    check = DivergenceCheck(scale * math.log(255), scale=scale)
    said = [check.check(step, 0.2, loss, 1.0) for step in range(1, 3 * COLLAPSE_STEPS)]
    assert [step for step, text in enumerate(said, start=1) if text] == [COLLAPSE_STEPS]
    assert "has collapsed: try a lower --learning_rate" in said[COLLAPSE_STEPS - 1]


def test_loss_that_leaves_the_plateau_is_no_collapse():
    check = DivergenceCheck(math.log(255))
    stuck = math.log(255)
    for step in range(1, 3 * COLLAPSE_STEPS):
        loss = stuck - 0.1 if step % (COLLAPSE_STEPS - 1) == 0 else stuck
        assert check.check(step, 0.2, loss, 1.0) is None


def test_skipped_steps_are_counted_until_they_are_too_many_in_a_row():
    check = DivergenceCheck(math.log(255), skips=True, num_skipped=3)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        assert check.check(step, 0.2, 1.0, math.inf) is None
    check.check(100, 0.2, 1.0, 1.0)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        check.check(step, 0.2, 1.0, math.nan)
    assert check.num_skipped == 3 + 2 * (MAX_SKIPPED_IN_A_ROW - 1)
    with pytest.raises(UserError, match="norm of the gradient is nan at step 200"):
        check.check(200, 0.2, 1.0, math.nan)


def test_loss_that_is_not_finite_is_not_skipped():
    with pytest.raises(UserError, match="loss is nan"):
        DivergenceCheck(math.log(255), skips=True).check(1, 0.2, math.nan, math.nan)
