"""Hugging Face `config.json` -> MoEModel: the common MoE and dense decoder families.

A config names the same fact differently from family to family, and leaves out what its class knows; both are
tables of `moesim.hf_families`. An unknown type whose keys are the usual ones is read by their meaning and
says so in `MoEModel.warnings`; an architecture whose layers are not attention over a cache (linear attention,
state spaces) or differ in head sizes is refused, because its cost and its memory would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.architecture import Attention, LayerKind, MoEModel
from moesim.errors import BadInput, Problem
from moesim.hf_families import (
    DENSE_TYPES,
    FAMILIES,
    FLOATS,
    KIND_OF,
    NAMES,
    REFUSED_KEYS,
    REFUSED_TYPES,
    Family,
)  # fmt: skip
from moesim.hf_keys import Keys
from moesim.hf_quant import QuantDtypes, Unreadable, read_quantization
from moesim.model_rules import MAX_EXPERTS, MAX_LAYERS
from moesim.strict_json import line_of_key, load_json

__all__ = ["from_hf_config", "read_hf_config"]


def read_hf_config(path: str | Path, name: str | None = None) -> MoEModel:
    """Read a `config.json`, or the one of a folder; `name` defaults to the folder's name (the file's stem).

    A `hf_quant_config.json` beside it is read where the config itself names no quantisation. Raises BadInput
    with `file:line` and the key.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    config, text = load_json(file)
    default = file.resolve().parent.name if file.name == "config.json" else file.stem
    if isinstance(config, dict) and not _quantization(config)[0]:
        beside = file.with_name("hf_quant_config.json")
        if beside.is_file():
            outer, _ = load_json(beside)
            inner = outer.get("quantization") if isinstance(outer, dict) else None
            if not isinstance(inner, dict):
                raise BadInput("an object under the key `quantization` is needed", str(beside))
            config = {**config, "quantization_config": inner}

    def where_of(key: str) -> str:
        line = line_of_key(text, key.split(".")[-1])
        return f"{file}:{line}" if line else str(file)

    return _read(config, where_of, str(file), name or default or "model")


def from_hf_config(config: dict[str, Any], where: str, name: str) -> MoEModel:
    """Turn a parsed config into a model; `where` stands in errors. Raises BadInput naming every wrong key."""
    return _read(config, lambda _key: where, where, name)


def _read(config: Any, where_of: Callable[[str], str], where: str, name: str) -> MoEModel:
    if not isinstance(config, dict):
        raise BadInput("a config is a JSON object of keys and values", where)
    text, warnings = _language_part(config, where)
    keys = Keys(text, where_of)
    model_type = keys.text(("model_type",), "")
    _refuse_unmodelled(keys, model_type)
    keys.raise_if_wrong()
    family = FAMILIES.get(model_type)
    if family is None:
        family = Family()
        warnings.append(f"model_type {model_type!r} is not known: read by the usual keys, biases and q/k norms as none")
    if keys.raw("index_topk") or keys.raw("sparse_attention_config"):
        warnings.append("sparse attention and its indexer are not modelled: it is priced as full attention")
    reader = _Reader(keys, family, model_type, warnings)
    facts = reader.facts(config)
    keys.raise_if_wrong()
    try:
        return MoEModel(name=name, source=f"Hugging Face config {where}", warnings=tuple(warnings), **facts)
    except BadInput as error:
        raise BadInput([_renamed(problem, keys) for problem in error.problems]) from None


def _renamed(problem: Problem, keys: Keys) -> Problem:
    """A disagreement between facts, with the config's own key and place in front."""
    field = problem.where.rsplit(".", 1)[-1]
    key = keys.used.get(field, field)
    return Problem(keys.where_of(key), f"{key}: {problem.message}")


