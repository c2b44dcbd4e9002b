"""Micro-benchmarks of the operators: plan, clocks, log, harness. Needs torch, triton and numpy alone."""
