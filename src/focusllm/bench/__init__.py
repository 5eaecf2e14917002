"""`focusllm bench`: how fast and how large, by length, against what one would otherwise run."""
