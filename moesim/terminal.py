"""What a person reads: the summary of a run, the progress bar, the lists of models and profiles.

Everything is drawn from the JSON report (`RunResult.to_json()`), so that the screen cannot say what the file does
not. Plain text where the output is no terminal or NO_COLOR is set; fits any width from 60 columns.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moesim.scenario.load import Scenario

__all__ = ["bound_by", "model_table", "profile_table", "progress_bar", "router_table", "summary"]

_GIB = 2**30
_LATENCIES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "gap between tokens",
    "e2e_ms": "whole request",
}
_MEMORY_NAMES = {
    "dense_weights": "weights, all but experts",
    "expert_weights": "expert weights",
    "expert_staging": "experts on the move",
    "expert_cache": "cache of experts",
    "expert_buffers": "buffers of streamed experts",
    "expert_extra": "kept for compressed experts",
    "experts": "home of all experts",
    "activations": "activations",
    "exchange_buffers": "exchange buffers",
    "runtime": "runtime",
    "optimizer_states": "optimizer states",
    "zero_buffers": "buffers of shared weights",
    "kv_peak": "KV cache at its peak",
}
_GRADES = ("measured", "interpolated", "extrapolated", "assumed")
_CAUSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention": ("attention", ("attention",)),
    "stall": ("waiting for experts' weights", ("expert_stall",)),
    "cpu": ("experts on the CPU", ("experts_on_cpu", "cpu_sync")),
    "experts": ("the routed experts", ("experts", "moe")),
    "network": ("moving tokens between ranks", ("dispatch", "combine", "all_", "reduce_scatter")),
    "host": ("the engine's work on the host", ("host",)),
    "rebalance": ("moving experts", ("rebalance",)),
}
_MENDS = {
    "stall": "more room for experts, a faster link or fewer bits a weight would help most",
    "cpu": "more experts on the device, or a host with more memory bandwidth, would help most",
    "attention": "contexts are long for what the batch does",
    "experts": "more tokens a step would use each expert's weights better",
    "network": "a faster network, a smaller EP group or fewer nodes would help most",
    "host": "the steps are short: larger batches or a leaner engine would help most",
    "rebalance": "a longer interval, a threshold or asynchronous moves would help most",
    "dense": "the dense layers' products; more tensor parallelism or a lower precision would help most",
}


def _console(file: IO[str] | None = None, width: int | None = None) -> Console:
    return Console(file=file or sys.stdout, width=width, highlight=False, soft_wrap=False, emoji=False)


def summary(report: dict[str, Any], scenario: Scenario, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the summary of a feasible run, of requests or of training steps."""
    console = _console(file, width)
    found = report["summary"]
    training = found.get("mode") == "training"
    with console.capture() as captured:
        _head(console, report, scenario)
        _memory(console, found)
        if training:
            _training_speed(console, found)
        else:
            _speed(console, found)
            _latency(console, found)
        _time(console, found)
        if training:
            _training_balance(console, found)
            _training_links(console, found)
        else:
            _balance(console, found)
            _tiers(console, found)
            _rebalance(console, found)
            _routing(console, found)
            _links(console, found)
        _honesty(console, report)
    _write(console, captured.get())


def _write(console: Console, text: str) -> None:
    """Out, without the blanks that tables leave at the ends of lines."""
    console.file.write("".join(f"{line.rstrip()}\n" for line in text.splitlines()))


# ---- parts of the summary


def _head(console: Console, report: dict[str, Any], scenario: Scenario) -> None:
    p, cluster = scenario.parallel, scenario.cluster
    console.print(Text(report["name"], style="bold"), Text(f"seed {report['seed']}", style="dim"))
    layout = f"tp {p.tp}, dp {p.dp}, ep {p.ep}" + (f", {p.replicas} replicas" if p.replicas > 1 else "")
    console.print(
        Text(f"{scenario.model.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.profile.name}, {layout}")
    )
    kinds = scenario.policies.kinds
    shown = [f"{key} {kinds[key]}" for key in ("batching", "balancer") if key in kinds]
    if scenario.model.is_moe:
        shown = [f"{key} {kinds[key]}" for key in ("routing", "placement", "dispatch") if key in kinds] + shown
    console.print(Text(", ".join(shown), style="dim"))


