"""Claims of routing papers beside the simulator's figures: results/validation/routing.md, with pictures beside it.

    python benchmarks/routing/claims.py [--only NAME ...]

Each section is a function of its own, seeded; `--only` prints sections on screen and writes no page. Recorded scores
are read from ../shared/data where they are there, real training curves from results/validation/routing_maxvio.json.
"""

from __future__ import annotations

from claim_page import command

TITLE = "Claims of routing papers beside the simulator's figures"
INTRO = [
    "Made by `python benchmarks/routing/claims.py` (about three minutes on one core; `--only NAME` prints one"
    " section;"
    " recorded scores are read from `../shared/data`). Only claims are typed in; every figure of ours is computed"
    " by the project's own routers, models and prices, seeded.",
    "Quality (loss, accuracy, perplexity) is outside a simulator and stands nowhere here. Recorded scores: ESFT's"
    " DeepSeek-V2-Lite traces `intent` and `summary` (64 experts, 6 recorded a token, 26 layers; scores below the"
    " sixth are drawn). No paper here used that model, so these figures say how far a claim carries over.",
    "",
    "**Not blind.** What is *asked* of a row is ours, and most was written with a first run's figures on the table."
    " Where a figure then missed what was asked, the rule stays and the row counts as missed; a rule added later is"
    " a row of its own or stricter than the first one. Decided after figures had been seen:",
    "",
    "- the row on MaxVio at most 1 was added when the real curves missed the stricter 0.3, which stays;",
    "- *identity* was set apart from *reproduced*, which had held those rows;",
    "- simulated against real AvgMaxVio: the factor of 2, first asked of the mean over all steps alone, is asked of"
    " the last 50 steps too, as a mean may hide an end that is off by more;",
    "- Upcycling's 13B: 5 % was asked first and 13.7B misses it; the reading of 13B as cut off, under which it"
    " passed, is dropped;",
    "- scores of ESFT are taken about each token's mean (or its highest score) instead of as log probabilities, on"
    " which sigmoid gates with u = 1e-2 do not settle: listed under *fitted* where the bias is concerned, and"
    " loss-free balancing's 0.04 is a scale, not a number reproduced;",
    "- OpenMoE's balanced mix is judged at factor 2.0 alone (at 1.25 it would have passed the 10 % asked before);",
    "- tails are compared on scores about the mean (as log probabilities 3 of 36 pairs changed places, all of"
    " `loss_free`);",
    "- what is asked of top-p by layer was judged by eye before, and its rule written after the figures;",
    "- OmniMoE's row from published parameters alone is arithmetic, whose result was known when its factor was chosen.",
]

SECTIONS: dict[str, str] = {
    "adamoe": "claims_counts.adamoe",
    "top_p": "claims_counts.top_p",
    "expert_choice": "claims_counts.expert_choice",
    "maxvio": "claims_load.maxvio_section",
    "openmoe": "claims_load.openmoe",
    "omnimoe": "claims_cost.omnimoe",
    "halting": "claims_counts.halting",
    "upcycling": "claims_cost.upcycling",
    "capacity": "claims_cost.capacity",
    "ec_dlm": "claims_cost.ec_dlm",
    "schedules": "claims_counts.schedules",
    "tails": "claims_load.tails",
    "left_out": "claims_counts.left_out",
}


if __name__ == "__main__":
    command(__doc__, SECTIONS, "routing.md", TITLE, INTRO)
