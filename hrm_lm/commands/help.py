"""Help texts of the commands: a setting's docstring is the only place that says what the setting means."""

import ast
import inspect
import textwrap


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each annotated field of a class, by the field's name; no entry where there is no docstring.

    Python keeps no such docstrings, so they are read from the source. Raises OSError where the source is not there.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs
