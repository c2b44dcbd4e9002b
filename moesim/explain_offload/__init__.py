"""`moesim explain offload`: what fits into a device that is smaller than the model, and which settings serve it best.

Candidates are scenarios: kinds of offload as engines have them, caches with evictions and prefetches, splits of device
memory between KV cache, experts and prompt buffers. Each is simulated on requests of the length asked for; policies
learn from one part of the routing, and are judged on the other. See docs/offload.md.
"""

from __future__ import annotations

from moesim.explain_offload.answer import Answer, explain_offload
from moesim.explain_offload.ask import Ask
from moesim.explain_offload.report import render, to_json

__all__ = ["Answer", "Ask", "explain_offload", "render", "to_json"]
