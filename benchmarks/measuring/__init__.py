"""How the loss is measured: workloads, providers and their truth, time, peak memory, the machine.

``workloads`` says which call, ``providers`` who computes it, ``admission`` whether it is right.
"""
