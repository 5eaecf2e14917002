"""Ask a document that comes with every Python: chapters of its language reference, or (SIZE=large) all 110,000 tokens.

    python examples/ask_long_document.py [QUESTION ...]

Reads it once with the default model and asks three questions whose right answers are known, or yours. Every answer is
streamed, and the sentences are shown that the model looked at as it wrote.
"""

import os
import sys
from pydoc_data.topics import topics

from focusllm import FocusLLM

CHAPTERS = (
    *("assert", "break", "calls", "class", "context-managers", "continue", "del", "else", "exceptions", "for"),
    *("function", "global", "if", "lambda", "nonlocal", "raise", "return", "try", "while", "with", "yield"),
)
QUESTIONS = {
    "When are default parameter values evaluated?": ("definition", "defined"),
    "Which exception does the raise statement raise when there is no active exception?": ("RuntimeError",),
    "Where may a yield expression be used?": ("generator",),
}


def main() -> int:
    """How many of the answers that are known were wrong."""
    chapters = sorted(topics) if os.environ.get("SIZE") == "large" else CHAPTERS
    llm = FocusLLM.from_pretrained(notify=print)
    text = "\n\n".join(topics[name] for name in chapters)
    document = llm.read(text, name="Python language reference", progress=True)
    print(f"Read {document.num_tokens:,} tokens in {len(document.chunks)} chunks and {document.read_seconds:.1f} s.")
    wrong = 0
    for question in sys.argv[1:] or QUESTIONS:
        print(f"\nQuestion: {question}\nAnswer:   ", end="")
        answer = llm.ask(document, question, max_new_tokens=64, on_text=lambda piece: print(piece, end="", flush=True))
        print("\nLooked at:")
        for citation in answer.citations[:3]:
            print(f"  {citation.weight:5.1%}  {' '.join(citation.text.split())[:100]}")
        if known := QUESTIONS.get(question):
            is_right = any(word in answer.text for word in known)
            wrong += not is_right
            print(
                f"Right: it says {' or '.join(known)}." if is_right else f"Wrong: the text says {' or '.join(known)}."
            )
        print(
            f"First token after {answer.time_to_first_token:.1f} s, then {answer.tokens_per_second:.1f} tokens/s; peak "
            f"memory {answer.peak_memory / 2**30:.2f} GiB"
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
