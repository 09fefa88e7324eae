"""Commands that run models outside a recipe's stages."""
