"""What a reply may be, as a grammar: JSON by schema, a pattern, a choice, or calls in GLM's own form.

A ``Grammar`` is text, in llguidance's dialect of Lark; the engine compiles it over a vocabulary and masks with it what
follows the reasoning. The grammar of calls accepts only what ``ReplyParser`` reads back as arguments that are valid
against the tool's schema. What a schema says and the grammar does not hold is named in ``warnings``, never dropped
silently:

    properties, required, additionalProperties of the parameters' own level are held, in any order of the arguments;
    where properties are declared and additionalProperties is not, there are no others;
    a string argument is raw text: enum, const, pattern, minLength and maxLength are held, format is not; where it has
    a grammar of its own (``x-lark``), that is held instead, and whoever writes it sees to it that no text spells out a
    marker that ends the argument;
    every other argument is JSON by its schema, as far as llguidance knows the keywords.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from glm52.chat import (
    CALL,
    END_CALL,
    END_KEY,
    END_THINK,
    END_VALUE,
    KEY,
    THINK,
    VALUE,
    argument_types,
    branches,
    resolve_reference,
)
from glm52.errors import RequestError

Schema = Mapping[str, Any]
LARK = "x-lark"  # of a string in a tool's parameters: a grammar that its text keeps to

# Text that spells a marker out would be read as one. Special tokens themselves are no part of any text.
_TEXT = rf"/(?s:.*)/ & ~/(?s:.*)({THINK}|{END_THINK}|{CALL})(?s:.*)/".replace("</", r"<\/")
_RAW = rf"/(?s:.*)/ & ~/(?s:.*)({END_VALUE}|{END_CALL})(?s:.*)/".replace("</", r"<\/")
_FREE_KEY = r"/[^\s<>]{1,64}/"
# Raw text that cannot be read as a number, a list or an object: see ``chat.read_value``.
_NOT_JSON = r"/([^\s\x00-\x20\x85\xa00-9+\-.\[{(](?s:.*))?/"
# White space inside JSON: enough for any indentation, too little to go on for ever.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t\r]{1,40}"}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_LONGEST = 100_000  # characters that a length is counted to
_KINDS = {"json_schema": "a JSON schema", "regex": "a pattern", "grammar": "a grammar", "choice": "a list of texts"}
_MOST_UNORDERED = 60  # arguments whose order is free; the set of those given is a 64-bit number


@dataclass(frozen=True)
class Grammar:
    """source: a grammar for llguidance. param: the field of the request that errors name. warnings: what it leaves
    open. has_text: whether any text may be said, beside calls."""

    source: str
    param: str = "grammar"
    warnings: tuple[str, ...] = ()
    has_text: bool = False

    @staticmethod
    def json_schema(schema: Schema, *, strict: bool = True, param: str = "response_format") -> "Grammar":
        """One JSON value by a schema. Unless strict, keywords that llguidance does not know are warnings."""
        options = {**_JSON_OPTIONS, "lenient": not strict}
        body = json.dumps({**without_unknown_formats(schema), "x-guidance": options}, ensure_ascii=False)
        return Grammar(f"start: %json {body}", param)

    @staticmethod
    def json_object(param: str = "response_format") -> "Grammar":
        return Grammar.json_schema({"type": "object"}, param=param)

    @staticmethod
    def regex(pattern: str, param: str = "regex") -> "Grammar":
        """The whole reply matches; ^ and $ at its ends may be written or not."""
        body = full_match(pattern, search=False)
        if body is None:
            raise RequestError(f"{param}: ^ and $ are understood at the ends of the pattern only", param=param)
        return Grammar(f"start: {_slashes(body)}", param)

    @staticmethod
    def choice(options: Sequence[str], param: str = "choice") -> "Grammar":
        if not options:
            raise RequestError(f"{param}: expected at least one text, found none", param=param)
        return Grammar(f"start: {' | '.join(map(_quoted, options))}", param)

    @staticmethod
    def lark(source: str, param: str = "grammar") -> "Grammar":
        """Lark as llguidance understands it, or llama.cpp's EBNF (GBNF), told apart by ``::=``."""
        if "::=" in source:
            from llguidance.gbnf_to_lark import any_to_lark

            try:
                source = any_to_lark(source)
            except Exception as error:  # of many classes, bare Exception among them
                raise RequestError(f"{param}: not a grammar in EBNF ({error})", param=param) from error
        return Grammar(source, param)

    @staticmethod
    def structured(
        kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"],
        value: Any = None,
        *,
        strict: bool = True,
        param: str = "response_format",
    ) -> "Grammar":
        """One of the above by its name. RequestError if the value is not of the kind's type."""
        expected = {"json_schema": Mapping, "regex": str, "grammar": str, "choice": list}.get(kind)
        if expected is not None and not isinstance(value, expected):
            raise RequestError(f"{param}: {kind} expects {_KINDS[kind]}, found {type(value).__name__}", param=param)
        if kind == "choice" and not all(isinstance(v, str) for v in value):
            raise RequestError(f"{param}: choice expects {_KINDS[kind]}", param=param)
        match kind:
            case "json_schema":
                return Grammar.json_schema(value, strict=strict, param=param)
            case "json_object":
                return Grammar.json_object(param)
            case "regex":
                return Grammar.regex(value, param)
            case "grammar":
                return Grammar.lark(value, param)
        return Grammar.choice(value, param)

    @staticmethod
    def tool_calls(
        tools: Sequence[Schema],
        choice: Literal["auto", "required", "none", "named"] = "auto",
        *,
        name: str | None = None,
        parallel: bool = True,
        answer: "Grammar | None" = None,
        param: str = "tools",
    ) -> "Grammar":
        """Calls of OpenAI-style tools. auto: text, then calls or none; required: calls at once; named: one call of the
        tool ``name``; none: text alone. answer: what the text must be where nothing is called."""
        definitions = {d["name"]: d.get("parameters") for d in (t.get("function", t) for t in tools)}
        _check_names(definitions)
        if choice == "named":
            if name not in definitions:
                raise RequestError(f"tool_choice: no tool is called {name!r}; there are {', '.join(definitions)}",
                                   param="tool_choice")  # fmt: skip
            definitions = {name: definitions[name]}
        rules = _Rules()
        text = rules.terminal(_TEXT) if answer is None else rules.rule(answer._body())
        if choice == "none" or not definitions:
            start = text
        else:
            calls = " | ".join(_call(rules, n, p) for n, p in definitions.items())
            several = rules.rule(f"{CALL} ({calls}) {END_CALL}") + ("+" if parallel and choice != "named" else "")
            start = several if choice != "auto" else f"{text} ({several})?" if answer is None else f"{text} | {several}"
        lines = [f"start: {start}", *(f"{name}{body}" for body, name in rules.names.items())]
        return Grammar(
            "\n".join(lines), param if answer is None else answer.param, tuple(rules.warnings), has_text=answer is None
        )

    def _body(self) -> str:
        """The rule of a grammar that has one only."""
        lead, _, body = self.source.partition("start: ")
        if lead or "\n" in body:
            raise RequestError(f"{self.param}: a grammar of several rules does not go with tools", param=self.param)
        return body


