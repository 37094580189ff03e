"""The GPU kernels without a GPU: what they compile to, and a model of the time they take.

``kernels`` defines a row, ``compiler`` fills it, ``sass`` reads machine code, ``chips`` holds the
limits of a multiprocessor, ``peers`` the kernels of other packages. ``model`` and ``tables`` read rows.
"""
