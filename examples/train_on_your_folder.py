"""Train an adapter on a folder of your own text, with the embedded model, on a laptop's CPU.

    python examples/train_on_your_folder.py FOLDER [OUTPUT]

Stop it whenever you like; the same command goes on. The settings are examples/presets/laptop.toml.
"""

import sys
from pathlib import Path

from focusllm import TrainConfig, train


def report(entry: dict) -> None:
    """One line a step, with the losses by objective in nats a token."""
    found = entry.get("evaluation", entry)
    losses = "  ".join(f"{name} {values['loss']:.2f}" for name, values in found["objectives"].items())
    print(f"step {entry['step']:3d}{' held out' if 'evaluation' in entry else ''}: {losses}", flush=True)


def main() -> None:
    """Train, and say how to load what came of it."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, output = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "my-adapter"
    config = TrainConfig.from_file(Path(__file__).parent / "presets" / "laptop.toml", sources=[folder])
    adapter = train(config, output, report=report, notify=print)
    print(f'Load it with FocusLLM.from_pretrained("smollm2-135m", adapter="{adapter}"); the curve: {output}/loss.png.')


if __name__ == "__main__":  # processes that draw samples (`loaders`) import this file
    main()
