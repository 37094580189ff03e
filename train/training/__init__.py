"""How a step moves the weights: its optimiser, and the signs that it fails."""
