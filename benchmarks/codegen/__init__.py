"""What is known of the GPU kernels without a GPU: what they compile to, and a model of their time.

``kernels`` says what a row holds, ``compiler`` fills it, ``sass`` reads machine code, ``peers`` names
the kernels of others, ``chips`` the limits of a multiprocessor; ``model`` and ``tables`` read rows.
"""
