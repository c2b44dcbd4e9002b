"""Claims about offload, caches, prefetch and compression beside ours: results/validation/offload.md.

    python benchmarks/offload/claims.py [--only NAME ...]

Each section is a function of its own, seeded; `--only` prints sections on screen and writes no page. Recorded routing
and published tables are read from ../shared/data where they are there.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import TARGET, Section, page, shown

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    options = parser.parse_args()
    made: list[Section] = []
    for name in options.only or SECTIONS:
        module, _, function = SECTIONS[name].partition(".")
        began = time.process_time()
        made.append(getattr(importlib.import_module(module), function)())
        print(f"{name}: {time.process_time() - began:.1f} CPU s", file=sys.stderr)
        if options.only:
            print(shown(made[-1]))
    if not options.only:
        (TARGET / "offload.md").write_text(page(TITLE, INTRO, made), "utf-8")


if __name__ == "__main__":
    main()
