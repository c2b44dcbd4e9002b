"""Claims about offload, caches, prefetch and compression beside ours: results/validation/offload.md.

    python benchmarks/offload/claims.py [--only NAME ...]

Each section is a function of its own, seeded; `--only` prints sections on screen and writes no page. Recorded routing
and published tables are read from ../shared/data where they are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import command

TITLE = "Claims about offload, caches, prefetch and compression beside the simulator's figures"
INTRO = [
    "Made by `python benchmarks/offload/claims.py` (some minutes on one core; `--only NAME` prints one section;"
    " recorded routing and published tables are read from `../shared/data`). Only claims are typed in; every figure of"
    " ours is computed by the project's own caches, policies, devices and prices, seeded. What a real machine did"
    " beside what was simulated is on its own page, offload_real.md; how fast the cache cores are, on"
    " offload_speed.md.",
    "What a paper leaves open is reconstructed, and the row says so.",
    "",
    "**Not blind.** What is *asked* of a row is ours, and most was written with a first run's figures on the table. A"
    " parameter chosen by looking at published figures stands under *fitted*. Routing recorded on one model stands in"
    " for that of others where the row says so.",
]
SECTIONS: dict[str, str] = {
    "hit_rates": "claims_caches.cache_hit_rates",
    "segments": "claims_caches.segments",
    "esft": "claims_caches.recorded_layers",
    "synthetic": "claims_caches.synthetic",
    "recorded": "claims_prefetch.recorded",
    "crossover": "claims_prefetch.crossover",
    "expertflow": "claims_scheduling.expertflow",
    "read_me": "claims_scheduling.read_me",
    "others": "claims_prefetch.others",
    "ktransformers": "claims_residency.ktransformers",
    "toys": "claims_residency.moe_lrc_toys",
    "mixtral_offloading": "claims_residency.mixtral_offloading",
    "fiddler": "claims_residency.fiddler",
    "moe_lightning": "claims_residency.moe_lightning",
    "sockets": "claims_residency.ktransformers_sockets",
    "sizes": "claims_precision.sizes",
    "expert_weave": "claims_precision.expert_weave",
    "conditional": "claims_conditional.conditional",
    "low_precision": "claims_conditional.low_precision",
}
"""Name of a section -> module and function that make it."""


if __name__ == "__main__":
    command(__doc__, SECTIONS, "offload.md", TITLE, INTRO)
