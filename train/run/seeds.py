"""Random seeds as pure functions of what they are for, so that nothing depends on history.

What a network draws itself (dropout) does depend on it: the state of that generator is saved.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from run.rules import broken, out_of_range


@dataclass
class SeedOptions:
    """Random numbers.

    Args:
        seed: Seed of weights, data order and augmentation.
    """

    seed: int = 0

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        rules = [(self.seed < 2**63, f"--seed {self.seed}: must be less than 2**63")]
        return broken(rules) + out_of_range(self, at_least={"seed": 0})


def seed_of(*key: int) -> int:
    """A 63-bit seed from integers such as (seed, epoch, step, view), zeros at the end aside."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a network on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` gave, as far as `device` has it."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
