"""The library's messages in the words of the command line: where they name a field of `Request`, its option."""

import re
from collections.abc import Collection
from functools import cache

import typer

# Where a message names a field by a word of everyday use, it says first of all what it is, or what to do with it.
_SAID = r"(?='s |,? (?:is|has|lists|names|makes|means|grows|goes|and|or|of)\b)"
_NAMED = rf"(?:^(?:{{words}}){_SAID}|(?:(?<=leave )|(?<=give ))(?:{{words}})(?![\w/-]|\.\w))"
_SPELT = r"(?<![\w./\"'-])(?:{names}|(?:{words})(?==True))(?:=True)?(?![\w/-]|\.\w)"
_SIZE = r"\bheight and width\b"
_QUOTED = r"""(?<!\w)(?:'[^']*'|"[^"]*")(?!\w)"""


@cache
def field_options() -> dict[str, str]:
    """By field of `Request`, the option of `sdrt run` that fills it: its parameters have the fields' names."""
    from sdrt.cli.pictures import PICTURES
    from sdrt.cli.run import REQUEST_FIELDS, run

    app = typer.Typer()
    app.command()(run)
    options = {parameter.name: parameter.opts[0] for parameter in typer.main.get_command(app).params}
    return {field: options[field] for field in (*REQUEST_FIELDS, *PICTURES) if options[field].startswith("--")}


def in_options(text: str, given: Collection[str] = ()) -> str:
    """A message with options instead of fields. Quotations and the arguments `given` stay as they are."""
    arguments = sorted({re.escape(word) for word in given if len(word) > 1}, key=len, reverse=True)
    kept = "|".join([_QUOTED, *arguments])
    options = field_options() | {"height and width": "--size"}
    return re.sub(
        f"(?P<kept>{kept})|{_SIZE}|{_fields()}",
        lambda found: found[0] if found["kept"] else options[found[0].removesuffix("=True")],
        text,
    )


@cache
def _fields() -> str:
    fields = sorted(field_options(), key=len, reverse=True)
    words = "|".join(field for field in fields if "_" not in field)
    names = "|".join(field for field in fields if "_" in field)
    return f"{_SPELT}|{_NAMED}".format(names=names, words=words)