def _say(console: Console, text: str, style: str = "") -> None:
    """One or more lines, set in by two."""
    for line in textwrap.wrap(text, console.width - 2):
        console.print(Text(f"  {line}", style=style))


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold cyan"))


def _speed(console: Console, found: dict[str, Any]) -> None:
    _section(console, "Speed")
    rates, intervals = found["throughput"], found["throughput"].get("interval90") or {}
    table = _table("", ">", "", ">")
    for name, label in (
        ("output_tok_per_s", "output tokens/s"),
        ("output_tok_per_s_per_device", "  of each device"),
        ("total_tok_per_s", "all tokens/s"),
        ("req_per_s", "requests/s"),
    ):
        if rates.get(name) is not None:
            table.add_row(label, _number(rates[name]), _range(intervals.get(name)), "")
    if found.get("offered_req_per_s") is not None:
        table.add_row("  offered", _number(found["offered_req_per_s"]), "", "")
    good = found.get("goodput_req_per_s")
    if good is not None:
        interval = (found.get("interval90") or {}).get("goodput_req_per_s")
        table.add_row("good requests/s", _number(good), _range(interval), "")
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    requests, tokens = found["requests"], found["tokens"]
    parts = [f"{requests['completed']:,} requests completed"]
    parts += [f"{requests[k]:,} {k}" for k in ("rejected", "unfinished", "preempted") if requests.get(k)]
    text = f"{', '.join(parts)} in {_number(found['duration_s'])} s simulated, {found['steps']:,} steps; "
    text += f"{tokens['prompt']:,} prompt and {tokens['output']:,} output tokens"
    if found.get("busy_share") is not None:
        text += f"; at work {_percent(found['busy_share'])} of the time"
    _say(console, text, "dim")


