"""A cache of experts written from the definitions, slowly: lists, dictionaries, everything counted again each time.

Nothing of `moesim.offload` is used, only the keyed draws of `moesim.rng` where a policy draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moesim.rng import generator

NEVER = 1 << 62


def cut(expert_TLK, num_experts, granularity, tokens):
    """[(step, keys)] of the look-up calls, steps of `tokens` tokens."""
    calls = []
    rows = [[list(map(int, ids)) for ids in token] for token in expert_TLK]
    for step, start in enumerate(range(0, len(rows), tokens)):
        batch = rows[start : start + tokens]
        layers = len(batch[0])
        if granularity == "batch":
            for layer in range(layers):
                calls.append((step, sorted({layer * num_experts + e for token in batch for e in token[layer]})))
            continue
        for token in batch:
            keys = [[layer * num_experts + e for e in ids] for layer, ids in enumerate(token)]
            if granularity == "layer":
                calls += [(step, sorted(set(ids))) for ids in keys]
            elif granularity == "token":
                calls.append((step, sorted({key for ids in keys for key in ids})))
            else:
                calls += [(step, [key]) for ids in keys for key in ids]
    return calls


@dataclass
class Play:
    """One replay. worth(self, key) of a policy says what a key is worth, the least leaves, of equals the lower key."""

    expert_TLK: list
    sequence_T: list
    num_experts: int
    granularity: str
    tokens: int
    slots: int
    """of a group"""
    pooled: bool
    bypass: bool
    kind: str
    parameters: dict
    seed: int = 0
    popularity: list = field(default_factory=list)
    initial: tuple = ()

    def run(self):
        """[(key, kind)] in the order of look-ups, and how many keys were evicted."""
        self.calls = cut(self.expert_TLK, self.num_experts, self.granularity, self.tokens)
        self.layers = len(self.expert_TLK[0])
        self.there = {}  # group -> keys in the order in which they entered
        self.touches = {}  # group -> keys in the order in which they were touched
        self.entered = {}  # key -> number of the call that fetched it, -1: there at the start
        self.draws = 0
        self.now = -1
        for key in self.initial:
            self.there.setdefault(self.group(key), []).append(key)
            self.touches.setdefault(self.group(key), []).append(key)
            self.entered[key] = -1
        out, evictions = [], 0
        for now, (step, call) in enumerate(self.calls):
            self.now, self.step, self.call = now, step, call
            for key in call:
                self.touches.setdefault(self.group(key), []).append(key)
            kinds = {key: "hit" for key in call if key in self.there.get(self.group(key), [])}
            misses = [key for key in call if key not in kinds]
            if self.bypass and self.kind not in ("lru", "fifo", "random", "partitioned"):
                misses.sort(key=self.worth, reverse=True)
            pinned = set(kinds)
            for key in misses:
                group = self.there.setdefault(self.group(key), [])
                kinds[key] = "load"
                if len(group) >= self.slots:
                    victim = self.victim([k for k in group if k not in pinned])
                    if victim is None or (self.bypass and not self.better(key, victim)):
                        kinds[key] = "stream"
                        continue
                    group.remove(victim)
                    evictions += 1
                group.append(key)
                pinned.add(key)
                self.entered[key] = self.now
            out += [(key, kinds[key]) for key in call]
        return out, evictions

    # -- decisions ----------------------------------------------------------------------------------------------
    def group(self, key):
        return 0 if self.pooled else key // self.num_experts

    def victim(self, keys):
        if not keys:
            return None
        if self.kind == "fifo":
            return keys[0]
        if self.kind == "random":
            block, at = divmod(self.draws, 1024)
            self.draws += 1
            return keys[int(generator(self.seed, "random eviction", block).random(1024)[at] * len(keys))]
        return min(keys, key=lambda key: (self.worth(key), key))

    def better(self, incoming, victim):
        if self.kind in ("lru", "fifo", "random", "partitioned"):
            return True
        if self.kind == "belady":
            return self.next_use(incoming) < self.next_use(victim)
        return self.worth(incoming) >= self.worth(victim)

    def worth(self, key):
        return getattr(self, f"worth_{self.kind}")(key)

    # -- facts --------------------------------------------------------------------------------------------------
    def last(self, key):
        """Number of the last touch within the group, from 1."""
        touches = self.touches.get(self.group(key), [])
        return max((n for n, k in enumerate(touches, 1) if k == key), default=0)

    def uses(self, key, since=-2):
        """Calls up to this one, the one that runs included, that asked for a key, not before call `since`."""
        return sum(key in keys for n, (_, keys) in enumerate(self.calls[: self.now + 1]) if n >= since)

    def uses_here(self, key):
        """Since it entered, the call that fetched it included; 1 for one that is asked for now and not there."""
        return self.uses(key, self.entered[key]) if key in self.there.get(self.group(key), []) else 1

    def next_use(self, key):
        later = (n for n in range(self.now + 1, len(self.calls)) if key in self.calls[n][1])
        return next(later, NEVER)

    # -- policies -----------------------------------------------------------------------------------------------
    def worth_lru(self, key):
        return self.last(key)

    def worth_lfu(self, key):
        count = self.uses_here if self.parameters.get("counts") == "resident" else self.uses
        return count(key), self.last(key)

    def worth_lfru(self, key):
        count = self.uses if self.parameters.get("counts") == "all" else self.uses_here
        age = len(self.touches[self.group(key)]) - self.last(key) + 1
        return count(key) / age, self.last(key)

    def worth_partitioned(self, key):
        members = sorted(self.there.get(self.group(key), []), key=self.last, reverse=True)
        protected = members[: math.ceil(self.parameters["privileged"] * len(members))]
        return (1, self.last(key), 0) if key in protected else (0, self.uses_here(key), self.last(key))

    def worth_static(self, key):
        return self.popularity[key], -key

    def worth_sliding(self, key):
        window = self.parameters["window"]
        if self.parameters["unit"] == "look_ups":
            return self.uses(key, self.now - window + 1), self.last(key)

        def end(step):  # tokens up to the end of a step
            return min((step + 1) * self.tokens, len(self.expert_TLK))

        past = self.calls[: self.now + 1]
        recent = [keys for step, keys in past if end(step) > end(self.step) - window]
        return sum(key in keys for keys in recent), self.last(key)

    def worth_belady(self, key):
        return -self.next_use(key)

    def worth_look_ahead(self, key):
        after = self.next_use(key)
        return (-after if after <= self.now + self.parameters["window"] else -NEVER), self.last(key)

    def worth_visits(self, key):
        return self.uses(key), key % self.num_experts

    def worth_scores(self, key):
        layer, current = key // self.num_experts, self.call[-1] // self.num_experts
        first = self.step * self.tokens
        running = set(self.sequence_T[first : first + self.tokens])
        seen = {(step, k) for step, keys in self.calls[: self.now + 1] for k in keys}
        counts = {}
        for token, (ids, sequence) in enumerate(zip(self.expert_TLK, self.sequence_T, strict=True)):
            for at, experts in enumerate(ids):
                for expert in experts:
                    k = at * self.num_experts + int(expert)
                    if sequence in running and (token // self.tokens, k) in seen:
                        counts[k] = counts.get(k, 0) + 1
        of_layer = sum(count for k, count in counts.items() if k // self.num_experts == layer)
        share = (counts.get(key, 0) / of_layer if of_layer else 1 / self.num_experts) / self.layers
        frequency = self.uses(key) / sum(len(keys) for _, keys in self.calls[: self.now + 1])
        to_come = self.parameters.get("layers", "to_come") == "to_come"
        weight = [1 - i / self.layers if to_come and i > current else 1.0 for i in range(self.layers)]
        topology = weight[layer] / (sum(weight) * self.num_experts)
        return (topology + 1e-6) * (share + 1e-6) * (frequency + 1e-6)

    def worth_predictive(self, key):
        layer, current = key // self.num_experts, self.call[-1] // self.num_experts
        predicted = self.predicted()
        asked = {k for step, keys in self.calls[: self.now + 1] if step == self.step for k in keys}
        group = range(self.layers) if self.pooled else [layer]
        held = {i: sum(k // self.num_experts == i for k in self.there.get(self.group(key), [])) for i in group}
        demand = {i: sum(k // self.num_experts == i for k in predicted) for i in group}
        if key in predicted and layer > current:
            return 4, -layer, self.last(key)
        if key in predicted and key not in asked:
            return 1, 0, self.last(key)
        total = sum(demand.values())
        over = total > 0 and held[layer] > sum(held.values()) * demand[layer] / total + 1e-9
        return 2 if over else 3, 0, self.last(key)

    def predicted(self):
        """Keys that the predictor names before this step."""
        first = self.step * self.tokens
        rng = generator(self.seed, "predictive eviction", self.step)
        hit = rng.random((self.layers, self.num_experts))
        other = rng.random((self.layers, self.num_experts))
        out = set()
        for layer in range(self.layers):
            needed = {int(e) for token in self.expert_TLK[first : first + self.tokens] for e in token[layer]}
            right = {e for e in needed if hit[layer, e] < self.parameters["accuracy"]}
            rest = sorted(set(range(self.num_experts)) - needed, key=lambda e: other[layer, e])
            out |= {layer * self.num_experts + e for e in [*right, *rest[: len(needed) - len(right)]]}
        return out
