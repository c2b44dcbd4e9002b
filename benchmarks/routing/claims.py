"""Claims of routing papers beside the simulator's figures: results/validation/routing.md, with pictures beside it.

    python benchmarks/routing/claims.py [--only NAME ...]

Each section is a function of its own, seeded; `--only` prints sections on screen and writes no page. Recorded scores
are read from ../shared/data where they are there, real training curves from results/validation/routing_maxvio.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import claims_cost
import claims_counts
import claims_load
from claim_page import TARGET, Section, page, shown

SECTIONS: dict[str, Callable[[], Section]] = {
    "adamoe": claims_counts.adamoe,
    "top_p": claims_counts.top_p,
    "expert_choice": claims_counts.expert_choice,
    "maxvio": claims_load.maxvio_section,
    "openmoe": claims_load.openmoe,
    "omnimoe": claims_cost.omnimoe,
    "halting": claims_counts.halting,
    "upcycling": claims_cost.upcycling,
    "capacity": claims_cost.capacity,
    "ec_dlm": claims_cost.ec_dlm,
    "schedules": claims_counts.schedules,
    "tails": claims_load.tails,
    "left_out": claims_counts.left_out,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    options = parser.parse_args()
    made = []
    for name in options.only or SECTIONS:
        began = time.process_time()
        made.append(SECTIONS[name]())
        print(f"{name}: {time.process_time() - began:.1f} CPU s", file=sys.stderr)
        if options.only:
            print(shown(made[-1]))
    if not options.only:
        (TARGET / "routing.md").write_text(page(made), "utf-8")


if __name__ == "__main__":
    main()
