"""A measured profile from the tables of aiconfigurator-core: fitted, held out, and written with its sources."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.arrays import BoolArray, FloatArray
from moesim.cost.physics import DEFAULTS
from moesim.errors import BadInput, Problem
from moesim.hardware import Curve, DeviceProfile
from moesim_kernels.fit.curves import curves, every_size, spread, write_curves, write_whole
from moesim_kernels.fit.model import Fitted, fit_operator, predict, profile_yaml, with_fits
from moesim_kernels.fit.physics import fit_physics, physics_ns
from moesim_kernels.fit.samples import Samples
from moesim_kernels.profiles import aic_tables as tables
from moesim_kernels.profiles.aic_package import LICENCE, Package, TableRef, datasheet
from moesim_kernels.profiles.find import clean

__all__ = ["Imported", "Part", "base_profile", "import_tables", "write_profile"]

BLOCK = 64
"""Rows a grouped GEMM pads an expert's share to: what suits the tables' skewed rows best (results/validation)"""

KEPT = 8
_KEPT_BATCHES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
_GEMM_ROWS = (1.0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)
_LENGTHS = (1.0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_CONTEXTS = (2.0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_BATCHES = tuple(2.0**i for i in range(11))
_HOST_NS = 30e3  # the fastest small products of a kernel launched one by one take longer than this
_FEWEST = 30
Axes = Callable[[FloatArray], list[list[float]]]


@dataclass
class Part:
    """One variant of an operator: what was timed, what came of it, and the held-out errors, |ln(predicted / timed)|."""

    samples: Samples
    fitted: Fitted
    source: str
    table: str
    held_out: FloatArray = field(default_factory=lambda: np.zeros(0))


@dataclass
class Imported:
    """What `import_tables` found. refused: by table, rows left out by reason; notes: what is missing and why."""

    base: DeviceProfile
    parts: list[Part] = field(default_factory=list)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def operators(self) -> list[str]:
        """Operators that have a curve, in order of appearance."""
        return list(dict.fromkeys(p.samples.op for p in self.parts))

    def errors(self) -> dict[str, float]:
        """By operator: 1 sigma of log, the worst of its parts (a normal law's 90 % quantile is 1.645 sigma)."""
        out: dict[str, float] = {}
        for p in self.parts:
            if len(p.held_out):
                sigma = round(float(np.quantile(p.held_out, 0.9)) / 1.645, 3)
                out[p.samples.op] = max(out.get(p.samples.op, 0.0), sigma)
        return out

    def intervals(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By operator: what held 90 % of all its held-out points; the points are kept by a rule, so it is empirical."""
        out = {}
        for op in self.operators():
            miss = np.concatenate([p.held_out for p in self.parts if p.samples.op == op])
            if len(miss) >= 9:
                width = round(float(np.quantile(miss, 0.9)), 4)
                row = {"level": 0.9, "half_width": width, "n": len(miss), "method": "empirical"}
                out[op] = {"interpolated": row}
        return out


def base_profile(sheet: dict[str, Any]) -> DeviceProfile:
    """The datasheet's device, ready to take fits and curves. Raises BadInput for figures out of range."""
    spec = {**sheet, "name": "base", "kind": "assumed", "provenance": {}, "moe_block_rows": BLOCK}
    return dataclasses.replace(DeviceProfile.from_spec(spec, Path(), "datasheet"), kind="measured")


def import_tables(
    package: Package, system: str, backend: str, version: str | None, tell: Callable[[str], None]
) -> Imported:
    """Read, check, fit and hold out every table of a system and backend. tell: called with what is being done.

    Raises BadInput: unknown system, backend or version; a broken table; no row left.
    """
    package.check(system, backend, version)
    out = Imported(base_profile(datasheet(package, system)))
    work = _Import(package, system, backend, version, out)
    for name, step in (
        ("gemm", work.gemm),
        ("moe", work.moe),
        ("attention", work.attention),
        ("collectives", work.collectives),
    ):
        tell(f"{name}: reading, fitting, predicting what was held out")
        step()
    if not out.parts:
        raise BadInput(Problem(f"{system}, {backend}", "no row of these tables can be used: " + "; ".join(out.notes)))
    return out


class _Import:
    """The steps of one import; each adds parts, tables and notes to `out`."""

    def __init__(self, package: Package, system: str, backend: str, version: str | None, out: Imported) -> None:
        self.package = package
        self.system = system
        self.backend = backend
        self.version = version
        self.out = out

    # -- operators

    def gemm(self) -> None:
        """Every weight format; one whose kernels the host launched one by one gets both ways of running."""
        ref = self._table("gemm", self.backend)
        if ref is None:
            return
        rows, found = tables.gemm(ref, self.out.base)
        axes = _on((_GEMM_ROWS,))
        for dtype, raw in found.items():
            small = raw.ns[raw.size[:, 0] < 32]
            if not len(small) or float(np.quantile(small, 0.05)) < _HOST_NS:
                self._learn(tables.possible(raw, self.out.base, rows.refused), rows, axes)
                continue
            eager = tables.possible(raw, self.out.base, rows.refused)
            plain = found.get("fp8") if dtype == "fp8_block" else None
            if plain is not None:
                self._stand_in(eager, plain, rows, axes)
            eager.variant = f"{dtype}@eager"
            self._learn(eager, rows, axes, "launched one by one")
        self._record("gemm", rows)

    def _stand_in(self, block: Samples, plain: Samples, rows: tables.Rows, axes: Axes) -> None:
        """fp8_block GEMM as it would run inside a CUDA graph: timed where the device bounds it, else the fp8 row of the
        same size times the two kernels' ratio, graded extrapolated.
        """
        other = {(k, m): ns for k, m, ns in zip(_shapes(plain), plain.size[:, 0].tolist(), plain.ns, strict=True)}
        like = np.array([other.get(p, np.nan) for p in zip(_shapes(block), block.size[:, 0].tolist(), strict=True)])
        m = block.size[:, 0]
        host = np.where(m < 32, _quarter(block.ns[m < 32]), _quarter(block.ns[(m >= 32) & (m < 256)]))
        bound = (block.ns > 1.5 * host) & np.isfinite(like)
        if np.count_nonzero(bound) < _FEWEST:
            self.out.notes.append("gemm fp8_block: the host's launches bound nearly every row; no times inside a graph")
            return
        ratio = float(np.median((block.ns / like)[bound]))
        bound &= ~((block.ns < 2.5 * host) & (block.ns > 1.3 * ratio * like))  # a hiccup of the host
        s = dataclasses.replace(block, ns=np.where(bound, block.ns, like * ratio)).where(np.isfinite(like))
        weak = dict(zip(zip(s.key, s.size[:, 0].tolist(), strict=True), ~bound[np.isfinite(like)], strict=True))
        s = tables.possible(s, self.out.base, Counter())
        part = self._learn(s, rows, axes, f"inside a graph: rows bound by the host from fp8 times {ratio:.3f}")
        if part is not None:
            weakened = [_weaken(c, weak) for c in part.fitted.curves]
            part.fitted = dataclasses.replace(part.fitted, curves=weakened)

    def moe(self) -> None:
        """The backend at EP 1; local work of EP ranks, and DeepSeek-V3, from TensorRT-LLM."""
        ref = self._table("moe", self.backend)
        donor = self.package.table(self.system, "trtllm", "moe")
        if ref is not None:
            rows, found = tables.moe(ref, self.out.base, False)
            seen: set[str] = set()
            for (dtype, kernel), raw in found.items():
                raw.variant = f"{dtype}@{kernel}" if dtype in seen else dtype
                if self.backend != "trtllm" and donor is not None and dtype == "fp8_block":
                    limited = np.array([k[0] == tables.LIMITED[0] and k[2] == tables.LIMITED[1] for k in raw.key], bool)
                    rows.refused["group-limited routing: fewer experts hit than claimed"] += int(limited.sum())
                    raw = raw.where(~limited)
                s = tables.possible(raw, self.out.base, rows.refused, later=True)
                if self._learn(s, rows, _on((), 16), kernel) is not None:
                    seen.add(dtype)
            if self.backend != "trtllm":
                self._passed_over(ref)
            if not found:
                self.out.notes.append("moe: no balanced row at EP 1")
            self._record("moe", rows)
        if donor is not None:
            self._ranks(donor)

    def _passed_over(self, ref: TableRef) -> None:
        """What a kernel pays for a row of another rank, in hidden-sized bytes: its EP ranks' large rows over what their
        own share costs. Variants without such rows take the first one's.
        """
        _, found = tables.moe(ref, self.out.base, True)
        costs: dict[str, float] = {}
        for (dtype, kernel), s in found.items():
            x = s.extra
            s = s.where((x["ep"] >= 8) & (x["ep"] <= 64) & (x["tokens"] >= 4096))
            for part in self.out.parts:
                own = part.samples
                if own.op == "moe" and part.source.endswith(f": {kernel}") and own.variant.split("@")[0] == dtype:
                    alone = dataclasses.replace(s, extra={**s.extra, "other": np.zeros(len(s.ns))})
                    more = s.ns - physics_ns(alone, part.fitted.values, self.out.base) if len(s.ns) else s.ns
                    if len(more) >= _FEWEST:
                        rate = self.out.base.hbm_bytes_per_s * 1e-9
                        cost = float(np.median(more * rate / s.extra["other"] / s.extra["hidden"]))
                        costs[own.variant] = round(min(max(cost, 0.0), 60.0), 2)
        for part in self.out.parts:
            if part.samples.op == "moe" and costs:
                cost = costs.get(part.samples.variant, next(iter(costs.values())))
                part.fitted.values["nonlocal_hidden"] = cost

    def _ranks(self, ref: TableRef) -> None:
        """EP ranks; shapes far slower than their neighbours (a badly chosen kernel) are left out."""
        rows, found = tables.moe(ref, self.out.base, True)
        seen: set[str] = set()
        for (dtype, kernel), raw in found.items():
            if self.backend == "trtllm":  # DeepSeek-V3 whole is among its own rows already
                raw = raw.where(raw.extra["ep"] > 1)
            whole = np.array([k[0] * k[1] >= 768 * 2048 and k[2] <= 256 for k in raw.key], bool)
            small = int(len(whole) - whole.sum())
            if small:
                rows.refused["experts narrower than any model's share"] += small
            s = tables.possible(raw.where(whole), self.out.base, rows.refused, later=True)
            s.variant = f"{dtype}@trtllm" + (f"_{kernel}" if dtype in seen else "")
            seen.add(dtype)
            if len(s.ns) >= _FEWEST:
                error = np.log(s.ns / physics_ns(s, fit_physics(s, self.out.base), self.out.base))
                slow = np.zeros(len(s.ns), bool)
                for at in s.by_key().values():
                    slow[at] = np.median(error[at]) > 0.5
                if slow.any():
                    rows.refused["shape far slower than its neighbours"] += int(slow.sum())
                self._learn(s.where(~slow), rows, _on((), 12), f"EP ranks, {kernel}")
        self._record("moe EP ranks", rows)

    def attention(self) -> None:
        """GQA of the backend; MLA's kernel alone of the backend, else of TensorRT-LLM or SGLang."""
        for phase, lengths in (("prefill", _LENGTHS), ("decode", _CONTEXTS)):
            ref = self._table(f"attention_{phase}", self.backend)
            if ref is not None:
                self._heads(*tables.attention(ref, phase), f"attention_{phase} gqa", (_BATCHES[::2], lengths))
            ref = self._table(f"mla_{phase}", self.backend, "trtllm", "sglang")
            if ref is not None:
                self._heads(*tables.mla(ref, phase), f"attention_{phase} mla", (_BATCHES, lengths))

    def _heads(
        self, rows: tables.Rows, found: dict[str, Samples], name: str, wanted: tuple[tuple[float, ...], ...]
    ) -> None:
        for raw in found.values():
            self._learn(tables.possible(raw, self.out.base, rows.refused), rows, _on(wanted))
        self._record(name, rows)

    def collectives(self) -> None:
        """Inside a node: NCCL, and the backend's own all-reduce where that is the faster one."""
        nccl = self._table("nccl", "nccl")
        custom = self._table("custom_all_reduce", self.backend)
        for op in ("all_reduce", "all_gather", "reduce_scatter"):
            found = list(self._rings(op, nccl, custom if op == "all_reduce" else None))
            graph = [(rows, s) for rows, s, how in found if how != "eager"]
            if not graph:
                continue
            rows, s = graph[0]
            for _, other in graph[1:]:
                s = _faster(s, other)
            part = self._learn(s, rows, every_size, " or ".join(r.ref.name for r, _ in graph[1:]))
            for rows, eager, how in found:
                if how == "eager" and part is not None:
                    more = curves(eager, part.fitted.values, self.out.base)
                    source = self._source(rows, "launched one by one")
                    late = [dataclasses.replace(c, variant="@eager", source=source) for c in more]
                    part.fitted = dataclasses.replace(part.fitted, curves=[*late, *part.fitted.curves])

    def _rings(
        self, op: str, nccl: TableRef | None, custom: TableRef | None
    ) -> Iterator[tuple[tables.Rows, Samples, str]]:
        for ref, how in ((custom, "graph"), (nccl, "nccl"), (custom, "eager")):
            if ref is not None:
                rows, raw = tables.collective(ref, op, how)
                if raw is not None:
                    s = tables.possible(raw, self.out.base, rows.refused)
                    self._record(f"{op} {how}", rows)
                    if len(s.ns):
                        yield rows, s, how

    # -- what they share

    def _table(self, kind: str, *backends: str) -> TableRef | None:
        """The newest table of the first backend that has one; --version binds the backend's own tables."""
        for backend in backends:
            version = self.version if backend == self.backend else None
            ref = self.package.table(self.system, backend, kind, version)
            if ref is not None:
                return ref
        wanted = f" {self.version}" if self.version else ""
        self.out.notes.append(f"{kind}: no table of {self.backend}{wanted} for {self.system}")
        return None

    def _learn(self, s: Samples, rows: tables.Rows, axes: Axes, more: str = "") -> Part | None:
        """Fit on all rows for the profile, and again on the kept ones to see how far the others are predicted."""
        if len(s.ns) < _FEWEST:
            if len(s.ns):
                self.out.notes.append(f"{s.op} {s.variant}: {len(s.ns)} rows left, too few to fit")
            return None
        s.source = self._source(rows, more)
        fitted = fit_operator(s, self.out.base, axes)
        part = Part(s, fitted, self._sources[s.source], rows.ref.name, held_out(s, self.out.base))
        self.out.parts.append(part)
        return part

    @property
    def _sources(self) -> list[str]:
        found: list[str] = self.out.tables.setdefault("", {"sources": []})["sources"]
        return found

    def _source(self, rows: tables.Rows, more: str) -> int:
        """Place of this source in `curve_sources`, added if new."""
        kernels = [clean(k, 60) for k, _ in _kernels(rows).most_common(3)]
        text = rows.ref.name + (f": {more}" if more else f": {', '.join(kernels)}" if kernels else "")
        known = self._sources
        if text not in known:
            known.append(text)
        return known.index(text)

    def _record(self, name: str, rows: tables.Rows) -> None:
        """Provenance of one table: where, which version, which kernels on which device, what was left out."""
        devices = rows.columns.get("device")
        self.out.tables[name] = {
            "table": rows.ref.name,
            "backend": f"{rows.ref.backend} {rows.ref.version}",
            "device": ", ".join(sorted({clean(d, 60) for d in devices.tolist()}))
            if devices is not None
            else "not stated",
            "kernels": [clean(k, 80) for k, _ in _kernels(rows).most_common(6)],
            "rows": rows.total,
            "left_out": dict(sorted(rows.refused.items(), key=lambda kv: (-kv[1], kv[0]))),
        }


def _kernels(rows: tables.Rows) -> Counter[str]:
    found = rows.columns.get("kernel_source")
    return Counter() if found is None else Counter(str(k) for k in found.tolist())


def _quarter(ns: FloatArray) -> float:
    return float(np.quantile(ns, 0.25)) if len(ns) else 0.0


def _shapes(s: Samples) -> list[tuple[int, int]]:
    return [(k[0], k[1]) for k in s.key]


def _weaken(curve: Curve, weak: dict[Any, bool]) -> Curve:
    """Points that another kernel stood in for are extrapolated."""
    grade = np.array([2 if weak.get((curve.key, m), True) else 0 for m in curve.axes[0].tolist()], np.uint8)
    return dataclasses.replace(curve, grade=grade)


def _on(wanted: tuple[tuple[float, ...], ...], number: int = 0) -> Axes:
    """The wanted sizes that a shape has on each axis; number: that many by `spread`'s rule."""

    def axes(size: FloatArray) -> list[list[float]]:
        if number:
            return [spread(size[:, 0].tolist(), number)]
        return [sorted(set(size[:, i].tolist()) & set(w)) or [float(size[:, i].min())] for i, w in enumerate(wanted)]

    return axes


def _faster(a: Samples, b: Samples) -> Samples:
    """Point by point the faster of two kernels, on a's sizes: what an engine that knows both would take."""
    ns, of_b = a.ns.copy(), b.by_key()
    for key, rows in a.by_key().items():
        other = of_b.get(key, np.zeros(0, np.intp))
        if not len(other):
            continue
        other = other[np.argsort(b.size[other, 0])]
        log = np.interp(np.log(a.size[rows, 0]), np.log(b.size[other, 0]), np.log(b.ns[other]))
        inside = (a.size[rows, 0] >= b.size[other, 0].min()) & (a.size[rows, 0] <= b.size[other, 0].max())
        ns[rows] = np.where(inside, np.minimum(ns[rows], np.exp(log)), ns[rows])
    return dataclasses.replace(a, ns=ns)


# ---- held out


def kept_axes(size: FloatArray) -> list[list[float]]:
    """Eight sizes a shape by a rule that looks at no time; of attention at batches that are powers of four."""
    lengths = spread(size[:, -1].tolist(), KEPT)
    if size.shape[1] == 1:
        return [lengths]
    batches = set(size[:, 0].tolist())
    return [sorted(b for b in batches if b in _KEPT_BATCHES) or [min(batches)], lengths]


def _kept(s: Samples) -> BoolArray:
    out = np.zeros(len(s.ns), bool)
    for rows in s.by_key().values():
        axes = kept_axes(s.size[rows])
        out[rows] = np.all([np.isin(s.size[rows, i], axis) for i, axis in enumerate(axes)], axis=0)
    return out


def held_out(s: Samples, base: DeviceProfile) -> FloatArray:
    """|ln(predicted / timed)| of every point that is not kept, from physics and curves of the kept ones alone."""
    kept = _kept(s)
    if kept.all():
        return np.zeros(0)
    fitted = fit_operator(s.where(kept), base, kept_axes)
    rest = s.where(~kept)
    ns = predict(with_fits(base, [fitted]), rest, cuda_graph=not s.variant.endswith("@eager"))
    return np.abs(np.log(ns / rest.ns))


# ---- the files


def write_profile(found: Imported, package: Package, system: str, out: Path, command: str) -> list[Path]:
    """Write the profile and its curve files beside it; on a failure none of them is left that was not there before.

    Raises BadInput where the folder cannot be written.
    """
    sheet = datasheet(package, system)
    groups = {"gemm": ("gemm",), "moe": ("moe",), "attention": ("attention_prefill", "attention_decode")}
    groups["links"] = ("all_reduce", "all_gather", "reduce_scatter")
    files = {out.with_name(f"{out.stem}.{name}.json"): _curves(found, ops) for name, ops in groups.items()}
    files = {path: by_op for path, by_op in files.items() if by_op}
    text = profile_yaml(_spec(found, package, system, sheet, out, command, list(files)), _HEAD)
    existed = {path: path.exists() for path in [*files, out]}
    try:
        for path, by_op in files.items():
            write_curves(path, by_op)
        write_whole(out, text)
    except OSError as error:
        for path, old in existed.items():
            if not old:
                path.unlink(missing_ok=True)
        raise BadInput(Problem(str(out), f"cannot be written: {error.strerror or error}")) from None
    return [out, *files]


_HEAD = "Written by `moesim profile import aic`; figures fitted to the tables named below, which are not copied."


def _curves(found: Imported, ops: tuple[str, ...]) -> dict[str, list[Curve]]:
    out: dict[str, list[Curve]] = {}
    for part in found.parts:
        if part.samples.op in ops:
            out.setdefault(part.samples.op, []).extend(part.fitted.curves)
    return out


def _spec(
    found: Imported, package: Package, system: str, sheet: dict[str, Any], out: Path, command: str, files: list[Path]
) -> dict[str, Any]:
    facts = ("device", "vendor", "memory_gib", "hbm_gb_per_s", "flop_per_s", "num_sms", "graph_launch_us")
    version = f"PyPI aiconfigurator-core {package.version}, {LICENCE}"
    provenance = {
        "date": datetime.date.today().isoformat(),
        "tables": f"{version}: systems/data/{system}",
        "driver": "not stated by the tables",
        "command": command,
        "datasheet": sheet["provenance"]["sheet"],
        "operators": {k: v for k, v in found.tables.items() if k},
        "missing": found.notes,
        "sources": sheet["provenance"].get("sources", {}),
        "curve_sources": found.tables.get("", {"sources": []})["sources"],
    }
    return {
        "name": out.stem[:100],
        "kind": "measured",
        **{key: sheet[key] for key in (*facts, "eager_launch_us")},
        "moe_block_rows": BLOCK,
        "node": sheet["node"],
        "fits": _fits(found),
        "errors": dict(sorted(found.errors().items())),
        "intervals": found.intervals(),
        "curves": [path.name for path in files],
        "provenance": provenance,
    }


def _fits(found: Imported) -> dict[str, dict[str, float]]:
    """Physics by operator and variant; operators without a table keep the typical efficiencies of a datasheet."""
    fits: dict[str, dict[str, float]] = {}
    for part in found.parts:
        op, variant = part.samples.op, part.samples.variant
        fits.setdefault(op, part.fitted.values)
        if variant:
            fits[f"{op}/{variant}"] = part.fitted.values
    for one, other in (("fp8", "fp8_block"), ("fp8_block", "fp8")):
        if f"moe/{one}" in fits:
            fits.setdefault(f"moe/{other}", fits[f"moe/{one}"])
    if "moe" not in fits:
        fits |= {f"moe/{dtype}": dict(DEFAULTS["moe"]) for dtype in found.base.flop_per_s}
    return fits
