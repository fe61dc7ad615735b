"""The front door: ``uv run launch.py`` runs the default study, ``uv run launch.py --help`` lists the rest."""

from pathlib import Path

from raydml.cli.main import main

if __name__ == "__main__":
    main(default_space=Path(__file__).parent / "search_spaces" / "glyphs.yaml")