class _Rules:
    """Rules and terminals of a grammar, each body once. names: body -> name."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.warnings: list[str] = []

    def rule(self, body: str) -> str:
        return self.names.setdefault(f": {body}", f"r{len(self.names)}")

    def terminal(self, body: str) -> str:
        return self.names.setdefault(f": {body}", f"T{len(self.names)}")

    def json(self, schema: Schema, where: str) -> str | None:
        """A rule for JSON by a schema; None if llguidance cannot tell it."""
        options = {**_JSON_OPTIONS, "lenient": True}
        body = json.dumps({**without_unknown_formats(schema), "x-guidance": options}, ensure_ascii=False)
        error, messages = _validated(f"start: %json {body}")
        self.warnings += [f"{where}: {m.splitlines()[0]}" for m in messages]
        return None if error else self.rule(f"%json {body}")


def _check_names(names: Iterable[str]) -> None:
    """RequestError unless a call can say them all."""
    odd = next((n for n in names if n != n.strip() or any(mark in n for mark in (CALL, END_CALL, KEY))), None)
    if odd is not None:
        raise RequestError(f"tools: no call can name a tool {odd!r}; leave out white space at its ends, and the marks "
                           "of a call", param="tools")  # fmt: skip


def _call(rules: _Rules, name: str, parameters: Any) -> str:
    """Without parameters there are none, which is what OpenAI says of leaving them out."""
    schema = parameters if isinstance(parameters, Mapping) else {"properties": {}}
    return f"{_quoted(name)} {_arguments(rules, name, schema)}"


def _arguments(rules: _Rules, tool: str, parameters: Schema) -> str:
    """A rule for the arguments of one call: each at most once, the required ones all, in any order."""
    resolved = resolve_reference(parameters, parameters)
    schema = resolved if isinstance(resolved, Mapping) else {}
    unknown = sorted(set(schema) & {"allOf", "anyOf", "oneOf", "not", "if", "dependentRequired", "patternProperties",
                                    "propertyNames", "minProperties", "maxProperties", "enum", "const"})  # fmt: skip
    rules.warnings += [f"{tool}: {word} of the parameters is not held" for word in unknown]
    found = schema.get("properties")
    properties: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
    required = [r for r in branches(schema, "required") if isinstance(r, str)]
    extra = schema.get("additionalProperties", not isinstance(found, Mapping))
    for key in required:
        properties.setdefault(key, extra if isinstance(extra, Mapping) else {})
    keys = [*dict.fromkeys(required), *(k for k in properties if k not in required and properties[k] is not False)]
    values = [_argument(rules, _quoted(k), properties[k], parameters, f"{tool}.{k}") for k in keys]
    more = ""
    if extra is not False:
        names = "|".join(map(_escaped, keys))
        key = rules.terminal(_FREE_KEY + (f" & ~/{names}/" if keys else ""))
        more = _argument(rules, key, extra, parameters, f"{tool}.*")
    if not keys:
        return f"({more})*" if more else ""
    if len(keys) > _MOST_UNORDERED:
        optional = len(set(required))
        return " ".join([*values[:optional], *(f"({v})?" for v in values[optional:]), f"({more})*" if more else ""])
    name = f"a{len(rules.names)}"
    done = '""' + (f" %if is_ones([0:{len(set(required))}])" if required else "")
    ways = [done, *(f"{v} {name}::set_bit({i}) %if bit_clear({i})" for i, v in enumerate(values))]
    ways += [f"{more} {name}::_"] if more else []
    rules.names["::_ : " + "\n  | ".join(ways)] = name
    return f"{name}::0x0"


def _argument(rules: _Rules, key: str, schema: Any, root: Schema, where: str) -> str:
    values = _value(rules, schema, root, where)
    if not values:
        rules.warnings.append(f"{where}: no value fits its schema, so that any may be given")
    value = " | ".join(dict.fromkeys(values or [rules.terminal(_RAW)]))
    return rules.rule(f"{KEY} {key} {END_KEY} {VALUE} ({value}) {END_VALUE}")


def _value(rules: _Rules, schema: Any, root: Schema, where: str, raw: str = _RAW) -> list[str]:
    """Alternatives for one argument's value, as the parser will read it: raw where it is a string, else JSON."""
    schema = resolve_reference(schema, root)
    types = argument_types(schema, root)
    if not isinstance(schema, Mapping) or (not types and not set(schema) & _MEANINGFUL):
        return [rules.terminal(raw)]
    others = sorted((types or _ALL_TYPES) - {"string"})
    if "string" not in types:
        return [_json(rules, schema if types else {"type": others, **schema}, root, where)]
    if not set(others) <= {"null", "boolean"}:
        raw = f"{_RAW} & {_NOT_JSON}"
    either = branches(schema, "anyOf", "oneOf")
    if either and others:
        return [a for b in either for a in _value(rules, b, root, where, raw)]
    strings = _strings(rules, schema, root, where, raw)
    if not others:
        return strings
    if "const" in schema or isinstance(schema.get("enum"), list):
        texts = [schema["const"]] if "const" in schema else schema["enum"]
        rest = [t for t in texts if not isinstance(t, str)]
        return [*strings, *([_json(rules, {"enum": rest}, root, where)] if rest else [])]
    return [*strings, _json(rules, {**schema, "type": others}, root, where)]


