"""How threads wait for each other (OpenMP's wait policy): time of passes, alone and beside another busy process.

python benchmarks/wait_policy.py

Every turn is a process of its own, for the policy is read when torch is loaded. It multiplies by the matrices of 30
layers as wide as those of SmolLM2-135M: many tokens (reading), and one (decoding). The median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from common import finish

WORK = """
import json, time, torch
torch.set_grad_enabled(False)
wide, narrow = ([torch.randn(*shape) for _ in range(30)] for shape in ((1536, 576), (576, 1536)))
def layers(tokens, times):
    x, start = torch.randn(tokens, 576), time.perf_counter()
    for _ in range(times):
        for up, down in zip(wide, narrow):
            x = torch.nn.functional.linear(torch.nn.functional.silu(torch.nn.functional.linear(x, up)), down) / 50
    return (time.perf_counter() - start) / times
layers(64, 1)
print(json.dumps({"read": layers(256, 2), "token": layers(1, 20)}))
"""
POLICIES: dict[str, dict[str, str]] = {
    "as torch has it": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
}

parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
parser.add_argument("--rounds", type=int, default=3)
arguments = parser.parse_args()
environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}

turns: dict[str, list[dict[str, float]]] = {}
load = os.getloadavg()
for number in range(arguments.rounds):
    for beside in ("alone", "beside a busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside != "alone" else None
        try:
            for policy, added in POLICIES.items():
                command = [sys.executable, "-c", WORK]
                out = subprocess.run(command, env={**environment, **added}, capture_output=True, text=True, check=True)
                turns.setdefault(f"{policy}, {beside}", []).append(json.loads(out.stdout))
                print(number, policy, beside, turns[f"{policy}, {beside}"][-1], flush=True)
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()

result: dict[str, Any] = {
    name: {what: statistics.median(turn[what] for turn in found) for what in found[0]} for name, found in turns.items()
}
finish("wait_policy", {"load_before": load, "seconds": result, "turns": turns, "load_after": os.getloadavg()})
