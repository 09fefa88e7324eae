"""Export a finished model for other tools, and verify the result before it is called done."""
