"""DeepEP across nodes of 8 H100: the tables that SGLang 0.5.6 measured on 2, 4 and 8 nodes. They are in NVIDIA's
package alone (82 MB), so this check runs where it is installed: `pip install --no-deps aiconfigurator-core==0.12.0`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from moesim_kernels.profiles.aic_package import installed

from benchmarks.validation.checks.h100_links import CLAIM, LATENCY, NVLINK, all_to_all, deep_ep, exchanging
from benchmarks.validation.rows import Beside, Errors, Row, Source, of_errors
from benchmarks.validation.tables import Part, profiles

GROUP = "links"
TITLE = "DeepEP across nodes of 8 H100"
SOURCE = Source(
    "aiconfigurator H100 nodes",
    "PyPI aiconfigurator-core",
    "0.12.0",
    "Apache-2.0",
    (),
    "2, 4, 8 nodes of 8 x H100 SXM, NICs of 50 GB/s",
)
PACKAGE = "aiconfigurator_core"
TABLES = "systems/data/h100_sxm/comm/sglang/0.5.6.post2"


def rows() -> list[Row]:
    """A number of nodes held out whole; physics and what the other nodes' curves say of it."""
    profiles()
    import fit_exchange as fx

    folder = installed().systems / "data" / "h100_sxm"
    out = []
    kinds = [errors.relative() for row, errors in (*all_to_all(), *deep_ep()) if row.held_out.endswith("between")]
    for kind, name, fitted, unseen in (
        ("normal", "DeepEP normal kernels", (2,), 4),
        ("ll", "DeepEP low-latency kernels", (2, 8), 4),
    ):
        # tables inside one node are fitted whole, these with the unseen nodes left out
        own = Part(lambda t, fitted=fitted: np.isin(t["node_num"], (1, *fitted)), folder)
        fits, curves, _ = fx.inside(own, NVLINK, LATENCY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of the held-out nodes, which are empty
            across = (fx.across(own, fits, NVLINK) if kind == "normal" else fx.across_quick(own, fits))[0]
        fits["all_to_all/normal"] |= {"notify_ns": 0.0, "notify_step_ns": 0.0}  # transmission alone is compared
        across = [c for c in across if len(c.axes[0])]
        ops, errors, wire = exchanging(fits, [*curves, *across]), Errors(), Errors()
        t = Part(lambda t, unseen=unseen: t["node_num"] == unseen, folder).read(f"{fx.NODES}{kind}_perf.parquet")
        if kind == "normal":
            t = fx.pick(t, t["dispatch_sms"] == t["combine_sms"])
        tokens, ranks = t["num_token"].astype(float), 8 * unseen
        for way, width in (("dispatch", fx.FP8), ("combine", fx.BF16)):
            head = fx.HEADER if kind == "ll" and way == "dispatch" else 0
            if kind == "normal":
                near = tokens * fx.distinct(ranks, 8) * (1 - 1 / ranks) * 7168 * width
                far = tokens * fx.distinct(unseen, 8) * (1 - 1 / unseen) * 7168 * width
                ns = t[f"{way}_transmit_us"] * 1e3
            else:
                far = tokens * 8 * (1 - 1 / unseen) * (7168 * width + head)
                near, ns = np.zeros(len(tokens)), t[f"{way}_avg_t_us"] * 1e3
            sms = t["dispatch_sms"] if kind == "normal" else np.zeros(len(tokens))
            for number in sorted(set(sms.tolist())):
                at = sms == number
                errors.add(ops.all_to_all(near[at], far[at], ranks, unseen, 8, kind, way, int(number)).ns, ns[at])
            wire.add(1e4 + far / 50.0, ns)
        f = wire.found()
        others = (Beside("latency + bytes at the NIC's rate", f.median, f.p90),)
        nodes = " and ".join(str(n) for n in fitted)
        out.append(Row(name, f"1 node, and {nodes} nodes", f"{unseen} nodes, all of it", errors.found(), CLAIM, others))
        kinds.append(errors.relative())
    # each kind weighs the same, however many points it has: its quantiles at 1,000 places
    even = np.concatenate([np.quantile(one, (np.arange(1000) + 0.5) / 1000) for one in kinds])
    f = replace(of_errors(even), n=sum(map(len, kinds)))
    held_out = f"{len(kinds)} kinds of the two tables, each weighing the same"
    return [*out, Row("every exchange of tokens together", "as in their rows", held_out, f, CLAIM)]
