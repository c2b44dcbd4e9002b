"""Scenarios, traces and data files that cannot be used, each with the words that its message must hold.

A case changes one thing of `BASE`, which is a good scenario: its text, an override, or a file it names.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BASE", "CASES", "LAYERS", "TOP_K", "Case", "trace"]

LAYERS, EXPERTS, TOP_K = 16, 64, 8

BASE = """\
name: small
seed: 7
model: olmoe-1b-7b
cluster: {device: h100_sxm_datasheet, nodes: 1}
parallel: {dp: 2, ep: 2}
requests: {format: poisson, rate_per_s: 50, num_requests: 6, prompt_tokens: 20, output_tokens: 4}
engine: {max_num_seqs: 8, max_num_batched_tokens: 64, bank_entries: 2}
"""


class Case(NamedTuple):
    """`text`: the scenario; `sets`: overrides; `files`: name -> content or what makes it. `words`: of the message."""

    name: str
    words: str
    text: str | bytes = BASE
    sets: tuple[str, ...] = ()
    files: tuple[tuple[str, bytes | Callable[[Path], object]], ...] = ()
    code: int = 2


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def trace(tokens: int = 12, layers: int = LAYERS, top_k: int = TOP_K, experts: int = EXPERTS) -> Any:
    """Legal expert ids [tokens, layers, top_k]."""
    draws = np.random.default_rng(0).random((tokens, layers, experts))
    return np.argsort(draws, axis=-1)[..., :top_k].astype(np.int16)


def _member(name: str, header: str, data: bytes) -> bytes:
    """An .npz with one member whose .npy header says what it likes."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return out.getvalue()


def _yaml() -> Iterator[Case]:
    def bad(name: str, words: str, text: str | bytes) -> Case:
        return Case(f"yaml-{name}", words, text)

    yield bad("empty", "required", "")
    yield bad("comment-only", "required", "# nothing\n")
    yield bad("list", "mapping", "- a\n- b\n")
    yield bad("text", "mapping", "hello\n")
    yield bad("tab", "tab", "parallel:\n\ttp: 1\n")
    yield bad("unclosed-list", "not YAML", BASE + "slo: [1, 2\n")
    yield bad("unclosed-mapping", "not YAML", BASE[:-2])
    yield bad("unclosed-quote", "not YAML", BASE + "name2: 'abc\n")
    yield bad("colon-in-value", "quotes", "name: a: b\n" + BASE)
    yield bad("bad-indent", "not YAML", "a:\n    b: 1\n  c: 2\n" + BASE)
    yield bad("duplicate-key", "already on line 2", BASE + "seed: 8\n")
    yield bad("duplicate-nested", "already on line", BASE.replace("dp: 2,", "dp: 2, dp: 2,"))
    yield bad("duplicate-after-alias", "already on line", "x: &k seed\n" + BASE + "*k : 8\n")
    yield bad("merge-key", "merge keys", BASE + "a: &a {b: 1}\nslo:\n  <<: *a\n")
    yield bad("two-documents", "second document", BASE + "---\nname: other\n")
    yield bad("python-tag", "tag", BASE + "slo: !!python/object/apply:os.system [id]\n")
    yield bad("binary-tag", "tag", BASE + "slo: !!binary aGk=\n")
    yield bad("local-tag", "tag", BASE.replace("seed: 7", "seed: !int 7"))
    yield bad("directive", "not YAML", "%YAML 3.0\n---\n" + BASE)
    yield bad("alias-bomb", "aliases", _bomb())
    yield bad("alias-unknown", "no anchor", BASE + "slo: *x\n")
    yield bad("alias-loop", "inside its own anchor", BASE + "slo: &x {a: *x}\n")
    yield bad("deep-flow", "deeper than 50", BASE + "slo: " + "[" * 3000 + "]" * 3000 + "\n")
    yield bad("deep-block", "deeper than 50", "".join("  " * i + f"k{i}:\n" for i in range(80)))
    yield bad("many-values", "more than 100000 values", BASE + "slo: [" + "1," * 100_001 + "]\n")
    yield bad("many-bytes", "at most 1048576", BASE + "#" * (1 << 20))
    yield bad("nul", "U+0000", BASE + "slo: \0\n")
    yield bad("escape", "U+001B", BASE + "slo: \x1b[31m\n")
    yield bad("latin-1", "UTF-8", BASE.encode() + b"# caf\xe9\n")
    yield bad("utf-16", "UTF-8", BASE.encode("utf-16"))
    yield bad("elf", "UTF-8", b"\x7fELF\x02\x01\x01" + bytes(range(256)))
    yield bad("surrogate", "surrogate", BASE.replace("name: small", 'name: "\\ud800"'))
    yield bad("number-key", "must be text", BASE + "7: seven\n")
    yield bad("null-key", "must be text", BASE + "~: x\n")
    yield bad("list-key", "must be text", BASE + "[a, b]: x\n")
    yield bad("nan", "finite", BASE.replace("rate_per_s: 50", "rate_per_s: .nan"))
    yield bad("inf", "finite", BASE.replace("rate_per_s: 50", "rate_per_s: .inf"))
    yield bad("overflow", "too large", BASE.replace("rate_per_s: 50", "rate_per_s: 1e400"))
    yield bad("huge-int", "64 bits", BASE.replace("seed: 7", f"seed: {'9' * 60}"))