def _language_part(config: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The decoder's own config (nested in multimodal ones) and what was left aside."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise BadInput(f"{key}: an object is needed, got {inner!r:.60}", where)
        text = {**inner}
        for shared in ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings", "model_type"):
            if text.get(shared) is None and config.get(shared) is not None:
                text[shared] = config[shared]
        towers = [k for k in ("vision_config", "audio_config") if config.get(k)]
        return text, [f"{key}: its parameters are not counted" for key in towers]
    return config, []


def _quantization(config: dict[str, Any]) -> tuple[Any, str]:
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    return holder[key], key
    return None, ""


def _refuse_unmodelled(keys: Keys, model_type: str) -> None:
    if model_type in REFUSED_TYPES:
        keys.wrong("model_type", f"not modelled: {model_type} has {REFUSED_TYPES[model_type]}")
    for key, what in REFUSED_KEYS.items():
        if keys.raw(key) not in (None, False, 0, [], {}, "none"):
            keys.wrong(key, f"not modelled: {what}")
    kinds = keys.raw("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != 1 for kind in kinds)):
        keys.wrong("attn_type_list", "not modelled: layers other than softmax attention (1)")
    if keys.raw("is_encoder_decoder") is True and model_type != "switch_transformers":
        keys.wrong("is_encoder_decoder", "not modelled: encoder-decoder models")


class _Reader:
    """One config being read: its keys, its family's silent facts, the warnings so far."""

    def __init__(self, keys: Keys, family: Family, model_type: str, warnings: list[str]) -> None:
        self.keys, self.family, self.model_type, self.warnings = keys, family, model_type, warnings

    def _int(self, fact: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        return self.keys.integer(NAMES[fact], default, low, high, fact)

    def facts(self, config: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of MoEModel but its name, source and warnings."""
        keys, family = self.keys, self.family
        layers = self._int("num_layers", high=MAX_LAYERS)
        hidden = self._int("hidden_size")
        positions = 512 if self.model_type == "switch_transformers" else None  # T5 has no table of positions
        out: dict[str, Any] = {
            "num_layers": layers,
            "hidden_size": hidden,
            "vocab_size": keys.integer(("vocab_size",)),
            "tie_word_embeddings": keys.flag(("tie_word_embeddings",), family.tie),
            "max_position_embeddings": self._int("max_position_embeddings", positions, high=1 << 40),
            "num_mtp_layers": self._mtp_layers(),
            "norm_bias": family.norm_bias,
            "lm_head_bias": keys.flag(("lm_head_bias",), family.lm_head_bias),
            "gated_mlp": self._gated(),
            "extra_params": 0,
            "attention": self._attention(hidden),
        }
        out |= self._experts(layers, hidden)
        if self.model_type == "switch_transformers":
            self._both_stacks(out)
        kinds, windows = self._layer_kinds(out["num_layers"], out["max_position_embeddings"])
        out |= {"attention_kind_of_layer": kinds, "window_of_layer": windows}
        out |= self._dtypes(config, out)
        return out

    def _mtp_layers(self) -> int:
        for name in ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"):
            if self.keys.raw(name) is not None:
                return self.keys.integer((name,), 0, 0, 64, "num_mtp_layers")
        return 0

    def _gated(self) -> bool:
        if self.keys.flag(("mlp_bias",), False):
            self.warnings.append("mlp_bias: the biases of the FFNs are not counted")
        if self.model_type == "switch_transformers":
            return self.keys.flag(("is_gated_act",), False)
        return True

    def _attention(self, hidden: int) -> Attention:
        keys, family = self.keys, self.family
        heads = self._int("num_heads", high=1 << 16)
        bias = keys.flag(("attention_bias", "qkv_bias", "use_bias"), family.qkv_bias)
        o_bias = bias if family.o_bias is None else family.o_bias
        if keys.raw("kv_lora_rank") is not None:
            nope = keys.integer(("qk_nope_head_dim",))
            rope = keys.integer(("qk_rope_head_dim",))
            query = None if keys.raw("q_lora_rank") is None else keys.integer(("q_lora_rank",))
            rank, value = keys.integer(("kv_lora_rank",)), keys.integer(("v_head_dim",))
            return Attention(
                "mla", heads, heads, nope + rope, value, query, rank, nope, rope, bias, False, o_bias=o_bias
            )  # fmt: skip
        kv = self._int("num_kv_heads", heads, high=1 << 16)
        if keys.flag(("multi_query",), False) and not keys.used.get("num_kv_heads"):
            kv = 1
        if keys.raw("head_dim") is None and keys.raw("d_kv") is None and hidden % heads and not keys.problems:
            keys.wrong(
                keys.used.get("num_heads", "num_attention_heads"),
                f"without head_dim, heads must divide the hidden size: {heads} heads, hidden size {hidden}",
            )
        head_dim = self._int("head_dim", max(1, hidden // heads))
        value = keys.integer(("v_head_dim",), head_dim)
        size = self._qk_norm()
        return Attention(
            "gqa", heads, kv, head_dim, value, None, 0, 0, 0, bias, bool(size),
            "all" if size == "all" else "head", o_bias, family.sinks,
        )  # fmt: skip

    def _qk_norm(self) -> str:
        family = self.family
        if not family.qk_norm_key:
            return family.qk_norm
        default = not family.qk_norm_key.endswith("!")  # "!": off unless the config turns it on
        return family.qk_norm if self.keys.flag((family.qk_norm_key.rstrip("!"),), default) else ""

    def _experts(self, layers: int, hidden: int) -> dict[str, Any]:
        keys, family = self.keys, self.family
        experts = self._int("num_experts", 0, 0, MAX_EXPERTS)
        intermediate = self._int("intermediate", 0)
        if experts <= 1:
            self._really_dense(experts)
            if not intermediate:
                self._int("intermediate")
            return {
                "moe_layers": (), "num_experts": 0, "top_k": 0, "moe_intermediate_size": 0,
                "shared_intermediate_size": 0, "shared_gate": False, "dense_intermediate_size": intermediate,
                "num_expert_groups": 1, "top_groups": 1, "scoring": "softmax", "norm_topk_prob": False,
            }  # fmt: skip
        moe_layers = self._moe_layers(layers)
        size = self._int("moe_intermediate_size", intermediate or None)
        scoring = keys.text(("scoring_func", "score_function"), "sigmoid" if family.sigmoid else "softmax")
        if scoring not in ("softmax", "sigmoid"):
            keys.wrong(keys.used.get("scoring_func", "scoring_func"), f"softmax or sigmoid is known, got {scoring!r}")
        groups = keys.integer(("n_group",), 1, fact="num_expert_groups")
        return {
            "moe_layers": moe_layers,
            "num_experts": experts,
            "top_k": self._int("top_k", high=MAX_EXPERTS),
            "moe_intermediate_size": size,
            "shared_intermediate_size": self._shared(size, intermediate),
            "shared_gate": family.shared_gate,
            "dense_intermediate_size": self._dense_size(intermediate) if len(moe_layers) < layers else 0,
            "num_expert_groups": groups,
            "top_groups": keys.integer(("topk_group",), groups, fact="top_groups"),
            "scoring": scoring,
            "norm_topk_prob": keys.flag(("norm_topk_prob",), family.norm_topk),
            "router_dtype": "fp32" if family.router_fp32 else "bf16",
            "router_bias": keys.flag(("use_routing_bias", "moe_router_enable_expert_bias"), family.router_bias),
            "expert_bias": family.expert_bias,
        }

    def _really_dense(self, experts: int) -> None:
        """Refuse to read as dense what is known to have experts or speaks of them."""
        if experts or self.model_type in DENSE_TYPES:
            return
        if self.model_type in FAMILIES:
            self._int("num_experts")
            return
        for holder in (self.keys.config, *self.keys.config.values()):
            for key, value in holder.items() if isinstance(holder, dict) else ():
                speaks = "expert" in str(key) or str(key).startswith("moe_")
                if speaks and type(value) is int and value > 1:
                    message = f"{value}, but the number of experts is missing (num_experts or alike)"
                    self.keys.wrong(ascii(key)[1:-1], message)

    def _dense_size(self, intermediate: int) -> int:
        names = (
            "intermediate_size_mlp",
            "dense_intermediate_size",
        )  # Llama 4 calls its experts' size "intermediate"
        return self.keys.integer(names, intermediate or None, fact="dense_intermediate_size")

    def _shared(self, size: int, intermediate: int) -> int:
        """Intermediate sizes of the shared experts, added up."""
        whole = self._int("shared_size", 0, 0)
        if whole:
            return whole
        if self.model_type in ("llama4", "llama4_text"):
            return intermediate
        if self.model_type == "hunyuan_v1_moe":
            return size * max(1, self._int("shared_count", 1, 0, 1024))
        return size * self._int("shared_count", 0, 0, 1024)

    def _moe_layers(self, layers: int) -> tuple[int, ...]:
        """Indices of the MoE layers, however the config says it."""
        keys = self.keys
        listed = keys.items(("moe_layers",), int)
        if listed:
            if any(not 0 <= layer < layers for layer in listed):
                keys.wrong("moe_layers", f"layers are numbered from 0 to {layers - 1}")
            return tuple(sorted({layer for layer in listed if 0 <= layer < layers}))
        kinds = keys.items(("mlp_layer_types",), str, layers)
        if kinds:
            return tuple(i for i, kind in enumerate(kinds) if kind in ("sparse", "moe"))
        if isinstance(keys.raw("moe_layer_freq"), list):
            marks = keys.items(("moe_layer_freq",), int, layers) or [1] * layers
            return tuple(i for i, mark in enumerate(marks) if mark)
        first = keys.integer(("first_k_dense_replace", "moe_layer_start_index"), 0, 0, MAX_LAYERS)
        last = keys.integer(("moe_layer_end_index",), -1, -1, MAX_LAYERS)
        end = layers if last < 0 else min(layers, last + 1)
        freq = keys.integer(("moe_layer_freq",), 1, 1, MAX_LAYERS)
        names = ("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_interval")
        step = keys.integer(names, 1, 1, MAX_LAYERS)
        dense = frozenset(keys.items(("mlp_only_layers",), int) or [])
        found = (i for i in range(first, end) if i % freq == 0 and (i + 1) % step == 0 and i not in dense)
        result = tuple(found)
        if not result:
            keys.wrong(keys.used.get("num_experts", "num_experts"), "experts are given, but no layer has them")
        return result

    def _both_stacks(self, out: dict[str, Any]) -> None:
        """Switch: encoder and decoder laid end to end; cross-attention counts as parameters only."""
        layers, hidden, a = out["num_layers"], out["hidden_size"], out["attention"]
        decoder = self.keys.integer(("num_decoder_layers",), layers, high=MAX_LAYERS)
        step = self.keys.integer(("encoder_sparse_step", "decoder_sparse_step"), 1, high=MAX_LAYERS)
        out["num_layers"] = layers + decoder
        out["moe_layers"] = tuple(
            [i for i in range(layers) if (i + 1) % step == 0]
            + [layers + i for i in range(decoder) if (i + 1) % step == 0]
        )
        out["dense_intermediate_size"] = out["moe_intermediate_size"]
        buckets = self.keys.integer(("relative_attention_num_buckets",), 32)
        cross = decoder * (4 * hidden * a.num_heads * a.head_dim + hidden)
        out["extra_params"] = cross + hidden + 2 * buckets * a.num_heads
        self.warnings.append("encoder and decoder are run as one stack; cross-attention is counted in bytes, not time")

    def _layer_kinds(self, layers: int, positions: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
        """(kind, window) of every layer."""
        keys = self.keys
        whole: LayerKind = "full"
        full = (whole,) * layers
        window = keys.integer(("sliding_window",), 0, 0, 1 << 40)
        chunk = keys.integer(("attention_chunk_size",), self._usual_chunk(), 0, 1 << 40)
        kinds = self._kinds_as_written(layers) or self._kinds_by_rule(layers, window)
        unknown = [kind for kind in kinds if kind not in KIND_OF]
        if unknown:
            known = ", ".join(KIND_OF)
            keys.wrong("layer_types", f"{unknown[0]!r:.60} layers are not modelled; known are {known}")
            return full, (0,) * layers
        named = [KIND_OF[kind] for kind in kinds]
        for need, size, key in (
            ("window", window, "sliding_window"),
            ("chunked", chunk, "attention_chunk_size"),
        ):
            if need in named and not size:
                keys.wrong(key, f"missing; {need} attention layers need it")
                return full, (0,) * layers
        sizes: dict[LayerKind, int] = {"full": 0, "window": window, "chunked": chunk}
        # A window as long as the longest context never cuts anything.
        real = tuple(kind if 0 < sizes[kind] < positions else whole for kind in named)
        return real, tuple(sizes[kind] for kind in real)

    def _usual_chunk(self) -> int:
        return 8192 if "llama4" in self.model_type else 0

    def _kinds_as_written(self, layers: int) -> list[str] | None:
        rope = self.keys.items(("no_rope_layers",), int)
        written = self.keys.items(("layer_types",), str, layers)
        if written or not rope:
            return written
        return ["chunked_attention" if i < len(rope) and rope[i] else "full_attention" for i in range(layers)]

    def _kinds_by_rule(self, layers: int, window: int) -> list[str]:
        """Layer kinds where the config lists none: by family, else every layer slides or none does."""
        keys, sliding, full = self.keys, "sliding_attention", "full_attention"
        if "llama4" in self.model_type:
            every = keys.integer(("no_rope_layer_interval",), 4, 1, MAX_LAYERS)
            return [full if (i + 1) % every == 0 else "chunked_attention" for i in range(layers)]
        if self.model_type == "gpt_oss":
            return [sliding if i % 2 == 0 else full for i in range(layers)]
        pattern = keys.integer(("sliding_window_pattern",), 0, 0, MAX_LAYERS)
        if not window or keys.raw("use_sliding_window") is False:
            return [full] * layers
        if pattern:
            return [full if (i + 1) % pattern == 0 else sliding for i in range(layers)]
        first = 0
        if keys.raw("use_sliding_window") is True:  # Qwen: the first max_window_layers stay full
            first = keys.integer(("max_window_layers",), 0, 0, MAX_LAYERS)
        return [full if i < first else sliding for i in range(layers)]

    def _dtypes(self, config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        keys = self.keys
        written = keys.text(("torch_dtype", "dtype"), "bfloat16")
        base = FLOATS.get(written.removeprefix("torch."))
        if base is None:
            keys.wrong(keys.used.get("torch_dtype", "torch_dtype"), f"one of {', '.join(FLOATS)}, got {written!r}")
            base = "bf16"
        if written.endswith(("float32", "float")) and "16" not in written:
            self.warnings.append("the checkpoint is float32; engines serve it in 16 bits, taken as bf16")
        found = QuantDtypes(base, base, None, ())
        quant, key = _quantization(config)
        if quant is not None and not isinstance(quant, dict):
            keys.wrong(key, f"an object is needed, got {quant!r:.60}")
        elif quant:
            other = bool(facts["shared_intermediate_size"] or facts["dense_intermediate_size"])
            try:
                is_moe = bool(facts["moe_layers"])
                found = read_quantization(quant, base, facts["num_layers"], is_moe, is_moe and other)
            except Unreadable as error:
                keys.wrong(f"{key}.{error.key}", str(error))
        self.warnings += found.warnings
        return {
            "weight_dtype": found.weight,
            "expert_dtype": found.expert,
            "kv_dtype": found.kv or base,
            "activation_dtype": base,
        }
