"""Random seeds as pure functions of what they are for, so that nothing depends on history."""

import numpy as np


def seed_of(*key: int) -> int:
    """A 63-bit seed from integers such as (seed, epoch, step, view); any change gives another."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
