"""A run around its training: folder, checkpoints, records, processes, command line."""
