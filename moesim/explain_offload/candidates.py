"""What is tried: kinds of offload as engines have them, then what each may vary."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["BUFFERS", "Candidate", "evictions", "kinds", "of_kind", "prefetches"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """engine: who could run it; "": no engine that we know of. kind: of offload. changes: of the scenario,
    `key=value`."""

    engine: str
    kind: str
    label: str
    changes: tuple[str, ...]

    def plus(self, label: str, *changes: str) -> Candidate:
        """With further changes; a key that is there already gets its new value."""
        keys = {change.partition("=")[0] for change in changes}
        kept = tuple(change for change in self.changes if change.partition("=")[0] not in keys)
        return replace(self, label=f"{self.label}, {label}" if label else self.label, changes=(*kept, *changes))


CACHE = "expert cache"
RESIDENT = Candidate("any", "none", "all experts on the device", ("policies.offload=none",))


def kinds(concurrency: int) -> list[Candidate]:
    """One or a few candidates of each kind of offload, the simplest first."""
    out = [
        RESIDENT,
        Candidate("llama.cpp", "llama_cpp", "first layers' experts on the CPU", ("policies.offload=llama_cpp",)),
    ]
    for strategy in ("uniform", "frequency", "dynamic"):
        policy = f'policies.offload={{"kind": "ktransformers", "strategy": "{strategy}"}}'
        out.append(Candidate("KTransformers", "ktransformers", f"{strategy} experts on the device, the others on the"
                             " CPU", (policy,)))  # fmt: skip
    out += [
        Candidate("Fiddler", "fiddler", "popular experts on the device, misses fetched or on the CPU",
                  ("policies.offload=fiddler",)),
        Candidate("", "expert_split", "popular experts on the device, misses where the layer ends first",
                  ("policies.offload=expert_split",)),
        *evictions(),
    ]  # fmt: skip
    if concurrency >= 8:
        out.append(Candidate("MoE-Lightning", "moe_lightning", "layers streamed", ("policies.offload=moe_lightning",)))
    return out


def of_kind(kind: str) -> Candidate:
    """A kind that was asked for and stands in no list: from another package, or a plugin."""
    return Candidate("", kind, kind, (f"policies.offload={kind}",))


def evictions() -> list[Candidate]:
    """Caches of experts that fetch what they miss."""
    out = []
    for eviction, pooled in (("lru", False), ("lfu", False), ("lfru", False), ("lfu", True)):
        where = "one cache for all layers" if pooled else "a cache a layer"
        changes = ("policies.offload=cached", f"policies.eviction={eviction}", f"tiers.pooled={str(pooled).lower()}")
        out.append(Candidate(CACHE, "cached", f"{where}, {eviction}", changes))
    return out


def prefetches(cache: Candidate) -> list[Candidate]:
    """A cache with each prefetch that learns from recorded routing. A gate that looks ahead, or a trained predictor,
    needs a recall that no trace holds, so they are not tried."""
    return [
        cache.plus(f"prefetch by {kind}, {ahead} ahead", f'policies.prefetch={{"kind": "{kind}", "ahead": {ahead}}}')
        for kind, depths in (("markov", (1, 2)), ("previous_token", (1,)), ("trace_matching", (2,)))
        for ahead in depths
    ]


BUFFERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("prompts in chunks of", "engine.max_num_batched_tokens", ("512", "2048", "8192")),
    ("staging buffers", "tiers.staging", ("1", "4")),
)
"""What device memory may be spent on besides experts: words, key of the scenario, values to try."""