def _bomb() -> str:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    return text + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


def _values() -> Iterator[Case]:
    """Overrides that give a key a value it cannot have: the message names the key."""
    wrong: dict[str, list[str]] = {
        "name": ["''", "a b", "../x", "3", ".hidden", "x" * 101, "[]"],
        "seed": ["-1", "1.5", "one", "true", "9223372036854775808"],
        "model": [
            "3",
            "[]",
            "{}",
            "{name: 3}",
            "{name: olmoe-1b-7b, kv_dtype: fp9}",
            "''",
            "{name: olmoe-1b-7b, x: 1}",
        ],
        "model.kv_dtype": ["fp8_block", "3"],
        "cluster": ["h100_sxm_datasheet", "[]", "{}", "{device: 3}"],
        "cluster.nodes": ["0", "-1", "1.5", "two", "true", "1e9", "100001"],
        "cluster.gpus_per_node": ["0", "8.5"],
        "cluster.oversubscription": ["0.5", "wide"],
        "cluster.nic_gb_per_s": ["0", "-5", "50 apples", "12 GiB", "true"],
        "cluster.nvlink_latency_us": ["-1", "3 bytes"],
        "parallel": ["2", "[2]"],
        "parallel.tp": ["0", "-2", "1.0", "'1'", "true", "[]", "99999999"],
        "parallel.ep": ["0", "two"],
        "requests": ["[]", "poisson"],
        "requests.format": ["poison", "3", "..", "_table", "os"],
        "requests.rate_per_s": ["0", "-3", "fast", "5 GB/s", "'1e400'"],
        "requests.num_requests": ["0", "2.5", "-1", "99999999999"],
        "requests.prompt_tokens": ["0", "-5", "1.5", "many", "{distribution: lognormal}", "{mean: 5}", "9999999999"],
        "requests.output_tokens": ["{distribution: nrmal, mean: 3}", "{distribution: lognormal, mean: 10, cv: -1}"],
        "routing": ["[]", "zipf"],
        "routing.popularity_zipf": ["-1", "99", "steep"],
        "routing.fidelity": ["exact", "3"],
        "policies": ["[]", "eplb"],
        "policies.placement": [
            "eplbb",
            "{}",
            "{kind: 3}",
            "{kind: ../eplb}",
            "[eplb]",
            "{kind: eplb, num_redundant: 2}",
        ],
        "policies.dispatch": ["nearest"],
        "policies.offload": ["lru"],
        "policies.batching": ["orca", "{kind: vllm_v1, long_prefill_token_threshold: -1}"],
        "policies.balancer": ["random_robin"],
        "policies.routing": ["topkk"],
        "engine": ["[]", "vllm"],
        "engine.max_num_seqs": ["0", "-1", "1e3", "100000"],
        "engine.gpu_memory_utilization": ["0", "1.1", "90"],
        "engine.graph_batch_sizes": ["[0]", "[4, 2]", "[2, 2]", "8", "[a]"],
        "engine.weights_from": ["s3"],
        "engine.host_overhead_us": ["-1", "3 bytes"],
        "engine.cuda_graph": ["yes", "1"],
        "slo": ["{}", "fast", "{ttft_ms: 0}", "{ttft_ms: -1}", "{tftt_ms: 5}", "{ttft_ms: 1 GB}"],
    }
    for key, values in wrong.items():
        for value in values:
            yield Case(
                f"value-{key}={value[:24]}", key.split(".")[-1] if key != "model" else "model", sets=(f"{key}={value}",)
            )


