"""Print the size of each section of profiler.py: its lines, its lines of code (no blanks,
comments, docstrings), and its tokens of code, of which an f-string is one.

python .ci/count_lines.py [FILE]
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def find_docstrings(source):
    """Return the numbers of the lines that contain docstrings."""
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node) is not None
    ]
    return {line for node in documented for line in range(node.lineno, node.end_lineno + 1)}


def find_tokens(source):
    """Return the first and the last line of each token of code."""
    docstrings, tokens = find_docstrings(source), []
    # Python 3.12 and later split an f-string into tokens, and the f-strings in it, too.
    starts = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, first, last = tokenize.tok_name[token.type], token.start[0], token.end[0]
        if kind == "FSTRING_START":
            starts.append(first)
        elif kind == "FSTRING_END":
            first = starts.pop()
        if not starts and kind not in LAYOUT and first not in docstrings:
            tokens.append((first, last))
    return tokens


def main():
    root = pathlib.Path(__file__).parent.parent
    source = pathlib.Path(*sys.argv[1:2] or [root / "profiler.py"]).read_text("utf-8")
    lines, tokens = source.splitlines(), find_tokens(source)
    code = {line for first, last in tokens for line in range(first, last + 1)}
    banners = [re.fullmatch("# -- (.+?) -+", line) for line in lines]
    starts = [1, *(number for number, banner in enumerate(banners, 1) if banner), len(lines) + 1]
    sections = zip(["head", *(banner[1] for banner in banners if banner)], starts, starts[1:])
    print(f"{'section':22} lines  code tokens")
    for name, start, end in [*sections, ("sum", 1, len(lines) + 1)]:
        size = sum(start <= line < end for line in code)
        count = sum(start <= first < end for first, _ in tokens)
        print(f"{name:22} {end - start:5} {size:5} {count:6}")


if __name__ == "__main__":
    main()
