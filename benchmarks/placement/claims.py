"""Claims about placement, dispatch and communication beside the simulator's figures: results/validation/placement.md.

    python benchmarks/placement/claims.py [--only NAME ...]

Each section is a function of its own, seeded; `--only` prints sections on screen and writes no page. Recorded routing
and measured tables are read from ../shared/data where they are there.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import TARGET, Section, page, shown

TITLE = "Claims about placement, dispatch and communication beside the simulator's figures"
INTRO = [
    "Made by `python benchmarks/placement/claims.py` (some minutes on one core; `--only NAME` prints one section;"
    " recorded routing and measured tables are read from `../shared/data`). Only claims are typed in; every figure of"
    " ours is computed by the project's own policies, models and prices, seeded.",
    "What a paper leaves open is reconstructed, and the row says so. A placement fitted on the traffic it is judged on"
    " is marked in-sample and claims nothing.",
]
SECTIONS: dict[str, str] = {
    "eplb": "claims_balance.eplb",
    "swap": "claims_balance.swap",
    "gaps": "claims_gaps.gaps",
    "executed": "claims_dispatch.balance",
    "interval": "claims_interval.interval",
    "heldout": "claims_heldout.heldout",
    "replicas": "claims_balance.replicas",
    "llep": "claims_dispatch.llep",
    "two_nodes": "claims_dispatch.two_nodes",
    "deepep_v1": "claims_comm.deepep_v1",
    "deepep_v2": "claims_comm.deepep_v2",
    "back_ends": "claims_comm.back_ends",
    "dispatch_caps": "claims_comm.dispatch_caps",
    "fsmoe": "claims_overlap.fsmoe_section",
    "two_batch": "claims_overlap.two_batch_section",
    "affinity": "claims_affinity.affinity_table",
    "exflow": "claims_affinity.exflow",
    "moetuner": "claims_affinity.moetuner",
    "speculative": "claims_local.speculative",
    "fastermoe": "claims_balance.fastermoe",
    "lina": "claims_balance.lina",
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
        (TARGET / "placement.md").write_text(page(TITLE, INTRO, made), "utf-8")


if __name__ == "__main__":
    main()
