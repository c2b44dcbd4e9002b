"""Plans and cases: strict to read, the same bytes both ways, ids by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.bench.default_plan import default_plan
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.floors import floors, guess_ns
from moesim_kernels.bench.plan import DEVICES, OPS, Case, Plan, load_plan, save_plan

GEMM = Case("gemm", {"n": 64, "k": 32}, {"m": 4}, "fp32")
MOE = Case(
    "moe",
    {"hidden": 16, "intermediate": 8, "slots": 4, "top_k": 2},
    {"tokens": 4, "rows": 8, "histogram": "zipf:1.2"},
)


def test_id_is_of_what_is_run_and_not_of_its_role():
    again = Case("gemm", {"k": 32, "n": 64}, {"m": 4}, "fp32", role="heldout")
    assert again.id == GEMM.id
    assert len(GEMM.id) == 16
    assert len({GEMM.id, MOE.id, Case("gemm", {"n": 64, "k": 32}, {"m": 5}, "fp32").id}) == 3
    assert Case("gemm", {"n": 64, "k": 32}, {"m": 4}, "fp32", seed=1).id != GEMM.id


def test_plan_id_leaves_the_note_out():
    plan = Plan("cpu", (GEMM, MOE))
    assert Plan("cpu", (GEMM, MOE), note={"by": "hand"}).plan_id == plan.plan_id
    assert Plan("cpu", (GEMM, MOE), threads=2).plan_id != plan.plan_id
    assert Plan("cpu", (MOE, GEMM)).plan_id != plan.plan_id


@pytest.mark.parametrize("device", DEVICES)
def test_default_plan_is_written_and_read_back(device: str, tmp_path: Path):
    plan = default_plan(device)
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    assert again.plan_id == plan.plan_id
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    roles = [case.role for case in plan.cases]
    assert {"ceiling", "grid", "heldout"} == set(roles)
    for case in plan.cases:
        if case.op not in ("launch", "copy"):
            assert min(floors(case)) >= 0
            assert max(floors(case)) > 0
            assert guess_ns(case, device) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"op": "gem"}, "op must be one of"),
        ({"dtype": "bf17"}, "dtype must be one of"),
        ({"backend": "cublas"}, "backend must be one of"),
        ({"role": "main"}, "role must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"shape": {"n": 64}}, "missing: k"),
        ({"shape": {"n": 64, "k": 32, "q": 1}}, "unknown: q"),
        ({"shape": {"n": 64, "k": 0}}, "k must be a whole number from 1; got 0"),
        ({"shape": {"n": 64, "k": 1.0}}, "k must be a whole number"),
        ({"shape": {"n": 64, "k": True}}, "k must be a whole number"),
        ({"shape": {"n": 64, "k": 1 << 60}}, "k must be a whole number"),
        ({"shape": []}, "shape must be an object"),
        ({"extra": 1}, "unknown: extra"),
    ],
)
def test_wrong_case_is_named(change: dict[str, Any], said: str):
    value = GEMM.to_json() | change
    with pytest.raises(BadPlan, match=said):
        Case.from_json(value, "plan.json: cases[0]")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"tokens": 4, "rows": 9, "histogram": "uniform"}, "rows must be at most tokens x min"),
        ({"tokens": 4, "rows": 8, "histogram": "zipf"}, "histogram must be"),
        ({"tokens": 4, "rows": 8, "histogram": "few:0"}, "histogram must be"),
        ({"tokens": 0, "rows": 0, "histogram": "one"}, "tokens must be a whole number from 1"),
    ],
)
def test_wrong_rows_are_named(size: dict[str, Any], said: str):
    with pytest.raises(BadPlan, match=said):
        Case("moe", MOE.shape, size)


def test_attention_needs_the_keys_of_its_kind():
    gqa = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "v_head_dim": 8, "window": 0}
    mla = {"kind": "mla", "heads": 4, "kv_dim": 24, "rope_dim": 8, "nope_dim": 8, "v_head_dim": 8}
    assert Case("attention_decode", gqa, {"batch": 1, "context": 9}).id
    assert Case("attention_decode", mla, {"batch": 1, "context": 9}).id
    with pytest.raises(BadPlan, match="shape takes kind, heads, kv_dim"):
        Case("attention_decode", gqa | {"kind": "mla"}, {"batch": 1, "context": 9})
    with pytest.raises(BadPlan, match=r"shape\.kind must be one of gqa, mla"):
        Case("attention_decode", {}, {"batch": 1, "context": 9})


def plan_text(**change: Any) -> str:
    return json.dumps(Plan("cpu", (GEMM,)).to_json() | change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (plan_text(schema=2), "schema must be 1; got 2"),
        (plan_text(schema=True), "schema must be 1"),
        (plan_text(device="tpu"), "device must be one of cpu, cuda"),
        (plan_text(threads=0), "threads must be"),
        (plan_text(cases=[]), "from 1 to 20000 cases"),
        (plan_text(cases={}), "cases must be a list"),
        (plan_text(cases=[GEMM.to_json(), GEMM.to_json() | {"role": "heldout"}]), "cases 0 and 1 are the same"),
        (plan_text(note=[]), "note must be an object"),
        (plan_text(colour="red"), "unknown: colour"),
        ('{"schema": 1, "schema": 1}', "the key 'schema' stands twice"),
        (plan_text().replace('"m": 4', '"m": NaN'), "NaN is not JSON"),
        (plan_text().replace('"m": 4', '"m": 1e999'), "must be finite"),
        (plan_text().replace('"m": 4', '"m": ' + "9" * 5000), "5000 digits"),
        (plan_text()[:-1], "not JSON"),
        ("[" * 200_000, "nests too deeply"),
        ("[]", "a plan must be an object"),
        ("", "not JSON"),
    ],
)
def test_wrong_plan_file_is_named(text: str, said: str, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(BadPlan, match=said) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path))


def test_note_that_nests_too_deeply_is_refused():
    note: dict[str, Any] = {}
    for _ in range(400):
        note = {"of": note}
    with pytest.raises(BadPlan, match="note may nest 16 levels"):
        Plan.from_json(Plan("cpu", (GEMM,)).to_json() | {"note": note})


def test_plan_that_is_no_file(tmp_path: Path):
    with pytest.raises(BadPlan, match="a regular file is needed"):
        load_plan(tmp_path)
    with pytest.raises(BadPlan, match="cannot be read"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "latin").write_bytes(b'{"schema": "\xe9"}')
    with pytest.raises(BadPlan, match="must be UTF-8"):
        load_plan(tmp_path / "latin")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*OPS, "op", "shape"]), inner),
        max_leaves=12,
    )
)
def test_any_json_is_a_plan_or_a_bad_plan(value: Any):
    for reader in (Plan.from_json, Case.from_json):
        with pytest.raises(BadPlan):
            reader(value, "here")
