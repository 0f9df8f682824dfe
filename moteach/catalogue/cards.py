"""Reading one expert card: YAML with line numbers, checked against `ExpertSpec`, paths resolved.

A card is data. Aliases, interpolations and every key that Hydra would act on (`_target_`, ...) are refused, so that a
folder of cards from somebody else can be read without running anything of theirs.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moteach.catalogue.packaged import CACHE, cache_path
from moteach.catalogue.places import resolve_file, resolve_weights
from moteach.catalogue.spec import NAME_PATTERN, ExpertSpec, name_message, problems_of
from moteach.errors import ConfigError, ExpertCardError, nearest

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 16
_WORDS = {str: "text", float: "a number", int: "a number", bool: "true or false", list: "a list", dict: "a mapping"}
_WEIGHT_KEYS = ("model", "adapter", "base", "reference", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class CardReading:
    """What came out of one card file: a spec, or everything that is wrong with it."""

    path: Path
    spec: ExpertSpec | None = None
    errors: tuple[ExpertCardError, ...] = ()


@dataclass
class _Draft:
    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    errors: list[ExpertCardError] = field(default_factory=list)

    def fail(self, message: str, line: int = 1) -> None:
        self.errors.append(ExpertCardError(f"{self.path}:{line}: {message}"))

    def fail_at(self, key: str | None, message: str) -> None:
        self.fail(message, self.lines.get(key or "", 1))


def read_card(path: Path) -> ExpertSpec:
    """Reads one expert card.

    Raises:
        ExpertCardError: The first problem of the card as `file:line: expected ..., got ...`.
    """
    reading = inspect_card(path)
    if reading.spec is None:
        raise reading.errors[0]
    return reading.spec


def inspect_card(path: Path) -> CardReading:
    """Reads one expert card and collects every problem instead of raising the first."""
    draft = _Draft(path)
    if not NAME_PATTERN.fullmatch(path.stem):
        draft.fail(name_message(path.stem))
    root = _parse(draft)
    if root is not None:
        _collect(draft, root)
        _check_name(draft)
    spec = None if draft.errors or root is None else _build(draft)
    return CardReading(path=path, spec=None if draft.errors else spec, errors=tuple(draft.errors))


def _parse(draft: _Draft) -> yaml.MappingNode | None:
    """Turns the file into YAML nodes, which remember their lines."""
    try:
        data = draft.path.read_bytes()
        if len(data) > _MAX_BYTES:
            draft.fail(f"expected a card of at most {_MAX_BYTES // 1024} KiB, got {len(data)} bytes")
            return None
        text = data.decode("utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                draft.fail(f"expected values nested at most {_MAX_DEPTH} deep, got more")
                return None
            if isinstance(event, yaml.AliasEvent):
                place = event.start_mark
                message = f"expected plain values, got the alias '*{event.anchor}'; write the value out"
                draft.fail(message, place.line + 1 if place else 1)
                return None
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        draft.fail(f"expected valid YAML, got: {problem}", mark.line + 1 if mark else 1)
        return None
    except UnicodeDecodeError as error:
        draft.fail(f"expected a UTF-8 text file, got bytes that are not ({error.reason} at byte {error.start})")
        return None
    except OSError as error:
        draft.fail(f"expected a readable file, got: {error.strerror or error}")
        return None
    if root is None:
        draft.fail("expected at least 'model: FOLDER-OR-HUB-ID' and 'domains: [NAME]', got an empty file")
        return None
    if not isinstance(root, yaml.MappingNode):
        draft.fail(f"expected a mapping 'key: value', got {_word_of_node(root)}", root.start_mark.line + 1)
        return None
    return root


def _collect(draft: _Draft, root: yaml.MappingNode) -> None:
    """Takes the keys of the card over, noting unknown ones, wrong types and everything that is not data."""
    for line, message in _unsafe(root):
        draft.fail(message, line)
    if draft.errors:
        return
    hints = typing.get_type_hints(ExpertSpec)
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key not in hints:
            draft.fail(f"expected a key of an expert card, got '{key}'; {nearest(key, hints)}", line)
            continue
        draft.lines[key] = line
        try:
            value = _construct(value_node)
        except (yaml.YAMLError, ValueError) as error:
            draft.fail(f"expected a plain value for '{key}', got: {str(error).splitlines()[0]}", line)
            continue
        if problem := _type_problem(key, value, hints[key]):
            draft.fail(problem, line)
            continue
        draft.values[key] = float(value) if hints[key] is float else value


def _unsafe(node: yaml.Node, trail: str = "") -> Iterator[tuple[int, str]]:
    """Finds duplicate keys, keys that are not text, instantiation keys and interpolations, at any depth."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                yield line, f"expected a key that is text, got '{getattr(key_node, 'value', '?')}'; quote it"
                continue
            key = trail + key_node.value
            if key in seen:
                yield line, f"expected each key once, got '{key}' again (first on line {seen[key]})"
            seen[key] = line
            if key_node.value.startswith("_"):
                yield line, f"expected data, got '{key}'; a card never instantiates anything: remove it"
            yield from _unsafe(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _unsafe(item, trail)
    elif isinstance(node, yaml.ScalarNode) and "${" in node.value:
        yield node.start_mark.line + 1, f"expected a plain value, got the interpolation '{node.value}'; write the value"


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _type_problem(key: str, value: Any, hint: Any) -> str | None:
    """Says why a value does not have the type of its field; None when it does."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return None
    if origin is dict and isinstance(value, dict):
        return None
    if origin is list and isinstance(value, list):
        (kind,) = typing.get_args(hint)
        wrong = [item for item in value if not isinstance(item, kind) or isinstance(item, bool)]
        remedy = "; quote it" if kind is str else ""
        return f"expected {_lists(kind)} for '{key}', got the item {_shown(wrong[0])}{remedy}" if wrong else None
    if origin is str and isinstance(value, str):
        return None
    remedy = ""
    if origin is list and isinstance(value, str):
        remedy = f"; write '{key}: [{value}]'"
    elif origin is str and not isinstance(value, list | dict | None):
        remedy = "; quote it"
    wanted = _lists(typing.get_args(hint)[0]) if origin is list else _WORDS[origin]
    return f"expected {wanted} for '{key}', got {_shown(value)}{remedy}"


def _lists(kind: type) -> str:
    return "a list of text" if kind is str else "a list of whole numbers"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{_WORDS.get(type(value), type(value).__name__)} ({value!r})"


def _word_of_node(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _check_name(draft: _Draft) -> None:
    given = draft.values.setdefault("name", draft.path.stem)
    if given != draft.path.stem:
        draft.fail_at("name", f"expected the name of the file, '{draft.path.stem}', got '{given}'; remove 'name'")


def _build(draft: _Draft) -> ExpertSpec | None:
    """Makes the spec out of values of the right types: ranges, consistency, then paths."""
    blank = object.__new__(ExpertSpec)
    for item in dataclasses.fields(ExpertSpec):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        setattr(blank, item.name, draft.values.get(item.name, default))
    for key, message in problems_of(blank):
        draft.fail_at(key, message)
    folder = draft.path.parent.resolve()
    hub = False
    for key in _WEIGHT_KEYS:
        if not draft.values.get(key):
            continue
        place = resolve_weights(draft.values[key], folder)
        if place.problem:
            draft.fail_at(key, f"expected {place.problem} for '{key}', got '{draft.values[key]}'{place.remedy}")
        draft.values[key] = place.value
        hub = hub or place.on_hub
    if draft.values.get("revision") is not None and not hub:
        draft.fail_at("revision", "expected 'revision' only with a hub id, got local folders alone; remove it")
    if draft.values.get("exemplars") is not None:
        file = resolve_file(draft.values["exemplars"], folder)
        if file.problem:
            draft.fail_at("exemplars", f"expected {file.problem}, got '{draft.values['exemplars']}'{file.remedy}")
        draft.values["exemplars"] = file.value
    recipe = draft.values.get("recipe", {})
    if isinstance(recipe.get("output"), str):
        draft.values["recipe"] = {**recipe, "output": _output(draft, recipe["output"], folder)}
    return None if draft.errors else ExpertSpec(**draft.values)


def _output(draft: _Draft, text: str, folder: Path) -> str:
    """Where a recipe writes to: `cache:NAME` below the cache, anything else relative to the card."""
    if not text.startswith(CACHE):
        return str((folder / text).resolve())
    try:
        return str(cache_path(text))
    except ConfigError as error:
        draft.fail_at("recipe", str(error))
        return text
