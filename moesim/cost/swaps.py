"""All-to-alls of tokens, by back end: how long the busiest ports take.

Letters: n bytes through the busiest NVLink port, f through the busiest NIC, s multiprocessors (SMs) that run the
kernel. Parameters are `fits["all_to_all/KIND"]` of a device profile, whose defaults stand in `DEFAULTS`:

- `normal` (DeepEP's normal kernels, deepseek-ai/DeepEP, MIT): SMs copy tokens, NVLink and NICs work at the same time.
  In a node   t = launch + knee(n / (NVLink nvlink_eff), n / (s sm_per_s));
  across      t = notify + launch
                + knee(n / (NVLink nvlink_eff), (n / forward_per_s + f / sm_nic_per_s) / s, f / (NIC nic_eff)).
  `knee` is the larger, a little rounded: measured rates grow with SMs in proportion until a link is full.
  `notify` is the exchange of counts before each dispatch and combine, which the published bandwidths leave out. Sums at
  the receiving end make combine slower: `combine_launch_ns`, `combine_forward_per_s`, `combine_nic_per_s`.
- `v2` (DeepEP V2): the same shape; parameters from its README.
- `ll` (DeepEP's low-latency kernels): no SM is waited for; t = launch + max(n / ..., f / ...).
- `pairwise` (NCCL's or gloo's all-to-all, point-to-point): a message to every peer, one after the other, costs peer_ns
  (nic_peer_ns across nodes) besides its bytes; the two levels work at the same time. counts_ns: what a dispatch inside
  a node takes to tell every rank how many rows will come; 0 where it was measured without. shared (0 to 1): how far
  the ports of a node are one medium, as loopback in one memory is: n is then (1 - shared) of the busiest port's bytes
  and `shared` of the mean port's. 0: ports of their own, both ways at once.
- `hierarchical` (Tutel's 2DH, arXiv:2206.03382, figure 15): all-to-all in the node, tokens put together by target node
  (read and written once), all-to-all across nodes: the three in turn, nodes - 1 far messages for each rank.

The launch across nodes grows with log2 of the nodes (`nic_step_ns`). Measured residuals over bytes correct all of it
where a profile has curves: key (kind, ranks) over n inside a node, or ("KIND/WAY", ranks) where the ways were measured
apart, key ("KIND/nodes/WAY", ranks) over f across nodes, `notify` apart.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from moesim.arrays import FloatArray, U8Array
from moesim.cost.curves import Residual, residual_of
from moesim.hardware import ASSUMED, INTERPOLATED, DeviceProfile

__all__ = ["DEFAULTS", "SwapKind", "Swaps", "Way", "knee", "undo"]

SwapKind = Literal["normal", "v2", "ll", "pairwise", "hierarchical"]
Way = Literal["dispatch", "combine"]

_NORMAL = {
    "launch_ns": 13.0, "nvlink_eff": 0.63, "sm_per_s": 0.59, "sms": 20.0, "nic_launch_ns": 3.3, "nic_step_ns": 4.3,
    "nic_eff": 0.89, "forward_per_s": 0.47, "sm_nic_per_s": 1.28, "combine_launch_ns": 12.8,
    "combine_forward_per_s": 0.37, "combine_nic_per_s": 0.86, "notify_ns": 6.6, "notify_step_ns": 8.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, float]] = {
    "normal": _NORMAL,
    # DeepEP V2's README: one node of B200 643 and 675 GB/s with 24 SMs, 726 and 740 with 64, local copies included;
    # H100 90 and 81 GB/s on two nodes with 12 SMs, 61 and 61 on four with 6; latencies as of V1
    "v2": _NORMAL
    | {"nvlink_eff": 0.72, "sm_per_s": 0.46, "sms": 12.0, "forward_per_s": 1.06, "sm_nic_per_s": 2.4,
       "combine_forward_per_s": 0.91, "combine_nic_per_s": 2.4, "nic_eff": 0.93},
    "ll": {"launch_ns": 4.3, "nvlink_eff": 0.52, "sms": 0.0, "nic_launch_ns": 4.0, "nic_step_ns": 1.1, "nic_eff": 0.93},
    # across nodes nothing is measured: launch and cost of a peer are assumed
    "pairwise": {"launch_ns": 3.0, "nvlink_eff": 0.6, "sms": 16.0, "peer_ns": 0.09, "nic_launch_ns": 8.0,
                 "counts_ns": 0.0, "shared": 0.0,
                 "nic_step_ns": 0.0, "nic_peer_ns": 0.4, "nic_eff": 0.85},
}  # fmt: skip
"""Those of the H100, rounded: `_ns` in launches of a CUDA graph's kernel, `_per_s` (bytes that an SM moves) in shares
of the HBM's rate for an SM; `sms`: what they are measured at, or what a kind takes"""
DEFAULTS["hierarchical"] = DEFAULTS["pairwise"]
_COPY_EFF = 0.8
"""share of the HBM bandwidth that a strided copy reaches"""


