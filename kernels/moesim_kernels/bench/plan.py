"""What to measure: cases and plans, and their strict JSON. Needs the standard library alone.

A case names one operator at one shape and one size; its `id` is a hash of what would be run, so that the same case
has the same id in every plan. A plan is a list of cases for one kind of device; its `plan_id` names the log that
belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.strict import canonical, parse, read_bytes

__all__ = ["BACKENDS", "DEVICES", "DTYPES", "OPS", "ROLES", "SCHEMA", "Case", "Plan", "load_plan", "save_plan"]

SCHEMA = 1
MAX_PLAN_BYTES = 16 << 20
MAX_CASES = 20_000
MAX_NOTE_DEPTH = 16
DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16", "fp16", "fp8")
BACKENDS = ("torch", "loop", "grouped", "triton")  # torch: grouped_mm on CUDA where torch has it, else the loop
ROLES = ("ceiling", "grid", "heldout")  # most important first: who is measured when the budget is short

_FROM_ONE = (
    "n k m hidden intermediate slots experts top_k groups top_groups tokens heads kv_heads head_dim v_head_dim kv_dim "
    "rope_dim nope_dim batch length context bytes streams block_bytes depth ranks"
)
_LEAST = dict.fromkeys(_FROM_ONE.split(), 1) | dict.fromkeys(("rows", "prefix", "window"), 0)
_MOST = 1 << 50
_CHOICES = {
    "score": ("softmax", "sigmoid"),
    "router_dtype": ("fp32", "bf16"),
    "direction": ("h2d", "d2h", "host"),
    "memory": ("pinned", "pageable"),
    "mode": ("direct", "buffered", "warm"),  # buffered: after advice to drop the blocks from the page cache
    "backend": ("gloo", "nccl"),
    "way": ("dispatch", "combine"),
    "spread": ("even", "one", "drawn"),  # of tokens over ranks: moesim_kernels.ops.routing.exchange_splits
}
_FLAGS = ("busy", "graph", "bias", "head_norm")
_HISTOGRAM = re.compile(r"uniform|balanced|one|zipf:\d{1,2}(\.\d{1,6})?|few:[1-9]\d{0,6}")

_EXPERTS = ("hidden", "intermediate", "slots", "top_k")
_ROWS = ("tokens", "rows", "histogram")
_ROUTER = ("hidden", "experts", "top_k", "score", "groups", "top_groups")
_BLOCK = ("heads", "kv_heads", "head_dim", "router_dtype", *_ROUTER, "bias", "head_norm")
_GQA = ("heads", "kv_heads", "head_dim", "v_head_dim", "window")
_MLA = ("heads", "kv_dim", "rope_dim", "nope_dim", "v_head_dim")
_RANKS = ("ranks", "backend")
# op: (keys of the shape, keys of the size). Attention's shape also has `kind`, which chooses between two key sets.
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gemm": (("n", "k"), ("m",)),
    "moe": (_EXPERTS, _ROWS),
    "moe_dgrad": (_EXPERTS, _ROWS),
    "moe_wgrad": (_EXPERTS, _ROWS),
    "router": (_ROUTER, ("tokens",)),
    "router_backward": (_ROUTER, ("tokens",)),
    "block": (_BLOCK, ("tokens",)),
    "permute": (("hidden", "slots", "top_k"), _ROWS),
    "combine": (("hidden", "slots", "top_k"), _ROWS),
    "shared_expert": (("hidden", "intermediate"), ("tokens",)),
    "attention_prefill": (_GQA, ("batch", "length", "prefix")),
    "attention_decode": (_GQA, ("batch", "context")),
    "attention_backward": (_GQA, ("batch", "length", "prefix")),
    "elementwise": ((), ("bytes",)),
    "launch": ((), ()),
    "read_bandwidth": ((), ("bytes",)),
    "copy_bandwidth": ((), ("bytes",)),
    "peak_gemm": ((), ("n",)),
    "copy": (("direction", "memory", "streams", "busy"), ("bytes",)),
    "storage": (("mode", "block_bytes", "depth"), ("bytes",)),
    "all_reduce": (_RANKS, ("bytes",)),
    "all_gather": (_RANKS, ("bytes",)),
    "reduce_scatter": (_RANKS, ("bytes",)),
    "all_to_all": (_RANKS, ("bytes",)),
    "token_exchange": ((*_RANKS, "way", "hidden", "slots", "top_k"), ("bytes", "spread")),
}


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical(value).encode(), digest_size=8).hexdigest()


def _deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value nests deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(x, levels - 1) for x in inner)


def _check_value(key: str, value: Any, where: str) -> None:
    """One value of a shape or a size. Raises BadPlan."""
    if key in _LEAST:
        if type(value) is not int or not _LEAST[key] <= value <= _MOST:
            raise BadPlan(f"{key} must be a whole number from {_LEAST[key]}; got {value!r:.80}", where)
    elif key in _CHOICES:
        if value not in _CHOICES[key]:
            raise BadPlan(f"{key} must be one of {', '.join(_CHOICES[key])}; got {value!r:.80}", where)
    elif key in _FLAGS:
        if type(value) is not bool:
            raise BadPlan(f"{key} must be true or false; got {value!r:.80}", where)
    elif key == "histogram" and not (isinstance(value, str) and _HISTOGRAM.fullmatch(value)):
        raise BadPlan(
            f"histogram must be uniform, balanced, one, zipf:EXPONENT or few:EXPERTS; got {value!r:.80}", where
        )


def _check_keys(what: str, given: Any, wanted: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    """The keys of one mapping, none missing and none unknown. Raises BadPlan."""
    if not isinstance(given, Mapping):
        raise BadPlan(f"{what} must be an object; got {given!r:.80}", where)
    missing = [key for key in wanted if key not in given]
    unknown = [str(key) for key in given if key not in wanted and key not in optional]
    if missing or unknown:
        raise BadPlan(
            f"{what} takes {', '.join(wanted + optional) or 'no key'}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown)[:200] or 'none'}",
            where,
        )


def _check_text(name: str, value: Any, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise BadPlan(f"{name} must be one of {', '.join(allowed)}; got {value!r:.80}", where)


def _check_rows(shape: Mapping[str, Any], size: Mapping[str, Any], where: str) -> None:
    """Rows fit the tokens: a token reaches an expert at most once, and at most `top_k` of them."""
    most = size["tokens"] * min(shape["top_k"], shape["slots"])
    if size["rows"] > most:
        raise BadPlan(f"rows must be at most tokens x min(top_k, slots) = {most}; got {size['rows']}", where)


@dataclass(frozen=True)
class Case:
    """One operator at one shape and size; the keys of `shape` and `size` are those of `OPS[op]`.

    Raises BadPlan for an unknown op, a missing or unknown key, or a value out of range. Do not change the mappings.
    """

    op: str
    shape: dict[str, int | float | str | bool]
    size: dict[str, int | float | str]
    dtype: str = "bf16"
    backend: str = "torch"
    role: str = "grid"
    seed: int = 0

    def __post_init__(self) -> None:
        where = f"case {self.op!r:.40}"
        _check_text("op", self.op, tuple(OPS), where)
        _check_text("dtype", self.dtype, DTYPES, where)
        _check_text("backend", self.backend, BACKENDS, where)
        _check_text("role", self.role, ROLES, where)
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise BadPlan(f"seed must be a whole number from 0 below 2**63; got {self.seed!r:.80}", where)
        shape_keys, size_keys = OPS[self.op]
        if self.op.startswith("attention"):
            kind = self.shape.get("kind") if isinstance(self.shape, Mapping) else None
            _check_text("shape.kind", kind, ("gqa", "mla"), where)
            shape_keys = ("kind", *(_GQA if kind == "gqa" else _MLA))
        _check_keys("shape", self.shape, shape_keys, ("graph",) if self.op == "launch" else (), where)
        _check_keys("size", self.size, size_keys, (), where)
        for key, value in (self.shape | self.size).items():
            _check_value(key, value, where)
        if "rows" in size_keys:
            _check_rows(self.shape, self.size, where)

    def __hash__(self) -> int:
        return hash((self.id, self.role))

    @cached_property
    def id(self) -> str:
        """16 hex digits of blake2b over the canonical JSON of everything but the role."""
        return _digest({key: value for key, value in self.to_json().items() if key != "role"})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Case:
        """The case that `to_json` wrote. Raises BadPlan, also for unknown keys; `where` names the place."""
        optional = ("dtype", "backend", "role", "seed")
        _check_keys("a case", value, ("op", "shape", "size"), optional, where)
        try:
            return cls(**value)
        except BadPlan as error:
            raise BadPlan(error.message, f"{where}: {error.where}" if where else error.where) from None


@dataclass(frozen=True)
class Plan:
    """The cases to measure on one kind of device with `threads` CPU threads. `note` is a remark and changes nothing.

    Raises BadPlan for an unknown device, threads outside 1 to 1024, no case, too many, or one case twice.
    """

    device: str
    cases: tuple[Case, ...]
    threads: int = 1
    note: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text("device", self.device, DEVICES, "plan")
        if type(self.threads) is not int or not 1 <= self.threads <= 1024:
            raise BadPlan(f"threads must be a whole number from 1 to 1024; got {self.threads!r:.80}", "plan")
        object.__setattr__(self, "cases", tuple(self.cases))
        if not 1 <= len(self.cases) <= MAX_CASES:
            raise BadPlan(f"a plan has from 1 to {MAX_CASES} cases; this one has {len(self.cases)}", "plan")
        seen: dict[str, int] = {}
        for at, case in enumerate(self.cases):
            if case.id in seen:
                raise BadPlan(f"cases {seen[case.id]} and {at} are the same ({case.op}); keep one", "plan")
            seen[case.id] = at

    def __hash__(self) -> int:
        return hash(self.plan_id)

    @cached_property
    def plan_id(self) -> str:
        """16 hex digits over everything but the note."""
        return _digest({key: value for key, value in self.to_json().items() if key != "note"})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `from_json` reads them."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "threads": self.threads,
            "cases": [case.to_json() for case in self.cases],
            "note": self.note,
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Plan:
        """The plan that `to_json` wrote. Raises BadPlan naming `where` and the case."""
        _check_keys("a plan", value, ("schema", "device", "cases"), ("threads", "note"), where)
        if type(value["schema"]) is not int or value["schema"] != SCHEMA:
            raise BadPlan(f"schema must be {SCHEMA}; got {value['schema']!r:.80}. Write the plan again", where)
        if not isinstance(value["cases"], list):
            raise BadPlan("cases must be a list", where)
        if len(value["cases"]) > MAX_CASES:
            raise BadPlan(f"a plan has at most {MAX_CASES} cases; this one has {len(value['cases'])}", where)
        if not isinstance(value.get("note", {}), dict):
            raise BadPlan("note must be an object", where)
        if _deeper(value.get("note", {}), MAX_NOTE_DEPTH):
            raise BadPlan(f"note may nest {MAX_NOTE_DEPTH} levels deep, this one goes deeper; shorten it", where)
        at = f"{where}: " if where else ""
        cases = tuple(Case.from_json(case, f"{at}cases[{i}]") for i, case in enumerate(value["cases"]))
        try:
            return cls(value["device"], cases, value.get("threads", 1), value.get("note", {}))
        except BadPlan as error:
            raise BadPlan(error.message, where or error.where) from None


def load_plan(path: Path | str) -> Plan:
    """Read a plan. Raises BadPlan naming the file, the case and the value."""
    path = Path(path)
    return Plan.from_json(parse(read_bytes(path, MAX_PLAN_BYTES), str(path)), str(path))


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write a plan, whole or not at all: one case a line. Raises OSError, or BadPlan for a note that is not JSON."""
    path = Path(path)
    head = plan.to_json()
    cases = head.pop("cases")
    try:
        note = canonical(head.pop("note"))
    except (TypeError, ValueError) as error:
        raise BadPlan(f"note must be plain JSON: {error}", "plan") from None
    lines = ",\n".join("  " + json.dumps(case, sort_keys=True) for case in cases)
    text = json.dumps(head)[:-1] + f', "note": {note}, "cases": [\n{lines}\n]}}\n'
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