def _keys() -> Iterator[Case]:
    for key, near in {
        "paralel.tp=1": "'parallel'",
        "cluster.device_name=x": "'device'",
        "parallel.tpp=2": "'tp'",
        "engine.max_num_sequences=3": "'max_num_seqs'",
        "policies.placment=eplb": "'placement'",
        "requests.rate=3": "'rate_per_s'",
        "routing.zipf=1": "popularity_zipf",
        "request=1": "'requests'",
    }.items():
        yield Case(f"key-{key}", near, sets=(key,))
    yield Case("mode", "'serving' or 'training'", sets=("mode=x",))
    yield Case("mode-training-of-requests", "nothing is asked for while a model trains", sets=("mode=training",))
    yield Case("training-of-serving", "is read in mode training only", sets=("training={steps: 3}",))
    for key, told in {
        "communication=x": "communication",
        "communication.all_to_all=nccl": "'pairwise'",
        "communication.coherent=true": "communication.coherent",
        "communication={all_to_all: deepep_normal, sms: 7}": "must be even",
        "communication={all_to_all: deepep_low_latency, sms: 20}": "must be 0",
        "communication.max_dispatch_tokens=64": "all_to_all is auto",
        "rebalance=x": "rebalance",
    }.items():
        yield Case(f"exchange-{key}", told, sets=(key,))
    for key in (
        "parallel.pp=2", "parallel.pipeline_parallel_size=4", "engine.enable_prefix_caching=true",
        "engine.speculative_config={num_speculative_tokens: 2}", "engine.mtp=1", "disaggregation={prefill: 1}",
    ):  # fmt: skip
        yield Case(f"later-{key}", "not simulated yet; remove", sets=(key,))
    for text, words in {
        "parallel": "key=value", "=1": "key=value", "a..b=1": "key=value", "seed.x=1": "holds a value",
        "parallel.tp=[": "not YAML", "parallel={tp: 1, tp: 1}": "again",
        "engine.graph_batch_sizes.3=1": "graph_batch_sizes",
    }.items():  # fmt: skip
        yield Case(f"override-{text}", words, sets=(text,))
    for gone in ("model", "cluster", "requests"):
        lines = [line for line in BASE.splitlines() if not line.startswith(gone)]
        yield Case(f"missing-{gone}", f"{gone}: is required", "\n".join(lines) + "\n")


