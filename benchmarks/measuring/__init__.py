"""How a row is measured: on what machine, which call of the loss, by whom, in how much time and memory."""
