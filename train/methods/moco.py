"""MoCo v2: first views against a queue of keys, without labels. Chen et al., arXiv 2003.04297."""

from methods.momentum_queue import MomentumQueue


class MoCo(MomentumQueue):
    """The keys of an image's other views attract its first view."""

    uses_labels = False
