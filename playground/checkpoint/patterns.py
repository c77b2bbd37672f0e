"""Regular expressions that a file brings along: which of them could keep a machine busy without end."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\.|\[\^?\]?|[\]()|*+?]|\{\d*,?\d*\}", re.DOTALL)


def may_never_end(pattern: str) -> bool:
    """Whether it repeats a group that itself repeats or chooses, such as `(a+)+`: matching can then take time that
    doubles with every character. No tokenizer that we know needs one."""
    groups, classes, risky = [False], 0, -1  # whether each open group repeats or chooses; where one has just ended
    for found in _TOKEN.finditer(pattern):
        token = found[0]
        if token[0] == "\\":
            continue
        if token[0] == "[":
            classes += 1
        elif token == "]":
            classes = max(classes - 1, 0)
        elif classes:
            continue
        elif token == "(":
            groups.append(False)
        elif token == ")":
            inner = groups.pop() if len(groups) > 1 else False
            groups[-1] |= inner
            risky = found.end() if inner else -1
        elif token == "|":
            groups[-1] = True
        elif token not in ("?", "{1}"):
            if found.start() == risky:
                return True
            groups[-1] = True
    return False
