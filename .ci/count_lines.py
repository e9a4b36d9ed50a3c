"""Print the lines and the lines of code (no blanks, comments, docstrings) of each
section of profiler.py.

python .ci/count_lines.py [FILE]
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def find_code(source):
    """Return the numbers of the lines that contain code."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = (
        range(token.start[0], token.end[0] + 1) for token in tokens if token.type not in LAYOUT
    )
    return set().union(*code) - docstrings


def main():
    path = pathlib.Path(
        sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "profiler.py"
    )
    source = path.read_text()
    lines, code = source.splitlines(), find_code(source)
    starts = {1: "head"}
    for number, line in enumerate(lines, 1):
        if banner := re.match(r"# -- (.+?) -+$", line):
            starts[number] = banner[1]
    ends = [*list(starts)[1:], len(lines) + 1]
    print(f"{'section':22} lines  code")
    for (start, name), end in zip(starts.items(), ends):
        print(f"{name:22} {end - start:5} {sum(start <= number < end for number in code):5}")
    print(f"{'sum':22} {len(lines):5} {len(code):5}")


if __name__ == "__main__":
    main()
