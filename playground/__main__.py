"""`python -m playground "Once upon a time"`: writes to the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from playground import CheckpointError, EngineError, FinishEvent, RequestError, SamplingParams, load
from playground.arguments import add_model_arguments, model_options
from playground.engine.settings import SETTINGS
from playground.inspect.columns import read_columns, titles
from playground.inspect.fork import Alignment
from playground.inspect.run import Run
from playground.terminal import ended

EPILOG = """examples:
  python -m playground "Once upon a time"
  python -m playground "The old clock" --sampler multinomial --temperature 0.7 --top-p 0.9 --seed 3
  python -m playground "A fox met a hen." --sampler greedy --max-new-tokens 100 --json | jq .
  python -m playground compare "Once upon a time" --column sampler=greedy --column temperature=1.2
"""
COMPARE = """Continue a prompt under 2 to 4 settings at once, as rows of one batch, and say where and why they part.

A column is a list of SETTINGS and weights (fp8 or bf16), such as
temperature=1.2,top_p=0.9; what it does not name is gumbel at 0.8 without filters, on the weights as loaded. All columns
meet the same noise, of the first seed that a column names, unless --own-noise.
""".replace("SETTINGS", ", ".join(SETTINGS))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m playground",
        description="Continue a prompt with a block-scaled FP8 language model, streaming the text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="the text to continue, or with --chat the message to answer")
    parser.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, with --chat")
    parser.add_argument(
        "--skip-thinking", action="store_true", help="with --chat, where the template knows it: answer at once"
    )
    for name, setting in SETTINGS.items():
        kind = {"type": setting.kind} if not setting.choices else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=setting.help, **kind)
    parser.add_argument("--max-new-tokens", type=int, help="default 256, or what the context holds")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="write on past the end of a story")
    parser.add_argument(
        "--parse-special", action="store_true", help="<|im_start|> and its kin in the prompt are tokens, not text"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line per token; the last holds stats")
    add_model_arguments(parser)
    return parser.parse_args()


def show_text(event) -> None:
    print(event.text, end="", flush=True)
    if isinstance(event, FinishEvent):
        s = event.stats
        summary = (
            f"\n[{s.new_tokens} tokens, {s.finish_reason}; seed {s.seed}; prefill {s.prefill_rate:.0f} tokens/s, "
            f"decode {s.decode_rate:.1f} tokens/s, first token {s.ttft * 1000:.0f} ms]"
        )
        print(flush=True)
        print(summary.strip(), file=sys.stderr)


def show_json(event) -> None:
    if isinstance(event, FinishEvent):
        print(json.dumps({"text": event.text, "stats": asdict(event.stats)}), flush=True)
    else:
        line = {"index": event.index, "id": event.id, "text": event.text, "logprob": event.logprob}
        print(json.dumps(line), flush=True)


def start(playground, args: argparse.Namespace, params: SamplingParams, options: dict):
    if not args.chat:
        options |= {"parse_special": args.parse_special}
        return playground.stream(args.prompt, params, args.max_new_tokens, **options)
    messages = [{"role": "user", "content": args.prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    return playground.chat(messages, params, args.max_new_tokens, thinking=not args.skip_thinking, **options)


def parse_column(text: str) -> dict:
    """`temperature=1.2,seed=3` as a setting; numbers are numbers, the rest is checked with the request."""
    setting = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            setting[name.strip()] = int(value) if value.strip().lstrip("-").isdigit() else float(value)
        except ValueError:
            setting[name.strip()] = value.strip()
    return setting


def compare() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m playground compare", description=COMPARE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=VALUE,...", help="a setting; 2 to 4 times"
    )
    parser.add_argument("--own-noise", action="store_true", help="each column draws with a seed of its own")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--ignore-eos", action="store_true", help="write on past the end of a story")
    parser.add_argument("--json", action="store_true", help="one JSON object: columns, and the fork")
    add_model_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    try:
        params, forms = read_columns([parse_column(text) for text in args.column], not args.own_noise)
        with load(**model_options(args)) as playground:
            options = {"ignore_eos": args.ignore_eos, "inspect": True}
            streams = playground.compare(args.prompt, params, args.max_new_tokens, forms, **options)
            runs = [Run.of(stream, playground.tokenizer, args.prompt) for stream in streams]
            for run in runs:
                for event in run.stream:
                    run.add(event)
    except (RequestError, CheckpointError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_comparison(runs, args.json)
    return 0


def show_comparison(runs: list[Run], as_json: bool) -> None:
    found = Alignment(runs)
    found.update()
    fork, shared, names = found.fork, found.shared, titles(runs, whole=True)
    if as_json:
        columns = [
            {"setting": name, "text": run.text, "tokens": len(run.tokens)}
            for name, run in zip(names, runs, strict=True)
        ]
        print(json.dumps({"columns": columns, "fork": fork}))
        return
    for name, run in zip(names, runs, strict=True):
        print(f"--- {name}\n{run.prompt}{run.text}\n")
    if fork is None:
        print(found.note or f"All columns share their first {shared} tokens.")
        return
    print(f"They part at token {shared + 1}:")
    for name, column in zip(names, fork["columns"], strict=True):
        print(f"  {name}: {column['text']!r}, {column['why']}")


def main() -> int:
    if sys.argv[1:2] == ["compare"] and len(sys.argv) > 2:  # alone, the word is a prompt like any other
        return compare()
    args = parse_arguments()
    try:
        given = {name: getattr(args, name) for name in SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        SamplingParams(**given)  # a wrong value is told before the model is loaded
        with load(**model_options(args)) as playground:
            params = playground.params(**given)
            options = {"stop": tuple(args.stop), "ignore_eos": args.ignore_eos}
            with start(playground, args, params, options) as stream:
                for event in stream:
                    (show_json if args.json else show_text)(event)
    except (RequestError, CheckpointError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
