"""Placements by an exact solver (CP-SAT of OR-Tools), behind the Protocol of `moesim.placement`.

Each policy has, besides `place`, `solve(weight_LE, ctx) -> Solution`: the placement with its objective, a bound that is
proven, and what the solver said. A heuristic of `moesim.placement` goes first, then a bound; the solver runs where a
gap is left, on one thread, with a fixed seed and a limit on its deterministic time, so that the same input gives the
same placement everywhere.
"""
