"""What serving engines' options have in common."""

from __future__ import annotations

from moesim.exports import emit
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["add_map", "finish", "memory_share"]


def add_map(sheet: Sheet, winner: Winner, engine: str) -> str | None:
    """The engine's file of the winner's placement, accepted by its checker, among the sheet's files; its path."""
    if winner.target is None:
        return None
    (made,) = emit(winner.target, [engine], winner.folder)
    sheet.files[made.file] = made.text
    sheet.notes += made.notes
    return f"{winner.folder}/{made.file}"


def memory_share(sheet: Sheet, winner: Winner, why: str) -> None:
    """gpu_memory_utilization of an engine that counts otherwise."""
    share = winner.scenario.engine.gpu_memory_utilization
    if share != 0.9:
        sheet.cannot("engine.gpu_memory_utilization", share, why)
    else:
        sheet.carries("engine.gpu_memory_utilization")


def finish(sheet: Sheet, winner: Winner) -> Settings:
    """The settings, with what no engine's command says: replicas, weights, and the policies of the simulator's own."""
    s = winner.scenario
    sheet.carries("parallel.replicas")
    if s.parallel.replicas > 1:
        sheet.notes.append(f"start this {s.parallel.replicas} times, on devices of its own each, behind a balancer")
    if winner.nodes > 1:
        sheet.notes.append(
            f"one server spans {winner.nodes} nodes of {s.cluster.gpus_per_node}: start it on each, as the engine's"
            " guide to several nodes says"
        )
    formats = dict.fromkeys((s.model.weight_dtype, s.model.expert_dtype))
    sheet.notes.append(f"simulated with weights in {'/'.join(formats)}: take a checkpoint of that format")
    if winner.untold:
        sheet.notes.append(winner.untold)
    return sheet.settings()
