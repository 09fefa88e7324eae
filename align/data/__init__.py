"""From files to token rows: sources, formats, chat rendering, mixing, batching."""
