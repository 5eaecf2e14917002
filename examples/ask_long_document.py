"""Ask the Python language reference (about 110,000 tokens), which comes with every Python.

    python examples/ask_long_document.py [QUESTION]

Reads it once with the embedded model, streams the answer, and says where it was looked for and what it cost.
"""

import sys
from pydoc_data.topics import topics

from focusllm import FocusLLM

question = " ".join(sys.argv[1:]) or "What does the with statement do?"
reference = "\n\n".join(topics[name] for name in sorted(topics))

llm = FocusLLM.from_pretrained("smollm2-135m", notify=print)
document = llm.read(reference, name="Python language reference", progress=True)
print(f"Read {document.num_tokens:,} tokens in {len(document.chunks)} chunks and {document.read_seconds:.1f} s.")
if not llm.has_trained_candidates:
    print("Note: candidate projections are untrained; the answer comes from the model more than from the document.")

for number, asked in enumerate([question, "How are default values of parameters evaluated?"]):
    print(f"\nQuestion: {asked}\nAnswer:   ", end="")
    answer = llm.ask(document, asked, max_new_tokens=48, on_text=lambda piece: print(piece, end="", flush=True))
    print("\n\nLooked for in:")
    for citation in answer.citations[:3]:
        passage = " ".join(citation.text.split())[:80]
        print(f"  {citation.weight:5.1%}  characters {citation.start:,}-{citation.end:,}: {passage}...")
    waited = answer.time_to_first_token + (document.read_seconds if number == 0 else 0)
    print(
        f"First token after {waited:.1f} s{' (reading included)' if number == 0 else ''}, then "
        f"{answer.tokens_per_second:.1f} tokens/s; peak memory {answer.peak_memory / 2**30:.2f} GiB"
    )
