"""Files that we write as JSON: declared models, checked when they are read, each with its JSON Schema.

values -> `Document` -> `to_json` -> file -> `from_json` -> the same value, or a sentence that says what is wrong where.
Must not know what any file means.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

import msgspec

from engines.core.errors import EngineError

# A number of a report that may be infinite or no number: JSON has neither, so 'inf', '-inf' or 'nan' is written.
Measured = Annotated[float, msgspec.Meta(extra_json_schema={"x-not-finite": ["inf", "-inf", "nan"]})]

KEY, OLD_KEY = "schema", "format"  # of the name and version of a file's form

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character; alone it is no text


class DocumentError(EngineError, ValueError):
    """A file is not what it should be; the message is a clause that a caller puts behind its name."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value inside a document. A field that is missing, of another type, or not known is refused."""

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The JSON Schema (2020-12) of such values."""
        _, components = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
        components |= {part.__name__: part._completed(components[part.__name__]) for part in _documents(cls).values()}
        whole = cls._completed(components.pop(cls.__name__))
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        return {**head, **_with_text(whole), "$defs": _with_text(components)}

    @classmethod
    def _completed(cls, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The schema of the fields with what else is written."""
        return dict(schema)


class Document(Part, frozen=True, kw_only=True):
    """A whole file.

    Attributes:
        FORMAT: the value of the file's key "schema": what it is, and the version of its form. Older files have it
            under "format", and are read too.
        MAKE: the command that makes such a file.
        COMPUTED: key -> property that is written under it for readers, and left out when the file is read.
    """

    FORMAT: ClassVar[str]
    MAKE: ClassVar[str]
    COMPUTED: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def to_mapping(self) -> dict[str, Any]:
        """The file's content as plain values; numbers that are not finite as text."""
        names = {**self.COMPUTED, **{name: name for name in self.__struct_fields__}}
        return {KEY: self.FORMAT, **{key: _plain(getattr(self, name)) for key, name in names.items()}}

    def to_json(self) -> str:
        """Indented JSON text; the same value gives the same text."""
        return json.dumps(self.to_mapping(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The value that `to_json` wrote.

        Raises:
            DocumentError: not JSON, another file or version, or a key that is missing, unknown or of another type.
        """
        try:
            plain = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
            content = json.loads(plain)
            if _SURROGATE.search(plain):
                json.dumps(content, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"it is not JSON ({error})") from None
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: object) -> Self:
        """The value of parsed JSON.

        Raises:
            DocumentError: as `from_json`.
        """
        key, found = _named(content)
        if not isinstance(content, Mapping) or found != cls.FORMAT:
            kind = cls.FORMAT.partition("/")[0]
            other = isinstance(found, str) and found.startswith(f"{kind}/")
            what = "made by another version of qdq. Make it again" if other else "another file. Make one"
            raise DocumentError(f"its schema is {found!r} and {cls.FORMAT!r} is needed: {what} with `{cls.MAKE}`")
        inside = _documents(cls)
        read = {k: _read(v, inside[k]) if k in inside else v for k, v in content.items()}
        held = {k: v for k, v in read.items() if k != key and k not in cls.COMPUTED}
        return converted(_with_numbers(held, cls), cls)

    @classmethod
    def _completed(cls, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The schema of the fields, with its name and the computed properties."""
        computed = {}
        for key, name in cls.COMPUTED.items():
            hints = typing.get_type_hints(getattr(cls, name).fget, include_extras=True)
            computed[key] = msgspec.json.schema(hints["return"])
        return {
            **schema,
            "properties": {KEY: {"const": cls.FORMAT}, **computed, **schema["properties"]},
            "required": [KEY, *cls.COMPUTED, *schema.get("required", ())],
        }


def schema_of(content: object) -> Any:
    """What parsed JSON says that it is, as 'qdq.plan/2'; None where it says nothing.

    >>> schema_of({"schema": "qdq.plan/2"}), schema_of({"format": "qdq.plan/2"}), schema_of([])
    ('qdq.plan/2', 'qdq.plan/2', None)
    """
    return _named(content)[1]


def _named(content: object) -> tuple[str, Any]:
    """The key under which that stands, and its value."""
    key = OLD_KEY if isinstance(content, Mapping) and KEY not in content else KEY
    return key, content.get(key) if isinstance(content, Mapping) else None


def _documents(kind: type[Part]) -> dict[str, type[Document]]:
    """The fields that hold a document of its own, or several."""
    some = {f.name: (f.type, *typing.get_args(f.type)) for f in msgspec.structs.fields(kind)}
    pairs = ((name, found) for name, kinds in some.items() for found in kinds)
    return {name: found for name, found in pairs if isinstance(found, type) and issubclass(found, Document)}


T = typing.TypeVar("T")

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def byte_count(size: str) -> int:
    """Bytes of a size that a person wrote, such as 800M, 2G or 1.5GiB.

    >>> byte_count("2 GiB"), byte_count("0.5k")
    (2147483648, 500)

    Raises:
        ValueError: it is no size.
    """
    body = size.strip().lower().removesuffix("b")
    number = body.rstrip("kmgi ")
    count = float(number) * _UNITS.get(body[len(number) :].strip(), math.nan)
    if not 1 <= count < math.inf:
        raise ValueError(size)
    return int(count)


def replace(value: T, /, **changes: Any) -> T:
    """The same value with other fields, checked as a new one is; of a declared model or of a dataclass."""
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(value, **changes)
    changed: T = dataclasses.replace(value, **changes)  # type: ignore[type-var]
    return changed


@cache
def _fields(kind: type[Part]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The fields of a declared model; to resolve their annotations costs more than to check the values."""
    return msgspec.structs.fields(kind)


def check_fields(part: Part) -> None:
    """Refuse a value that is not of its field's type, which a constructor does not look at; lists become tuples.

    Raises:
        DocumentError: says which field is wrong, what is there and what is needed.
    """
    for field in _fields(type(part)):
        value = getattr(part, field.name)
        try:
            held = msgspec.convert(value, field.type)
        except UnicodeEncodeError:  # a byte of the command line that is no text
            raise DocumentError(f"{field.name} is {value!r}: it must be text in UTF-8") from None
        except msgspec.ValidationError as error:
            raise DocumentError(f"{field.name} is {value!r}: it must be {_needed(str(error), field.type)}") from None
        msgspec.structs.force_setattr(part, field.name, held)


def converted(values: object, kind: type[T]) -> T:
    """Plain values as a declared type.

    Raises:
        DocumentError: says which key is wrong, what is there and what is needed; names the nearest key.
    """
    try:
        return msgspec.convert(values, kind, str_keys=True)
    except msgspec.ValidationError as error:
        text = str(error)
        unknown = text.partition("unknown field `")[2].partition("`")[0]
        if unknown and issubclass(kind, msgspec.Struct):
            near = difflib.get_close_matches(unknown, kind.__struct_fields__, n=1)
            text += f": did you mean `{near[0]}`?" if near else ""
        raise DocumentError(text.replace("$.", "").replace("`$`", "the file")) from None


def _with_text(schema: Any) -> Any:
    """A schema in which a `Measured` number may be one of the three texts."""
    if isinstance(schema, list):
        return [_with_text(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_text(part) for key, part in schema.items()}
    texts = found.pop("x-not-finite", None)
    return {"anyOf": [found, {"enum": texts}]} if texts else found


_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text", "null": "none"}
_WORDS |= {"array": "a list", "object": "a mapping"}


def _needed(error: str, kind: Any) -> str:
    """What a field must be, in words, from msgspec's message and the bounds of its type.

    >>> _needed("Expected `float` > 50.0", Annotated[float, msgspec.Meta(gt=50, le=100)])
    'a number above 50 and at most 100'
    >>> _needed("Expected `int | str`, got `bool`", int | str)
    'a whole number or a text'
    >>> _needed("Invalid enum value 'yes'", bool | Literal["auto"])
    'true or false or auto'
    >>> _needed("Invalid enum value 'yes'", Literal["auto", "never"])
    'auto or never'
    """
    if error.startswith("Invalid enum value"):
        some = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
        parts = (get_args(part) or (_WORDS.get(part.__name__, part.__name__),) for part in some)
        return " or ".join(str(value) for values in parts for value in values)
    text, _, place = error.removeprefix("Expected ").partition(" - at ")
    if key := re.match(r"Object (contains unknown|missing required) field `(.*)`", text):
        return f"a mapping {'with' if key[1].startswith('m') else 'without'} the key {key[2]}"
    found, _, bound = text.partition(", got ")[0].partition("` ")
    words = " or ".join(_WORDS.get(name, name) for name in found.strip("`").split(" | "))
    limits = _bounds(kind) if place == "" else ""
    where = f", at {place.strip('`').removeprefix('$')}" if place else ""
    return words + (limits or f" {bound}" * bool(bound)) + where


def _bounds(kind: Any) -> str:
    """The bounds of a number in words, "" where there are none; what only keeps infinity out is none."""
    for part in typing.get_args(kind):
        if isinstance(part, msgspec.Meta):
            low, high = part.gt if part.ge is None else part.ge, part.le
            least = "" if low is None else f" above {low:g}" if part.ge is None else f" of at least {low:g}"
            if high is None or high >= 1e9:
                return least
            if part.ge is not None:
                return f" from {low:g} to {high:g}"
            return f"{least} and at most {high:g}" if least else f" of at most {high:g}"
        if found := _bounds(part):
            return found
    return ""


def _read(value: Any, kind: type[Document]) -> Any:
    """One document, each of a list, or none where a field has none."""
    if isinstance(value, list):
        return [kind.from_mapping(part) for part in value]
    return None if value is None else kind.from_mapping(value)


@cache
def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a declared model, by the names that are written."""
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _with_numbers(value: Any, kind: Any) -> Any:
    """A value of JSON, with the texts of `Measured` numbers that are not finite as numbers again."""
    if isinstance(value, str):
        texts = [m.extra_json_schema.get("x-not-finite", ()) for m in _metas(kind) if m.extra_json_schema]
        return float(value) if any(value in some for some in texts) else value
    if not isinstance(value, list | dict):
        return value
    for part in (kind, *get_args(kind)):
        if isinstance(value, dict) and isinstance(part, type) and issubclass(part, msgspec.Struct):
            known = _types(part)
            return {k: _with_numbers(v, known[k]) if k in known else v for k, v in value.items()}
        if isinstance(value, list) and get_origin(part) in (tuple, list):
            return [_with_numbers(v, get_args(part)[0]) for v in value]
        if isinstance(value, dict) and get_origin(part) is dict:
            return {k: _with_numbers(v, get_args(part)[1]) for k, v in value.items()}
    return value


def _metas(kind: Any) -> list[msgspec.Meta]:
    """What is said of a type, or of the types that it may be."""
    if get_origin(kind) is Annotated:
        return [m for m in get_args(kind)[1:] if isinstance(m, msgspec.Meta)]
    return [m for part in get_args(kind) for m in _metas(part)]


def _plain(value: Any) -> Any:
    """A value for JSON: whole documents inside it as they are alone, numbers that are not finite as text."""
    if isinstance(value, Document):
        return value.to_mapping()
    if isinstance(value, msgspec.Struct):
        short = value.__struct_config__.omit_defaults
        held = {field.name: (getattr(value, field.name), field.default) for field in msgspec.structs.fields(value)}
        return {name: _plain(found) for name, (found, default) in held.items() if not (short and found == default)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
