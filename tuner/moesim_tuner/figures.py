"""Figures of a run that can be objectives or constraints: those of `moesim.observe`, and what is made of them with the
number of devices, a price and the power that a device draws.

Each derived figure is a constant times an observed one, or a constant over it, so its intervals and its ties are those
of the observed one.

Energy is an estimate, graded assumed: a device draws `power.busy_w` of its profile while its group steps and
`power.idle_w` while it waits, so with a busy share b it draws idle + (busy - idle) * b on average. Shipped profiles
know the board's limit alone: then a device counts as busy all the time. Both lean high, for steps that wait for memory
or links draw less than the limit. Hosts, switches and cooling are not in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moesim.errors import BadInput
from moesim.observe import FIGURES, Figure, Observation, Seen, observe
from moesim.record import REJECTED
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult
from moesim.training.result import TrainingResult
from moesim.tune_spec import TuneSpec

__all__ = [
    "figure",
    "figure_problems",
    "figures_of",
    "known_figures",
    "lacking",
    "more_is_better",
    "needs",
    "observed",
    "violation",
]

_OWN = {
    f.name: f
    for f in (
        Figure("devices", "devices", "", (), counted=True),
        Figure("tok_per_s_per_device", "tokens/s a device", "tokens/s", (), True),
        Figure("usd_per_mtok", "USD per million tokens", "USD", ()),
        Figure("usd_per_mtok_total", "USD per million tokens, prompts too", "USD", ()),
        Figure("kv_tokens", "KV cache, tokens", "tokens", (), True, counted=True),
        Figure("joule_per_token", "joules a token", "J", ()),
        Figure("rejected_share", "requests rejected", "share", (), absolute=True, counted=True, resolution=5e-4),
    )
}
_NEEDS = {
    "usd_per_mtok": "output tokens, of training the tokens trained; set tune.gpu_hour_usd",
    "usd_per_mtok_total": "prompt and output tokens, of training the tokens trained; set tune.gpu_hour_usd",
    "joule_per_token": "output tokens, of training the tokens trained; needs `power` in the device's profile",
    "goodput_req_per_s": "needs an slo",
    "slo_met_share": "needs an slo",
    "hit_rate": "needs tiers",
    "dropped_share": "needs a capacity",
    "rejected_share": "requests longer than max_model_len, or than the KV cache holds",
}
_TRAINING = ("step_mean_ms", "tok_per_s", "mfu", "maxvio")
_BOTH = (
    "max_over_mean_load", "hbm_used_bytes", "dropped_share", "nvlink_bytes", "nic_bytes", "devices",
    "tok_per_s_per_device", "usd_per_mtok", "usd_per_mtok_total", "joule_per_token",
)  # fmt: skip
_EXPERTS = ("max_over_mean_load", "hit_rate", "dropped_share", "nvlink_bytes", "nic_bytes", "maxvio")
_BLOCKS = {"goodput_req_per_s": "slo", "slo_met_share": "slo", "hit_rate": "tiers", "dropped_share": "capacity"}


def known_figures() -> Mapping[str, Figure]:
    """Every figure that can be an objective or a constraint, by name."""
    return {**FIGURES, **_OWN}


def figure(name: str) -> Figure:
    """Raises BadInput with the nearest name, and all of them, for one that is unknown."""
    known = known_figures()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise BadInput(f"unknown figure {name!r:.80}. {hint}Known: {', '.join(known)}")


def more_is_better(name: str) -> bool:
    """The direction in which a figure is better. Raises BadInput for an unknown one."""
    return figure(name).more_is_better


def lacking(scenario: Scenario, name: str, sets: Iterable[str] = ()) -> str:
    """Why no run of this scenario has the figure, as a sentence with its mend; "" where one can. sets: dotted paths of
    the fields that a search changes."""
    figure(name)
    touched = {path.split(".")[0] for path in sets}
    training = scenario.training is not None
    if training and name not in (*_TRAINING, *_BOTH):
        return f"{name}: training steps serve no requests; use tok_per_s, step_mean_ms, mfu or usd_per_mtok"
    if not training and name in _TRAINING:
        return f"{name}: it is of training steps alone; of requests use output_tok_per_s or tpot_p50_ms"
    if name.startswith("usd_") and (scenario.tune is None or scenario.tune.gpu_hour_usd is None):
        return f"{name}: the price of a device for an hour is not given; set tune.gpu_hour_usd"
    if name == "joule_per_token" and scenario.cluster.profile.power is None and "cluster" not in touched:
        device = scenario.cluster.profile.name
        return f"{name}: profile {device} does not say what the device draws; add power: {{busy_w, source}} to it"
    block = _BLOCKS.get(name)
    may_come = block in touched or (block == "capacity" and "policies" in touched)  # with a router's preset
    if block and getattr(scenario, block) is None and not may_come:
        return f"{name}: the scenario has no {block}; add one, or choose another figure"
    if name in _EXPERTS and not scenario.model.is_moe and "model" not in touched:
        return f"{name}: {scenario.model.name} is a dense model, which has no experts"
    return ""


def figure_problems(
    scenario: Scenario, spec: TuneSpec, sets: Iterable[str] = ()
) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong with a study's objectives and constraints: the place in the scenario and a sentence, for each.
    sets: as in `lacking`."""
    sets = tuple(sets)
    named: list[tuple[tuple[str | int, ...], str]] = [
        (("tune", "objectives", i), name) for i, name in enumerate(spec.objectives)
    ]
    named += [(("tune", "constraints", name), name) for name in spec.constraints]
    out = []
    for i, (place, name) in enumerate(named):
        try:
            told = lacking(scenario, name, sets)
        except BadInput as error:
            told = error.problems[0].message
        if not told and place[1] == "objectives" and name in spec.objectives[:i]:
            told = f"{name} is an objective twice; name each once"
        if told:
            out.append((place, told))
    return out


