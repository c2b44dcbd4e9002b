"""Strict YAML: what is read is what was written, or one clear message says where it is not.

YAML 1.2 core scalars on PyYAML's parser: `1e-3` is a number, `no`, `on` and `12:30` are text, `017` is 17 and
`0o17` is 15. Refused: duplicate keys, keys that are not text, tags, merge keys, several documents, NaN and
infinity, and whatever passes the bounds on bytes, depth, nodes and alias expansion. Nothing recurses, so no
input can exhaust the stack. Every value and key keeps its place, so later checks can name `file:line:col`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from moesim.errors import BadInput, Problem

__all__ = ["Marks", "YamlPath", "dump_yaml", "load_yaml", "parse_yaml", "read_text"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_NODES = 100_000
MAX_ALIAS_NODES = 10_000  # nodes that aliases may add by repeating what they point to
MAX_PROBLEMS = 50

YamlPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_INT = 1 << 63


class Marks(dict[YamlPath, tuple[int, int]]):
    """Path of a value -> (line, column), both from 1; `keys_at` has the places of the keys."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.keys_at: dict[YamlPath, tuple[int, int]] = {}

    def where(self, path: YamlPath, *, key: bool = False) -> str:
        """`file:line:col` of the value (or key) at `path`, or of its nearest parent that is there."""
        for end in range(len(path), -1, -1):
            found = self.keys_at.get(path[:end]) if key or end < len(path) else None
            found = found or self.get(path[:end])
            if found:
                return f"{self.name}:{found[0]}:{found[1]}"
        return self.name


@dataclass(slots=True)
class _Node:
    """One value of the document; `children` holds (key or index, place of the key, node)."""

    kind: type
    place: tuple[int, int]
    value: Any = None
    children: list[tuple[str | int, tuple[int, int], _Node]] = field(default_factory=list)
    size: int = 1


@dataclass(slots=True)
class _Open:
    """A collection being read: for a mapping, `key` is the key that waits for its value."""

    node: _Node
    anchor: str | None
    keys: set[str] = field(default_factory=set)
    key: tuple[str, tuple[int, int]] | None = None


def read_text(path: Path, name: str | None = None, max_bytes: int = MAX_BYTES) -> str:
    """The UTF-8 text of a regular file of at most `max_bytes`. Raises BadInput, also for what cannot open."""
    name = name or str(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise BadInput(Problem(name, f"a file is needed here, but this is {kind}"))
        if info.st_size > max_bytes:
            raise BadInput(Problem(name, f"the file has {info.st_size} bytes; at most {max_bytes} are read"))
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise BadInput(Problem(name, f"no such file{_nearest_file(path)}")) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(Problem(name, f"the file cannot be read: {reason}")) from None
    if len(raw) > max_bytes:
        raise BadInput(Problem(name, f"the file has more than {max_bytes} bytes; no more are read"))
    return _decode(raw, name)


def _nearest_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir())[:10_000]
    except OSError:
        return f"; the folder {path.parent} is not there either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _decode(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, col = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        raise BadInput(Problem(f"{name}:{line}:{col}", message)) from None
    return text


def load_yaml(path: str | Path) -> tuple[Any, Marks]:
    """Read one YAML file: (data, marks). Raises BadInput with every problem of scalars and keys at once."""
    return parse_yaml(read_text(Path(path)), str(path))