def _together() -> Iterator[Case]:
    for name, words, sets in (
        ("too-many-ranks", "set cluster.nodes to 2", ("parallel.dp=16",)),
        ("too-many-replicas", "devices", ("parallel.replicas=5",)),
        ("ep-not-dividing-ranks", "must divide tp * dp", ("parallel.ep=3",)),
        ("ep-over-ranks", "must divide tp * dp", ("parallel.ep=4",)),
        ("ep-not-dividing-slots", "expert slots", ("parallel={dp: 3, ep: 3}",)),
        ("redundant-not-dividing", "65 slots", ("policies.placement={kind: eplb, num_redundant_experts: 1}",)),
        ("tp-not-dividing-heads", "attention heads", ("parallel={tp: 3}",)),
        ("expert-tp-not-dividing", "intermediate size", ("model=gpt-oss-20b", "cluster.nodes=99", "parallel={dp: 7}")),
        ("dense-with-ep", "dense", ("model=llama-3.1-8b",)),
        ("dense-with-routing", "dense", ("model=llama-3.1-8b", "parallel.ep=1", "routing={popularity_zipf: 1}")),
        ("seqs-over-tokens", "max_num_seqs", ("engine.max_num_seqs=65",)),
        ("longer-than-positions", "positions", ("engine.max_model_len=999999",)),
        ("prompts-over-limit", "longer than", ("engine.max_model_len=10",)),
        ("rate-and-interval", "interval_ms", ("requests.format=fixed", "requests.interval_ms=3")),
        ("key-of-other-format", "does not use", ("requests.concurrency=4",)),
        ("two-popularities", "give one of them", ("routing={popularity_zipf: 1, popularity_lognormal_sigma: 1}",)),
        ("unknown-model", "Did you mean 'deepseek-v3'", ("model=deepseek_v3",)),
        ("unknown-device", "Did you mean", ("cluster.device=h100_smx",)),
        ("model-file-missing", "no such file", ("model=./nope.yaml",)),
        ("device-file-missing", "no such file", ("cluster.device=../nope.yaml",)),
        ("model-nul", "model", ('model="a\\0b"',)),
        ("model-long-name", "model", (f"model={'x' * 400}",)),
        ("requests-path-missing", "no such file", ("requests={format: azure, path: nope.csv}",)),
        ("requests-path-long", "requests.path", (f"requests={{format: azure, path: {'x' * 4000}}}",)),
        ("routing-path-missing", "no such file", ("routing={path: nope.npz}",)),
        ("trace-format-without-path", "path", ("requests={format: azure}",)),
        ("trace-with-knobs", "synthetic", ("routing={path: t.npz, popularity_zipf: 1}",)),
    ):
        yield Case(f"together-{name}", words, sets=sets, files=(("t.npz", npz(expert_ids=trace())),))
    big = "model={name: deepseek-v3, weight_dtype: bf16, expert_dtype: bf16}"
    for name, sets in (
        ("deepseek-v3-bf16-on-8", (big, "parallel={dp: 8, ep: 8}")),
        ("deepseek-v3-on-a-4090", ("model=deepseek-v3", "cluster.device=rtx_4090", "parallel={}")),
        ("405b-on-one-gpu", ("model=llama-3.1-405b", "parallel={}")),
        ("kimi-on-8", ("model=kimi-k2", "parallel={dp: 8, ep: 8}")),
        ("no-room-for-kv", ("engine.gpu_memory_utilization=0.01",)),
        ("huge-batch", ("model=mixtral-8x7b", "parallel={tp: 2, ep: 1}", "engine.max_num_batched_tokens=1048576")),
    ):
        yield Case(f"infeasible-{name}", "bytes", sets=sets, code=3)


def _csv(name: str, words: str, content: str | bytes, kind: str = "azure", more: str = "") -> Case:
    data = content.encode() if isinstance(content, str) else content
    sets = (f"requests={{format: {kind}, path: r.csv{more}}}",)
    return Case(f"{kind}-{name}", words or "r.csv", sets=sets, files=(("r.csv", data),))


