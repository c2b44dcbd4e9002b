"""A mini-runtime: a real MoE model with its experts in slow memory, a real cache and real transfers, driven by the
objects that the simulator uses (`moesim.offload`).

```
weights (one file) ──source──> link: a thread, a queue, one transfer at a time ──> slots: buffers of one expert each
routes ──replay──> moesim's Driver ──> RealDevice: dense layers (model), experts of the slots, waits ──> step times
```
`device` is `moesim.offload.drive.Device` with real memory; what decides is moesim's own. Three links carry experts:
`disk` (a file, past the page cache, into RAM), `memory` (RAM into RAM: what a machine without a GPU can try of the
next one) and `cuda` (page-locked RAM into device memory on a stream of its own). docs/runtime.md.

Legend: T tokens of a step, L layers, E experts, K experts a token, H hidden, F inner size of an expert, S sequences;
a key is `layer * E + expert`, a slot the number of a buffer.
"""
