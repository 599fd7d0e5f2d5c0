"""``python -m lightning_adaptive``, the same as ``lightning-adaptive``."""

from lightning_adaptive.app.cli import main

if __name__ == "__main__":
    main()
