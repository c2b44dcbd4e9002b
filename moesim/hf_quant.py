"""What a `quantization_config` of Hugging Face does to the dtypes of weights, experts and KV cache.

Two dtypes describe the weights (`weight_dtype`: attention, shared experts, dense FFNs; `expert_dtype`: routed
experts), so the list of modules left alone is asked about one late layer's attention, shared expert and
routed expert. A method of unknown size is refused: a guess would be wrong by the factor the method was chosen
for.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from moesim.dtypes import Dtype

__all__ = ["QuantDtypes", "Unreadable", "read_quantization"]

_MAX_PATTERNS = 200_000
_MAX_PATTERN = 400
_SKIP_KEYS = (
    "modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers", "llm_int8_skip_modules",
)  # fmt: skip
_ATTENTION = ("self_attn.o_proj", "self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj")
_SHARED = ("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2", "feed_forward.experts.down_proj")
_MODELOPT: dict[str, Dtype] = {"FP8": "fp8", "NVFP4": "nvfp4", "FP8_PB_WO": "fp8_block", "MXFP4": "mxfp4"}


class Unreadable(ValueError):
    """A quantisation that cannot be told in bytes: `key` inside quantization_config, and why."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


class QuantDtypes(NamedTuple):
    """Dtypes after quantisation; kv None where the file says nothing."""

    weight: Dtype
    expert: Dtype
    kv: Dtype | None
    warnings: tuple[str, ...]


def read_quantization(
    config: dict[str, Any], base: Dtype, num_layers: int, is_moe: bool, has_other_ffn: bool
) -> QuantDtypes:
    """Dtypes under `config`, a quantization_config; `base` is what unquantised tensors are held in.

    is_moe: there are routed experts. has_other_ffn: there are shared experts or dense FFNs beside them.
    Raises Unreadable naming the key.
    """
    quantised = _dtype_of(config)
    kv = _kv_dtype(config)
    if quantised is None:
        return QuantDtypes(base, base, kv, ())
    if quantised == "mxfp4" and config.get("quant_method") == "mxfp4" and is_moe:
        return QuantDtypes(base, quantised, kv, ())  # this method touches routed experts alone (gpt-oss)
    patterns = _skip_patterns(config)
    layer = f"model.layers.{num_layers - 1}."
    attention = _skips(patterns, layer + _ATTENTION[0]) and any(
        _skips(patterns, layer + name) for name in _ATTENTION[1:]
    )
    experts = is_moe and any(_skips(patterns, layer + name) for name in _EXPERTS)
    others = [_skips(patterns, layer + name) for name in (_SHARED[:2] if is_moe else _SHARED[2:])]
    warnings = []
    if has_other_ffn and attention != any(others):
        kept = base if attention else quantised
        warnings.append(f"attention and shared or dense FFNs are quantised differently; both are taken as {kept}")
    return QuantDtypes(base if attention else quantised, base if experts else quantised, kv, tuple(warnings))


def _dtype_of(config: dict[str, Any]) -> Dtype | None:
    method = config.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise Unreadable("quant_method", f"a method's name is needed, got {method!r}")
    if config.get("quant_algo") is not None:
        return _modelopt(config)
    if method == "fp8":
        return "fp8_block" if _block(config) else "fp8"
    if method in ("fbgemm_fp8", "ptpc_fp8"):
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method in ("gptq", "awq", "auto-round", "gptq_marlin", "awq_marlin"):
        return _integer(config, "bits" if "bits" in config else "w_bit")
    if method == "bitsandbytes":
        return "int4" if config.get("load_in_4bit") is True else "int8"
    if method == "compressed-tensors":
        return _compressed(config)
    known = "fp8, fbgemm_fp8, mxfp4, gptq, awq, auto-round, bitsandbytes, compressed-tensors, modelopt"
    raise Unreadable("quant_method", f"{method!r} is not known; known are {known}")


