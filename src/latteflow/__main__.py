"""``python -m latteflow``."""

from latteflow.cli.main import main

main()