_ALL_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_MEANINGFUL = {"enum", "const", "anyOf", "oneOf", "allOf", "not", "properties", "items", "prefixItems", "minimum",
               "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "required", "pattern", "minLength",
               "maxLength"}  # fmt: skip


def _json(rules: _Rules, schema: Schema, root: Schema, where: str) -> str:
    definitions = {w: root[w] for w in ("$defs", "definitions") if w in root} if '"$ref"' in json.dumps(schema) else {}
    found = rules.json({**definitions, **schema}, where)
    if found is None:
        rules.warnings.append(f"{where}: its schema is not held")
        found = rules.json({}, where)
        assert found is not None
    return found


def _strings(rules: _Rules, schema: Schema, root: Schema, where: str, raw: str) -> list[str]:
    """Raw text of a schema that admits strings."""
    if "const" in schema or isinstance(schema.get("enum"), list):
        texts = [schema["const"]] if "const" in schema else schema["enum"]
        return [_quoted(t) for t in texts if isinstance(t, str)]
    if isinstance(schema.get(LARK), str):
        body = f"%lark {{\n{schema[LARK]}\n}}"
        if not _validated(f"start: {body}")[0]:
            return [rules.rule(body)]
        rules.warnings.append(f"{where}: its grammar is not held")
    parts = [resolve_reference(b, root) for b in branches(schema, "anyOf", "oneOf", "allOf")]
    if len(parts) == 1 or (parts and "allOf" not in schema):
        return [a for b in parts if isinstance(b, Mapping) for a in _strings(rules, b, root, where, raw)]
    if parts or "not" in schema:
        rules.warnings.append(f"{where}: allOf and not are not held for a string")
    if "format" in schema:
        rules.warnings.append(f"{where}: format is not held for a string")
    pattern, length = _pattern(schema), _length(schema)
    body = " & ".join((raw, *pattern, *length))
    asked = ("pattern" in schema, "minLength" in schema or "maxLength" in schema)
    if asked != (bool(pattern), bool(length)) or (any(asked) and _validated(f"start: T\nT: {body}")[0]):
        rules.warnings.append(f"{where}: the pattern {schema.get('pattern')!r} or the length is not held")
        body = raw
    return [rules.terminal(body)]