def _block(config: dict[str, Any]) -> bool:
    """Whether fp8 weights have a scale a block; the block must be the 128 x 128 that `fp8_block` means."""
    block = config.get("weight_block_size")
    if block is None:
        return False
    if block != [128, 128]:
        raise Unreadable("weight_block_size", f"blocks of [128, 128] are known, got {block!r}")
    return True


def _integer(config: dict[str, Any], key: str) -> Dtype:
    bits = config.get(key)
    if isinstance(bits, bool) or bits not in (4, 8):
        raise Unreadable(key, f"4 or 8 bits are known, got {bits!r}")
    return "int4" if bits == 4 else "int8"


def _modelopt(config: dict[str, Any]) -> Dtype | None:
    algo = config["quant_algo"]
    if not isinstance(algo, str) or algo.upper() not in _MODELOPT:
        raise Unreadable("quant_algo", f"{algo!r} is not known; known are {', '.join(_MODELOPT)}")
    return _MODELOPT[algo.upper()]


def _compressed(config: dict[str, Any]) -> Dtype | None:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise Unreadable("config_groups", "compressed-tensors needs at least one group")
    found = {_group_dtype(name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise Unreadable("config_groups", f"groups of several dtypes are not modelled: {sorted(found)}")
    return found.pop()


def _group_dtype(name: str, group: Any) -> Dtype:
    key = f"config_groups.{ascii(name)[1:-1]}"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise Unreadable(key, "a group needs `weights`")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if isinstance(bits, bool) or (bits, kind) not in ((8, "float"), (4, "float"), (8, "int"), (4, "int")):
        raise Unreadable(f"{key}.weights", f"4 or 8 bits of int or float are known, got {bits!r} of {kind!r}")
    if kind == "int":
        return "int4" if bits == 4 else "int8"
    if bits == 8:
        return "fp8_block" if strategy == "block" else "fp8"
    return "mxfp4" if weights.get("group_size") == 32 else "nvfp4"


def _kv_dtype(config: dict[str, Any]) -> Dtype | None:
    algo, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    for key, text in (("kv_cache_quant_algo", algo), ("kv_cache_scheme", scheme)):
        if isinstance(text, str):
            if text.upper() not in ("FP8", "INT8", "NVFP4"):
                raise Unreadable(key, f"FP8, INT8 and NVFP4 are known, got {text!r}")
            return {"FP8": "fp8", "INT8": "int8", "NVFP4": "nvfp4"}[text.upper()]  # type: ignore[return-value]
    if isinstance(scheme, dict):
        if scheme.get("num_bits") != 8:
            raise Unreadable("kv_cache_scheme", f"8 bits are known, got {scheme.get('num_bits')!r}")
        return "int8" if scheme.get("type") == "int" else "fp8"
    return None


def _skip_patterns(config: dict[str, Any]) -> list[str]:
    """Every list of modules left alone, as shell patterns. Regular expressions are translated, never run."""
    out: list[str] = []
    for key in _SKIP_KEYS:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) > _MAX_PATTERNS:
            raise Unreadable(key, f"a list of at most {_MAX_PATTERNS} module names is needed")
        for item in value:
            if not isinstance(item, str) or len(item) > _MAX_PATTERN:
                raise Unreadable(key, f"a module name of at most {_MAX_PATTERN} characters is needed")
            out += _as_shell(item)
    return out


def _as_shell(pattern: str) -> list[str]:
    if pattern.startswith("re:"):
        text = pattern[3:].replace(".*", "*").replace("\\", "").strip("^$")
        group = re.search(r"\(([\w|]+)\)", text)
        names = group[1].split("|")[:32] if group else [""]
        texts = [text[: group.start()] + name + text[group.end() :] for name in names] if group else [text]
    else:
        texts = [pattern]
    return [re.sub(r"\*+", "*", t.replace("language_model.", "").replace("[", "?")) for t in texts]


def _skips(patterns: list[str], name: str) -> bool:
    """Whether a pattern names the module, a module it lies in, or the end of its path."""
    for pattern in patterns:
        if "*" not in pattern and "?" not in pattern:
            if f".{pattern}." in f".{name}.":
                return True
        elif any(fnmatchcase(name, p) for p in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*")):
            return True
    return False
