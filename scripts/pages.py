"""Write the generated pages: the tables of docs/import.md. Usage: python scripts/pages.py"""

from pathlib import Path

from align.recipe.foreign.convert import markdown

ROOT = Path(__file__).resolve().parents[1]
IMPORT_PAGE = ROOT / "docs" / "import.md"


def import_page() -> str:
    """Return docs/import.md: its own text, and the tables of the converters."""
    text = IMPORT_PAGE.read_text(encoding="utf-8")
    own = text.partition("\n## ")[0].rstrip()
    return f"{own}\n\n{markdown()}"


if __name__ == "__main__":
    IMPORT_PAGE.write_text(import_page(), encoding="utf-8")
