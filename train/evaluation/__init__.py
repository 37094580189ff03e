"""How good an embedding is: k-NN, a linear probe, pictures."""
