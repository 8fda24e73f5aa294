"""The docstrings under a dataclass's fields, which are the help texts of its flags."""

import ast
import functools
import inspect
import itertools
import textwrap


@functools.cache
def field_docs(config_type: type) -> dict[str, str]:
    """By field: the text under it, in one line; of base classes too."""
    docs: dict[str, str] = {}
    for owner in reversed(config_type.__mro__[:-1]):
        (body,) = [n.body for n in _module(owner) if isinstance(n, ast.ClassDef)]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                value = ast.literal_eval(text.value)
                docs[ast.unparse(field.target)] = " ".join(str(value).split())
    return docs


def _module(owner: type) -> list[ast.stmt]:
    return ast.parse(textwrap.dedent(inspect.getsource(owner))).body
