"""A YAML file into a pydantic model, once: unknown and repeated keys refused, a wrong value named with its mend."""

from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedfin.errors import ConfigError
from fedfin.reference import section_of

__all__ = ["load_config", "parse_yaml"]


ModelT = TypeVar("ModelT", bound=BaseModel)


def load_config(path: Path, model: type[ModelT], *, without: Collection[str] = ()) -> ModelT:
    """Read and check a configuration file.

    Args:
        path: A YAML file.
        model: The pydantic model it must fit.
        without: Sections that are not looked at, as if the file did not have them.

    Raises:
        ConfigError: Names the file, every wrong key, the value seen and the mend.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        msg = f"{path} does not exist; give the path of the file with --config"
        raise ConfigError(msg) from error
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}"
        raise ConfigError(msg) from error
    return parse_yaml(text, model, origin=str(path), without=without)


def parse_yaml(text: str, model: type[ModelT], *, origin: str, without: Collection[str] = ()) -> ModelT:
    """Parse YAML text into `model`; `origin` names it in errors, `without` as in `load_config`.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader that refuses repeated keys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        msg = f"{where}: {problem}; mend the YAML there"
        raise ConfigError(msg) from error
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors, on a value such as 2024-13-45 or `!!int x`: no place is known.
        msg = f"{origin} holds a value that YAML cannot read ({error}); put texts between quotes"
        raise ConfigError(msg) from error
    if not isinstance(data, dict):
        msg = f"{origin} does not hold keys and values; start from the example that `fedfin` writes"
        raise ConfigError(msg)
    try:
        return model.model_validate({key: data[key] for key in data if key not in without})
    except ValidationError as error:
        problems = [_explain(detail, model) for detail in error.errors(include_url=False)]
        msg = f"{origin}: " + "; ".join(problems)
        # from None: the original would print the values it was given.
        raise ConfigError(msg) from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    problem="a key is a list or a mapping (braces in a text need quotes)",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is given twice; keep one", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "the file"
    info = _field_at(model, detail["loc"])
    about = f" ({info.description})" if info is not None and info.description else ""
    match detail["type"]:
        case "missing":
            return f"{key} is missing; add it{about}"
        case "extra_forbidden":
            known = ", ".join(_keys_at(model, detail["loc"][:-1]))
            return f"{key} is not a key of this release; remove it or mend its spelling (known here: {known})"
        case _:
            value = detail["input"]
            shown = (
                repr(value) if isinstance(value, int | float | str | bool | None) else type(value).__name__
            )
            if "url" in key or len(shown) > 80:
                shown = "the value given"
            message = detail["msg"].removeprefix("Value error, ")
            said = f"{key} is {shown}" if isinstance(value, int | float | str | bool | None) else key
            return f"{said}: {message[:1].lower()}{message[1:]}{about}"


def _field_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Any:  # noqa: ANN401  (pydantic's FieldInfo)
    info = None
    section: type[BaseModel] | None = model
    for part in location:
        if section is None or not isinstance(part, str) or part not in section.model_fields:
            return info
        info = section.model_fields[part]
        section = section_of(info.annotation)
    return info


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        info = model.model_fields.get(str(part))
        section = section_of(info.annotation) if info else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)
