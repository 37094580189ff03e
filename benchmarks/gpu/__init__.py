"""What runs on a GPU, a stage a file: ``items(place)`` names its parts, and each part yields rows.

gpu_check.py is the command. ``runner`` starts every stage in a process group of its own (``worker``)
and writes what it says to the journal; ``summary`` and ``report`` read that. What the kit knows of
the Triton backend's insides stands in ``backend`` alone.
"""
