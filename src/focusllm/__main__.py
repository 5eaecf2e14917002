"""`python -m focusllm`."""

from focusllm.cli import main

main()
