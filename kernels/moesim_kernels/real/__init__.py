"""The real executor: steps of a scenario run with real weights, kernels and transfers, for what is predicted to be held
against.

`work` makes a step of a scenario from a description, with the simulator's own traffic, routing, placement, capacity and
dispatch, and asks the simulator what it takes. Everything else here executes such work and never looks at a price.
"""
