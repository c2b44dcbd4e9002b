"""DeepEP as vLLM 0.24 calls it on 8 H100, with all that its layer does around the kernels. Nothing was ever fitted to
this table; the shipped profile knows the kernels alone, as SGLang's benchmark times them, and V2 from its README."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from benchmarks.validation.checks.h100_links import CLAIM, shipped
from benchmarks.validation.rows import Errors, Row, Source
from benchmarks.validation.tables import Part, profiles
from moesim.cost.operators import Operators

GROUP = "links"
TITLE = "DeepEP inside vLLM, nothing fitted"
SOURCE = Source(
    "aiconfigurator vLLM exchange",
    "PyPI aiconfigurator-core",
    "0.12.0",
    "Apache-2.0",
    ("kernels/h100_sxm/comm/vllm/0.24.0/moe_a2a_perf.parquet",),
    "8 x H100 SXM, vLLM 0.24.0",
)
TABLE = "comm/vllm/0.24.0/moe_a2a_perf.parquet"
KINDS = {
    "deepep_ht": ("normal", "normal kernels, 20 SMs"),
    "deepep_ll": ("ll", "low-latency kernels"),
    "deepep_v2_context": ("v2", "V2, prompts, 64 SMs"),
}


@cache
def table() -> dict[str, np.ndarray]:
    """The file."""
    return Part().read(TABLE)


def rows() -> list[Row]:
    """Each kind of kernel, dispatch and combine in bf16, ranked by size of time as well."""
    profiles()
    import fit_exchange as fx

    ops, out = Operators(shipped()), []
    for name, (kind, what) in KINDS.items():
        t = fx.pick(table(), table()["comm_backend"] == name)
        errors = Errors()
        for way in ("dispatch", "combine"):
            w = fx.pick(t, t["phase"] == way)
            copies = w["topk"] if kind == "ll" else fx.distinct(8, w["topk"])
            near = copies * 7.0 / 8.0 * w["num_tokens"] * w["hidden_size"] * fx.BF16
            kernel: Any = kind
            errors.add(ops.all_to_all(near, 0.0, 8, 1, 8, kernel, way, int(w["sms"][0])).ns, w["latency"] * 1e3)  # type: ignore[arg-type]
        out.append(
            Row(
                f"DeepEP {what}",
                "nothing of this table: h100_sxm.yaml",
                "all of it",
                errors.found(ranked=True),
                CLAIM,
                note="what vLLM does around the kernels (layouts, counts to the host, copies) is not priced"
                if kind == "normal"
                else "",
            )
        )
    return out
