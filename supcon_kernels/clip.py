"""CLIP's loss as a module, with the arguments of open_clip's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from supcon_kernels import validation
from supcon_kernels.loss import supcon_loss
from supcon_kernels.problem import working_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ClipLoss(nn.Module):
    r"""CLIP's loss of images and texts, a drop-in for the class of that name in open_clip.

    Row i of the images is the positive of row i of the texts, in both directions. In plain PyTorch:

        logits = logit_scale * image_features @ text_features.T
        numbers = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2

    without the matrix of logits.

    Args:
        normalize: L2-normalise both features. Unit rows, which open_clip's models return, do not
            change.
        group: as in ``supcon_loss``. It replaces open_clip's ``rank``, ``world_size``,
            ``local_loss=True`` and ``gather_with_grad=True``.
        backend: as in ``supcon_loss``.

    Example:
        >>> criterion = ClipLoss()
        >>> loss = criterion(image_features, text_features, log_scale.exp())

    Source:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        ICML 2021, arXiv 2103.00020.
    """

    def __init__(
        self,
        *,
        normalize: bool = True,
        group: ProcessGroup | str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.group = group
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss of both directions.

        Args:
            image_features: (N, D).
            text_features: (N, D).
            logit_scale: 1/τ > 0, a number or a tensor of one element, which may require grad.
            logit_bias: must be None, because a bias does not change a softmax.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError: an argument that is not as described, named in the message.
        """
        validation.check_clip(image_features, text_features, logit_scale, logit_bias)
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.reshape(()).to(working_dtype(logit_scale))
        loss = supcon_loss(
            image_features,
            contrast_features=text_features,
            symmetric=True,
            temperature=1 / logit_scale,
            normalize=self.normalize,
            group=self.group,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
