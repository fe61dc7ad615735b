"""``python -m raydml``: the commands of ``launch.py``, without a default study."""

from raydml.cli.main import main

if __name__ == "__main__":
    main()
