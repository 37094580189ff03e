"""Signs that a training has failed: numbers that are not finite, a collapsed embedding."""

import math

from run.errors import UserError

REMEDY = "try a lower --learning_rate or a longer --warmup_epochs"
# With equal embeddings every similarity is the same: the loss is the logarithm of their number,
# whatever the temperature, times what it is scaled by. A run may come as near for some steps and leave again, so this is a
# warning, and of more steps than that takes.
COLLAPSE_TOLERANCE = 1e-3
COLLAPSE_STEPS = 20
# Each skipped step halves the scale of fp16's gradients, which begins at 2**16: overflow ends long
# before, and what remains is no overflow.
MAX_SKIPPED_IN_A_ROW = 40


class DivergenceCheck:
    """Watches the loss and the gradient of every step.

    Args:
        collapsed_loss: that of a network that embeds every image alike; None: it is no number.
        scale: what the loss is multiplied by.
        skips: whether a step whose gradient is not finite leaves the weights alone (fp16).
        num_skipped: such steps of the run so far.
    """

    def __init__(
        self,
        collapsed_loss: float | None,
        *,
        scale: float = 1.0,
        skips: bool = False,
        num_skipped: int = 0,
    ) -> None:
        self.scale = scale
        self.collapsed_loss = math.nan if collapsed_loss is None else collapsed_loss
        self.collapsed_steps = 0
        self.skips = skips
        self.num_skipped = num_skipped
        self.skipped_in_a_row = 0

    def check(self, step: int, learning_rate: float, loss: float, gradient: float) -> str | None:
        """A warning to show, once in a collapse, or None.

        Raises:
            UserError: the loss or the norm of the gradient is not finite; if such steps are skipped,
                the loss is not, or MAX_SKIPPED_IN_A_ROW were.
        """
        skipped = self.skips and math.isfinite(loss) and not math.isfinite(gradient)
        self.num_skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped and self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return None
        for name, value in (("loss", loss), ("norm of the gradient", gradient)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is {value} at step {step}, learning rate {learning_rate:.3g}: "
                    f"{REMEDY}"
                )
        near = abs(loss - self.collapsed_loss) < COLLAPSE_TOLERANCE * self.scale
        self.collapsed_steps = self.collapsed_steps + 1 if near else 0
        if self.collapsed_steps != COLLAPSE_STEPS:
            return None
        return (
            f"warning: the loss has stayed at {self.collapsed_loss:.4f} for {COLLAPSE_STEPS} steps "
            f"up to {step}, learning rate {learning_rate:.3g}: the loss of a network that "
            f"embeds every image alike. It has collapsed: {REMEDY}"
        )
