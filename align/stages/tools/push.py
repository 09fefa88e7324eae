"""Push a model to the Hugging Face Hub, or list what would be uploaded."""

import argparse
import sys
from pathlib import Path

from align.core.errors import EXIT_OK, AlignError
from align.core.text import visible
from align.export.push import Upload, check_repo, plan_push, push
from align.export.source import find_place

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_of(num_bytes: int) -> str:
    """Return a number of bytes with its unit."""
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def listing(uploads: list[Upload], left_out: list[str]) -> list[str]:
    """Return one line per file with its size, and the names that are not uploaded."""
    lines = [f"{size_of(upload.size):>10}  {upload.name}" for upload in uploads]
    total = size_of(sum(upload.size for upload in uploads))
    lines.append(f"{total:>10}  in {len(uploads)} files")
    return lines + ([f"not uploaded: {', '.join(left_out)}"] if left_out else [])


def main() -> None:
    """Push the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference")
    parser.add_argument("repo")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision")
    parser.add_argument("--message", default="Upload by align push")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    try:
        check_repo(args.repo)
        uploads, left_out = plan_push(find_place(args.reference, args.runs))
        lines = listing(uploads, left_out)
        if not args.dry_run:
            given = {"private": args.private, "revision": args.revision, "message": args.message}
            lines.append(f"{args.repo}: {push(uploads, args.repo, **given)}")
    except AlignError as error:
        sys.stderr.write(visible(f"{error}\n"))
        sys.exit(error.exit_code)
    sys.stdout.write(visible("\n".join(lines) + "\n"))
    sys.exit(EXIT_OK)


if __name__ == "__main__":
    main()
