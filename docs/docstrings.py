"""Lets mkdocstrings read our docstrings: ``Example:`` is a section, and ``[branch,]`` an optional dim and no link."""

import re

import griffe

_CODE_OR_OPTIONAL = re.compile(r"``.*?``|`.*?`|\[(\w+,)\]")


def _escape(match: re.Match[str]) -> str:
    return rf"\[{match[1]}\]" if match[1] else match[0]


class Docstrings(griffe.Extension):
    """Rewrites the text before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _CODE_OR_OPTIONAL.sub(_escape, text)
