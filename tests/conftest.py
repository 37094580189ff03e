"""Settings of the whole suite."""

import torch

# The tensors are small: a team of threads costs more than it brings.
torch.set_num_threads(1)