def _latency(console: Console, found: dict[str, Any]) -> None:
    if all(found.get(name) is None for name in _LATENCIES):
        return
    _section(console, "Latency, ms")
    table = _table("", ">mean", ">p50", ">p90", ">p99", ">90% interval of p50")
    for name, label in _LATENCIES.items():
        row = found.get(name)
        if row is not None:
            figures = [_number(row[key]) for key in ("mean", "p50", "p90", "p99")]
            table.add_row(label, *figures, _range((row.get("interval90") or {}).get("p50")))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _time(console: Console, found: dict[str, Any]) -> None:
    shares = {k: v for k, v in (found.get("time_share") or {}).items() if v}
    if not shares:
        return
    _section(console, "Where the time goes")
    ordered = sorted(shares.items(), key=lambda kv: (-kv[1], kv[0]))
    shown, rest = ordered[:9], ordered[9:]
    if rest:
        shown.append((f"{len(rest)} others", sum(share for _, share in rest)))
    most = max(share for _, share in shown)
    table = _table("", ">", "")
    for name, share in shown:
        table.add_row(name.replace("_", " "), _percent(share), _bar(share / most, max(10, console.width // 3)))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    if found.get("mode") == "training":
        phases = sorted(found["phase_share"].items(), key=lambda kv: (-kv[1], kv[0]))
        _say(console, ", ".join(f"{name.replace('_', ' ')} {_percent(share)}" for name, share in phases if share))
    else:
        _say(console, bound_by(found))


def bound_by(found: dict[str, Any]) -> str:
    """One sentence: what takes most of a step, how much of it is waiting, and what follows."""
    shares: dict[str, float] = found.get("time_share") or {}
    groups = dict.fromkeys((*_CAUSES, "dense"), 0.0)
    for name, share in shares.items():
        cause = next((c for c, (_, starts) in _CAUSES.items() if name.startswith(starts)), "dense")
        groups[cause] += share
    cause = max(groups, key=lambda c: (groups[c], c))
    label = _CAUSES[cause][0] if cause in _CAUSES else "the dense layers"
    text = f"Bound by {label}: {_percent(groups[cause])} of the time"
    balance = found.get("balance") or {}
    idle = balance.get("expert_idle_share")
    if cause == "experts" and idle is not None and idle >= 0.1:
        return (
            f"{text}, and {_percent(idle)} of that is waiting for the busiest rank; "
            "a better placement or redundant experts would help most."
        )
    return f"{text}; {_MENDS[cause]}."


def _balance(console: Console, found: dict[str, Any]) -> None:
    balance = found.get("balance")
    if not balance:
        return
    _section(console, "Balance of the experts")
    lines = [
        f"busiest rank / mean: {_number(balance['max_over_mean_load'])} in load, "
        f"{_number(balance['lockstep'])} over all layers and steps"
    ]
    if balance.get("planned") is not None:
        lines.append(
            f"planned by the placement: {_number(balance['planned'])}; proven: no placement plans less than "
            f"{_number(balance['bound'])}"
        )
    if balance.get("expert_idle_share") is not None:
        lines.append(f"ranks wait {_percent(balance['expert_idle_share'])} of the experts' time for the slowest one")
    hottest = balance.get("hottest")
    if hottest:
        lines.append(
            f"hottest place: layer {hottest['layer']}, rank {hottest['rank']} with "
            f"{_number(hottest['max_over_mean_load'])} times the mean, {_percent(hottest['expert_share_of_rank'])} "
            f"of it from expert {hottest['expert']}"
        )
    for line in lines:
        _say(console, line)


def _tiers(console: Console, found: dict[str, Any]) -> None:
    """Only where experts come and go between memories."""
    cache = found.get("cache")
    if not cache:
        return
    _section(console, "Experts between memories")
    slots, kinds, asked = cache["slots"], cache["policies"], max(cache["look_ups"], 1)
    idle = () if slots["cache_per_layer"] else ("eviction",)
    chosen = ", ".join(f"{key} {kind}" for key, kind in kinds.items() if kind != "none" and key not in idle)
    stay, room = (_number(slots[key]) if slots[key] else "none" for key in ("fixed_per_layer", "cache_per_layer"))
    _say(
        console,
        f"{chosen}; of {slots['experts_per_layer']:g} experts a layer {stay} stay on the device, {room} have room in "
        "its cache",
    )
    for family, proof in cache["proof"].items():
        if proof:
            text = f"{family} {kinds[family]}: {proof['of']} {proof['objective']:.5g}, bound {proof['bound']:.5g}, "
            solver = "solver asked" if proof["solver_units"] else "no solver asked"
            _say(console, f"{text}gap {proof['gap']:.2%} ({proof['status'].replace('_', ' ')}, {solver})")
    if cache["look_ups"]:
        names = {"hit": "there", "late": "on their way", "load": "fetched", "stream": "streamed", "cpu": "on the CPU"}
        parts = [
            f"{_percent(cache['found'][key] / asked)} {name}" for key, name in names.items() if cache["found"][key]
        ]
        text = f"found, of experts looked up: {', '.join(parts)}; hit rate {_percent(cache['hit_rate'])}"
        _say(console, f"{text}, by rows {_percent(cache['hit_rate_rows'])}")
        _say(console, f"experts in use, a layer and pass: {_number(cache['experts_per_look_up'])}")
    for lane, label in (("to_device", "to the device"), ("to_host", "back to the host"), ("nvme", "from NVMe")):
        moved = {reason: size for reason, size in cache["bytes"][lane].items() if size}
        if moved:
            why = ", ".join(f"{_size(size)} {reason.replace('_', ' ')}" for reason, size in moved.items())
            text = f"{label}: {why}; {_size(cache['bytes_per_token'][lane])} a token"
            _say(console, f"{text}, link busy {_percent(cache['link_busy_share'][lane])} of the time")
    if cache["stall_ms_per_step"]:
        text = f"waiting for experts' weights: {_number(cache['stall_ms_per_step'])} ms a step, "
        text += f"{_number(cache['stall_ms_per_token'])} ms a token; an expert's way takes "
        _say(console, f"{text}{_number(cache['fetch']['ms'])} ms")
    ahead = cache["prefetch"]
    if ahead:
        text = f"prefetched: {ahead['asked']:,} experts, {ahead['cancelled']:,} given up"
        _say(console, f"{text}; {_percent(ahead['accuracy'] or 0.0)} of the others were used")
    bound = cache["bound"]
    if bound:
        text = f"bounds on these look-ups: Belady's MIN finds {_percent(bound['min'])}, with bypass"
        text += f" {_percent(bound['min_bypass'])}"
        if bound["time_over_bound"] is not None:
            text += f"; the run takes {_number(bound['time_over_bound'])} times what computing or its transfers need"
        _say(console, text)


def _rebalance(console: Console, found: dict[str, Any]) -> None:
    """Only where experts move."""
    moved = found.get("rebalance")
    if not moved:
        return
    _section(console, "Rebalancing")
    skipped = moved["skipped_balanced"] + moved["skipped_busy"]
    _say(console, f"asked {moved['asked']} times, moved {moved['moved']}, left alone {skipped}")
    if not moved["moved"]:
        return
    total = max(sum(moved["slots"].values()), 1)
    parts = [f"{_percent(n / total)} {name.replace('_', ' ')}" for name, n in moved["slots"].items() if n]
    _say(console, f"slots of a new map: {', '.join(parts)}")
    _say(
        console,
        f"each moves {_size(sum(moved['bytes'].values()) / moved['moved'])} in "
        f"{_number(moved['transfer_s'] / moved['moved'] * 1e3)} ms; steps paid "
        f"{_number(moved['step_time_s'])} s in all",
    )
    if moved["planned_before"] is not None:
        _say(
            console,
            f"busiest rank / mean over the window: {_number(moved['planned_before'])} before, "
            f"{_number(moved['planned_after'])} planned",
        )


def _routing(console: Console, found: dict[str, Any]) -> None:
    """Only where routers ran on scores: experts a token, drops, and what another model of the scores would give."""
    routing, drops = found.get("routing") or {}, found.get("drops")
    scores = routing.get("scores")
    if not scores and not drops:
        return
    _section(console, "Routing")
    _say(console, f"experts a token: {_number(routing['experts_per_token'])}")
    if drops:
        text = f"dropped by the capacity: {_percent(drops['share'])} of the chosen"
        tenths = [share for share in drops["by_position"] if share is not None]
        if drops["share"] and tenths:
            text += f"; {_percent(tenths[0])} in a sequence's first tenth, {_percent(tenths[-1])} in its last"
        _say(console, text)
    if scores and scores.get("other"):
        one, other = scores["figures"], scores["other"]
        _say(
            console,
            "scores are partly assumed; 2,048 tokens routed at once under two models of them: "
            + "; ".join(
                f"{f['score_model']}: {_number(f['experts_per_token'])} experts a token, "
                f"{_percent(f['dropped_share'])} dropped, busiest rank {_number(f['max_over_mean_rank'])} and expert "
                f"{_number(f['max_over_mean_expert'])} of the mean"
                for f in (one, other)
            ),
        )


def _memory(console: Console, found: dict[str, Any]) -> None:
    for tier, use in (found.get("memory") or {}).items():
        names = {"dram": "Memory of a node for experts, DRAM", "nvme": "Memory of a node for experts, NVMe"}
        _section(console, names.get(tier, f"Memory of a rank, {tier.upper()}"))
        capacity = use["capacity"]
        table = _table("", ">GiB", "")
        for name, size in use["by"].items():
            if size and name != "kv_cache":
                bar = _bar(size / capacity, max(10, console.width // 3))
                table.add_row(_MEMORY_NAMES.get(name, name.replace("_", " ")), f"{size / _GIB:.1f}", bar)
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        text = f"fits: {use['used'] / _GIB:.1f} of {capacity / _GIB:.1f} GiB used at the peak"
        if use["by"].get("kv_cache"):
            share = use["by"].get("kv_peak", 0) / use["by"]["kv_cache"]
            text += f"; the KV cache has {use['by']['kv_cache'] / _GIB:.1f} GiB and was {_percent(share)} full"
        _say(console, text)


def _links(console: Console, found: dict[str, Any]) -> None:
    links = found.get("links")
    if not links:
        return
    _section(console, "Links")
    for name, link in links.items():
        text = f"{name}: {_size(link['bytes'])}"
        if link.get("busy_share") is not None:
            text += f", tokens on their way {_percent(link['busy_share'])} of the time"
        _say(console, text)
    if overlap := found.get("overlap"):
        text = f"overlap {overlap['kind']}: {_percent(overlap['hidden_share'])} of the exchange hidden"
        if overlap["kind"] != "two_batch":
            text += f", {_number(overlap['chunks'])} chunks a layer"
        _say(console, text)


def _training_speed(console: Console, found: dict[str, Any]) -> None:
    _section(console, "Speed")
    step, rates = found["step_ms"], found["throughput"]
    table = _table("", ">", "", ">")
    table.add_row("a step, ms", _number(step["mean"]), _range(step["interval90"]["mean"]), "")
    for name in ("p50", "p99"):
        table.add_row(f"  {name}", _number(step[name]), _range(step["interval90"][name]), "")
    for name, label in (("tok_per_s", "tokens/s"), ("tok_per_s_per_device", "  of each device")):
        table.add_row(label, _number(rates[name]), _range(rates["interval90"][name]), "")
    table.add_row("model FLOP utilisation", _percent(found["mfu"]), "", "")
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    steps = found["training"]
    text = f"{steps['steps']:,} steps simulated, {steps['measured_steps']:,} measured, of "
    text += f"{steps['tokens_per_step']:,} tokens in {steps['micro_batches']:,} micro-batches"
    overlap = found["overlap"]
    if overlap["gradient_reduction_ms"]:
        text += f"; gradients are summed in {_number(overlap['gradient_reduction_ms'])} ms a step, of which "
        text += f"{_number(overlap['gradient_reduction_exposed_ms'])} ms are waited for"
    _say(console, text, "dim")


def _training_balance(console: Console, found: dict[str, Any]) -> None:
    balance, drops = found.get("balance"), found.get("drops")
    if not balance:
        return
    _section(console, "Balance of the experts")
    lines = [
        f"busiest expert over the mean, less 1 (MaxVio): {_number(balance['maxvio'])} of a step's batch, "
        f"{_number(balance['maxvio_micro_batch'])} of a micro-batch; {_number(balance['maxvio_first_step'])} in the "
        f"first step, {_number(balance['maxvio_last_step'])} in the last",
        f"busiest rank / mean: {_number(balance['max_over_mean_load'])} in load; ranks wait "
        f"{_percent(balance['expert_idle_share'])} of the experts' time for the slowest one",
        f"{_number(found['routing']['experts_per_token'])} experts a token",
    ]
    if drops:
        lines[-1] += f", {_percent(drops['share'])} of the choices dropped"
        if drops["run_over_kept"] > 1.0005:
            lines[-1] += f"; kernels run {_number(drops['run_over_kept'])} rows for each that is kept"
    for line in lines:
        _say(console, line)


def _training_links(console: Console, found: dict[str, Any]) -> None:
    links = found.get("links")
    if not links:
        return
    _section(console, "Links")
    for name, link in links.items():
        parts = [("exchange_bytes", "tokens and their gradients"), ("reduction_bytes", "gradients and weights")]
        told = ", ".join(f"{_size(link[key])} {label}" for key, label in parts if link[key])
        _say(console, f"{name}: {told}")


def _honesty(console: Console, report: dict[str, Any]) -> None:
    _section(console, "What this rests on")
    made, found = report["provenance"], report["summary"]
    shares = made.get("shares") or {}
    parts = [f"{_percent(shares[g])} {g}" for g in _GRADES if shares.get(g)]
    lines = [f"times from profile {made['profile']}" + (f": {', '.join(parts)}" if parts else "")]
    error = found.get("error")
    if error:
        lines.append(
            f"error of a step (1 sigma): {_percent(error['profile'])} profile, {_percent(error['bank'])} routing"
        )
    replay = found.get("replay")
    if replay:
        total = max(sum(replay.values()), 1)
        parts = [f"{_percent(count / total)} {name}" for name, count in replay.items()]
        lines.append(f"routing of the tokens: {', '.join(parts)}")
    lines += [f"{key}: {made[key]}" for key in ("routing", "requests") if made.get(key)]
    for line in lines:
        _say(console, line, "dim")
    for warning in report.get("warnings") or ():
        _say(console, f"note: {warning}", "yellow")


# ---- figures


def _table(*columns: str) -> Table:
    """A table without lines; a column that starts with `>` is set to the right."""
    table = Table(box=None, show_header=any(c.lstrip(">") for c in columns), pad_edge=False, header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=not table.columns)
    return table


def _number(value: float | None) -> str:
    """Three or four significant digits, thousands parted."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 or not size else f"{value:.3g}"


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
    return f"{text}%"


def _range(interval: list[float] | None) -> str:
    return f"{_number(interval[0])} .. {_number(interval[1])}" if interval else ""


def _bar(share: float, width: int) -> Text:
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="cyan")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            break
        size /= 1000
    return f"{_number(size)} {unit}"


# ---- the progress bar and the lists


@contextlib.contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr while the block runs, on a terminal only; yields what tells it the share that is done."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        shown = 0.0

        def advance(share: float) -> None:
            nonlocal shown
            if share - shown >= 0.005:  # drawing costs more than the event that moved it
                shown = share
                progress.update(task, completed=share)

        yield advance


def model_table(file: IO[str] | None = None, width: int | None = None) -> None:
    """The models of workloads/models: parameters, layers, experts, attention."""
    from moesim.scenario.files import home, names_in
    from moesim.scenario.load import load_model

    table = _table("model", ">total", ">active", ">layers", ">experts", ">top-k", "", "weights")
    for name in names_in("workloads/models"):
        m = load_model(home() / "workloads/models" / f"{name}.yaml")
        experts = (str(m.num_experts), str(m.top_k)) if m.is_moe else ("-", "-")
        dtypes = [m.weight_dtype, m.expert_dtype] if m.is_moe else [m.weight_dtype]
        table.add_row(
            name,
            _billions(m.total_params()),
            _billions(m.active_params()),
            str(m.num_layers),
            *experts,
            m.attention.kind,
            "/".join(dict.fromkeys(dtypes)),
        )
    console = _console(file, width)
    with console.capture() as captured:
        console.print(table)
    _write(console, captured.get())


def router_table(file: IO[str] | None = None, width: int | None = None) -> None:
    """Mechanisms and the presets that stand for papers: what each is, its source, and what of it is ours."""
    from moesim.policy import policy_class, policy_kinds
    from moesim.scenario.presets import presets

    console = _console(file, width)
    with console.capture() as captured:
        kinds = _table("mechanism", "parameters")
        for kind in policy_kinds("routing"):
            kinds.add_row(kind, ", ".join(policy_class("routing", kind).model_fields) or "-")
        console.print(kinds)
        console.print()
        table = _table("preset", "mechanism", "also changes", "source")
        for preset in presets().values():
            changes = [f"model.{key}" for key in preset.model] + [f"capacity.{key}" for key in preset.capacity]
            source = preset.source + (" (reconstruction)" if preset.reconstruction else "")
            table.add_row(preset.name, preset.kind, ", ".join(changes) or "-", source)
        console.print(table)
    _write(console, captured.get())


def _billions(params: int) -> str:
    return f"{_number(params / 1e9)} B"


def profile_table(file: IO[str] | None = None, width: int | None = None) -> None:
    """The device profiles of hw_profiles: memory, bandwidth, bf16 rate, links, kind."""
    from moesim.scenario.files import home, names_in
    from moesim.scenario.load import load_profile

    table = _table("profile", "times", ">GiB", ">HBM GB/s", ">bf16 TFLOP/s", ">NVLink GB/s", ">NIC GB/s")
    for name in names_in("hw_profiles"):
        p = load_profile(home() / "hw_profiles" / f"{name}.yaml")
        rates = (p.hbm_bytes_per_s / 1e9, p.flop_per_s.get("bf16", 0) / 1e12)
        links = (p.node.nvlink_bytes_per_s / 1e9, p.node.nic_bytes_per_s / 1e9)
        table.add_row(name, p.kind, f"{p.memory_bytes / _GIB:.0f}", *map(_number, (*rates, *links)))
    console = _console(file, width)
    with console.capture() as captured:
        console.print(table)
    _write(console, captured.get())