class Swaps:
    """Prices all-to-alls on a profile's links. Sizes in bytes, float64 arrays of one shape; answers ns and grade."""

    def __init__(self, profile: DeviceProfile, eager: bool) -> None:
        self.profile = profile
        self.eager = eager
        self._residuals: dict[tuple[str, int], Residual] = {}
        self._copies: dict[tuple[int, int], float] = {}
        self._values = {kind: self._fitted(kind) for kind in get_args(SwapKind)}

    def all_to_all(
        self, near: FloatArray, far: FloatArray, ranks: int, nodes: int, top_k: int, way: Way = "dispatch", sms: int = 0
    ) -> tuple[FloatArray, U8Array]:
        """The faster of DeepEP's two kernels. near, far: a token once a rank, once a node; the low-latency kernels'
        copies are made of these as if experts were picked evenly."""
        normal, grade_normal = self.swap("normal", near, far, ranks, nodes, way, sms)
        quick, grade_quick = self.swap("ll", *self._undone(near, far, ranks, nodes, top_k), ranks, nodes, way)
        take = quick < normal
        return np.where(take, quick, normal), np.where(take, grade_quick, grade_normal)

    def swap(
        self,
        kind: SwapKind,
        near: FloatArray,
        far: FloatArray,
        ranks: int,
        nodes: int,
        way: Way = "dispatch",
        sms: int = 0,
        total: FloatArray | None = None,
    ) -> tuple[FloatArray, U8Array]:
        """One phase of an exchange. near, far: bytes through the busiest NVLink port and NIC, as the kind counts
        copies. sms: of the kernel, 0: as measured. total: bytes over NVLink that all ranks send, None: as many as if
        all ports were as busy."""
        fit = self._values[kind]
        port = near
        if total is not None and nodes == 1 and fit.get("shared", 0.0) > 0:
            near = near + fit["shared"] * (total / ranks - near)
        if kind == "hierarchical":
            return self._two_level(near, far, ranks, nodes)
        if nodes > 1:
            ns = self.across_ns(kind, near, far, ranks, nodes, way, sms)
            ratio, grade = self._residual(f"{kind}/nodes/{way}", ranks).at((far,))
        else:
            ns = self.inside_ns(kind, near, ranks, sms, way)
            name = f"{kind}/{way}" if self._known(f"{kind}/{way}") else kind
            ratio, grade = self._residual(name, ranks).at((port,))
        if sms and sms != fit["sms"] and "sm_per_s" in fit:
            grade = np.maximum(grade, INTERPOLATED)
        return self.notify_ns(kind, nodes) + ns * np.exp(ratio), grade

    def notify_ns(self, kind: SwapKind, nodes: int) -> float:
        """The part of the time across nodes that exchanges counts."""
        fit = self._values[kind]
        return _steps(fit.get("notify_ns", 0.0), fit.get("notify_step_ns", 0.0), nodes) if nodes > 1 else 0.0

    def counts(self, kind: SwapKind) -> bool:
        """Whether exchanges of the kind were measured with the counts that go before the rows."""
        return self._values[kind].get("counts_ns", 0.0) > 0

    def sms(self, kind: SwapKind) -> int:
        """Multiprocessors that the kernels of a kind take where nobody says how many."""
        return int(self._values[kind]["sms"])

    # -- physics, residuals and notify apart --------------------------------------------------------------------
    def inside_ns(self, kind: SwapKind, near: FloatArray, ranks: int, sms: int, way: Way = "dispatch") -> FloatArray:
        fit, node = self._values[kind], self.profile.node
        launch = fit["launch_ns"] + node.nvlink_latency_ns + fit.get("peer_ns", 0.0) * (ranks - 1)
        if way == "dispatch":
            launch += fit.get("counts_ns", 0.0)
        wire = near / (node.nvlink_bytes_per_s * fit["nvlink_eff"] * 1e-9)
        if "sm_per_s" not in fit:
            return launch + wire
        return np.asarray(launch + knee(wire, near / ((sms or fit["sms"]) * fit["sm_per_s"])))

    def across_ns(
        self, kind: SwapKind, near: FloatArray, far: FloatArray, ranks: int, nodes: int, way: Way, sms: int
    ) -> FloatArray:
        fit, node = self._values[kind], self.profile.node
        wire = near / (node.nvlink_bytes_per_s * fit["nvlink_eff"] * 1e-9)
        air = far / (node.nic_bytes_per_s * fit["nic_eff"] * 1e-9)
        first = "combine_launch_ns" if way == "combine" and "combine_launch_ns" in fit else "nic_launch_ns"
        launch = _steps(fit[first], fit["nic_step_ns"], nodes) + node.nic_latency_ns
        if "sm_per_s" in fit:
            names = (
                ("combine_forward_per_s", "combine_nic_per_s")
                if way == "combine"
                else ("forward_per_s", "sm_nic_per_s")
            )
            copied = (near / fit[names[0]] + far / fit[names[1]]) / (sms or fit["sms"])
            return np.asarray(launch + knee(knee(wire, copied), air))
        per_node = -(-ranks // nodes)
        near_ns = wire + fit.get("peer_ns", 0.0) * (per_node - 1)
        far_ns = air + fit.get("nic_peer_ns", 0.0) * (ranks - per_node)
        return launch + np.maximum(near_ns, far_ns)

    def _two_level(self, near: FloatArray, far: FloatArray, ranks: int, nodes: int) -> tuple[FloatArray, U8Array]:
        """2DH: inside, align, across. One node: the first alone."""
        per_node = min(-(-ranks // nodes), ranks)
        ns, grade = self.swap("pairwise", near, far, per_node, 1)
        ns = np.where(near > 0, ns, 0.0)
        if nodes == 1:
            return ns, grade
        fit, node = self._values["hierarchical"], self.profile.node
        # tokens are put together before both steps: each byte read and written twice
        moved = near * (per_node / max(1, per_node - 1))
        align = 2 * (self.profile.graph_launch_ns + 2.0 * moved / (self.profile.hbm_bytes_per_s * _COPY_EFF * 1e-9))
        air = far / (node.nic_bytes_per_s * fit["nic_eff"] * 1e-9)
        start = fit["nic_launch_ns"] + node.nic_latency_ns + fit["nic_peer_ns"] * (nodes - 1)
        return ns + align + start + air, np.full(near.shape, ASSUMED, dtype=np.uint8)

    # -- parameters ---------------------------------------------------------------------------------------------
    def _fitted(self, kind: str) -> dict[str, float]:
        profile = self.profile
        own = profile.fits.get(f"all_to_all/{'pairwise' if kind == 'hierarchical' else kind}", {})
        units = {"_ns": profile.graph_launch_ns, "_per_s": profile.hbm_bytes_per_s / profile.num_sms}
        values = {
            name: value * next((unit for end, unit in units.items() if name.endswith(end)), 1.0)
            for name, value in DEFAULTS[kind].items()
        }
        values |= own
        return {name: value * 1e-9 if name.endswith("_per_s") else value for name, value in values.items()}

    def _residual(self, kind: str, ranks: int) -> Residual:
        found = self._residuals.get((kind, ranks))
        if found is None:
            found = residual_of(self.profile, "all_to_all", (kind, ranks), "", self.eager)
            if not self._known(kind):
                # nothing of the kind was measured here
                found = Residual(None, "", found.bare if kind in ("normal", "ll") else ASSUMED)
            self._residuals[kind, ranks] = found
        return found

    def _known(self, kind: str) -> bool:
        """Whether the profile has a curve of this kind."""
        return any(c.key[0] == kind for c in self.profile.curves.get("all_to_all", ()))

    def _undone(
        self, near: FloatArray, far: FloatArray, ranks: int, nodes: int, top_k: int
    ) -> tuple[FloatArray, FloatArray]:
        """Bytes of the low-latency kernels, which send a pair once, across nodes over NICs alone."""
        pairs = near * self._undo(ranks, top_k)
        if nodes == 1:
            return pairs, far
        per_node = -(-ranks // nodes)
        return pairs * ((per_node - 1) / (ranks - 1)), far * self._undo(nodes, top_k)

    def _undo(self, places: int, top_k: int) -> float:
        found = self._copies.get((places, top_k))
        if found is None:
            found = self._copies[places, top_k] = undo(places, top_k)
        return found


def knee(a: FloatArray, b: FloatArray) -> FloatArray:
    """(a^16 + b^16)^(1/16), elementwise: between max(a, b) and 1.045 max(a, b)."""
    top = np.maximum(a, b)
    share = np.minimum(a, b) / np.maximum(top, 1e-300)
    return np.asarray(top * (1.0 + share**16) ** 0.0625)


def undo(places: int, top_k: int) -> float:
    """Copies sent for each deduplicated one: k (P-1)/P over the mean distinct remote places of k uniform picks."""
    if places <= 1 or top_k <= 1:
        return 1.0
    distinct = (places - 1) * (1.0 - (1.0 - 1.0 / places) ** top_k)
    return max(1.0, top_k * (places - 1) / places / distinct)


def _steps(first: float, step: float, nodes: int) -> float:
    return first + step * math.log2(nodes)