def _requests() -> Iterator[Case]:
    head, row = "TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:17:03.9799600,100,5\n"
    yield _csv("empty", "", "")
    yield _csv("header-only", "", head)
    yield _csv("wrong-header", "ContextTokens", "time,prompt,output\n1,2,3\n")
    yield _csv("near-header", "ContextTokens", head.replace("ContextTokens", "ContextToken") + row)
    yield _csv("twice-header", "", head.replace("ContextTokens", "GeneratedTokens") + row)
    yield _csv("cut-off-row", "", head + row * 3 + "2023-11-16 18:17:04.0,1")
    yield _csv("cut-off-time", "", head + row + "2023-11-1")
    yield _csv("nan", "", head + "2023-11-16 18:17:03,nan,5\n")
    yield _csv("negative", "", head + "2023-11-16 18:17:03,-4,5\n")
    yield _csv("zero", "", head + "2023-11-16 18:17:03,0,5\n")
    yield _csv("fraction", "", head + "2023-11-16 18:17:03,1.5,5\n")
    yield _csv("huge", "", head + "2023-11-16 18:17:03,99999999999999999999,5\n")
    yield _csv("bad-date", "", head + "2023-02-31 18:17:03,1,5\n")
    yield _csv("too-many-columns", "", head + row.strip() + ",9\n")
    yield _csv("nul", "", (head + row).encode() + b"\0\0\0\n")
    yield _csv("utf-16", "", (head + row).encode("utf-16"))
    yield _csv("binary", "", bytes(range(256)) * 8)
    yield _csv("quotes", "", head + '"2023-11-16 18:17:03,1,5\n' + row)
    yield _csv("bad-gzip", "", b"\x1f\x8b\x08\x00" + b"x" * 40)
    yield _csv("offset-past-end", "offset", head + row, more=", offset: 5")
    yield _csv("window-past-end", "window", head + row, more=", window_s: [100, 200]")
    yield _csv("window-reversed", "window", head + row, more=", window_s: [5, 1]")
    yield _csv("limit-zero", "limit", head + row, more=", limit: 0")
    yield _csv("rate-scale", "rate_scale", head + row, more=", rate_scale: 0")
    yield Case("azure-folder", "", sets=("requests={format: azure, path: d}",), files=(("d", Path.mkdir),))
    for name, text in {
        "not-json": "{timestamp: 1}\n",
        "cut-off": '{"timestamp": 0, "input_length": 5, "output_length": 2}\n{"timestamp": 1, "input_le',
        "missing-key": '{"timestamp": 0, "input_length": 5}\n',
        "near-key": '{"timestamp": 0, "input_len": 5, "output_length": 2}\n',
        "nan": '{"timestamp": NaN, "input_length": 5, "output_length": 2}\n',
        "negative": '{"timestamp": 0, "input_length": -5, "output_length": 2}\n',
        "text-number": '{"timestamp": 0, "input_length": "5", "output_length": 2}\n',
        "list-line": "[1, 2, 3]\n",
        "duplicate-key": '{"timestamp": 0, "timestamp": 1, "input_length": 5, "output_length": 2}\n',
        "deep": "[" * 20_000 + "\n",
        "empty": "",
        "overflow": '{"timestamp": 1e400, "input_length": 5, "output_length": 2}\n',
    }.items():
        yield _csv(name, "r.csv", text, "mooncake")
    burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    yield _csv("all-failed", "failed", burst + "5,ChatGPT,10,0,10,API log\n", "burstgpt")
    yield _csv("negative-time", "", burst + "-5,ChatGPT,10,3,13,API log\n", "burstgpt")
    yield _csv("no-tokens", "", "Timestamp,Model\n5,x\n", "burstgpt")
    yield _csv("text", "", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,five,2\n", "csv")
    yield _csv("infinite", "", "arrived_at,num_prefill_tokens,num_decode_tokens\ninf,5,2\n", "csv")
    yield _csv("no-arrivals", "arriv", "num_prefill_tokens,num_decode_tokens\n5,2\n", "csv")
    good: dict[str, Any] = {"input_lens": [5, 6], "output_lens": [2, 2], "start_times": [0.0, 0.5], "errors": ["", ""]}
    for name, change in (
        ("lengths-differ", {"input_lens": [5]}),
        ("not-lists", {"input_lens": 5}),
        ("no-start-times", {"start_times": None}),
        ("negative-length", {"output_lens": [2, -1]}),
        ("all-failed", {"errors": ["x", "y"], "output_lens": [0, 0]}),
    ):
        yield _csv(name, "r.csv", json.dumps(good | change), "vllm_bench")
    yield _csv("summary-only", "save-detailed", "{}", "vllm_bench")
    yield _csv("cut-off", "cut off", json.dumps(good)[:-5], "vllm_bench")
    yield _csv("deep", "", "[" * 100_000, "vllm_bench")
    yield _csv("no-folder", "", "x\n", "servegen")


def _routing(name: str, words: str, content: bytes | Callable[[Path], object], file: str = "t.npz") -> Case:
    return Case(f"routing-{name}", words or file, sets=(f"routing={{path: {file}}}",), files=((file, content),))


def _with(array: Any, place: tuple[int, ...], value: int) -> Any:
    array = array.copy()
    array[place] = value
    return array


def _folder(**changes: Any) -> Callable[[Path], object]:
    """A converted trace with some of its files replaced (None: left out)."""

    def make(folder: Path) -> None:
        folder.mkdir()
        files: dict[str, Any] = {
            "expert_ids.npy": trace().astype(np.uint8),
            "sequence_start.npy": np.array([0, 12]),
            "meta.json": {"schema_version": 1, "format": "moesim-routing", "num_experts": EXPERTS, "top_k": TOP_K},
        }
        for name, value in {**files, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
            if isinstance(value, bytes):
                (folder / name).write_bytes(value)
            elif isinstance(value, dict):
                (folder / name).write_text(json.dumps(value))
            elif value is not None:
                np.save(folder / name, value, allow_pickle=True)

    return make


def _traces() -> Iterator[Case]:
    ids = trace()
    whole = npz(expert_ids=ids)
    yield _routing("empty-file", "zip", b"")
    yield _routing("not-a-zip", "zip", b"hello")
    yield _routing("cut-off", "zip", whole[: len(whole) // 2])
    yield _routing("damaged", "", whole[:200] + bytes(64) + whole[264:])
    yield _routing("no-ids", "expert_ids", npz(experts=ids))
    yield _routing("objects", "Nothing is unpickled", npz(expert_ids=np.array([[[{}]]], dtype=object)))
    yield _routing("floats", "integers", npz(expert_ids=ids.astype(float)))
    yield _routing("nan", "integers", npz(expert_ids=np.full(ids.shape, np.nan)))
    yield _routing("text", "", npz(expert_ids=ids.astype(str)))
    yield _routing("two-axes", "", npz(expert_ids=ids[:, :, 0]))
    yield _routing("no-tokens", "", npz(expert_ids=ids[:0]))
    yield _routing("id-too-large", "64", npz(expert_ids=_with(ids, (3, 2, 1), EXPERTS)))
    yield _routing("id-negative", "-", npz(expert_ids=_with(ids, (3, 2, 1), -1)))
    yield _routing("id-twice", "", npz(expert_ids=_with(ids, (3, 2, 1), int(ids[3, 2, 0]))))
    yield _routing("other-top-k", "top", npz(expert_ids=ids[:, :, :4]))
    yield _routing("other-experts", "experts", npz(expert_ids=ids, num_experts=128))
    yield _routing("experts-zero", "num_experts", npz(expert_ids=ids, num_experts=0))
    yield _routing("sequence-short", "sequence_id", npz(expert_ids=ids, sequence_id=np.zeros(5, int)))
    yield _routing("sequence-torn", "sequence_id", npz(expert_ids=ids, sequence_id=np.arange(12) % 2))
    yield _routing("sequence-floats", "sequence_id", npz(expert_ids=ids, sequence_id=np.zeros(12)))
    yield _routing("layers-twice", "layer_index", npz(expert_ids=ids, layer_index=np.zeros(LAYERS, int)))
    yield _routing("weights-shape", "weights", npz(expert_ids=ids, weights=np.ones((3, 3))))
    yield _routing("weights-nan", "weights", npz(expert_ids=ids, weights=np.full(ids.shape, np.nan)))
    yield _routing("weights-negative", "weights", npz(expert_ids=ids, weights=np.full(ids.shape, -1.0)))
    lie = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 16, 8), }"
    yield _routing("lying-header", "", _member("expert_ids", lie, b"\0" * 64))
    yield _routing("header-negative", "", _member("expert_ids", lie.replace("1000000000", "-5"), b""))
    yield _routing("header-code", "", _member("expert_ids", "__import__('os').system('id')", b""))
    yield _routing("header-deep", "", _member("expert_ids", "(" * 5000, b""))
    yield _routing("zip-bomb", "", _member("expert_ids", lie.replace("1000000000", "8000000"), b"\0" * (1 << 26)))
    yield _routing("folder-empty", "", Path.mkdir, "f")
    yield _routing("folder-no-ids", "expert_ids", _folder(expert_ids__npy=None), "f")
    yield _routing("folder-no-meta", "meta", _folder(meta__json=None), "f")
    yield _routing("folder-meta-list", "meta", _folder(meta__json=b"[]"), "f")
    yield _routing("folder-meta-cut", "meta", _folder(meta__json=b'{"num_experts": 6'), "f")
    yield _routing("folder-id-range", "64", _folder(expert_ids__npy=_with(ids, (0, 0, 0), 99).astype(np.uint8)), "f")
    yield _routing("folder-starts", "sequence_start", _folder(sequence_start__npy=np.array([0, 99])), "f")
    yield _routing("folder-starts-back", "sequence_start", _folder(sequence_start__npy=np.array([0, 8, 4, 12])), "f")
    yield _routing("folder-objects", "", _folder(expert_ids__npy=np.array([{}], dtype=object)), "f")
    yield _routing("folder-cut-off", "", _folder(expert_ids__npy=b"\x93NUMPY\x01\x00\x10"), "f")
    head = "layer," + ",".join(f"e{i}" for i in range(EXPERTS)) + "\n"
    rows = "".join(f"{layer}," + ",".join(["5"] * EXPERTS) + "\n" for layer in range(LAYERS))
    for name, words, text in (
        ("empty", "layer", ""), ("header-only", "", head), ("no-header", "layer", rows),
        ("cut-off", "", head + rows[:-40]), ("negative", "", head + rows.replace("5", "-5", 1)),
        ("nan", "", head + rows.replace("5", "nan", 1)), ("infinite", "", head + rows.replace("5", "inf", 1)),
        ("text", "", head + rows.replace("5", "five", 1)), ("layer-twice", "", head + rows + rows),
        ("all-zero", "", head + rows.replace(",5", ",0")), ("other-experts", "", "layer,e0,e1\n0,1,2\n"),
    ):  # fmt: skip
        yield _routing(f"counts-{name}", words, text.encode(), "c.csv")
    for name, words, text in (
        ("ragged", "", json.dumps([[1] * EXPERTS] * 15 + [[1]])), ("cut-off", "", "[[1, 2"), ("number", "", "5"),
        ("nan", "", json.dumps([[float("nan")] * EXPERTS] * LAYERS)), ("deep", "", "[" * 100_000),
        ("text", "", json.dumps([["x"] * EXPERTS] * LAYERS)), ("layers", "", json.dumps({"x": [1] * EXPERTS})),
    ):  # fmt: skip
        yield _routing(f"counts-json-{name}", words, text.encode(), "c.json")


def _models() -> Iterator[Case]:
    model = """\
name: mine
source: made up
num_layers: 4
hidden_size: 256
vocab_size: 1024
tie_word_embeddings: false
max_position_embeddings: 4096
attention: {kind: gqa, num_heads: 8, num_kv_heads: 8, head_dim: 32}
moe: {num_experts: 64, top_k: 8, intermediate_size: 128}
"""
    for name, words, text in (
        ("unknown-key", "num_layer", model.replace("num_layers", "num_layer")),
        ("negative", "hidden_size", model.replace("256", "-256")),
        ("huge", "hidden_size", model.replace("256", "999999999999")),
        ("text", "vocab_size", model.replace("1024", "many")),
        ("kind", "kind", model.replace("gqa", "mha")),
        ("top-k-over-experts", "top_k", model.replace("top_k: 8", "top_k: 65")),
        ("kv-heads", "num_kv_heads", model.replace("num_kv_heads: 8", "num_kv_heads: 3")),
        ("layers-past-end", "", model.replace("top_k: 8", "top_k: 8, layers: [1, 9]")),
        ("dtype", "weight_dtype", model + "weight_dtype: fp7\n"),
        ("list", "mapping", "- 1\n"),
        ("empty", "required", ""),
    ):
        yield Case(f"model-{name}", words, sets=("model=m.yaml",), files=(("m.yaml", text.encode()),))
    config = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
              "vocab_size": 32000, "max_position_embeddings": 32768}  # fmt: skip
    for name, words, value in (
        ("text-layers", "num_hidden_layers", config | {"num_hidden_layers": "32"}),
        ("negative-layers", "num_hidden_layers", config | {"num_hidden_layers": -1}),
        ("huge-layers", "num_hidden_layers", config | {"num_hidden_layers": 10**9}),
        ("missing", "hidden_size", {k: v for k, v in config.items() if k != "hidden_size"}),
        ("nan", "finite", config | {"hidden_size": float("nan")}),
        ("list", "", [1]),
    ):
        data = json.dumps(value).encode()
        yield Case(
            f"config-{name}", words or "config.json", sets=("model=config.json",), files=(("config.json", data),)
        )
    for name, words, raw in (
        ("cut-off", "", b'{"model_type": "mix'), ("deep", "", b"[" * 100_000), ("binary", "", zlib.compress(b"x")),
        ("duplicate", "", b'{"model_type": "mixtral", "model_type": "dbrx"}'),
        ("digits", "", b'{"a": ' + b"9" * 5000 + b"}"),
    ):  # fmt: skip
        yield Case(f"config-{name}", words or "config.json", sets=("model=config.json",), files=(("config.json", raw),))


def _profiles() -> Iterator[Case]:
    profile = """\
name: mine
kind: assumed
device: Mine
vendor: Me
memory_gib: 80
hbm_gb_per_s: 3000
flop_per_s: {bf16: 1e15}
num_sms: 100
graph_launch_us: 2
eager_launch_us: 8
node: {gpus_per_node: 8, nvlink_gb_per_s: 450, nvlink_latency_us: 2, nic_gb_per_s: 50, nic_latency_us: 10,
  pcie_gb_per_s: 64, host_memory_gib: 1000, host_gb_per_s: 600, nvme_gb_per_s: 25, nvme_gib: 1000, cpu_cores: 100}
"""
    for name, words, text in (
        ("unknown-key", "hbm", profile.replace("hbm_gb_per_s", "hbm_gbps")),
        ("zero-memory", "memory_gib", profile.replace("memory_gib: 80", "memory_gib: 0")),
        ("unit", "hbm_gb_per_s", profile.replace("3000", "3000 apples")),
        ("dtype", "flop_per_s", profile.replace("bf16", "bf17")),
        ("no-flops", "flop_per_s", profile.replace("{bf16: 1e15}", "{}")),
        ("kind", "kind", profile.replace("assumed", "guessed")),
        ("measured-without-curves", "curves", profile.replace("assumed", "measured")),
        ("curves-missing", "", profile + "curves: [nope.json]\n"),
        ("curves-outside", "curves", profile + "curves: [../nope.json]\n"),
        ("fit-unknown", "operator", profile + "fits: {gemmm: {efficiency: 0.5}}\n"),
        ("error-nan", "finite", profile + "errors: {gemm: .nan}\n"),
        ("node-missing-key", "nic_gb_per_s", profile.replace("nic_gb_per_s: 50, ", "")),
    ):
        yield Case(f"profile-{name}", words, sets=("cluster.device=p.yaml",), files=(("p.yaml", text.encode()),))
    curve: dict[str, Any] = {"key": [1, 1, "bf16"], "variant": "bf16", "axes": [0], "log_ratio": [0, 0]}
    for name, words, axes, change in (
        ("unknown-operator", "gemmm is not an operator", [[1, 2]], None),
        ("axes-backwards", "must increase", [[2, 1]], {}),
        ("axes-zero", "positive", [[0, 1]], {}),
        ("axes-place", "gemm[0]", [[1, 2]], {"axes": [1]}),
        ("shape", "log_ratio has shape", [[1, 2]], {"log_ratio": [0]}),
        ("far-off", "within +-10", [[1, 2]], {"log_ratio": [0, 99]}),
        ("infinite", "within +-10", [[1, 2]], {"log_ratio": [0, float("inf")]}),
        ("nan", "within +-10", [[1, 2]], {"log_ratio": [0, float("nan")]}),
        ("no-key", "gemm[0]", [[1, 2]], {"key": []}),
    ):
        curves = {"gemmm": []} if change is None else {"gemm": [curve | change]}
        yield _curves(profile, name, words, json.dumps({"axes": axes, "curves": curves}).encode())
    yield _curves(profile, "not-json", "not JSON", b"{")
    yield _curves(profile, "deep", "not JSON", b"[" * 100_000)
    yield _curves(profile, "list", "mapping", b"[]")


def _curves(profile: str, name: str, words: str, curves: bytes) -> Case:
    files = (("p.yaml", f"{profile}curves: [c.json]\n".encode()), ("c.json", curves))
    return Case(f"curves-{name}", words, sets=("cluster.device=p.yaml",), files=files)


CASES: list[Case] = [
    *_yaml(), *_values(), *_keys(), *_together(), *_requests(), *_traces(), *_models(), *_profiles(),
]  # fmt: skip
