"""A griffe extension: what docstrings borrow from reStructuredText, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

RULE = r"[ ]*=+(?: +=+)+\n"


class Markdown(griffe.Extension):
    """Literal blocks, `text::`, and tables between lines of `===`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is None:
            return
        text = re.sub(r"::$", ":", obj.docstring.value + "\n", flags=re.MULTILINE)
        table = rf"^(?P<indent>[ ]*)(?P<table>=+(?: +=+)+\n(?:.*\n)*?{RULE}(?:.*\n)*?{RULE})"
        fence = r"\n\g<indent>```text\n\g<indent>\g<table>\g<indent>```\n"
        obj.docstring.value = re.sub(table, fence, text, flags=re.MULTILINE)
