"""`moesim explain eplb`: is expert load balancing worth enabling for this traffic, how, at what cost, and why.

A trace-driven counterfactual: recorded counts in time order are played against every candidate (no EPLB; redundant
experts placed once; placed anew every so many steps), each placement fitted on the past alone, steps priced by the same
functions that price a simulation. See docs/eplb.md.
"""

from __future__ import annotations

from moesim.explain_eplb.answer import Answer, Ask, explain_eplb
from moesim.explain_eplb.report import render, to_json

__all__ = ["Answer", "Ask", "explain_eplb", "render", "to_json"]
