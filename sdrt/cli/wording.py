"""The library's messages in the words of the command line: where they name a field of `Request`, its option."""

import re
from functools import cache

import typer

# Where a message names a field by a word of everyday use, it does so first of all, or says what to do with it.
_NAMED = r"(?:^|(?<=leave )|(?<=give ))(?:{words})(?![\w/-]|\.\w)"
_SPELT = r"(?<![\w./\"'-])(?:{names}|(?:{words})(?==True))(?:=True)?(?![\w/-]|\.\w)"
_SIZE = re.compile(r"\bheight and width\b")


@cache
def field_options() -> dict[str, str]:
    """By field of `Request`, the option of `sdrt run` that fills it: its parameters have the fields' names."""
    from sdrt.cli.pictures import PICTURES
    from sdrt.cli.run import REQUEST_FIELDS, run

    app = typer.Typer()
    app.command()(run)
    options = {parameter.name: parameter.opts[0] for parameter in typer.main.get_command(app).params}
    return {field: options[field] for field in (*REQUEST_FIELDS, *PICTURES) if options[field].startswith("--")}


def in_options(text: str) -> str:
    """A message with options instead of fields."""
    pattern, options = _fields(), field_options()
    text = _SIZE.sub("--size", text)
    return pattern.sub(lambda found: options[found[0].removesuffix("=True")], text)


@cache
def _fields() -> re.Pattern[str]:
    fields = sorted(field_options(), key=len, reverse=True)
    words = "|".join(field for field in fields if "_" not in field)
    names = "|".join(field for field in fields if "_" in field)
    return re.compile(f"{_SPELT}|{_NAMED}".format(names=names, words=words))
