"""Pairs of UUIDs (Lost in the Middle, arXiv 2307.03172), looked up by opened chunks.

python benchmarks/opened_pairs.py --pairs 75 140 --texts 3 --keys 12

A text of pairs is read once and asked for many of its keys. What is measured of each key is kept as it comes, so a run
goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import json
import random
import uuid

from common import earlier, finish
from focusllm import FocusLLM

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--model", default="qwen2.5-coder-0.5b")
parser.add_argument("--pairs", type=int, nargs="*", default=[75, 140])
parser.add_argument("--texts", type=int, default=3)
parser.add_argument("--keys", type=int, default=12, help="asked for of each text")
parser.add_argument("--chunk-length", type=int, default=512)
parser.add_argument("--open", type=int, nargs="*", default=[1, 2], help="how many chunks are opened")
parser.add_argument("--output", default="opened_pairs")


def pairs_of(count: int, number: int) -> dict[str, str]:
    """Random pairs, the same every time."""
    draw = random.Random(1000 * count + number)
    one = (str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(2 * count))
    return {key: next(one) for key in one}


def main() -> None:
    """Measure, and keep what was measured."""
    arguments = parser.parse_args()
    llm = FocusLLM.from_pretrained(arguments.model, far_context="opened", chunk_length=arguments.chunk_length)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "pairs")}
    before = earlier(arguments.output)
    rows = before.get("rows", []) if before.get("settings") == settings else []
    known = {(row["pairs"], row["text"], row["place"]) for row in rows}
    for count in arguments.pairs:
        for number in range(arguments.texts):
            pairs = pairs_of(count, number)
            places = random.Random(number).sample(range(count), arguments.keys)
            todo = [place for place in places if (count, number, place) not in known]
            if not todo:
                continue
            text = json.dumps(pairs, indent=1)
            document = llm.read_text(f"JSON data:\n{text}\n", name="pairs.json")
            for place in todo:
                key, value = list(pairs.items())[place]
                row: dict[str, object] = {"pairs": count, "tokens": document.num_tokens, "text": number, "place": place}
                for opened in arguments.open:
                    llm.model.focus_config = llm.config.replace(open_tokens=opened * arguments.chunk_length)
                    question = f'Extract the value of the key "{key}" in the JSON data above.'
                    answer = llm.ask(document, question, max_new_tokens=48)
                    found = document.text.index(value)
                    cited = answer.citations[0].start <= found < answer.citations[0].end
                    row[str(opened)] = {"right": value in answer.text, "cited first": cited, "answer": answer.text}
                rows.append(row)
                print(row, flush=True)
                finish(arguments.output, {"settings": settings, "summary": summary(rows), "rows": rows}, quiet=True)
    print(json.dumps(summary(rows), indent=2))


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Right answers, by pairs and chunks opened."""
    told: dict[str, dict[str, float]] = {}
    for count in sorted({row["pairs"] for row in rows}):
        own = [row for row in rows if row["pairs"] == count]
        opened = [name for name in own[0] if name.isdigit()]
        told[f"{count} pairs"] = {
            "keys": len(own),
            **{f"right, {n} opened": sum(row[n]["right"] for row in own) / len(own) for n in opened},
            **{f"cited first, {n} opened": sum(row[n]["cited first"] for row in own) / len(own) for n in opened},
        }
    return told


if __name__ == "__main__":
    main()