def observed(result: RunResult | TrainingResult, left_out: bool = True) -> Observation:
    """`moesim.observe.observe` with the figures that are made here."""
    seen = observe(result, left_out)
    return replace(seen, figures={**seen.figures, **_derived(result, seen.figures)})


def figures_of(result: RunResult | TrainingResult) -> dict[str, float]:
    """Every figure of a feasible run, by name, in its own unit."""
    return {name: found.value for name, found in observed(result, left_out=False).figures.items()}


def _derived(result: RunResult | TrainingResult, seen: Mapping[str, Seen]) -> dict[str, Seen]:
    devices = result.devices
    out = {"devices": Seen(float(devices))}
    if isinstance(result, RunResult) and result.kv is not None:
        parallel = result.scenario.parallel
        out["kv_tokens"] = Seen(float(result.kv.token_capacity * parallel.dp * parallel.replicas))
    rate = seen.get("output_tok_per_s", seen.get("tok_per_s"))
    total = seen.get("total_tok_per_s", seen.get("tok_per_s"))
    if isinstance(result, RunResult) and result.outcome is not None:
        out["rejected_share"] = Seen(float((result.outcome.requests.target == REJECTED).mean()))
    if rate is None or total is None:
        return out
    out["tok_per_s_per_device"] = _times(rate, 1 / devices)
    price, power = _price(result.scenario), result.scenario.cluster.profile.power
    if price is not None:
        # USD/h of all devices, over 3600 s/h, over tokens/s, times a million
        for name, tokens in (("usd_per_mtok", rate), ("usd_per_mtok_total", total)):
            out[name] = _over(price * devices / 3600 * 1e6, tokens)
    if power is not None:
        idle_w = power.busy_w if power.idle_w is None else power.idle_w
        busy = result.busy_share if isinstance(result, RunResult) else 1.0
        drawn_w = idle_w + (power.busy_w - idle_w) * busy
        joules = _over(drawn_w * devices, rate)
        # the longer the steps, the busier the devices, as far as arrivals and not steps set the pace (-rate.slope)
        more = (1 + rate.slope) * (power.busy_w - idle_w) * busy / drawn_w if drawn_w else 0.0
        out["joule_per_token"] = replace(joules, slope=joules.slope + more)
    return {name: found for name, found in out.items() if found.value < float("inf")}


def _price(scenario: Scenario) -> float | None:
    return None if scenario.tune is None else scenario.tune.gpu_hour_usd


def _times(seen: Seen, factor: float) -> Seen:
    held, left = seen.interval90, seen.without_G
    return Seen(
        seen.value * factor,
        None if held is None else (held[0] * factor, held[1] * factor),
        None if left is None else left * factor,
        seen.slope,
    )


def _over(above: float, seen: Seen) -> Seen:
    """above / seen."""
    if seen.value <= 0:
        return Seen(float("inf"))
    held, left = seen.interval90, seen.without_G
    return Seen(
        above / seen.value,
        None if held is None or held[0] <= 0 else (above / held[1], above / held[0]),
        None if left is None or not (left > 0).all() else above / left,
        -seen.slope,
    )


def violation(figures: Mapping[str, float], name: str, low: float | None, high: float | None) -> float:
    """How far a figure lies outside its limits: 0.1 is a tenth of the limit beyond it (where the limit is 0: 0.1 in the
    figure's own unit); <= 0 inside, the larger of two limits' values. A figure that the run does not have breaks its
    limit by 1. So violations of different figures are of one size, and a sampler can learn from how large they are."""
    value = figures.get(name)
    if value is None:
        return 1.0
    over = [] if high is None else [(value - high) / (abs(high) or 1.0)]
    under = [] if low is None else [(low - value) / (abs(low) or 1.0)]
    return max(over + under)


def needs(name: str) -> str:
    """What a figure counts and what it needs, for tables of figures; "" where its label says all."""
    return _NEEDS.get(name, "")
