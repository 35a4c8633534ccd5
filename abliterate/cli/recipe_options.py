"""The options of a recipe on the command line: a command says which it takes, and is given one ``Recipe``.

``@takes("find", "batch_size")`` gives a command all options of the table ``[find]``, and one of another table.  Each is
made from its field in ``abliterate.recipe``: flag, type and help text.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import show_note
from abliterate.data.methods import check_method
from abliterate.errors import UsageError
from abliterate.options import ADDITION, REMOVAL, Flag, Trait
from abliterate.recipe import SECTIONS, Recipe, load_recipe, option

R = TypeVar("R")
Given = Mapping[str, Any]
"""The values of the options that stand on the command line, by the names of their fields."""
RECEIVERS = ("recipe", "given")
"""The parameters of a command that are made from its options."""
FILE, METHOD, QUICK, ADD = "recipe_file", "method", "quick", "adding"


def takes(
    *wanted: str,
    leaving_out: Collection[str] = (),
    file: bool = False,
    method: bool = False,
    quick: bool = False,
    add: bool = False,
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command the options ``wanted``, which are names of tables or of single options.

    A parameter ``recipe`` of the command becomes the defaults, or with ``file`` the recipe of ``--recipe``, changed by
    what the flags say; a parameter ``given`` becomes what the flags say alone.  The options stand in their place.  With
    ``quick`` there is a flag for the recipe of that name, with ``method`` one for those of published methods, with
    ``add`` one for the edit that adds the direction.
    """
    names = [name for name in _offered(wanted) if name not in leaving_out]
    of_files = [_other_parameter(FILE, None, opt.RecipeFile)] * file
    of_files += [_other_parameter(METHOD, None, opt.Method)] * method
    of_files += [_other_parameter(QUICK, False, opt.Quick)] * quick
    of_files += [_other_parameter(ADD, False, opt.Add)] * add
    made = of_files + [_parameter(name) for name in names]

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        own = inspect.signature(command).parameters.values()
        place = next(index for index, its in enumerate(own) if its.name in RECEIVERS)
        kept, receives = [its for its in own if its.name not in RECEIVERS], {its.name for its in own}
        parameters = [*kept[:place], *made, *kept[place:]]

        @wraps(command)
        def wrapper(**arguments: Any) -> R:  # noqa: ANN401 - whatever the command takes
            read = {name: _read(name, arguments.pop(name)) for name in names}
            given = {name: value for name, value in read.items() if value is not None}
            source = _source(**{name: arguments.pop(name, None) for name in (FILE, METHOD, QUICK)})
            if "recipe" in receives:
                start = Recipe() if source is None else load_recipe(source, on_event=show_note)
                given |= _adding(given, start) if arguments.pop(ADD, False) else {}
                arguments["recipe"] = start.with_changes(given)
            if "given" in receives:
                arguments["given"] = given
            return command(**arguments)

        # what Typer reads, by inspect.signature and typing.get_type_hints
        wrapper.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {its.name: its.annotation for its in parameters}
        return wrapper

    return decorate


def flag_of(name: str) -> Flag:
    """How the option ``name`` is spelled, its flag filled in."""
    given = next((its for its in option(name).metadata if isinstance(its, Flag)), Flag())
    return Flag(given.name or "--" + name.replace("_", "-"), given.written)


def _offered(wanted: Collection[str]) -> Iterator[str]:
    for name in wanted:
        for each in SECTIONS[name].model_fields if name in SECTIONS else [name]:
            traits = option(each).metadata
            if Trait.FILE_ONLY in traits:
                if each == name:
                    raise ValueError(f"{name} stands in recipe files only")
            elif each == name or Trait.OF_PROCESSES not in traits:
                yield each


def _other_parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:  # noqa: ANN401
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _source(*, recipe_file: str | None, method: str | None, quick: bool | None) -> str | None:
    """The recipe to begin with.

    Raises:
        UsageError: two are named, or there is no such method.
    """
    named = {"--recipe": recipe_file, "--method": method, "--quick": QUICK if quick else None}
    flags = [flag for flag, name in named.items() if name is not None]
    if len(flags) > 1:
        raise UsageError(f"{flags[1]} is a recipe, and {flags[0]} names another", "give one of the two")
    if method is not None:
        check_method(method)
    return next((name for name in named.values() if name is not None), None)


def _adding(given: Given, start: Recipe) -> Given:
    """What ``--add`` says.

    Raises:
        UsageError: the flags or their recipe name another edit.
    """
    named = given.get("change") or start.edit.change
    if named != ADDITION and (named != REMOVAL or "change" in given):
        raise UsageError(f"--add adds the direction, and the edit {named!r} does not", "ask for one of the two")
    return {"change": ADDITION}


def _parameter(name: str) -> inspect.Parameter:
    field, flag, kind = option(name), flag_of(name).name, _type_on_the_command_line(name)
    if kind is bool and field.default:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    annotation = Annotated[kind | None, typer.Option(flag, help=field.description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _type_on_the_command_line(name: str) -> Any:  # noqa: ANN401 - a type, which may be generic
    """Text for what is checked or taken apart later; a repeatable flag for several words."""
    annotation = option(name).annotation
    if NoneType in get_args(annotation):
        (annotation,) = (its for its in get_args(annotation) if its is not NoneType)
    if flag_of(name).written or get_origin(annotation) is Literal:
        return str
    return list[str] if get_origin(annotation) is tuple else annotation


def _read(name: str, value: Any) -> Any:  # noqa: ANN401 - recipe values
    """The value of the option ``name`` as a recipe holds it; None: not given."""
    written = flag_of(name).written
    if value is None or value == []:
        return None
    if written == "size":
        return opt.parse_size(value)
    if written == "list":
        return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    return tuple(value) if isinstance(value, list) else value