def parse_yaml(text: str, name: str, number_keys: bool = False) -> tuple[Any, Marks]:
    """Parse one YAML document in `text`; `name` stands for the file in messages. Raises BadInput.

    number_keys: a key may be a whole number (its digits as text), as in the files of programs that number their layers.
    """
    if len(text) > MAX_BYTES:
        raise BadInput(Problem(name, f"the text has more than {MAX_BYTES} characters; no more are read"))
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line, col = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        message = f"character U+{ord(bad[0]):04X} is not allowed in YAML; is this a text file?"
        raise BadInput(Problem(f"{name}:{line}:{col}", message))
    builder = _Builder(name, number_keys)
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_event():
            builder.take(loader.get_event())  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        raise BadInput(_syntax_problem(error, name)) from None
    except yaml.YAMLError as error:
        raise BadInput(Problem(name, f"not YAML: {error}")) from None
    finally:
        loader.dispose()
    if builder.problems:
        raise BadInput(builder.problems)
    return _convert(builder.root, name)


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    text = ", ".join(part for part in (error.context, error.problem) if part)
    if "\\t" in text:
        text = "a tab stands where YAML allows only spaces; indent with spaces"
    elif "mapping values are not allowed" in text:
        text += "; put quotes around text that holds ': ', and check the indentation"
    elif "found undefined alias" in text:
        text += "; an alias needs its anchor (&name) before it"
    return Problem(where, f"not YAML: {text}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


class _Builder:
    """Turns parser events into `_Node`s without recursion, within the bounds."""

    def __init__(self, name: str, number_keys: bool = False) -> None:
        self.name = name
        self.number_keys = number_keys
        self.root: _Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, _Node] = {}
        self.problems: list[Problem] = []
        self.nodes = 0
        self.alias_nodes = 0
        self.documents = 0

    def _stop(self, place: tuple[int, int], message: str) -> NoReturn:
        raise BadInput([*self.problems, Problem(f"{self.name}:{place[0]}:{place[1]}", message)])

    def _note(self, place: tuple[int, int], message: str) -> None:
        self.problems.append(Problem(f"{self.name}:{place[0]}:{place[1]}", message))
        if len(self.problems) >= MAX_PROBLEMS:
            raise BadInput([*self.problems, Problem(self.name, "too many problems; the rest is not shown")])

    def take(self, event: yaml.Event) -> None:
        """One event of the parser."""
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop(_place(event), "a second document begins here ('---'); a file holds one document")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self.stack.pop()
            if done.anchor is not None:
                self.anchors[done.anchor] = done.node
            self._add(done.node)

    def _check_tag(self, event: yaml.NodeEvent, tag: str | None) -> None:
        if tag is not None:
            self._note(_place(event), f"the tag {_short(tag)} is not read; write the value without a tag")

    def _count(self, place: tuple[int, int]) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._stop(place, f"the document has more than {MAX_NODES} values; no more are read")

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        place = _place(event)
        self._count(place)
        if len(self.stack) >= MAX_DEPTH:
            self._stop(place, f"nested deeper than {MAX_DEPTH} levels")
        self._check_tag(event, event.tag)
        if event.anchor is not None:
            self.anchors.pop(event.anchor, None)  # an alias inside its own anchor is a loop, not the old value
        kind = dict if isinstance(event, yaml.MappingStartEvent) else list
        self.stack.append(_Open(_Node(kind, place), event.anchor))

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        place = _place(event)
        self._count(place)
        self._check_tag(event, event.tag)
        parent = self.stack[-1] if self.stack else None
        is_key = parent is not None and parent.node.kind is dict and parent.key is None
        value: Any = event.value
        if event.style is None:
            if is_key and value == "<<":
                self._note(place, "merge keys (<<) are not read; write the keys out")
            else:
                value = self._plain(value, place)
        elif _SURROGATE.search(event.value):
            self._note(place, "half of a surrogate pair (\\ud800 to \\udfff) is not text")
        node = _Node(str, place, value)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        self._add(node)

    def _plain(self, text: str, place: tuple[int, int]) -> Any:
        """The value of an unquoted scalar by YAML 1.2's core schema (section 10.3.2)."""
        if text in _WORDS:
            return _WORDS[text]
        if not (text[0].isdigit() or text[0] in "+-."):
            return text
        number: int | float
        if _NOT_FINITE.fullmatch(text):
            self._note(place, f"{text} is not a finite number; a number is needed (or quote it if it is text)")
            return text
        if len(text) > 400:
            return text
        if _INT.fullmatch(text):
            number = int(text)
        elif _OCTAL.fullmatch(text):
            number = int(text[2:], 8)
        elif _HEX.fullmatch(text):
            number = int(text[2:], 16)
        elif _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                self._note(place, f"{text} is too large for a 64-bit float")
            return number
        else:
            return text
        if abs(number) >= _MAX_INT:
            self._note(place, f"the integer {text[:40]} does not fit into 64 bits")
            return 0
        return number

    def _alias(self, event: yaml.AliasEvent) -> None:
        place = _place(event)
        node = self.anchors.get(event.anchor or "")
        if node is None:
            loop = any(o.anchor == event.anchor for o in self.stack)
            reason = "stands inside its own anchor" if loop else "has no anchor (&name) before it"
            self._stop(place, f"the alias *{(event.anchor or '')[:60]} {reason}")
        self.alias_nodes += node.size
        if self.alias_nodes > MAX_ALIAS_NODES:
            self._stop(place, f"aliases repeat more than {MAX_ALIAS_NODES} values; write the values out")
        self._add(_Node(node.kind, place, node.value, node.children, node.size))

    def _add(self, node: _Node) -> None:
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        if top.node.kind is list:
            top.node.children.append((len(top.node.children), node.place, node))
            top.node.size += node.size
        elif top.key is None:
            top.key = (self._key(top, node), node.place)
        else:
            key, place = top.key
            top.key = None
            if key in top.keys:
                first = next(p for k, p, _ in top.node.children if k == key)
                self._note(place, f"the key {_short(key)} stands here again; it is already on line {first[0]}")
                return
            top.keys.add(key)
            top.node.children.append((key, place, node))
            top.node.size += node.size + 1

    def _key(self, top: _Open, node: _Node) -> str:
        if isinstance(node.value, str) and node.kind is str:
            return node.value
        if self.number_keys and type(node.value) is int:
            return str(node.value)
        shown = "a list or mapping" if node.kind is not str else repr(node.value)
        self._note(node.place, f"a key must be text, and this is {shown}; put quotes around it")
        return f"(key on line {node.place[0]}:{node.place[1]})"


