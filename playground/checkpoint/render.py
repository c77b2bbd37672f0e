"""Renders one chat template in a process of its own: a file on disk says what runs here, so it gets no more than text,
jinja2's sandbox, two seconds of one core and half a gigabyte. Run by `chat.py`; knows nothing of ours.

Reads JSON `{"template", "variables"}` from standard input; writes JSON `{"text"}` or `{"error"}`.
"""

import json
import sys
from datetime import datetime

SECONDS, MEMORY, LONGEST = 2, 512 << 20, 4_000_000


def limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not POSIX: the caller's own time limit remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, variables: dict) -> str:
    """The rendered text. The environment is what transformers gives a chat template."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only holds its body."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    parts, length = [], 0
    for part in environment.from_string(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise TemplateError(f"it writes more than {LONGEST} characters")
    return "".join(parts)


def main() -> None:
    sys.path[:0] = sys.argv[1:]
    import jinja2.sandbox  # noqa: F401

    request = json.load(sys.stdin)
    limit_resources()
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY >> 20} MB"}
    except Exception as error:  # whatever a template can raise is its own fault, and the caller's sentence
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
