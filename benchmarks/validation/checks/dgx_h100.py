"""All-reduce on a DGX H100, as Vidur profiled it: 2, 4 and 8 GPUs, 2 KiB to 64 MiB. Its clock counts in steps of 1
us, so a time of 7 us is known to 7 % at best. Sizes of the table are bytes (64 MiB on 4 GPUs in 0.318 ms would else
be 630 GB/s)."""

from __future__ import annotations

import csv
import gzip
from functools import cache

import numpy as np
from moesim_kernels.fit.curves import spread
from moesim_kernels.fit.model import fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points

from benchmarks.validation.checks.h100_links import claim, shipped
from benchmarks.validation.rows import DATA, HELD_OUT, Row, Source, beside, found, interpolated

GROUP = "links"
TITLE = "All-reduce on a DGX H100"
SOURCE = Source(
    "Vidur DGX H100",
    "github.com/microsoft/vidur data/profiling/network",
    "file's sha256 17742cff4b04dd8e",
    "MIT",
    ("kernels/collectives/h100_dgx_all_reduce.csv.gz",),
    "DGX H100, NCCL",
)
CLAIM = claim("all_reduce")


@cache
def samples() -> Samples:
    """Medians by size and number of GPUs; a size that was timed twice counts twice."""
    with gzip.open(DATA / SOURCE.files[0], "rt", encoding="utf-8", newline="") as file:
        rows = [
            (int(r["num_workers"]), float(r["size"]), float(r["time_stats.all_reduce.median"]) * 1e6)
            for r in csv.DictReader(file)
        ]
    rows.sort()
    return sample_points("all_reduce", "", [(r[0],) for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def rows() -> list[Row]:
    """Eight sizes a number of GPUs kept; then the profile fitted to another machine's table, as it is shipped."""
    s = samples()
    mask = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        mask[at] = np.isin(s.size[at, 0], spread(s.size[at, 0].tolist(), 8))
    some, rest = s.where(mask), s.where(~mask)
    ours = predict(with_fits(shipped(), [fit_operator(some, shipped())]), rest)
    large = rest.size[:, 0] >= 1 << 20
    alone = interpolated(some, rest)
    return [
        Row(
            f"all-reduce, {name}",
            "8 sizes each of 2, 4, 8 GPUs",
            "all other sizes",
            found(ours[at], rest.ns[at]),
            HELD_OUT,
            (beside("interpolated", alone[at], rest.ns[at]),),
        )
        for name, at in (("1 to 64 MiB", large), ("under 1 MiB", ~large))
    ] + [
        Row(
            "all-reduce, 1 to 64 MiB, profile as shipped",
            "nothing of this table: h100_sxm.yaml (vLLM's kernel, NCCL 2.29)",
            "all sizes from 1 MiB",
            found(predict(shipped(), s.where(s.size[:, 0] >= 1 << 20)), s.ns[s.size[:, 0] >= 1 << 20]),
            CLAIM,
            note="another machine and an older NCCL: small buffers took it 20 to 40 us",
        )
    ]
