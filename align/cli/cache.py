"""List and remove stores of tokenized rows and copies of data at URLs (docs/scale.md)."""

from typing import Annotated

import typer

from align.core.text import visible


def cache(
    clean: Annotated[bool, typer.Option("--clean", help="remove every store and copy")] = False,
) -> None:
    """List or remove the stored tokenized rows of large data sources, and data from URLs."""
    from align.data.reading import remote
    from align.data.store import folder

    place = folder.cache_folder()
    if clean:
        typer.echo(visible(f"{place}: {_mib(folder.clean())} removed"))
        typer.echo(visible(f"{remote.downloads()}: {_mib(remote.clean())} removed"))
        return
    stores = folder.stores()
    for path, meta, size in stores:
        of = f"{meta['rows']:,} rows of {meta['source']}" if "rows" in meta else "a comparison"
        typer.echo(visible(f"{path.name[:12]}  {_mib(size):>12}  {of}"))
    total = sum(size for _, _, size in stores)
    typer.echo(visible(f"{place}: {len(stores)} stores, {_mib(total)}"))
    typer.echo(visible(f"{remote.downloads()}: copies of data at URLs, {_mib(remote.size())}"))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
