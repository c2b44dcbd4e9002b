"""A small real MoE language model: bytes of Python's standard library, trained on a CPU under each balancing method.

Its routing is this project's own recorded traces, and its MaxVio curves stand beside the simulated ones. Needs torch
and numpy alone. `python -m moesim_kernels.lm --help` lists the commands.

Legend: B sequences of a batch, S tokens of a sequence, T = B S tokens, H hidden, E experts, I an expert's width,
K experts a token, L layers.
"""
