"""Real operators of MoE layers, their measurement, and the hardware profiles that come of it.

`ops` and `bench` need torch, triton and numpy alone, so that a bare GPU machine can run them, `routers` and `lm` torch
and numpy; `fit`, `calibrate`, `profiles` and `cli` build on moesim. Importing this package imports none of them.
"""
