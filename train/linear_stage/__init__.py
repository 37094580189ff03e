"""The linear stage: a classifier on the encoder of a run, by a convex fit or as papers train it."""
