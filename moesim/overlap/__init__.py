"""Step programs that overlap exchange and compute, as pure functions of durations.

`timeline` is the reference: operations on streams, in the order they are issued. `pipeline`, `two_batch` and `fsmoe`
state the programs that systems issue and what they take, closed or layer by layer; `gradients` puts the sums of
gradients where they hide.
"""