def _pattern(schema: Schema) -> list[str]:
    """pattern as a term of a terminal, if it can be one."""
    pattern = schema.get("pattern")
    whole = full_match(pattern, search=True) if isinstance(pattern, str) else None
    return [] if whole is None else [_slashes(whole)]


def _length(schema: Schema) -> list[str]:
    """minLength and maxLength as a term of a terminal, where they are numbers that make sense."""
    if "minLength" not in schema and "maxLength" not in schema:
        return []
    low, high = schema.get("minLength", 0), schema.get("maxLength", _LONGEST)
    if type(low) is not int or type(high) is not int or not 0 <= low <= high <= _LONGEST:
        return []
    return [f"/(?s:.{{{low},{high if 'maxLength' in schema else ''}}})/"]


# ── Text of grammars ─────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=4096)
def _validated(source: str) -> tuple[bool, list[str]]:
    """Whether llguidance refuses a grammar or nothing can match it, and what it says of it."""
    from llguidance import LLMatcher, LLTokenizer

    error, messages = LLMatcher.validate_grammar_with_warnings(source)
    if not error:
        matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0)
        matcher.compute_bitmask()
        error = matcher.is_error()
    return error, list(messages)


def without_unknown_formats(schema: Schema) -> dict[str, Any]:
    """The schema without those ``format`` that nobody enforces; by JSON Schema a format is a remark, not a demand."""
    return {str(k): v if k in ("enum", "const", "default", "examples") else _formats(v) for k, v in schema.items()
            if not (k == "format" and isinstance(v, str) and v not in _FORMATS)}  # fmt: skip


def _formats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_unknown_formats(value)
    return [_formats(v) for v in value] if isinstance(value, list) else value


def full_match(pattern: str, *, search: bool) -> str | None:
    """A regular expression without anchors that matches whole what ``pattern`` matches whole or, with ``search``, what
    it is found in. None if it has anchors elsewhere than at the ends of its alternatives."""
    around = "(?s:.*)" if search else ""
    out = []
    for part in _alternatives(pattern):
        at_start, at_end = part[:1] == ["^"], part[-1:] == ["$"]
        body = part[at_start : len(part) - at_end]
        if "^" in body or "$" in body:
            return None
        out.append(f"{'' if at_start else around}({''.join(body)}){'' if at_end else around}")
    return "|".join(out)


def _alternatives(pattern: str) -> list[list[str]]:
    """The alternatives of a pattern at its top level, each as pieces: characters, escapes, classes."""
    out: list[list[str]] = [[]]
    depth = at = 0
    while at < len(pattern):
        end = at + (2 if pattern[at] == "\\" else 1)
        if pattern[at] == "[":
            end = at + 2 + (pattern[at + 1 : at + 2] == "^")
            while end < len(pattern) and pattern[end] != "]":
                end += 2 if pattern[end] == "\\" else 1
            end += 1
        piece = pattern[at:end]
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            out.append([])
        else:
            out[-1].append(piece)
        at = end
    return out


def _slashes(regex: str) -> str:
    """A pattern as a literal of Lark, with JSON Schema's ASCII classes."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, 'dw')}/"


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\x{{{ord(c):x}}}" for c in text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
