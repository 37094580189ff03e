"""SimCLR: the views of one image attract each other. Chen et al., arXiv 2002.05709."""

from methods.contrastive import Contrastive


class SimCLR(Contrastive):
    """The contrastive loss without labels."""

    uses_labels = False
