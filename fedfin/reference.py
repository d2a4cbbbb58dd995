"""A configuration's documentation, from its fields: annotated examples and the rows of docs/configuration.md."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel

__all__ = ["annotated", "reference", "section_of"]


def annotated(model: type[BaseModel], values: Mapping[str, Any], *, heading: str) -> str:
    """Return YAML text with every key of `model`, its description above it and its value or default.

    Args:
        model: The configuration's type.
        values: The values to write, nested like the model; other keys get their defaults, commented out where
            the default is "not given".
        heading: The first comment.
    """
    lines = [f"# {line}".rstrip() for line in heading.strip().splitlines()]
    lines += ["", *_annotate(model, values, indent=0)]
    return "\n".join(lines) + "\n"


def reference(model: type[BaseModel], *, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (key, type and range, default, description) for every key of `model`, nested keys dotted."""
    rows: list[tuple[str, str, str, str]] = []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        kind = "section" if section else _type_text(info.annotation) + _range_text(info.metadata)
        default = (
            "required"
            if info.is_required()
            else ("" if section else _scalar(info.get_default(call_default_factory=True)))
        )
        rows.append((f"{prefix}{name}", kind, default, info.description or ""))
        if section:
            rows += reference(section, prefix=f"{prefix}{name}.")
    return rows


def section_of(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  (a type expression)
    """Return the section that a field holds, or None for a plain value."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _annotate(model: type[BaseModel], values: Mapping[str, Any], *, indent: int) -> list[str]:
    pad = "  " * indent
    lines: list[str] = []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        lines += [f"{pad}# {line}" for line in _wrap(info.description or "", 100 - len(pad))]
        given = values.get(name)
        if section is not None and (
            given is not None or info.is_required() or info.default_factory is not None
        ):
            lines.append(f"{pad}{name}:")
            lines += _annotate(section, given or {}, indent=indent + 1)
        elif name in values:
            lines.append(f"{pad}{name}: {_scalar(given)}")
        else:
            default = info.get_default(call_default_factory=True)
            comment = "# " if default is None or info.is_required() else ""
            lines.append(
                f"{pad}{comment}{name}: {'' if default is None or info.is_required() else _scalar(default)}".rstrip()
            )
    return lines


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, float) and 0.0 < abs(value) < 1e-3:
        # YAML 1.1 reads 1e-05 as text: it wants the point.
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa)}e{int(exponent):+03d}"
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()


def _type_text(annotation: Any) -> str:  # noqa: ANN401  (a type expression)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(str(option) for option in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        return " or ".join(
            _type_text(option) for option in typing.get_args(annotation) if option is not type(None)
        )
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_text(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_text(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "map"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _range_text(metadata: list[Any]) -> str:
    signs = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= "}
    parts = [
        f"{sign}{bound:g}"
        for rule in metadata
        for key, sign in signs.items()
        if (bound := getattr(rule, key, None)) is not None
    ]
    return f", {', '.join(parts)}" if parts else ""
