"""``python -m emflow`` is ``emflow``."""

from emflow.cli import main

main()