def _convert(root: _Node | None, name: str) -> tuple[Any, Marks]:
    """Nodes -> plain dicts, lists and scalars with the place of each; an alias becomes a copy."""
    marks = Marks(name)
    if root is None:
        return None, marks
    holder: list[Any] = [None]
    todo: list[tuple[_Node, YamlPath, Any, Any]] = [(root, (), holder, 0)]
    while todo:
        node, path, into, key = todo.pop()
        if len(path) > MAX_DEPTH:
            raise BadInput(Problem(f"{name}:{node.place[0]}:{node.place[1]}", f"nested deeper than {MAX_DEPTH} levels"))
        marks[path] = node.place
        if node.kind is str:
            into[key] = node.value
            continue
        made: Any = {k: None for k, _, _ in node.children} if node.kind is dict else [None] * len(node.children)
        into[key] = made
        for child_key, place, child in node.children:
            if node.kind is dict:
                marks.keys_at[(*path, child_key)] = place
            todo.append((child, (*path, child_key), made, child_key))
    return holder[0], marks


def dump_yaml(data: Any) -> str:
    """Nested dicts, lists and scalars as YAML that `parse_yaml` reads back to the same value."""
    lines: list[str] = []
    todo: list[tuple[Any, int, str]] = [(data, -1, "")]
    while todo:
        value, indent, lead = todo.pop()
        if isinstance(value, dict | list) and value:
            if lead:
                lines.append(lead)
            pad = "  " * (indent + 1)
            items: Any = value.items() if isinstance(value, dict) else [(None, v) for v in value]
            leads = [pad + "-" if k is None else f"{pad}{_scalar_text(k)}:" for k, _ in items]
            todo += [(v, indent + 1, first) for first, (_, v) in reversed(list(zip(leads, items, strict=True)))]
        else:
            text = "{}" if value == {} else "[]" if value == [] else _scalar_text(value)
            lines.append(f"{lead} {text}".strip() if indent < 0 else f"{lead} {text}")
    return "\n".join(lines) + "\n"


_PLAIN_QUOTED = frozenset(map(chr, range(32, 127))) - {'"', "\\"}
_SAFE_TEXT = re.compile(r"[A-Za-z_./][A-Za-z0-9_./@ -]*(?<! )")


def _scalar_text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value, allow_nan=False)
    if _SAFE_TEXT.fullmatch(value) and value not in _WORDS and not value.startswith((".", "- ")):
        return value
    if value.startswith((".", "..")) and _SAFE_TEXT.fullmatch(value) and "/" in value:
        return value
    return '"' + "".join(c if c in _PLAIN_QUOTED else f"\\U{ord(c):08X}" for c in value) + '"'
