"""The page of every prediction beside a measurement: results/validation/README.md.

python benchmarks/validation/page.py                 the page, from committed figures alone (`make validation`)
python benchmarks/validation/page.py --measure       every check whose data is here into published.json, then the page
python benchmarks/validation/page.py --measure NAME  the named checks alone
python benchmarks/validation/page.py --check         is the page what the figures make it? Exit code 1 says no

A check is a file of checks/, found by its name: GROUP, TITLE, SOURCE, `rows()`; SLOW where its test takes long, PACKAGE
where it reads an optional package, COMMAND where its measurements are this project's own. Checks that read tables of
others (../shared/data, never committed) keep their figures in results/validation/published.json; those that read
committed measurements are computed whenever the page is made, those of `moesim validate` among them (raw.py).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in (".", "kernels", "tuner")]

from moesim_kernels.fit.curves import write_whole

from benchmarks.validation import checks as folder_of_checks
from benchmarks.validation.raw import RawCheck, raw_checks
from benchmarks.validation.rows import ROOT, Row
from benchmarks.validation.words import page_text

__all__ = ["GROUPS", "OUT", "PUBLISHED", "check", "found_in", "main", "missing", "names", "page"]

OUT = ROOT / "results" / "validation"
PUBLISHED = OUT / "published.json"
GROUPS = ("operators", "links", "whole steps", "offload", "routing")
ORDER = ("h100", "a800", "infersim", "rtx_pro_6000", "a100_mixtral", "h100_links", "h100_nodes", "dgx_h100")
"""checks that come first in their groups"""


@cache
def names() -> tuple[str, ...]:
    """Every file of checks/ and every folder of raw/, in the page's order."""
    known = [*(m.name for m in pkgutil.iter_modules(folder_of_checks.__path__)), *raw_checks()]
    place = {name: i for i, name in enumerate(ORDER)}
    return tuple(sorted(known, key=lambda n: (GROUPS.index(check(n).GROUP), place.get(n, len(place)), n)))


@cache
def check(name: str) -> ModuleType | RawCheck:
    """A check's module, or what stands in for one."""
    if name.startswith("raw/"):
        return raw_checks()[name]
    return importlib.import_module(f"benchmarks.validation.checks.{name}")


def missing(name: str) -> list[str]:
    """What a check needs and is not here."""
    module = check(name)
    package = getattr(module, "PACKAGE", "")
    out = list(module.SOURCE.missing())
    return out + ([package] if package and importlib.util.find_spec(package) is None else [])


def recorded() -> dict[str, Any]:
    """published.json."""
    return dict(json.loads(PUBLISHED.read_text("utf-8"))) if PUBLISHED.exists() else {}


def found_in(name: str, kept: dict[str, Any]) -> list[Row]:
    """A check's rows: computed where they rest on committed files, else as recorded."""
    module = check(name)
    if module.SOURCE.committed:
        return [Row.of(row.plain()) for row in module.rows()]
    return [Row.of(row) for row in kept.get(name, [])]


def page() -> str:
    """The page's text."""
    kept = recorded()
    parts = {name: (check(name), found_in(name, kept)) for name in names()}
    return page_text(parts, GROUPS, OUT)


def measure(wanted: list[str]) -> None:
    """Run checks that read tables of others, and keep their figures."""
    kept = recorded()
    for name in wanted or [n for n in names() if not check(n).SOURCE.committed]:
        if check(name).SOURCE.committed:
            sys.exit(f"{name} rests on committed measurements, made by `{check(name).COMMAND}`; it is not recorded")
        gone = missing(name)
        if gone:
            print(f"{name}: kept as recorded; not here: {', '.join(gone)}", file=sys.stderr)
            continue
        kept[name] = [row.plain() for row in check(name).rows()]
        print(f"{name}: {len(kept[name])} rows", file=sys.stderr)
    kept = {name: kept[name] for name in names() if name in kept}
    write_whole(PUBLISHED, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="NAME", choices=[*names(), []], help="checks to run anew")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
    text, path = page(), OUT / "README.md"
    if options.check:
        sys.exit(0 if path.exists() and path.read_text("utf-8") == text else "results/validation/README.md is stale")
    write_whole(path, text)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
